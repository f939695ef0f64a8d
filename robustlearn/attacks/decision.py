"""Attacks that see the predicted class and nothing else."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn._tensor import flat, per_sample
from robustlearn.attacks.base import attack
from robustlearn.attacks.score import moves, share_at
from robustlearn.models import Model
from robustlearn.threats import LpBall

STARTS = 20  # queries, at most, for finding any point of another class
HALVES = 7  # queries that first halve the way back from it
STRIDES = (0.125, 0.25, 0.5, 1.0)  # shares of a step along the normal that are tried
BISECTIONS = 10  # of the distance, after each step
REACH = 0.1  # of the distance: how far the probes of the boundary go
LIKELY = 0.2  # share of successful moves that the step aims at


@attack(needs="labels", norms="1, 2, inf")
def retreat(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    queries: int = 1000,
    share: float = 0.3,
    stop_when_broken: bool = True,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """From a far point of another class back towards x, by random moves on a shrinking ball.

    With d the distance of the best adversarial point so far: project that point to the ball of
    radius (1 − γ)d around x, make a random move of `square` there, and keep the result if it is
    still adversarial. γ grows on success and falls on failure, to a success rate of a fifth.

    Parameters
    ----------
    x, y : as for `fgsm`.
    loss : only its success counts: by default a wrong class.
    queries : forward passes a sample, at most; the first is for x itself.
    share : first share of the features in a move.
    stop_when_broken : drop a sample once its distance is at most ε; if False go on to the
        smallest distance, for instance with a large ε.
    generator : as for `LpBall.sample`.

    Returns
    -------
    (n, *shape), in the threat without tolerance: the nearest adversarial point found, projected
    to the threat (and then seldom adversarial) where it lies farther than ε.

    Examples
    --------
    >>> threat = LpBall(float("inf"), 0.5)
    >>> x, y = torch.full((1, 3), -0.2), torch.tensor([0])
    >>> x_adv = retreat(lambda a: a @ ([[-1, 1]] * 3), x, y, threat, queries=200)
    >>> float(x_adv.sum()) >= 0
    True
    """
    walk = Walk(model, x, y, threat, loss, queries, generator, stop_when_broken)
    walk.start()
    _, move = moves(threat, x)
    gamma = torch.full((len(x),), 0.1, dtype=torch.float64, device=x.device)
    while walk.goes_on():
        rows = walk.rows
        nearer = walk.ball(walk.distance[rows] * (1 - gamma[rows]))
        around = x[rows]
        present = nearer.enclose(around, walk.best[rows]) - around
        part = share_at(share, walk.spent, queries)
        wish = move(nearer, around, nearer.span(around), present, walk.keys(), part)
        won = walk.visit(nearer.restrict(around, wish))
        factor = torch.where(won, 1.5, 1.5 ** (-LIKELY / (1 - LIKELY)))
        gamma[rows] = (gamma[rows] * factor).clamp(1e-5, 0.5)
        walk.leave()
    return walk.result()


@attack(needs="labels", norms="2, inf")
def hop_skip_jump(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    queries: int = 1000,
    probes: int = 30,
    stop_when_broken: bool = True,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """Along the boundary: its normal from the classes of random probes, a step, and back to x.

    v = Σ (φᵢ − φ̄) uᵢ over ``probes``·√t random uᵢ, φᵢ = ±1 as the best point + r·uᵢ is
    adversarial or not; the largest of a few steps up to d/√t along the steepest direction of v
    that is adversarial; then bisection of the distance at which its projection still is.

    Parameters
    ----------
    x, y, loss, queries, stop_when_broken, generator : as for `retreat`.
    probes : random directions of the first iteration.

    Returns
    -------
    As `retreat`.

    Notes
    -----
    Source: Chen, Jordan and Wainwright (2020).

    Examples
    --------
    >>> x, y = torch.full((1, 3), -0.2), torch.tensor([0])
    >>> x_adv = hop_skip_jump(lambda a: a @ ([[-1, 1]] * 3), x, y, LpBall(2, 0.5), queries=300)
    >>> float(x_adv.sum()) >= 0
    True
    """
    walk = Walk(model, x, y, threat, loss, queries, generator, stop_when_broken)
    walk.start()
    turn = 0
    while walk.goes_on():
        turn += 1
        normal = _normal(walk, max(2, round(probes * turn**0.5)))
        rows, around, base = walk.rows, x[walk.rows], walk.best[walk.rows]
        free = replace(walk.ball(walk.distance[rows] / turn**0.5), lower=None, upper=None)
        step, aim = free.argmax(normal), base
        if walk.queries - walk.spent < len(STRIDES):
            break
        for size in STRIDES:  # all of them: what a sample costs must not depend on others
            point = walk.legal(around, base + step * size)
            landed = walk.query(point).reshape(-1, *[1] * (x.dim() - 1))
            aim = torch.where(landed, point, aim)
        walk.bisect(aim, BISECTIONS)
        walk.leave()
    return walk.result()


def _normal(walk: "Walk", count: int) -> Tensor:
    """Estimate the direction of the boundary's normal at the best points."""
    rows, x = walk.rows, walk.x[walk.rows]
    count = min(count, walk.queries - walk.spent)
    base, keys = walk.best[rows], walk.keys()
    unit = replace(walk.ball(torch.ones_like(walk.distance[rows])), p=math.inf)
    extent = replace(unit, lower=None, upper=None).argmax(torch.ones_like(x))
    radius = per_sample(walk.distance[rows] * REACH, x)
    d = flat(x).shape[1]
    sides, moved = [], []
    for i in range(count):
        drawn = _tensor.normal(_tensor.fold(keys, i), tuple(x.shape[1:]), x.dtype)
        drawn = drawn * extent / (d**0.5 if walk.threat.p == 2 else 1)
        point = walk.legal(x, base + radius * drawn)
        sides.append(walk.query(point))
        moved.append(point - base)
    side = torch.stack(sides).to(x.dtype) * 2 - 1
    weight = side - side.mean(0)
    weight = torch.where((side == side[:1]).all(0), side, weight)
    return torch.stack([m * per_sample(w, m) for m, w in zip(moved, weight, strict=True)]).sum(0)


class Walk:
    """The nearest adversarial points so far, what they cost, and the samples still on the way."""

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: LpBall,
        loss: Any,
        queries: int,
        generator: torch.Generator | Tensor | int,
        stop: bool,
    ) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.loss = losses.get(loss, str(model.task))
        self.queries, self.stop, self.spent = queries, stop, 0
        self._keys = _tensor.keys(generator, x)
        self.best = x.clone()
        self.goal = threat.eps * torch.ones(len(x), dtype=torch.float64)
        self.goal = self.goal.to(x.device)
        self.distance = torch.full_like(self.goal, torch.inf)
        self.rows = torch.arange(len(x), device=x.device)
        right = ~self.query(x)
        self.distance[~right] = 0
        self.rows = (right & (self.goal > 0)).nonzero().squeeze(1)

    def goes_on(self) -> bool:
        """Tell whether there is a sample and a query left."""
        return self.spent < self.queries and len(self.rows) > 0

    def keys(self) -> Tensor:
        """Return a key for each sample on the way, new at every query."""
        return _tensor.fold(self._keys[self.rows], self.spent)

    def ball(self, eps: Tensor) -> LpBall:
        """Return the threat around the samples on the way with other budgets."""
        return replace(self.threat, eps=eps)

    def legal(self, around: Tensor, point: Tensor) -> Tensor:
        """Return the point next to another that lies in the box, whatever its distance."""
        far = self.threat.norm((point - around).double()).nan_to_num(posinf=1e30)
        low, high = replace(self.threat, eps=far.clamp_min(1e-30) * 2, p=math.inf).span(around)
        return torch.minimum(torch.maximum(point, low), high)

    def query(self, point: Tensor) -> Tensor:
        """Ask for the classes at one point per sample on the way; True where it has won."""
        self.spent += 1
        if len(point) == 0:
            return torch.zeros(0, dtype=torch.bool, device=point.device)
        return self.loss.broken(self.model(point), self.y[self.rows])

    def visit(self, point: Tensor) -> Tensor:
        """Query, and keep the points that are adversarial and nearer."""
        won = self.query(point)
        far = self.threat.norm(point.double() - self.x[self.rows].double())
        better = won & (far < self.distance[self.rows])
        self.best[self.rows[better]] = point[better]
        self.distance[self.rows[better]] = far[better]
        return won

    def start(self) -> None:
        """Look for any adversarial point, at distances from ε up, and halve the way back."""
        first, _ = moves(self.threat, self.x)
        waiting, begun = self.rows, self.spent
        turns = min(STARTS, self.queries // 4)
        for turn in range(turns):
            self.rows = waiting
            wide = self.ball(self.goal[waiting] * 2.0 ** (turn // 2))
            around, keys = self.x[waiting], _tensor.fold(self._keys[waiting], turn)
            if turn % 2:
                wish = wide.sample(around, keys)
            else:
                walls, still = wide.span(around), torch.zeros_like(around)
                wish = first(wide, around, walls, still, keys, 1.0)
            self.visit(wide.restrict(around, wish))
            waiting = waiting[self.distance[waiting].isinf()]
            if len(waiting) == 0:
                break
        self.rows = (self.distance.isfinite() & (self.distance > 0)).nonzero().squeeze(1)
        self.leave()
        self.spent = begun + turns  # for all alike: no sample's budget depends on its neighbours
        self.bisect(self.best[self.rows], HALVES)
        self.leave()

    def bisect(self, aim: Tensor, times: int) -> None:
        """Halve the distances between which the projection of ``aim`` becomes adversarial."""
        around = self.x[self.rows]
        high = self.threat.norm(aim.double() - around.double())
        low = torch.zeros_like(high)
        for _ in range(min(times, self.queries - self.spent)):
            middle = (low + high) / 2
            won = self.visit(self.ball(middle).enclose(around, aim))
            low, high = torch.where(won, low, middle), torch.where(won, middle, high)

    def leave(self) -> None:
        """Drop the samples that are near enough."""
        if self.stop:
            self.rows = self.rows[self.distance[self.rows] > self.goal[self.rows]]

    def result(self) -> Tensor:
        """Return the best points, in the threat."""
        return self.threat.enclose(self.x, self.best)
