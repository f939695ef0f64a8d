"""Why a row is flagged: the nearest point that the detector accepts, found by attacking it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robustlearn.anomaly.scaling import by_range
from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError
from robustlearn.models import Model, wrap
from robustlearn.threats import LpBall

if TYPE_CHECKING:
    from robustlearn.anomaly.base import Detector

STEPS = 40
HALVINGS = 20
MARGIN = 1e-9  # of a typical score: rounding depends on the batch that a row travels in
FAR = 1e3  # ranges within which an accepted point is looked for

Accepts = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Explanation:
    """The change that makes a flagged row accepted.

    Attributes
    ----------
    accepted : (d,) the accepted point.
    distance : ‖accepted − row‖_p, in units of the range of each feature.
    features : of those that had to change the number, value before and value after, in the
        order of how much, in ranges.
    """

    accepted: NDArray[np.float64]
    distance: float
    features: list[tuple[int, float, float]]


def explained(detector: "Detector", rows: NDArray[np.float64], p: float) -> list[Any]:
    """Explain the flagged ones of rows (n, d); see `Detector.explain`."""
    if p not in (1, 2):
        raise InputError(f"p must be 1 (few features change) or 2; got {p!r}")
    model, flagged = wrap(detector), detector._scores(rows) < detector.offset_
    found: list[Any] = [None] * len(rows)
    if not flagged.any():
        return found
    x = torch.from_numpy(rows[flagged])
    normal = detector.rows_
    unit = by_range(normal).divisor
    accepts = functools.partial(_accepted, model, _margin(detector))
    goal = _accepted_row(model, x, normal, unit, p, _margin(detector))
    point = _restored(accepts, x, _nearest(model, accepts, x, goal, unit, p), unit)
    distances = ((point - x) / unit).norm(p, dim=1)
    right = (detector._scores(point.numpy()) >= detector.offset_) & distances.isfinite().numpy()
    numbers = np.flatnonzero(flagged)
    for number, row, other, distance in zip(
        numbers[right], x[right], point[right], distances[right], strict=True
    ):
        order = ((other - row) / unit).abs().argsort(descending=True).tolist()
        changed = [(j, float(row[j]), float(other[j])) for j in order if row[j] != other[j]]
        found[number] = Explanation(other.numpy(), float(distance), changed)
    return found


def _margin(detector: "Detector") -> float:
    """Return by how much a decision must be above 0 to be so for sure."""
    typical = float(np.median(np.abs(detector.calibration_)))
    return MARGIN * max(abs(detector.offset_), typical)


def _nearest(
    model: Model, accepts: Accepts, x: Tensor, goal: Tensor, unit: Tensor, p: float
) -> Tensor:
    """Return the nearer of what a minimal-norm attack finds and the way to the goal."""
    threat = LpBall(p, FAR, scale=unit)
    flagged = torch.zeros(len(x), dtype=torch.long)
    attacked = ATTACKS["fmn"].function(model, x, flagged, threat, steps=STEPS)
    walked = _walked(accepts, x, goal)
    far = [((point - x) / unit).norm(p, dim=1) for point in (attacked, walked)]
    better = accepts(attacked) & ((far[0] < far[1]) | ~accepts(walked))
    return torch.where(better[:, None], attacked, walked)


def _accepted_row(
    model: Model, x: Tensor, normal: Tensor, unit: Tensor, p: float, margin: float
) -> Tensor:
    """Return for each row the nearest normal row that is accepted; else the best that there is."""
    decision = _decision(model, normal)
    inside = normal[decision >= min(margin, float(decision.max()))]
    return inside[torch.cdist(x / unit, inside / unit, p=p).argmin(1)]


def _walked(accepts: Accepts, x: Tensor, goal: Tensor) -> Tensor:
    """Return the accepted point nearest to x that bisection finds on the way to the goal."""
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.ones(len(x), 1, dtype=x.dtype)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        good = accepts(x.lerp(goal, middle))[:, None]
        low, high = torch.where(good, low, middle), torch.where(good, middle, high)
    return torch.where(high < 1, x.lerp(goal, high), goal)


def _restored(accepts: Accepts, x: Tensor, point: Tensor, unit: Tensor) -> Tensor:
    """Put features back to what they were, the least changed first, as long as that is accepted."""
    order = ((point - x) / unit).abs().argsort(1)
    for column in order.T:
        tried = point.scatter(1, column[:, None], x.gather(1, column[:, None]))
        point = torch.where(accepts(tried)[:, None], tried, point)
    return point


def _accepted(model: Model, margin: float, x: Tensor) -> Tensor:
    return _decision(model, x) >= margin


def _decision(model: Model, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)[:, 1]
