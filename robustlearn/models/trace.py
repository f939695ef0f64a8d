"""Networks in normal form: affine maps between ReLU, tanh and sigmoid, recorded as they run.

A module is run once, on one sample, and every operation that torch then carries out below its
Python surface is looked up in one list: affine, or one of three activations, or a composition of
these. What is not in the list raises, by name; nothing is taken to be affine on trust. Branches on
values, conversions to other libraries and random numbers are refused too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from robustlearn._tensor import is_out_of_memory
from robustlearn.errors import InputError

aten = torch.ops.aten
REALS = (torch.float32, torch.float64)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
# Selections, orders and means: linear, no offset, coefficients ≥ 0.
MOVES = """view _unsafe_view reshape permute transpose t unsqueeze squeeze expand slice select
alias clone cat stack index_select mean sum avg_pool1d avg_pool2d avg_pool3d
_adaptive_avg_pool2d _adaptive_avg_pool3d constant_pad_nd reflection_pad1d reflection_pad2d
replication_pad1d replication_pad2d repeat flip roll upsample_nearest2d im2col pixel_shuffle
select_scatter slice_scatter""".split()
AWAKE = 10  # standard deviations by which rounding may wake a neuron
PRODUCTS = ("mm", "mv", "bmm", "addmm", "baddbmm")
# What each leading argument is to the value: a term is added, of the factors one may depend on x.
ROLES = {
    **dict.fromkeys(MOVES, ("term",)),
    "select_scatter": ("term", "term"),
    "slice_scatter": ("term", "term"),
    "add": ("term", "term"),
    "mul": ("factor", "factor"),
    "div": ("factor", "divisor"),
    "mm": ("factor", "factor"),
    "mv": ("factor", "factor"),
    "bmm": ("factor", "factor"),
    "addmm": ("term", "factor", "factor"),
    "baddbmm": ("term", "factor", "factor"),
    "convolution": ("factor", "factor", "term"),
}
KNOWN = (
    "linear layers, convolutions, batch normalisation in evaluation mode, average and max pooling, "
    "reshapes, sums, and ReLU, leaky ReLU, PReLU, clamp, maximum, abs, tanh and sigmoid"
)


Spans = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Ref:
    """The value of another node, as an argument."""

    node: int


@dataclass(frozen=True, eq=False)
class Node:
    """One operation on one sample.

    ``kind`` is ``"input"``, ``"constant"``, ``"affine"`` or the name of an activation; ``parents``
    are the arguments that depend on the input. The value of a node with a ``hull`` is the largest
    of the values of those nodes.
    """

    kind: str
    shape: tuple[int, ...]
    function: Callable[..., Any] = aten.alias
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    parents: tuple[int, ...] = ()
    roles: tuple[str, ...] = ()
    hull: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Affine:
    """z = Σⱼ Wⱼ aⱼ + c of one sample: from the input and activations to one value.

    ``pull`` is (n, *z) ↦ one (n, *aⱼ) for each source, the rows times Wⱼ; ``offset`` is c.
    ``simple`` tells that interval arithmetic is exact: at most one operation adds up.
    """

    sources: tuple[int, ...]
    pull: Callable[[Tensor], Sequence[Tensor]]
    offset: Tensor
    simple: bool


class Network:
    """A recorded network with its constants in one dtype.

    Attributes
    ----------
    nodes : in the order of computation; ``output`` is the number of the last one.
    activations : numbers of the nodes that are not affine; the input is node 0.
    width : numbers in the largest value.
    unit : unit roundoff of the least precise type in which the module computes.
    """

    def __init__(
        self, nodes: list[Node], output: int, dtype: torch.dtype, unit: float = 0.0
    ) -> None:
        self.nodes, self.output, self.dtype, self.unit = nodes, output, dtype, unit
        self.activations = [i for i, node in enumerate(nodes) if node.kind in ACTIVATIONS]
        self.width = max(math.prod(n.shape) for n in nodes if n.kind != "constant")
        self.bind()

    def bind(self, live: bool = False) -> None:
        """Compute all that depends on weights alone, anew; if ``live``, derivable by them.

        What is made of weights is computed in their own dtype, as the module does it.

        Raises
        ------
        InputError naming the operation that takes NaN or infinity from the weights.
        """
        made: dict[int, Any] = {}
        with torch.set_grad_enabled(live):
            for i, node in enumerate(self.nodes):
                if node.kind == "constant":
                    value = self._value(node, made)
                    made[i] = value if live else value.detach()
            self.constants: dict[int, Tensor] = {i: self._cast(v) for i, v in made.items()}
            self._check_finite()
            self.segments = {i: self._segment(self._before(i)) for i in self._targets()}

    def _check_finite(self) -> None:
        for node in self.nodes:
            for part in _parts(node.arguments) if node.kind != "constant" else ():
                value = self.constants.get(part.node) if isinstance(part, Ref) else part
                numbers = torch.as_tensor(value if isinstance(value, Tensor | float) else 0.0)
                if not bool(numbers.isfinite().all()):
                    raise InputError(
                        f"{node.function.__name__} takes NaN or infinity from a weight or constant "
                        f"of shape {tuple(numbers.shape)}: such outputs cannot be bounded; mend "
                        "the weights of the network"
                    )

    @property
    def is_shallow(self) -> bool:
        """Whether every activation sees the input through affine maps alone."""
        return all(self.segments[i].sources == (0,) for i in self.activations)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the outputs (n, K) of points (n, *shape)."""
        return torch.vmap(self._forward, randomness="error")(x[:, None]).squeeze(1)

    def intervals(
        self, low: Tensor, high: Tensor, known: dict[int, tuple[Tensor, Tensor]]
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Bound what enters each activation, and the output, by interval arithmetic.

        Parameters
        ----------
        low, high : (n, 1, *shape) of the input.
        known : bounds of the same kind that are to be intersected with.

        Returns
        -------
        by number of the activation, and of the output, (n, 1, *) lower and upper bounds.
        """
        return dict(torch.vmap(self._intervals)(low, high, known))

    def rounding(self, low: Tensor, high: Tensor, unit: float) -> Tensor:
        """Return the standard deviation, at most, of what rounding does to an output, (n,).

        k terms are added up with an error of u·√k·(|W||z| + |c|), z as large as intervals allow;
        errors are taken to be independent and of mean zero, so that their variances go on as
        v ↦ W²v (Higham and Mary, 2019). A ReLU that sleeps on its whole interval passes none.

        Parameters
        ----------
        low, high : (n, 1, *shape) of the input; unit : u, the unit roundoff.
        """
        found = torch.vmap(lambda a, b: self._variance(a, b, unit))(low, high)
        return found.flatten(1).amax(1).sqrt()

    def _targets(self) -> list[int]:
        return [*self.activations, self.output]

    def _before(self, i: int) -> int:
        """Return the node whose bounds are asked for: what enters an activation, or the output."""
        return self.nodes[i].parents[0] if i != self.output else i

    def _forward(self, x: Tensor) -> Tensor:
        values = {**self.constants, 0: x}
        for i, node in enumerate(self.nodes):
            if i not in values:
                values[i] = self._value(node, values)
        return values[self.output].reshape(1, -1)

    def _intervals(self, low: Tensor, high: Tensor, known: Any) -> Any:
        span, entering = self._spans(low, high, known)
        return {**entering, self.output: span[self.output]}

    def _spans(self, low: Tensor, high: Tensor, known: Any) -> tuple[Spans, Spans]:
        """Return the bounds of every value, and of what enters each activation."""
        span, entering = {0: (low, high)}, {}
        for i, node in enumerate(self.nodes[1:], start=1):
            if node.kind == "affine":
                span[i] = self._spread(node, span)
            elif node.kind != "constant":
                low, high = span[node.parents[0]]
                if i in known:
                    low, high = torch.maximum(low, known[i][0]), torch.minimum(high, known[i][1])
                entering[i] = low, high
                span[i] = ACTIVATIONS[node.kind](low), ACTIVATIONS[node.kind](high)
        return span, entering

    def _spread(self, node: Node, span: Spans) -> tuple[Tensor, Tensor]:
        """f(centre) ± |f|(radius), |f| with the sizes of all factors and no constant terms."""
        if node.hull:
            (a, b), (c, d) = (span[j] for j in node.hull)
            return torch.maximum(a, c), torch.maximum(b, d)
        centre = {j: (span[j][0] + span[j][1]) / 2 for j in node.parents}
        radius = {j: (span[j][1] - span[j][0]) / 2 for j in node.parents}
        middle = self._value(node, {**self.constants, **centre})
        reach = self._value(node, {**self.constants, **radius}, abs, _nothing)
        low, high = middle - reach, middle + reach
        sure = low.isfinite() & high.isfinite()  # what overflows proves nothing
        return torch.where(sure, low, -torch.inf), torch.where(sure, high, torch.inf)

    def _variance(self, low: Tensor, high: Tensor, unit: float) -> Tensor:
        span, entering = self._spans(low, high, {})
        size = {i: torch.maximum(-a, b) for i, (a, b) in span.items()}
        found = {0: torch.zeros_like(low)}
        for i, node in enumerate(self.nodes[1:], start=1):
            if node.kind == "affine" and node.hull:
                found[i] = torch.maximum(*(found[j] for j in node.hull))
            elif node.kind == "affine":
                passed = self._value(node, {**self.constants, **found}, torch.square, _nothing)
                whole = self._value(node, {**self.constants, **size}, abs, abs)
                found[i] = passed + self._terms(node) * (unit * whole) ** 2
            elif node.kind == "relu":
                given = found[node.parents[0]]
                found[i] = torch.where(entering[i][1] > -AWAKE * given.sqrt(), given, 0)
            elif node.kind != "constant":
                found[i] = found[node.parents[0]] + unit**2
        return found[self.output]

    def _value(
        self, node: Node, values: dict[int, Tensor], factors: Any = None, terms: Any = None
    ) -> Any:
        """Carry out an operation; constant factors and terms are replaced by functions of them."""

        def filled(argument: Any, role: str | None) -> Any:
            if isinstance(argument, list | tuple):
                return [filled(part, role) for part in argument]
            fixed = not isinstance(argument, Ref) or self.nodes[argument.node].kind == "constant"
            if isinstance(argument, Ref):
                argument = values[argument.node]
            if role and isinstance(argument, Tensor):  # integers and masks become numbers here
                argument = argument.to(self.dtype)
            if not (factors and fixed and role and isinstance(argument, Tensor | int | float)):
                return argument
            number = torch.as_tensor(argument, dtype=self.dtype)
            return terms(number) if role == "term" else factors(number)

        roles = node.roles + (None,) * len(node.arguments)
        arguments = [filled(a, r) for a, r in zip(node.arguments, roles, strict=False)]
        options = {key: filled(value, None) for key, value in node.options.items()}
        if factors and node.function is aten.constant_pad_nd:
            arguments = arguments[:2]
        return node.function(*arguments, **options)

    def _cast(self, value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(self.dtype) if floating else value

    def _segment(self, target: int) -> Affine:
        order: list[int] = []
        sources: set[int] = set()

        def visit(i: int) -> None:
            if self.nodes[i].kind != "affine":
                sources.add(i)
            elif i not in order:
                for parent in self.nodes[i].parents:
                    visit(parent)
                order.append(i)

        visit(target)
        chosen = tuple(sorted(sources))

        def function(*inputs: Tensor) -> Tensor:
            values = {**self.constants, **dict(zip(chosen, inputs, strict=True))}
            for i in order:
                values[i] = self._value(self.nodes[i], values)
            return values[target].clone()

        zeros = [self._cast(torch.zeros(self.nodes[i].shape, device=self._device)) for i in chosen]
        offset, pull = torch.func.vjp(function, *zeros)[:2]
        passed = [self.nodes[i] for i in order]
        adding = sum(self._terms(node) > 1 or len(node.parents) > 1 for node in passed)
        return Affine(chosen, torch.vmap(pull), offset, len(chosen) == 1 and adding <= 1)

    def _terms(self, node: Node) -> int:
        """How many numbers that depend on the input are added up, or rounded, for one of these."""
        name, shape = node.function.__name__, self.nodes[node.parents[0]].shape
        if name == "convolution":
            weight = self.nodes[node.arguments[1].node].shape
            transposed = node.arguments[6]
            return math.prod(weight[2:]) * weight[0 if transposed else 1]
        if name in PRODUCTS:
            return self.nodes[node.arguments["add" in name].node].shape[-1]
        if name in ("mean", "sum") or "pool" in name:
            return math.prod(shape) // max(1, math.prod(node.shape)) + 1
        return 0 if name in MOVES and name != "alias" else len(node.parents)

    @property
    def _device(self) -> torch.device:
        return next((v.device for v in self.constants.values()), torch.device("cpu"))


def trace(
    function: Callable[[Tensor], Tensor], example: Tensor, dtype: torch.dtype = torch.float64
) -> Network:
    """Record a network that computes on batches.

    Parameters
    ----------
    function : a module in evaluation mode, or what calls one.
    example : (n, *shape) in the dtype of the module; the first sample is run.
    dtype : in which the recorded network computes; its weights are those of the module.

    Raises
    ------
    InputError naming the first operation that is not known, and for a network whose path depends
    on values, that is random, or whose output does not come from its input.

    Examples
    --------
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> network = trace(net, torch.zeros(1, 2))
    >>> [network.nodes[i].kind for i in network.activations]
    ['relu']
    """
    example = example[:1].detach().clone()
    recorder = _Recorder(example)
    try:
        with torch.no_grad(), _NoEscape(), recorder:
            output = torch.func.functionalize(function)(example)
    except InputError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the network cannot be recorded on one sample of shape {tuple(example.shape[1:])}: "
            f"{type(error).__name__}: {error}. Is it in evaluation mode, by .eval(), and made of "
            f"torch operations alone? Known are {KNOWN}"
        ) from error
    last = recorder.numbers.get(id(output)) if isinstance(output, Tensor) else None
    if last is None or recorder.nodes[last].kind == "constant":
        raise InputError(
            "the output of the network does not depend on its input, as far as torch "
            "can see: it cannot be bounded"
        )
    if recorder.nodes[last].kind != "affine":  # an output node of its own
        node = recorder.nodes[last]
        recorder.nodes.append(
            Node("affine", node.shape, aten.alias, (Ref(last),), {}, (last,), ("term",))
        )
        last = len(recorder.nodes) - 1
    return Network(recorder.nodes[: last + 1], last, dtype, recorder.unit)


class _NoEscape(TorchFunctionMode):
    """Refuses what would take values out of torch's sight; pooling of rows becomes that of images.

    Torch does so too, but below the surface and with indices, which are not recorded.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("numpy", "tolist", "__array__", "data_ptr", "item"):
            raise _refusal(f"Tensor.{name}")
        if name == "max_pool1d":
            return _pooled(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Files every operation that depends on the input, or on weights alone, as a node."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler takes seconds

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.nodes = [Node("input", tuple(example.shape))]
        self.numbers = {id(example): 0}
        self.alive = [example]  # so that no two values share an id
        self.unit = torch.finfo(example.dtype).eps / 2

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        name = func.overloadpacket.__name__
        parents = self._parents((args, tuple(options.values())))
        if not parents:
            if torch.Tag.nondeterministic_seeded in func.tags:
                raise _refusal(name, "it is random")
            return self._file("constant", func, func(*args, **options), args, options)
        if func.namespace != "aten":
            raise _refusal(f"{func.namespace}::{name}")
        if name in COMPOSED and (options or name not in ROLES):
            with self:
                return COMPOSED[name](self, *args, **options)
        output = func(*args, **options)
        self._check_type(name, func, output)
        if name in ACTIVATIONS:
            return self._file(name, func.overloadpacket, output, args, {}, parents)
        if name in ("_to_copy", "detach"):  # neither changes the values, but for rounding
            return self._file("affine", aten.alias, output, args, {}, parents, ("term",))
        self._check(name, func, args, options)
        kept = {k: v for k, v in options.items() if k != "dtype"}
        return self._file("affine", func.overloadpacket, output, args, kept, parents, ROLES[name])

    def _check_type(self, name: str, func: Any, output: Any) -> None:
        if name == "view" and func._overloadname == "dtype":
            raise _refusal(name, "it reads the bits of a number as another type")
        if isinstance(output, Tensor) and output.dtype not in REALS:
            raise _refusal(name, f"it gives {output.dtype}")
        if isinstance(output, Tensor):
            self.unit = max(self.unit, torch.finfo(output.dtype).eps / 2)

    def _check(self, name: str, func: Any, args: Any, options: dict[str, Any]) -> None:
        roles = ROLES.get(name)
        if roles is None or "mode" in func._overloadname or self._parents(options.values()):
            raise _refusal(name)
        if name in ("addmm", "baddbmm") and options:
            raise _refusal(name, f"with {', '.join(options)}")
        if name.startswith("avg_pool") and any(divisor and divisor < 0 for divisor in args[6:]):
            raise _refusal(name, "its divisor is negative")
        depending = [
            role
            for role, argument in zip(roles, args, strict=False)
            if role != "term" and self._parents((argument,))
        ]
        if len(depending) > 1 or "divisor" in depending or self._parents(args[len(roles) :]):
            raise _refusal(name, "both of what it combines depend on the input")

    def _parents(self, arguments: Any) -> tuple[int, ...]:
        found: list[int] = []
        for argument in arguments:
            if isinstance(argument, list | tuple):
                found += self._parents(argument)
            elif isinstance(argument, Tensor) and id(argument) in self.numbers:
                number = self.numbers[id(argument)]
                found += [] if self.nodes[number].kind == "constant" else [number]
        return tuple(dict.fromkeys(found))

    def _file(
        self,
        kind: str,
        function: Any,
        output: Any,
        args: Any,
        options: dict[str, Any],
        parents: tuple[int, ...] = (),
        roles: tuple[str, ...] = (),
    ) -> Any:
        if not isinstance(output, Tensor):
            if kind != "constant":
                raise _refusal(function.__name__, "it gives several values")
            return output
        if id(output) in self.numbers:  # an operation that returns its argument
            return output
        arguments = self._refs(args)
        named = dict(zip(options, self._refs(options.values()), strict=True))
        node = Node(kind, tuple(output.shape), function, arguments, named, parents, roles)
        self.numbers[id(output)] = len(self.nodes)
        self.nodes.append(node)
        self.alive.append(output)
        return output

    def depends(self, argument: Any) -> bool:
        """Tell whether an argument depends on the input."""
        return bool(self._parents((argument,)))

    def _refs(self, arguments: Any) -> tuple[Any, ...]:
        found: list[Any] = []
        for argument in arguments:
            if isinstance(argument, list | tuple):
                found.append(list(self._refs(argument)))
            elif isinstance(argument, Tensor) and id(argument) in self.numbers:
                found.append(Ref(self.numbers[id(argument)]))
            elif isinstance(argument, Tensor):
                found.append(Ref(self._keep(argument)))
            else:
                found.append(argument)
        return tuple(found)

    def _keep(self, tensor: Tensor) -> int:
        """File a weight, a buffer or another tensor that no operation made."""
        self.numbers[id(tensor)] = len(self.nodes)
        self.nodes.append(Node("constant", tuple(tensor.shape), lambda: tensor))
        self.alive.append(tensor)
        return len(self.nodes) - 1

    def larger(self, a: Tensor, b: Any) -> Tensor:
        """max(a, b) = b + ReLU(a − b), remembered as a maximum."""
        result = b + torch.relu(a - b)
        hull = [self.numbers.get(id(part)) for part in (a, b)]
        number = self.numbers[id(result)]
        node = self.nodes[number]
        both = [j for j in hull if j is not None and self.nodes[j].kind != "constant"]
        if len(both) == 2:
            self.nodes[number] = Node(
                node.kind, node.shape, node.function, node.arguments, node.options,
                tuple(dict.fromkeys((*node.parents, *both))), node.roles, tuple(both),
            )  # fmt: skip
        return result


def _nothing(value: Tensor) -> Tensor:
    return value * 0


def _parts(arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _parts(argument)
        else:
            yield argument


def _refusal(name: str, why: str = "") -> InputError:
    return InputError(
        f"the network uses {name}{', and ' + why if why else ''}, which cannot be bounded here; "
        f"known are {KNOWN}"
    )


def _batch_norm(
    recorder: _Recorder, x: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any
) -> tuple[Any, ...]:
    *_, training, _, eps = (None, *rest) if len(rest) == 3 else (None, False, *rest)
    if training or mean is None:
        raise _refusal("batch normalisation", "it depends on the batch: call .eval()")
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = [1, -1, *[1] * (x.dim() - 2)]
    return x * scale.reshape(shape) + shift.reshape(shape), scale.new_empty(0), scale.new_empty(0)


def _pooled(
    x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False, return_indices: bool = False,
) -> Tensor:  # fmt: skip
    """Maxima over windows of rows."""
    if return_indices:
        raise _refusal("max_pool1d", "with indices")
    given, fills = (kernel_size, stride or kernel_size, padding, dilation), (1, 1, 0, 1)
    size, stride, padding, dilation = (
        (fill, *(one if isinstance(one, list | tuple) else [one]))
        for fill, one in zip(fills, given, strict=True)
    )
    rows = x.unsqueeze(-2)
    return functional.max_pool2d(rows, size, stride, padding, dilation, ceil_mode).squeeze(-2)


def _max_pool(
    recorder: _Recorder, x: Tensor, size: Any, stride: Any = (), padding: Any = 0,
    dilation: Any = 1, ceil_mode: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Maxima over windows; what lies in the padding is replaced by another pixel of the window."""
    if ceil_mode:
        raise _refusal("max_pool2d", "with ceil_mode")
    height, width = x.shape[-2:]
    pixels = torch.arange(1.0, height * width + 1, dtype=torch.float64).reshape(1, 1, height, width)
    windows = functional.unfold(pixels, size, dilation, padding, stride or size)[0].long() - 1
    windows = torch.where(windows < 0, windows.amax(0), windows)
    shape = functional.max_pool2d(pixels, size, stride or None, padding, dilation).shape[-2:]
    flat = x.reshape(*x.shape[:-2], height * width)
    parts = [flat.index_select(-1, window) for window in windows.to(x.device)]
    while len(parts) > 1:
        pairs = zip(parts[::2], parts[1::2], strict=False)
        odd = parts[-1:] if len(parts) % 2 else []
        parts = [recorder.larger(a, b) for a, b in pairs] + odd
    return parts[0].reshape(*x.shape[:-2], *shape), None


def _clamped(recorder: _Recorder, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    x = x if low is None else _at_least(recorder, x, low)
    return x if high is None else -_at_least(recorder, -x, -high)


def _at_least(recorder: _Recorder, x: Tensor, low: Any) -> Tensor:
    """max(x, low), entry by entry; −∞ in ``low`` leaves x as it is."""
    if recorder.depends(low):
        return recorder.larger(x, low)
    if not isinstance(low, Tensor):
        if low == -math.inf:
            return x
        return torch.relu(x - low) + low if low else torch.relu(x)
    free = low == -torch.inf
    floor = torch.where(free, 0, low)
    risen = torch.relu(x - floor)
    if not bool(free.any()):
        return risen + floor
    return x * free + (risen + floor) * ~free


def _leaky(recorder: _Recorder, x: Tensor, slope: Any = 0.01) -> Tensor:
    return x * slope + torch.relu(x) * (1 - slope)


def _copied(recorder: _Recorder, x: Tensor, other: Tensor, non_blocking: bool = False) -> Tensor:
    same = other.dtype == x.dtype
    return (other if same else aten._to_copy(other, dtype=x.dtype)).expand(x.shape)


COMPOSED: dict[str, Callable[..., Any]] = {
    "native_batch_norm": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "max_pool2d_with_indices": _max_pool,
    "leaky_relu": _leaky,
    "_prelu_kernel": _leaky,
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": lambda recorder, x, high: _clamped(recorder, x, None, high),
    "hardtanh": lambda recorder, x, low=-1.0, high=1.0: _clamped(recorder, x, low, high),
    "maximum": lambda recorder, a, b: recorder.larger(a, b),
    "minimum": lambda recorder, a, b: -recorder.larger(-a, -b),
    "abs": lambda recorder, x: torch.relu(x) + torch.relu(-x),
    "add": lambda recorder, a, b, alpha=1: a + b * alpha,
    "copy": _copied,
    "neg": lambda recorder, x: x * -1.0,
    "sub": lambda recorder, a, b, alpha=1: a + b * -alpha,
    "rsub": lambda recorder, x, other, alpha=1: x * -alpha + other,
}
