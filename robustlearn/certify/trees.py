"""Ensembles of trees: a bound from the leaves within reach, and the exact worst case."""

import math
import time

import numpy as np
from torch import Tensor

from robustlearn._leaves import (
    Aim,
    Array,
    Least,
    Space,
    bound,
    distances,
    least,
    prediction,
    rivals,
    safe_distance,
)
from robustlearn._tensor import flat
from robustlearn.certify.base import CERTIFICATES, Certificate, classified, interval
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.models.trees import Trees
from robustlearn.threats import LpBall

SOME = 256  # trees: of more, fewer boxes where no clock is kept
BOXES = 4_000  # a sample, for the worst case and as many for the radius: a tenth of a second
GROWTH = 1.25  # of ε, while no adversarial point is known
TOLERANCE = 1e-3  # relative, of a radius where it is not the distance of a leaf


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    return model.trees is not None and type(threat) is LpBall


def _within(model: Model, x: Tensor, threat: LpBall, y: Tensor | None, passes: int) -> Certificate:
    """Certify in about the same time whatever the number of trees T: a box costs T²."""
    count = SOME if model.trees is None else int(model.trees.tree[-1]) + 1
    return trees(model, x, threat, y, boxes=int(BOXES * min(1.0, (SOME / count) ** 2)) + 1)


@CERTIFICATES.register("trees", applies=_applies, within=_within)
def trees(
    model: Model,
    x: Tensor,
    threat: LpBall,
    y: Tensor | None,
    seconds: float = math.inf,
    *,
    boxes: int = BOXES,
) -> Certificate:
    """The exact worst case of an ensemble of trees, and the nearest point that changes it.

    Classifier: margin = min over rivals j and points of the threat of Σ_t (v_y − v_j)(leaf of t),
    by branch and bound over boxes (`_leaves.Search`); the radius is where that turns to 0,
    bracketed by searches at growing ε to 10⁻³ from below (for p = ∞ and 0 exactly: it is the
    distance of a leaf). Regressor: the least and the largest prediction. Distances are those that
    `LpBall.contains` measures. What ``boxes`` do not suffice for is left at its bound, and
    ``exact`` is then False, as it is for a threat that is less than its ball; ``radius``,
    ``certified`` and the interval leave room for the rounding of the library's sums.

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels or targets, or None for the predicted class.
    seconds : that the worst case of a sample may take, and as many its radius; without them the
        boxes alone end a search, and results do not depend on the machine.
    boxes : for the worst case of a sample, and as many for its radius; 0 for `leaves`.

    Raises
    ------
    InputError for a model whose trees are not known.
    """
    return _Worst(model, x, threat, boxes, seconds).certificate(y)


@CERTIFICATES.register("leaves", applies=_applies, auto=False)
def leaves(
    model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
) -> Certificate:
    """Σ_t of the worst leaf of tree t that the threat reaches: a bound, exact for one tree.

    Thousands of samples a second. Parameters as for `trees`.
    """
    return trees(model, x, threat, y, seconds, boxes=0)


class _Worst:
    """Bounds and searches for all samples of one threat."""

    def __init__(self, model: Model, x: Tensor, threat: LpBall, boxes: int, seconds: float) -> None:
        if model.trees is None:
            raise InputError(f"the trees of {model.name} are not known")
        self.trees: Trees = model.trees
        self.model, self.boxes, self.seconds = model, boxes, seconds
        self.name = "trees" if boxes else "leaves"
        self.x = flat(x.detach().cpu().double()).numpy()
        self.space = Space.of(threat, self.x)
        self.far = distances(self.trees, self.space)
        eps = np.asarray(threat.eps, dtype=np.float64)
        self.eps = np.broadcast_to(eps, (len(self.x),))
        room = 0 if math.isinf(threat.p) else 2.0**-40  # of a norm that is computed otherwise
        self.reached = self.far <= (self.eps * (1 + room))[:, None]
        self.jumps = math.isinf(threat.p) or threat.p == 0  # the nearest point lies at a leaf
        self.room = 2 * self.trees.slack  # of a margin, the difference of two scores
        self.exact = bool(boxes) and threat.tight

    def certificate(self, y: Tensor | None) -> Certificate:
        """Put the bounds together."""
        if self.model.task == "regression":
            low, high = (self._end(sign) for sign in (1.0, -1.0))
            lower, upper = low - self.trees.slack, self.trees.slack - high
            return interval(self.name, lower, upper, y, exact=self.exact)
        scores = self.trees.scores(self.x)
        scores = np.column_stack([0 * scores, scores]) if scores.shape[1] == 1 else scores
        label = scores.argmax(1) if y is None else y.detach().cpu().numpy()
        margin, radius = self._bounds(label)
        for row in range(len(label) if self.boxes else 0):
            aims = rivals(self.trees, int(label[row]))
            worst = self._least(row, float(self.eps[row]), aims, self.boxes)
            self._judge(worst)
            margin[row] = worst.bound
            radius[row] = self._radius(row, aims, float(radius[row]), worst)
        right, certified = scores.argmax(1) == label, margin > self.room
        return classified(self.name, right, radius, certified, margin, exact=self.exact)

    def _bounds(self, label: Array) -> tuple[Array, Array]:
        """Return what the leaves within reach say of margin and radius, (n,) each."""
        margin, radius = (np.full(len(label), np.inf) for _ in range(2))
        for own in np.unique(label):
            rows = np.flatnonzero(label == own)
            for weight, offset in rivals(self.trees, int(own)):
                low = offset + bound(self.trees, weight, self.reached[rows])
                near = safe_distance(self.trees, weight, offset - self.room, self.far[rows])
                margin[rows] = np.minimum(margin[rows], low)
                radius[rows] = np.minimum(radius[rows], near)
        return margin, radius

    def _least(
        self, row: int, eps: float, aims: list[Aim], boxes: int, enough: float = math.inf,
        until: float | None = None,
    ) -> Least:  # fmt: skip
        until = time.monotonic() + self.seconds if until is None else until
        space, far = self.space.at(row), self.far[row]
        return least(self.trees, space, far, eps, aims, boxes, enough=enough, until=until)

    def _judge(self, found: Least) -> None:
        """Take note of a search that was cut short."""
        self.exact &= found.bound >= found.value - 1e-12 * (1 + abs(found.value))

    def _radius(self, row: int, aims: list[Aim], low: float, worst: Least) -> float:
        """Bracket the distance of the nearest point of no margin, from the bound ``low`` upwards.

        No margin is one that the rounding of the sums may have made.
        """
        high, left = math.inf, self.boxes
        until = time.monotonic() + self.seconds
        if worst.bound > self.room:
            low = max(low, self._beyond(row, float(self.eps[row])))
        elif worst.point is not None and worst.value <= self.room:
            high = self._distance(row, worst.point)
        eps = low
        while (
            low < high * (1 - (0 if self.jumps else TOLERANCE)) and math.isfinite(low) and left > 0
        ):
            found = self._least(row, eps, aims, left, self.room, until)
            left -= found.boxes
            if found.value <= self.room and found.point is not None:
                high = min(high, max(low, self._distance(row, found.point)))
            elif found.bound > self.room:
                low = self._beyond(row, eps)
            else:
                break
            eps = max(low * GROWTH, low) if math.isinf(high) else (low + high) / 2
        return low

    def _beyond(self, row: int, eps: float) -> float:
        """Return the radius if all within ε is safe; infinite if nothing is farther than ε.

        For p = ∞ leaves that meet do so at the largest of their distances, hence at that of the
        next leaf; for other p they may meet at d^(1/p) times it, and counts are whole.
        """
        far, p = self.far[row], self.space.p
        if math.isinf(p):
            return float(np.where(far > eps, far, np.inf).min())
        d = self.x.shape[1]
        farthest = d ** (1 / p) * far[np.isfinite(far)].max() if p else d
        return math.inf if eps >= farthest else math.floor(eps) + 1.0 if p == 0 else eps

    def _distance(self, row: int, point: Array) -> float:
        space = self.space.at(row)
        return float(space.size(space.moves(point, point)))

    def _end(self, sign: float) -> Array:
        """min sign·prediction over the threat, (n,)."""
        weight, offset = prediction(self.trees)
        weight, offset = sign * weight, sign * offset
        end = offset + bound(self.trees, weight, self.reached)
        for row in range(len(end) if self.boxes else 0):
            found = self._least(row, float(self.eps[row]), [(weight, offset)], self.boxes)
            self._judge(found)
            end[row] = found.bound
        return np.asarray(end)
