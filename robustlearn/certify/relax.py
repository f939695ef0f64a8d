"""Linear bounds of activations, and how they go backward through a network.

For l ≤ z ≤ u each activation lies between two lines; a row g·a of its output is then at least
g⁺·(lower line) + g⁻·(upper line), a row of its input, and so on down to the network's own input,
where the threat's support function gives the least value. That is CROWN (Zhang et al., 2018); with
the slopes below a ReLU optimised, α-CROWN (Xu et al., 2021); with multipliers β ≥ 0 of signs that
are given, β-CROWN (Wang et al., 2021).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.models.graph import Network
from robustlearn.threats import LpBall

Span = tuple[Tensor, Tensor]
Span_of = dict[int, Span]
NARROW = 1e-5  # intervals on which a chord's slope would be rounding


@dataclass(frozen=True)
class Lines:
    """Lines under and over an activation, slopes and intercepts (n, 1, *z); None for 0."""

    under: Tensor
    over: Tensor
    above: Tensor
    below: Tensor | None = None

    def rows(self, owner: Tensor) -> "Lines":
        """Return the lines of some samples, one a row."""
        under, over, above = (
            line.index_select(0, owner) for line in (self.under, self.over, self.above)
        )
        below = None if self.below is None else self.below.index_select(0, owner)
        return Lines(under, over, above, below)


class Region:
    """Points x (n, *shape) and what may be added to them.

    For a ball of p = ∞ with its box the support function is that of an interval; of all others
    it is the threat's own, exact with box, mask and scale.

    Attributes
    ----------
    box : the least and largest value of each coordinate, (n, 1, *shape) each.
    is_box : whether all that lies between them is allowed.
    """

    def __init__(self, x: Tensor, threat: LpBall, box: Span | None = None) -> None:
        self.x, self.threat = x, threat
        if box is None:
            low, high = threat.span(x)
            box = low[:, None], high[:, None]
        self.box = box
        self.is_box = type(threat) is LpBall and math.isinf(threat.p)

    def select(self, owner: Tensor) -> "Region":
        """Return the region of some samples, one a row."""
        x, low, high = (part.index_select(0, owner) for part in (self.x, *self.box))
        return Region(x, self.threat.select(owner), (low, high))

    def least(self, slope: Tensor, offset: Tensor) -> Tensor:
        """Return min of slope·x' + offset over the region of each row, (r,).

        slope is (r, 1, *shape), offset (r,); a region of one sample is that of all rows. −∞ for
        coefficients that are no numbers.
        """
        least = self._least(slope, offset)  # a coefficient that is no number makes it none: 0·∞
        return torch.where(least.isfinite(), least, -torch.inf)

    def _least(self, slope: Tensor, offset: Tensor) -> Tensor:
        if self.is_box:
            low, high = self.box
            negative = slope.clamp(max=0)
            least = negative * high + (slope - negative) * low
            return least.flatten(1).sum(1) + offset
        direction, x = slope.squeeze(1), self.x.expand(len(slope), *self.x.shape[1:])
        ball, fixed = self._of(len(slope)), -direction.detach()
        least = (flat(direction) * flat(x)).sum(1) + offset - ball.support(fixed, x)
        if direction.requires_grad:  # the derivative of a support function is where it is attained
            least = least + (flat(direction + fixed) * flat(ball.argmax(fixed, x))).sum(1)
        return least

    def corner(self, slope: Tensor) -> Tensor:
        """Return where that minimum is attained, (r, *shape)."""
        x = self.x.expand(len(slope), *self.x.shape[1:])
        return x + self._of(len(slope)).argmax(-slope.squeeze(1).detach(), x)

    def _of(self, rows: int) -> LpBall:
        """Return the threat with a budget for each row."""
        alone = len(self.x) == 1
        return self.threat.select(torch.zeros(rows, dtype=torch.long)) if alone else self.threat


def relu_lines(low: Tensor, high: Tensor, alpha: Tensor | None = None) -> Lines:
    """α·z ≤ ReLU(z) ≤ u/(u−l)·(z − l), for any 0 ≤ α ≤ 1; exact where the sign is known.

    Without α, 1 where u > −l, else 0: the smaller triangle.
    """
    on, off = low >= 0, high <= 0
    slope = high / torch.where(on | off, 1, high - low)  # no 0/0: its derivative would be NaN
    fixed = torch.where(on, 1.0, 0.0).to(low.dtype)
    over = torch.where(on | off, fixed, slope)
    alpha = (high > -low).to(low.dtype) if alpha is None else alpha
    under = torch.where(on | off, fixed, alpha)
    return Lines(under, over, torch.where(on | off, 0, -low * slope))


def curve_lines(kind: str, low: Tensor, high: Tensor) -> Lines:
    """Lines under and over tanh or sigmoid: convex below 0, concave above.

    Over: the chord where the curve is steeper at u than the chord; else the tangent at the middle
    where l ≥ 0, or the one from (l, f(l)), its point of contact found from the safe side by
    bisection. Under: the same of −f(−z) = f, up to a constant. On narrow intervals the smallest
    slope at the ends: f(z) − s·z then rises.
    """
    curve, derivative = CURVES[kind]
    over, above = _line_over(curve, derivative, low, high)
    offset = 1.0 if kind == "sigmoid" else 0.0  # f(−z) = offset − f(z)
    under, mirrored = _line_over(curve, derivative, -high, -low)
    below = offset - mirrored
    flattest = torch.minimum(derivative(low), derivative(high))
    narrow = high - low < NARROW
    return Lines(
        torch.where(narrow, flattest, under),
        torch.where(narrow, flattest, over),
        torch.where(narrow, curve(high) - flattest * high, above),
        torch.where(narrow, curve(low) - flattest * low, below),
    )


def _line_over(
    curve: Callable[[Tensor], Tensor], derivative: Callable[[Tensor], Tensor], low: Tensor,
    high: Tensor,
) -> Span:  # fmt: skip
    chord = (curve(high) - curve(low)) / (high - low)
    near, far = low.clamp(min=0), high.clamp(min=0)  # the point of contact lies between
    for _ in range(40):
        middle = (near + far) / 2
        beyond = curve(middle) + derivative(middle) * (low - middle) >= curve(low)
        near, far = torch.where(beyond, near, middle), torch.where(beyond, middle, far)
    contact = torch.where(low >= 0, (low + high) / 2, far)
    tangent = derivative(contact)
    by_chord = (high <= 0) | (derivative(high) >= chord)
    slope = torch.where(by_chord, chord, tangent)
    through = torch.where(by_chord, low, contact)
    return slope, curve(through) - slope * through


CURVES: Mapping[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "sigmoid": (torch.sigmoid, lambda z: torch.sigmoid(z) * torch.sigmoid(-z)),
}


def lines(
    network: Network, spans: Span_of, slopes: Mapping[int, Tensor] | None = None
) -> dict[int, Lines]:
    """Return the lines of every activation whose bounds are given."""
    slopes = slopes or {}
    found = {}
    for i in network.activations:
        if i in spans:
            kind, (low, high) = network.nodes[i].kind, spans[i]
            relu = kind == "relu"
            found[i] = (
                relu_lines(low, high, slopes.get(i)) if relu else curve_lines(kind, low, high)
            )
    return found


def backward(
    network: Network,
    target: int,
    rows: Tensor,
    relaxed: Mapping[int, Lines],
    shifts: Mapping[int, Tensor] | None = None,
    gains: dict[int, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """rows·z ≥ slope·x + offset for all x of a region, z what enters ``target`` or comes out.

    Parameters
    ----------
    target : number of an activation, or of the output.
    rows : (n, *z); relaxed : the lines of each row's own region, by activation.
    shifts : β·s of the signs s that are given, subtracted from the coefficients of what enters.
    gains : is filled with what each line over an activation costs a row, ≤ 0.

    Returns
    -------
    slope (n, 1, *shape) and offset (n,).
    """
    coefficients: dict[int, Tensor] = {}
    offset = torch.zeros(len(rows), dtype=rows.dtype, device=rows.device)

    def through(segment: int, row: Tensor) -> None:
        nonlocal offset
        affine = network.segments[segment]
        offset = offset + row.flatten(1) @ affine.offset.flatten()
        for source, part in zip(affine.sources, affine.pull(row), strict=True):
            known = coefficients.get(source)
            coefficients[source] = part if known is None else known + part

    through(target, rows)
    for i in reversed(network.activations):
        if i not in coefficients:
            continue
        g, line = coefficients.pop(i), relaxed[i]
        negative = g.clamp(max=0)
        positive = g - negative
        cost = negative * line.above
        if gains is not None:
            gains[i] = cost.detach()
        if line.below is not None:
            cost = cost + positive * line.below
        offset = offset + cost.flatten(1).sum(1)
        g = torch.addcmul(positive * line.under, negative, line.over)
        through(i, g if shifts is None or i not in shifts else g - shifts[i])
    return coefficients[0], offset
