"""Projected gradient ascent that sets its own step size."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn._tensor import column, flat
from robustlearn.attacks.ascent import (
    UNTARGETED,
    Along,
    Path,
    Rows,
    best_of,
    confirmed,
    directions,
    reach,
    rivals,
    sharp,
    unwalled,
)
from robustlearn.attacks.base import attack
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.models.base import Objective
from robustlearn.threats import LpBall

RISING = 0.75  # ρ: share of the steps that must raise the loss
ONWARD = 0.75  # α: weight of the new step against the one before
FIRST, SHRINK, SHORTEST = 0.22, 0.03, 0.06  # stretches between checkpoints, shares of the steps
SPARSE_STRETCH, SPARSE_START, SPARSE_SHRINK = 0.04, 0.2, 1.5
SPARSE_STEADY, SPARSE_SLOWEST = 0.95, 10.0

Move = Callable[[Tensor, Tensor, "_Control"], Tensor]


@attack(needs="gradient", norms="1, 2, inf")
def apgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 100,
    restarts: int = 1,
    targets: int = 0,
    start: Tensor | None = None,
    stop_when_broken: bool = True,
    precision: str | None = None,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """Projected gradient ascent that halves its step where the loss stops rising.

    z = project(δ + η·steepest(∇)), δ ← project(δ + ¾(z − δ) + ¼(δ − δ_before)), η = 2 at first.
    At checkpoints, the first after ⌊.22n⌋ of the n steps and then after stretches that shrink by
    ⌊.03n⌋ down to ⌊.06n⌋, a sample halves its η and goes back to its best point if the loss rose
    in fewer than ¾ of the steps, or if neither η nor the best loss changed since the last
    checkpoint.

    For p = 1 a step goes along the signs of the k features of largest gradient, η = 1, without
    the second term. Every ⌊.04n⌋ steps k becomes ‖δ_best‖₀/1.5 (at first it is d/5); if that
    shrank to .95 of what it was or less, η returns to 1 and the sample to its best point, and
    otherwise η falls by 1.5, down to 1/10.

    Parameters
    ----------
    x, y : as for `fgsm`.
    loss : name, `Loss` or function; by default the margin (squared error of a regressor).
    steps : n, gradients a sample and run; the last point costs one more forward pass.
    restarts : runs from random starts, the best is kept; the first of a regressor starts at x.
        After the first each heads for one rival class, the closest of the sample first, as with
        ``targets``; with a regressor up and down in turn.
    targets : make every restart a run for each of this many rival classes, the closest of the
        sample first, and none for all at once: with the margin z_t − z_y rises, and with
        ``"dlr"`` (z_t − z_y) / (z₍₁₎ − (z₍₃₎ + z₍₄₎)/2). Needs one of these two losses.
    start : (n, *shape) where the first run starts, moved into the threat.
    stop_when_broken : drop a sample from the batch once it is misclassified.
    precision : as for `pgd`.
    generator : as for `LpBall.sample`.

    Returns
    -------
    (n, *shape), in the threat without tolerance; the best point of all runs.

    Notes
    -----
    Source: Croce and Hein (2020); for p = 1 Croce and Hein (2021), there with η in units of ε
    too. Added here: features that stand at the wall they are pushed at take no share of a step
    for finite p, the last step goes to the argmax of the threat along the last gradient of the
    margin (on a linear model the exact worst case), and cross-entropy is climbed through the
    log-odds (see `pgd`). DLR is undefined for fewer than three classes (targeted: four): a
    scaled margin takes its place.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> threat = LpBall(math.inf, 0.1)
    >>> x_adv = apgd(net, torch.zeros(1, 2), torch.tensor([0]), threat, stop_when_broken=False)
    >>> x_adv.abs()
    tensor([[0.1000, 0.1000]])
    """
    final = sharp(losses.get(loss, str(model.task)))
    goals = _goals(model, x, y, final, targets, restarts)
    plan = _Plan(final, steps, stop_when_broken, precision)
    keys = _tensor.keys(generator, x)
    at_x = model.task == "regression"

    def run(number: int, rows: Tensor) -> list[Path]:
        held, around = threat.select(rows), x[rows]
        point = around
        if number == 0 and start is not None:
            point = held.enclose(around, start.to(x)[rows])
        elif number or not at_x:
            point = around + _random(held, around, _tensor.fold(keys[rows], number))
        goal = goals[number % len(goals)]
        goal = None if goal is None else goal[rows]
        return _climb(model, Path(rows, around, y[rows], point, goal), held, plan)

    return threat.enclose(x, best_of(x, restarts * (len(goals) if targets else 1), run))


@dataclass(frozen=True)
class _Plan:
    """What every run does: the loss that counts, gradients, whether breaking ends it."""

    final: losses.Loss
    steps: int
    stop: bool
    precision: str | None

    def goal(self, path: Path, *, last: bool) -> Objective:
        """Return what the path climbs; the last step follows the plain margin instead."""
        climb: Objective = self.final
        if path.goal is not None:
            climb = Along(path.goal, self.final)
            if self.final.task == "classification":
                climb = (_Ratio if self.final is losses.dlr else _Above)(path.goal)
        if not last or self.final not in UNTARGETED:
            return climb
        return _Follow(climb, losses.margin if path.goal is None else _Above(path.goal))

    def broken(
        self, model: Model, path: Path, seen: Tensor, output: Tensor, precision: str | None
    ) -> Tensor | None:
        """Tell which samples are broken, if that is to stop them."""
        if not self.stop:
            return None
        broken = self.final.broken(output, path.y)
        return path.broken | confirmed(model, seen, path.y, self.final, broken, precision)


def _random(threat: LpBall, x: Tensor, keys: Tensor) -> Tensor:
    """Return a random δ of the threat; for p = 1 a sparse one, the projection of normal noise."""
    if threat.p > 1:
        return threat.sample(x, keys)
    noise = _tensor.normal(keys, tuple(x.shape[1:]), x.dtype)
    return threat.project(noise * reach(threat, x), x)


def _goals(
    model: Model, x: Tensor, y: Tensor, final: losses.Loss, targets: int, restarts: int
) -> list[Tensor | None]:
    """Return what each run in turn heads for: a rival class (n,), up or down, or nothing."""
    if targets:
        if final not in (losses.margin, losses.dlr):
            raise InputError(f"targets= goes with the losses margin and dlr, not with {final.name}")
        return list(rivals(model(x), y).T[:targets])
    if restarts == 1:
        return [None]
    if final in UNTARGETED:
        return [None, *rivals(model(x), y).T]
    return [None, *directions(model, x, y, final)]


def _climb(model: Model, path: Path, threat: LpBall, plan: _Plan) -> list[Path]:
    """Ascend; return the samples in the groups in which they left."""
    left: list[Path] = []
    control = _Control(path, threat)
    move = _mover(threat, path.x)
    marks = _checkpoints(plan.steps, sparse=threat.p == 1)
    for number in range(plan.steps):
        goal = plan.goal(path, last=number == plan.steps - 1)
        seen = threat.land(path.x, path.point)
        gradient, value, output = model.gradient(seen, path.y, goal, plan.precision)
        broken = plan.broken(model, path, seen, output, plan.precision)
        better = path.record(seen, value, broken)
        control.follow(gradient, value, better)
        if bool(path.broken.any()):
            going = (~path.broken).nonzero().squeeze(1)
            left.append(path.part(path.broken))
            path, control, gradient = path.part(going), control.part(going), gradient[going]
            if len(going) == 0:
                return left
            threat = threat.select(going)
            move = _mover(threat, path.x)
        if number in marks:
            gradient = control.review(path, gradient, marks[number])
        path.point, control.before = move(path.point, gradient, control), path.point
    seen = threat.land(path.x, path.x + threat.argmax(gradient, path.x))
    if plan.precision is not None or path.goal is not None:
        path.measure(model, plan.final, stop=plan.stop)
    output = model(seen)
    broken = plan.broken(model, path, seen, output, None)
    path.record(seen, plan.final.objective(output, path.y), broken)
    return [*left, path]


def _checkpoints(steps: int, *, sparse: bool) -> dict[int, int]:
    """Return the steps before which the sizes are reviewed, with the stretch that they end.

    >>> list(_checkpoints(100, sparse=False))
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    stretch = max(1, int((SPARSE_STRETCH if sparse else FIRST) * steps))
    marks, at = {}, stretch
    while at < steps:
        marks[at] = stretch
        if not sparse:
            stretch = max(stretch - max(1, int(SHRINK * steps)), max(1, int(SHORTEST * steps)))
        at += stretch
    return marks


class _Control(Rows):
    """The step size of each sample and what it depends on, shape (n,) or (n, *shape)."""

    def __init__(self, path: Path, threat: LpBall) -> None:
        n, like = len(path.x), path.value
        self.sparse = threat.p == 1
        self.before: Tensor | None = None
        self.uphill = torch.zeros_like(path.x)  # the gradient at the best point
        self.size = torch.full_like(like, 1.0 if self.sparse else 2.0)
        self.last = torch.full_like(like, torch.inf)  # loss of the point before
        self.rises = torch.zeros_like(like)
        self.halved = torch.zeros(n, dtype=torch.bool, device=like.device)
        self.mark = torch.full_like(like, -torch.inf)  # best loss at the last checkpoint
        width = float(flat(path.x).shape[1])
        self.active = torch.full_like(like, SPARSE_START * width)  # features in a sparse step
        self.nonzero = torch.full_like(like, width)  # of the best point at the last checkpoint

    def follow(self, gradient: Tensor, value: Tensor, better: Tensor) -> None:
        """Note whether the loss rose, and the gradient where the best point is new."""
        self.rises += value > self.last
        self.last = value
        torch.where(column(better, gradient), gradient, self.uphill, out=self.uphill)

    def blend(self, ahead: Tensor, point: Tensor) -> Tensor:
        """x + α(z − x) + (1 − α)(x − x_before): where the step to z leads; z at first."""
        if self.before is None:
            return ahead
        inertia = 1 - ONWARD
        return (ahead * ONWARD).add_(point, alpha=2 * inertia).sub_(self.before, alpha=inertia)

    def review(self, path: Path, gradient: Tensor, stretch: int) -> Tensor:
        """Set sizes at a checkpoint, send samples back to their best; return the gradients."""
        back = self._sparsen(path) if self.sparse else self._halve(path, stretch)
        wide = column(back, path.x)
        path.point = torch.where(wide, path.best, path.point)
        self.rises = torch.zeros_like(self.rises)
        return torch.where(wide, self.uphill, gradient)

    def _halve(self, path: Path, stretch: int) -> Tensor:
        stuck = ~self.halved & (path.value <= self.mark)
        self.halved = (self.rises < RISING * stretch) | stuck
        self.mark = path.value
        self.size = torch.where(self.halved, self.size / 2, self.size)
        return self.halved

    def _sparsen(self, path: Path) -> Tensor:
        nonzero = flat(path.best != path.x).sum(1).to(self.size)
        fewer = nonzero <= SPARSE_STEADY * self.nonzero
        slower = (self.size / SPARSE_SHRINK).clamp_min(1 / SPARSE_SLOWEST)
        self.size = torch.where(fewer, 1.0, slower)
        self.active, self.nonzero = nonzero / SPARSE_SHRINK, nonzero
        return fewer


def _mover(threat: LpBall, x: Tensor) -> Move:
    """Return the step around fixed x: from a point along a gradient."""
    if math.isinf(threat.p):
        return _move_signs(threat, x)
    return _move_sparse(threat, x) if threat.p == 1 else _move_steepest(threat, x)


def _move_signs(threat: LpBall, x: Tensor) -> Move:
    low, high = threat.span(x)
    unit = reach(threat, x)

    def move(point: Tensor, gradient: Tensor, control: _Control) -> Tensor:
        ahead = gradient.sign().mul_(column(control.size, x) * unit).add_(point).clamp_(low, high)
        return control.blend(ahead, point).clamp_(low, high)

    return move


def _move_steepest(threat: LpBall, x: Tensor) -> Move:
    project, free = threat.projector(x), unwalled(threat)

    def move(point: Tensor, gradient: Tensor, control: _Control) -> Tensor:
        step = free.argmax(threat.inward(gradient, point)) * column(control.size, x)
        ahead = x + project(step.add_(point - x))
        return x + project(control.blend(ahead, point) - x)

    return move


def _move_sparse(threat: LpBall, x: Tensor) -> Move:
    project = threat.projector(x)
    units = torch.ones_like(x) * reach(threat, x)

    def move(point: Tensor, gradient: Tensor, control: _Control) -> Tensor:
        open_ways = flat(threat.inward(gradient, point))
        gain = open_ways.abs() * flat(units)
        count = control.active.clamp(1, gain.shape[1]).ceil().long()[:, None]
        least = gain.sort(1, descending=True).values.gather(1, count - 1)
        chosen = (gain >= least) & (gain > 0)
        share = control.size[:, None] / chosen.sum(1, keepdim=True).clamp_min(1)
        step = torch.where(chosen, open_ways.sign() * flat(units) * share, 0).reshape(x.shape)
        return x + project(step.add_(point - x))

    return move


@dataclass(frozen=True, eq=False)
class _Follow:
    """The objective of one, the direction of the other."""

    value: Objective
    slope: Objective

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective, and the derivative to follow."""
        return self.value.look(output, y)[0], self.slope.look(output, y)[1]


@dataclass(frozen=True, eq=False)
class _Above:
    """z_t − z_y for the target t of each sample."""

    target: Tensor

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective and its slope e_t − e_y."""
        target, own = self.target[:, None], y[:, None]
        slope = torch.zeros_like(output).scatter_(1, target, 1.0).scatter_(1, own, -1.0)
        return (output.gather(1, target) - output.gather(1, own)).squeeze(1), slope


@dataclass(frozen=True, eq=False)
class _Ratio:
    """(z_t − z_y) / (z₍₁₎ − (z₍₃₎ + z₍₄₎)/2): the targeted DLR of Croce and Hein (2020).

    Under four classes 1 + z₍₁₎ − z₍last₎ is below the line.
    """

    target: Tensor

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective and its slope."""
        gap, slope = _Above(self.target).look(output, y)
        top, order = output.sort(1, descending=True)
        weight = torch.zeros_like(top)
        weight[:, 0] = 1.0
        weight[:, 2:4] = -0.5
        spread = top[:, 0] - top[:, 2:4].mean(1) if top.shape[1] > 3 else top[:, 0] - top[:, -1] + 1
        if top.shape[1] < 4:
            weight[:, 1:] = 0.0
            weight[:, -1] = -1.0
        spread = spread.clamp_min(torch.finfo(top.dtype).tiny)
        ratio = gap / spread
        below = torch.zeros_like(top).scatter_(1, order, weight)
        return ratio, (slope - ratio[:, None] * below) / spread[:, None]
