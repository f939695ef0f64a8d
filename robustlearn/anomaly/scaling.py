"""Maps that bring features to a common scale, learnt from normal rows; all differentiable."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from robustlearn.threats import LpBall

KNOTS = 200  # quantiles that a map by ranks keeps
WIDEST = 10.0  # a range counts up to this many times the spread of the central 98%
END = 4.0  # normal score of the least and the largest value
FARTHEST = 1e300  # a row beyond it is as far as it: infinity has no neighbours

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Affine:
    """x ↦ (x − shift) / divisor, feature by feature."""

    shift: Tensor
    divisor: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows (n, d)."""
        return ((x - self.shift) / self.divisor).clamp(-FARTHEST, FARTHEST)


def plain(x: Tensor) -> Affine:
    """Return the map that leaves every feature as it is."""
    return Affine(torch.zeros_like(x[0]), torch.ones_like(x[0]))


def standard(x: Tensor) -> Affine:
    """x ↦ (x − mean) / standard deviation; a constant feature is divided by 1."""
    return Affine(*_moments(x))


def by_range(x: Tensor) -> Affine:
    """x ↦ (x − min) / range, the range cut at 10 times that of the central 98% of the values.

    The cut keeps huge outliers among the normal rows, up to 1% on each side and at least one, from
    hiding the feature; a feature that is constant but for 2% of the rows, such as a rare flag, has
    its full range.
    """
    outside = min(0.5, max(0.01, 1 / (len(x) - 1)))
    low, high = quantiles(x, torch.tensor([outside, 1 - outside], dtype=torch.float64))
    least, span = x.amin(0), x.amax(0) - x.amin(0)
    cut = torch.where(high > low, torch.minimum(span, WIDEST * (high - low)), span)
    return Affine(torch.maximum(least, high - cut), _or_one(cut))


@dataclass(frozen=True)
class ByRank:
    """x ↦ ½Φ⁻¹(F(x)) + ½asinh((x − median) / spread), feature by feature.

    F is the distribution of the normal rows on 200 quantiles, linear between them, Φ⁻¹ cut at ±4.
    The first part undoes any monotone transformation of a feature; the second still grows where
    the first has ended, beyond the normal rows.
    """

    knots: Tensor  # (d, k), non-decreasing
    levels: Tensor  # (d, k): normal scores at the knots
    centre: Affine

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows (n, d)."""
        columns, values = x.T.contiguous(), self.knots
        right = torch.searchsorted(values, columns.detach()).clamp(1, values.shape[1] - 1)
        below, above = (values.gather(1, i) for i in (right - 1, right))
        low, high = (self.levels.gather(1, i) for i in (right - 1, right))
        share = ((columns - below) / _or_one(above - below)).clamp(0, 1)
        return 0.5 * (low + share * (high - low)).T + 0.5 * torch.asinh(self.centre(x))


def by_rank(x: Tensor) -> ByRank:
    """Learn a `ByRank` from normal rows (n, d)."""
    shares = torch.linspace(0, 1, min(KNOTS, max(2, len(x))), dtype=x.dtype, device=x.device)
    knots = quantiles(x, shares).T.contiguous()
    scores = (math.sqrt(2) * torch.erfinv(2 * shares - 1)).clamp(-END, END)
    first, last = (torch.searchsorted(knots, knots, right=side) for side in (False, True))
    sums = functional.pad(scores.cumsum(0), (1, 0))
    levels = (sums[last] - sums[first]) / (last - first)  # equal knots share their mean
    levels[knots == knots[:, :1]] = -END
    levels[(knots == knots[:, -1:]) & (knots > knots[:, :1])] = END
    spread = by_range(x)
    held = x.clamp(spread.shift, spread.shift + spread.divisor)
    centre = Affine(quantiles(x, torch.tensor([0.5]))[0], _moments(held)[1])
    return ByRank(knots, levels, centre)


def quantiles(x: Tensor, shares: Tensor) -> Tensor:
    """Return the quantiles of each column, linear between ranks: (n, d), (k,) -> (k, d)."""
    ordered = x.sort(0).values  # torch.quantile refuses more than 2²⁴ numbers
    place = shares.to(x) * (len(x) - 1)
    below = place.floor().long()
    above = (below + 1).clamp_max(len(x) - 1)
    return ordered[below].lerp(ordered[above], (place - below)[:, None])


def reach(scaling: Map, x: Tensor, threat: LpBall, p: float) -> Tensor:
    """Bound ‖scaling(x + δ) − scaling(x)‖_p over the threat, (n,).

    Features rise by themselves, hence the norm of what each one may do alone; after an affine map
    with divisors c also ε·‖scale/c‖_r, with r = ∞ where the threat's norm is at most p, and
    1/r = 1/p − 1/p_threat where it is more (Hölder).
    """
    here = scaling(x)
    low, high = (scaling(end) for end in threat.span(x))
    alone = torch.maximum(high - here, here - low).norm(p, dim=1)
    if not isinstance(scaling, Affine):
        return alone
    unit = torch.ones_like(x[0]) if threat.scale is None else torch.as_tensor(threat.scale).to(x)
    gain = (unit if threat.mask is None else unit * threat.mask.to(x)) / scaling.divisor
    r = torch.inf if threat.p <= p else 1 / (1 / p - 1 / threat.p)
    together = torch.as_tensor(threat.eps).to(x) * gain.expand_as(x).norm(r, dim=1)
    return torch.minimum(alone, together)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each column, 1 for 0.

    Both are computed in units of a power of 2 near the largest value: squares neither overflow nor
    vanish.
    """
    _, exponent = torch.frexp(x.abs().amax(0))
    unit = torch.ldexp(torch.ones_like(x[0]), exponent.clamp(-1000, 1000))
    scaled = x / unit
    return scaled.mean(0) * unit, _or_one(scaled.std(0, correction=0) * unit)


def _or_one(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))


SCALINGS: dict[str, Callable[[Tensor], Map]] = {
    "none": plain,
    "standard": standard,
    "range": by_range,
    "rank": by_rank,
}
