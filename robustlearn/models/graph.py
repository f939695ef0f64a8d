"""Networks in normal form: affine maps between ReLU, tanh and sigmoid, as they were recorded."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustlearn.errors import InputError

aten = torch.ops.aten
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
        if node.function.__name__ in MOVES:  # they keep the order of the ends
            low, high = (
                self._value(node, {**self.constants, **{j: span[j][side] for j in node.parents}})
                for side in (0, 1)
            )
            return _unless_overflown(low, high)
        centre = {j: (span[j][0] + span[j][1]) / 2 for j in node.parents}
        radius = {j: span[j][1] - centre[j] for j in node.parents}
        middle = self._value(node, {**self.constants, **centre})
        reach = self._value(node, {**self.constants, **radius}, abs, _nothing)
        return _unless_overflown(middle - reach, middle + reach)

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


def _unless_overflown(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Replace ends that are no numbers: what overflows proves nothing."""
    inf = math.inf
    return low.nan_to_num(-inf, -inf, -inf), high.nan_to_num(inf, inf, inf)


def _nothing(value: Tensor) -> Tensor:
    return value * 0


def _parts(arguments: Any) -> Iterator[Any]:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            yield from _parts(argument)
        else:
            yield argument
