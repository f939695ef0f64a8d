"""Ensembles of trees: a bound from the leaves within reach, and the exact worst case."""

import math
import time

import numpy as np
from torch import Tensor

from robustlearn._leaves import Array, Least, Search, Space, bound, distances, gap, safe_distance
from robustlearn._tensor import flat
from robustlearn.certify.base import CERTIFICATES, Certificate
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.models.trees import Trees
from robustlearn.threats import LpBall

BOXES = 4_000  # a sample, for the worst case and as many for the radius: a tenth of a second
GROWTH = 1.25  # of ε, while no adversarial point is known
TOLERANCE = 1e-3  # relative, of a radius where it is not the distance of a leaf


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    return model.trees is not None and type(threat) is LpBall


@CERTIFICATES.register("trees", applies=_applies)
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
    ``exact`` is then False; ``certified`` and the interval leave room for the rounding of the
    library's sums.

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels or targets, or None for the predicted class.
    seconds : that the worst case of a sample may take, and as many its radius.
    boxes : for the worst case of a sample, and as many for its radius; 0 for `leaves`.

    Raises
    ------
    InputError for a model whose trees are not known.
    """
    return _Worst(model, x, threat, "trees", boxes, seconds).certificate(y)


@CERTIFICATES.register("leaves", applies=_applies, auto=False)
def leaves(
    model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
) -> Certificate:
    """Σ_t of the worst leaf of tree t that the threat reaches: a bound, exact for one tree.

    Thousands of samples a second. Parameters as for `trees`.
    """
    return _Worst(model, x, threat, "leaves", 0, seconds).certificate(y)


class _Worst:
    """Bounds and searches for all samples of one threat."""

    def __init__(
        self, model: Model, x: Tensor, threat: LpBall, name: str, boxes: int, seconds: float
    ) -> None:
        if model.trees is None:
            raise InputError(f"the trees of {model.name} are not known")
        self.trees: Trees = model.trees
        self.model, self.name, self.boxes, self.seconds = model, name, boxes, seconds
        self.x = flat(x.detach().cpu().double()).numpy()
        self.space = Space.of(threat, self.x)
        self.far = distances(self.trees, self.space)
        eps = np.asarray(threat.eps, dtype=np.float64)
        self.eps = np.broadcast_to(eps, (len(self.x),))
        room = 0 if math.isinf(threat.p) else 2.0**-40  # of a norm that is computed otherwise
        self.reached = self.far <= (self.eps * (1 + room))[:, None]
        self.jumps = math.isinf(threat.p) or threat.p == 0  # the nearest point lies at a leaf
        self.exact = True

    def certificate(self, y: Tensor | None) -> Certificate:
        """Put the bounds together."""
        target = None if y is None else y.detach().cpu().numpy()
        if self.model.task == "regression":
            return self._interval(target)
        scores = self.trees.scores(self.x)
        scores = np.column_stack([0 * scores, scores]) if scores.shape[1] == 1 else scores
        label = scores.argmax(1) if target is None else target
        classes = scores.shape[1]
        margins, radii = (np.full((len(label), classes), np.inf) for _ in range(2))
        for k, j in np.argwhere(~np.eye(classes, dtype=bool)):
            rows = np.flatnonzero(label == k)
            weight, offset = gap(self.trees, k, j)
            margins[rows, j] = offset + bound(self.trees, weight, self.reached[rows])
            radii[rows, j] = safe_distance(self.trees, weight, offset, self.far[rows])
        margin, radius = margins.min(1), radii.min(1)
        if self.boxes:
            for row in range(len(label)):
                found = self._margin(row, int(label[row]), margins[row])
                margin[row] = found.bound
                radius[row] = self._radius(row, int(label[row]), radii[row], found)
        predicted = scores.argmax(1) == label
        return Certificate(
            method=self.name,
            exact=bool(self.boxes) and self.exact,
            radius=np.where(predicted, radius, 0),
            certified=predicted & (margin > 2 * self.trees.slack),
            margin=margin,
        )

    def _search(self, row: int, weight: Array, eps: float) -> Search:
        return Search(self.trees, self.space.at(row), weight, self.far[row], eps)

    def _margin(self, row: int, label: int, bounds: Array) -> Least:
        """Search rival by rival, those of least bound first."""
        proven, best, point, spent = math.inf, math.inf, None, 0
        until = time.monotonic() + self.seconds
        for rival in bounds.argsort():
            if bounds[rival] >= best:
                break
            if rival == label:
                continue
            weight, offset = gap(self.trees, label, int(rival))
            search = self._search(row, weight, float(self.eps[row]))
            found = search.run(self.boxes - spent, cap=best - offset, until=until)
            spent += found.boxes
            proven = min(proven, found.bound + offset)
            if found.value + offset < best:
                best, point = found.value + offset, found.point
        self.exact &= proven >= best - 1e-12 * (1 + abs(best))
        return Least(proven, best, point, spent)

    def _radius(self, row: int, label: int, bounds: Array, worst: Least) -> float:
        """Bracket the distance of the nearest point of no margin, from the bounds upwards."""
        low, high, left = float(bounds.min()), math.inf, self.boxes
        until = time.monotonic() + self.seconds
        if worst.bound > 0:
            low = max(low, self._beyond(row, float(self.eps[row])))
        elif worst.point is not None and worst.value <= 0:
            high = self._distance(row, worst.point)
        eps = low
        while (
            low < high * (1 - (0 if self.jumps else TOLERANCE)) and math.isfinite(low) and left > 0
        ):
            found = self._decide(row, label, bounds, eps, left, until)
            left -= found.boxes
            if found.value <= 0 and found.point is not None:
                high = min(high, max(low, self._distance(row, found.point)))
            elif found.bound > 0:
                low = self._beyond(row, eps)
            else:
                break
            eps = max(low * GROWTH, low) if math.isinf(high) else (low + high) / 2
        return low

    def _decide(
        self, row: int, label: int, bounds: Array, eps: float, boxes: int, until: float
    ) -> Least:
        """Tell whether some rival wins within ε."""
        spent, proven = 0, math.inf
        for rival in bounds.argsort():
            if bounds[rival] > eps:
                break
            weight, offset = gap(self.trees, label, int(rival))
            search = self._search(row, weight, eps)
            found = search.run(boxes - spent, enough=-offset, until=until)
            spent, proven = spent + found.boxes, min(proven, found.bound + offset)
            if found.value + offset <= 0:
                return Least(proven, found.value + offset, found.point, spent)
        return Least(proven, math.inf, None, spent)

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

    def _interval(self, target: Array | None) -> Certificate:
        ends = [self._least(sign) for sign in (1.0, -1.0)]
        lower, upper = ends[0] - self.trees.slack, self.trees.slack - ends[1]
        loss = None
        if target is not None:
            loss = np.maximum(np.abs(upper - target), np.abs(lower - target)) ** 2
        exact = bool(self.boxes) and self.exact
        return Certificate(self.name, exact=exact, lower=lower, upper=upper, loss=loss)

    def _least(self, sign: float) -> Array:
        """min sign·prediction over the threat, (n,)."""
        weight = sign * self.trees.value[:, 0] / self.trees.divisor
        offset = sign * float(self.trees.base[0]) / self.trees.divisor
        least = offset + bound(self.trees, weight, self.reached)
        for row in range(len(least) if self.boxes else 0):
            found = self._search(row, weight, float(self.eps[row])).run(
                self.boxes, until=time.monotonic() + self.seconds
            )
            least[row] = found.bound + offset
            self.exact &= found.bound >= found.value - 1e-12 * (1 + abs(found.value))
        return least
