"""The least sum of one leaf per tree over a ball: bounded tree by tree, exact by search.

A point of the threat lies in one leaf of every tree, and a leaf is a box. Leaves that the threat
cannot reach are left out; the sum of the least that remains in every tree is a bound, and it is
attained where the boxes of those leaves meet within the threat.
"""

import heapq
import math
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from robustlearn.models.trees import CHUNK, Trees
from robustlearn.threats import LpBall

Array = NDArray[np.float64]
Aim = tuple[Array, float]  # the weight of each leaf, and what is added to their sum
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
BATCH = 64  # boxes that are cut together
ROOM = 1e-9  # relative: what the rounding of distances and budgets must not cut off


@dataclass(frozen=True)
class Space:
    """Distances from points to boxes: what `LpBall.norm` says of the nearest point in them.

    Attributes
    ----------
    x : (n, d), or (d,) for one point; unit, lower, upper : (d,), the unit of a frozen feature
        is 0.
    """

    p: float
    x: Array
    unit: Array
    lower: Array
    upper: Array

    @classmethod
    def of(cls, threat: LpBall, x: Array) -> "Space":
        """Read a threat for points (n, d)."""

        def row(value: object, default: float) -> Array:
            given = torch.as_tensor(default if value is None else value, dtype=torch.float64)
            return np.broadcast_to(given.reshape(-1).numpy(), x.shape[1:])

        unit = row(threat.scale, 1.0) * row(threat.mask, 1.0)
        return cls(threat.p, x, unit, row(threat.lower, -math.inf), row(threat.upper, math.inf))

    def at(self, row: int) -> "Space":
        """Return the space of one of the points."""
        return Space(self.p, self.x[row], self.unit, self.lower, self.upper)

    def only(self, features: Indices) -> "Space":
        """Return the space of some features, in any arrangement of them."""
        parts = (self.x, self.unit, self.lower, self.upper)
        return Space(self.p, *(part[..., features] for part in parts))

    def moves(self, low: Array, high: Array) -> Array:
        """Return how far each feature must move into [low, high], in units; infinite if never."""
        gap = np.maximum(np.maximum(low - self.x, self.x - high), 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            way = np.where(gap > 0, gap / self.unit, 0)
        return np.where((low > self.upper) | (high < self.lower), np.inf, way)

    def size(self, moves: Array) -> Array:
        """Return the norm of moves along the last axis."""
        if math.isinf(self.p):
            return np.asarray(moves.max(-1, initial=0))
        if self.p == 0:
            return np.where(np.isinf(moves).any(-1), np.inf, (moves > 0).sum(-1))
        if self.p == 1:
            return np.asarray(moves.sum(-1))
        top = moves.max(-1, initial=0)
        safe = np.where((top > 0) & np.isfinite(top), top, 1)
        norm = safe * ((moves / safe[..., None]) ** self.p).sum(-1) ** (1 / self.p)
        return np.where(np.isinf(top), np.inf, norm)

    def shares(self, low: Array, high: Array, eps: float) -> Array:
        """Return what each feature takes of the budget: they add up to at most 1 in the ball."""
        if math.isinf(self.p):
            return np.zeros(np.broadcast_shapes(low.shape, high.shape))
        moves = self.moves(low, high)
        if self.p == 0:
            return (moves > 0) / max(1.0, math.floor(eps))
        return np.asarray((moves / max(eps, float(np.finfo(float).tiny))) ** self.p)


def distances(trees: Trees, space: Space) -> Array:
    """Return how far each leaf is from each point, (n, M): the least ε that reaches it."""
    step = max(1, CHUNK // trees.feature.size)
    parts = []
    for start in range(0, len(space.x), step):
        some = Space(space.p, space.x[start : start + step], space.unit, space.lower, space.upper)
        near = some.only(trees.feature)
        parts.append(near.size(near.moves(trees.low, trees.high)))
    return np.concatenate(parts)


def bound(trees: Trees, weight: Array, reached: Flags) -> Array:
    """Σ_t min over the reached leaves of tree t of their weight, (M,) and (n, M) -> (n,).

    No point of the threat has less. A tree of which no leaf is reached makes it infinite.
    """
    starts = np.flatnonzero(np.diff(trees.tree, prepend=-1))
    least = np.minimum.reduceat(np.where(reached, weight, np.inf), starts, axis=1)
    return np.asarray(least.sum(1))


def safe_distance(trees: Trees, weight: Array, offset: float, far: Array) -> Array:
    """Return the largest ε (n,) below which offset + `bound` is positive.

    The reached leaves change at the distances of leaves alone, so that one of these is it, found
    by bisection of their order: exact for the bound, O(M log M) a sample.

    Parameters
    ----------
    weight : (M,); far : (n, M) as from `distances`.
    """
    ends = np.append(np.sort(far, 1), np.full((len(far), 1), np.inf), 1)
    low, high = np.zeros(len(far), int), np.full(len(far), far.shape[1])
    while (low < high).any():
        middle = (low + high) // 2
        eps = np.take_along_axis(ends, middle[:, None], 1)
        safe = (offset + bound(trees, weight, far <= eps) > 0) & np.isfinite(eps[:, 0])
        low = np.where(safe & (low < high), middle + 1, low)
        high = np.where(safe, high, middle)
    return np.take_along_axis(ends, low[:, None], 1)[:, 0]


def gap(trees: Trees, label: int, rival: int) -> Aim:
    """Return the weight (M,) of the leaves in z_label − z_rival, and what is added to their sum.

    One score z is that of class 1 against class 0: the classes have 0 and z.
    """
    if trees.value.shape[1] == 1:
        value, base = (np.column_stack([0 * a, a]) for a in (trees.value[:, 0], trees.base))
    else:
        value, base = trees.value, trees.base[None]
    parts = (part[..., label] - part[..., rival] for part in (value, base))
    weight, offset = (part / trees.divisor for part in parts)
    return weight, float(offset[0])


def rivals(trees: Trees, label: int) -> list[Aim]:
    """Return the `gap` of a class to every other."""
    classes = max(2, trees.value.shape[1])
    return [gap(trees, label, rival) for rival in range(classes) if rival != label]


def prediction(trees: Trees) -> Aim:
    """Return the weight (M,) of the leaves in a regressor's prediction, and what is added."""
    return trees.value[:, 0] / trees.divisor, float(trees.base[0]) / trees.divisor


class Least(NamedTuple):
    """What a search has found of the least sum.

    No point of the threat has less than ``bound``; ``value`` is the sum at ``point``, the least
    where the two are equal, and infinite where no point was met; ``boxes`` were looked at.
    """

    bound: float
    value: float
    point: Array | None
    boxes: int


class _Boxes(NamedTuple):
    """Boxes (n, d), the leaves (n, trees, places) that they meet, what both take of a budget."""

    low: Array
    high: Array
    met: Flags
    spent: Array

    def only(self, rows: Indices | Flags) -> "_Boxes":
        return _Boxes(*(part[rows] for part in self))  # type: ignore[arg-type]


class _Meeting(NamedTuple):
    """The least leaves of the boxes: their weight and bounds (n, trees, d), and where they meet."""

    first: Indices
    value: Array
    starts: Array
    ends: Array
    inner: Array
    outer: Array

    def only(self, rows: Indices) -> "_Meeting":
        return _Meeting(*(part[rows] for part in self))  # type: ignore[arg-type]


class Search:
    """Branch and bound for the least sum of leaves within ε of one point.

    A box of input space has the bound Σ_t min over the leaves of tree t that it meets. Where the
    least leaves of all trees have a common point within the threat, that is attained. Otherwise
    some of them contradict each other in a feature: the box is cut there, at the place that
    forbids leaves worth most on its lesser side. Boxes of least bound come first.

    Parameters
    ----------
    space : of one point; weight : (M,); far : (M,) from `distances`.

    Notes
    -----
    For p = ∞ the boxes need not be cut at the ball: intervals that meet two by two have a common
    point (Helly), so that leaves within reach that meet each other do so within reach. For other
    p the budget Σ(move/ε)^p is kept for each box and leaf.
    """

    def __init__(self, trees: Trees, space: Space, weight: Array, far: Array, eps: float) -> None:
        self.eps, self.x, self.budget = eps, space.x, not math.isinf(space.p)
        leaves = np.flatnonzero(far <= eps * (1 + ROOM * self.budget))
        count = np.bincount(trees.tree[leaves], minlength=int(trees.tree[-1]) + 1)
        alone = count[trees.tree[leaves]] == 1
        self.constant = float(weight[leaves[alone]].sum())
        self.feasible = bool((count > 0).all())
        leaves = leaves[~alone]
        order = np.lexsort((weight[leaves], trees.tree[leaves]))
        self._lay_out(trees, space, weight, leaves[order])

    def _lay_out(self, trees: Trees, space: Space, weight: Array, leaves: Indices) -> None:
        """Put the leaves in (trees, places), the least of each tree first."""
        _, tree, count = np.unique(trees.tree[leaves], return_inverse=True, return_counts=True)
        place = np.arange(len(leaves)) - (np.cumsum(count) - count)[tree]
        used, low, high = trees.feature[leaves], trees.low[leaves], trees.high[leaves]
        near = np.isfinite(low) | np.isfinite(high)
        if space.p > 0:  # what the ball does not grant anyway
            reach = (self.eps * (1 + ROOM) * space.unit)[used]
            near = (low > space.x[used] - reach) | (high < space.x[used] + reach)
        self.features, slot = np.unique(used[near], return_inverse=True)
        self.space = space.only(self.features)
        shape = (len(count), int(count.max(initial=1)))
        self.low = np.full((*shape, len(self.features)), -np.inf)
        self.high = np.full((*shape, len(self.features)), np.inf)
        row = near.nonzero()[0]
        self.low[tree[row], place[row], slot] = low[near]
        self.high[tree[row], place[row], slot] = high[near]
        self.value = np.full(shape, np.inf)
        self.value[tree, place] = weight[leaves]
        self.share = self.space.shares(self.low, self.high, eps=self.eps)
        self.spread = float(np.ptp(weight[leaves])) if len(leaves) else 0.0

    def run(
        self,
        boxes: int,
        *,
        cap: float = math.inf,
        enough: float = math.inf,
        until: float = math.inf,
    ) -> Least:
        """Search until the least sum is known.

        Parameters
        ----------
        boxes : to look at, at most; until : the reading of `time.monotonic` at which to stop.
        cap : sums from here on are of no interest.
        enough : stop once it is known whether the least sum exceeds this.
        """
        if not self.feasible:
            return Least(math.inf, math.inf, None, 0)
        self.best, self.cap = math.inf, cap - self.constant
        self.point: Array | None = None
        self.queue: list[tuple[float, int, tuple[Any, ...]]] = []
        self.looked, threshold = 0, enough - self.constant
        end = np.full((1, len(self.features)), np.inf)
        self._file(_Boxes(-end, end, np.isfinite(self.value)[None], self.share.sum(-1)[None]))
        while self.queue and self.looked < boxes and time.monotonic() < until:
            if self.best <= threshold < math.inf or self.queue[0][0] > threshold:
                break
            self._cut_some()
        left = self.queue[0][0] if self.queue else math.inf
        bound = min(self.best, left, self.cap) + self.constant
        return Least(bound, self.best + self.constant, self.point, self.looked)

    def _cut_some(self) -> None:
        """Cut the boxes of least bound in two."""
        taken: list[tuple[Any, ...]] = []
        while self.queue and len(taken) < BATCH:
            least, _, node = heapq.heappop(self.queue)
            if least < min(self.best, self.cap):
                taken.append(node)
        if not taken:
            return
        *parts, feature, cut = (np.stack(part) for part in zip(*taken, strict=True))
        boxes, rows = _Boxes(*parts), np.arange(len(taken))
        below, above = boxes.high.copy(), boxes.low.copy()
        below[rows, feature], above[rows, feature] = cut, np.nextafter(cut, np.inf)
        starts, ends = (np.moveaxis(side, -1, 0)[feature] for side in (self.low, self.high))
        left = boxes._replace(high=below, met=boxes.met & (starts <= cut[:, None, None]))
        right = boxes._replace(low=above, met=boxes.met & (ends > cut[:, None, None]))
        sides = [self._charged(boxes, side, feature) for side in (left, right)]
        self._file(_Boxes(*(np.concatenate(pair) for pair in zip(*sides, strict=True))))

    def _charged(self, before: _Boxes, after: _Boxes, feature: Indices) -> _Boxes:
        """Return boxes after a cut in one feature, without the leaves beyond the budget."""
        if not self.budget:
            return after
        rows, own = np.arange(len(feature)), np.moveaxis(self.share, -1, 0)[feature]
        was, now = (
            self.space.shares(boxes.low, boxes.high, self.eps)[rows, feature][:, None, None]
            for boxes in (before, after)
        )
        spent = before.spent + np.maximum(now, own) - np.maximum(was, own)
        return after._replace(met=after.met & (spent <= 1 + ROOM), spent=spent)

    def _file(self, boxes: _Boxes) -> None:
        """Bound boxes; keep the best point of those that are settled, and queue the others."""
        self.looked += len(boxes.low)
        value = np.where(boxes.met.any(2), self._weight(boxes.met.argmax(2)), np.inf).sum(1)
        promising = value < min(self.best, self.cap)
        boxes, least = boxes.only(promising), value[promising]
        if not len(least):
            return
        meeting = self._met(boxes)
        spent = self.space.shares(meeting.inner, meeting.outer, self.eps)
        apart = meeting.inner > meeting.outer
        settled = ~apart.any(1) & (spent.sum(1) <= 1 + ROOM)
        first = np.where(settled, least, np.inf).argmin()
        if settled[first] and least[first] < self.best:
            point = self.x.copy()
            inside = np.clip(self.space.x, meeting.inner[first], meeting.outer[first])
            point[self.features] = inside
            self.best, self.point = float(least[first]), point
        rows = np.flatnonzero(~settled)
        if not len(rows):
            return
        open_boxes, meeting = boxes.only(rows), meeting.only(rows)
        extra = spent[rows] - self.space.shares(open_boxes.low, open_boxes.high, self.eps)
        feature, cut = self._place(meeting, self._regret(open_boxes, meeting), extra)
        for number, node in enumerate(zip(*open_boxes, feature, cut, strict=True)):
            age = self.looked - number  # of equal bounds the younger, which is the smaller box
            heapq.heappush(self.queue, (float(least[rows[number]]), -age, node))

    def _weight(self, place: Indices) -> Array:
        return np.asarray(self.value[np.arange(place.shape[1]), place])

    def _met(self, boxes: _Boxes) -> _Meeting:
        """Return the least leaf of each tree, and the box that they have in common."""
        first, trees = boxes.met.argmax(2), np.arange(boxes.met.shape[1])
        starts, ends = self.low[trees, first], self.high[trees, first]
        inner = np.maximum(boxes.low, starts.max(1, initial=-np.inf))
        outer = np.minimum(boxes.high, ends.min(1, initial=np.inf))
        return _Meeting(first, self._weight(first), starts, ends, inner, outer)

    def _regret(self, boxes: _Boxes, meeting: _Meeting) -> Array:
        """Return what each tree loses at least if its least leaf is forbidden, (n, trees)."""
        rest = boxes.met.copy()
        np.put_along_axis(rest, meeting.first[..., None], False, 2)
        loss = self._weight(rest.argmax(2)) - meeting.value
        return np.where(rest.any(2), loss, self.spread)

    def _place(self, meeting: _Meeting, regret: Array, extra: Array) -> tuple[Indices, Array]:
        """Return the feature of a cut for each box, and the last number of its lower side.

        Where leaves contradict each other, the cut for which the regrets of those that it
        forbids are largest on the side where they are less; else, beyond the budget, where
        meeting costs most.
        """
        rows, apart = np.arange(len(regret)), meeting.inner > meeting.outer
        denied = [
            np.einsum("nt,ntd->nd", regret, meeting.starts > meeting.outer[:, None]),
            np.einsum("nt,ntd->nd", regret, meeting.ends < meeting.inner[:, None]),
        ]
        worth = np.where(apart, np.minimum(*denied), -1)
        clash = apart.any(1)
        feature = np.where(clash, worth.argmax(1), extra.argmax(1))
        inner, outer = meeting.inner[rows, feature], meeting.outer[rows, feature]
        start, end = meeting.starts[rows, :, feature], meeting.ends[rows, :, feature]
        below = np.einsum("nt,nct->nc", regret, start[:, None] > end[..., None])
        above = np.einsum("nt,nct->nc", regret, end[:, None] <= end[..., None])
        score = np.where(end < inner[:, None], np.minimum(below, above), -1)
        away = inner > self.space.x[feature]
        toward = np.where(away, np.nextafter(inner, -np.inf), outer)
        return feature, np.where(clash, end[rows, score.argmax(1)], toward)


def least(
    trees: Trees,
    space: Space,
    far: Array,
    eps: float,
    aims: list[Aim],
    boxes: int,
    *,
    enough: float = math.inf,
    until: float = math.inf,
) -> Least:
    """Search for the least of several sums within ε of one point, those of least bound first.

    What one aim has reached is the cap of the next; an aim whose bound is above it is left out.

    Parameters
    ----------
    far : (M,) from `distances`; boxes : for all aims together; enough, until : see `Search.run`.
    """
    reached = (far <= eps * (1 + ROOM))[None]
    bounded = [(offset + float(bound(trees, weight, reached)[0]), weight, offset)
               for weight, offset in aims]  # fmt: skip
    proven, best, point, spent = math.inf, math.inf, None, 0
    for lowest, weight, offset in sorted(bounded, key=lambda aim: aim[0]):
        if lowest >= best or lowest > enough or best <= enough < math.inf:
            break
        search = Search(trees, space, weight, far, eps)
        found = search.run(boxes - spent, cap=best - offset, enough=enough - offset, until=until)
        spent += found.boxes
        proven = min(proven, found.bound + offset)
        if found.value + offset < best:
            best, point = found.value + offset, found.point
    return Least(proven, best, point, spent)
