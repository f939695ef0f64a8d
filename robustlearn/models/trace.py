"""Networks recorded as they run, in normal form.

A module is run once, on one sample, and every operation that torch then carries out below its
Python surface is looked up in one list: affine, or one of three activations, or a composition of
these. What is not in the list raises, by name; nothing is taken to be affine on trust. Branches on
values, conversions to other libraries and random numbers are refused too.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from robustlearn._tensor import is_out_of_memory
from robustlearn.errors import InputError
from robustlearn.models.graph import ACTIVATIONS, MOVES, Network, Node, Ref

__all__ = ["ACTIVATIONS", "Network", "trace"]

aten = torch.ops.aten
REALS = (torch.float32, torch.float64)
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
