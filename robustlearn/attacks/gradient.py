"""Attacks that follow the gradient of a loss: one step, or many with projection."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn._tensor import column, flat
from robustlearn.attacks.base import attack
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.threats import LpBall

Step = Callable[[Tensor, Tensor, float | None], Tensor]


@attack(needs="gradient")
def fgsm(model: Model, x: Tensor, y: Tensor, threat: LpBall, *, loss: Any = None) -> Tensor:
    """One gradient, then the largest step that the threat allows along it.

    x_adv = x + argmax over the threat of ⟨∇ₓ loss, δ⟩, for p = ∞ x + ε·sign(∇ₓ loss).

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels, targets of the prediction, or of a targeted loss.
    loss : name, `Loss` or function; by default the margin (squared error of a regressor).

    Returns
    -------
    (n, *shape), in the threat without tolerance. Cost: one gradient a sample.

    Notes
    -----
    Source: Goodfellow, Shlens and Szegedy (2015), there with cross-entropy and p = ∞.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> threat = LpBall(math.inf, 0.1)
    >>> fgsm(net, torch.zeros(1, 2), torch.tensor([0]), threat).abs()
    tensor([[0.1000, 0.1000]])
    """
    chosen = losses.get(loss, str(model.task))
    gradient, _, _ = model.gradient(x, y, chosen)
    return threat.restrict(x, threat.argmax(gradient, x))


@attack(needs="gradient", norms="1, 2, inf")
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 40,
    step_size: float | None = None,
    schedule: str = "cosine",
    momentum: float = 0.0,
    random_start: bool = True,
    restarts: int = 1,
    stop_when_broken: bool = True,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """Projected gradient ascent from random starts; the best point on the path counts.

    δ ← project(δ + α·steepest(m)), m ← momentum·m + ∇/‖∇‖₁, where steepest(m) is the step of
    length ε in the threat's norm that gains most without pushing at a wall.

    Parameters
    ----------
    x, y : as for `fgsm`.
    loss : name, `Loss` or function. By default a classifier is attacked by its log-odds in the
        first half of the steps and by its margin in the second: all rivals at first, then the
        closest; a regressor by its squared error.
    steps : gradients a sample and restart; the last point costs one more forward pass.
    step_size : the first α, in units of ε; by default 2, and 4 for p = 1.
    schedule : ``"constant"``, or ``"cosine"``: at step k of n α is scaled by (1 + cos(πk/n))/2,
        and the last step, which would be of no length, goes to the argmax of the threat along
        the last gradient. On a linear model that is the exact worst case.
    random_start : start from `LpBall.sample`; if False only restarts after the first do. The
        first run of a regressor starts at x, where the sign of the error is the better guess.
    restarts : runs; each goes on with the samples that stand, and the best is kept. With the
        margin the run after the first heads for the closest rival class, the next for the
        second closest, and so on; with a regressor they head up and down in turn: an ascent
        seldom changes its direction on the way.
    stop_when_broken : drop a sample from the batch once it is misclassified; if False go on to
        the largest loss.
    generator : as for `LpBall.sample`. A seed or keys make the result independent of the batch.

    Returns
    -------
    (n, *shape), in the threat without tolerance; of no smaller loss than any point on its path,
    but for the rounding of `LpBall.restrict`.

    Notes
    -----
    Source: Madry et al. (2018); for the rival classes Gowal et al. (2019). Log-odds and margin
    keep their gradient where the logits are saturated and that of cross-entropy vanishes.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> threat = LpBall(2, 0.1, lower=0.0, upper=1.0)
    >>> x_adv = pgd(net, torch.full((1, 2), 0.5), torch.tensor([0]), threat)
    >>> bool(threat.contains(torch.full((1, 2), 0.5), x_adv))
    True
    """
    if steps < 1 or restarts < 1:
        raise InputError(f"steps and restarts start at 1; got {steps} and {restarts}")
    if schedule not in ("cosine", "constant"):
        raise InputError(f"schedule must be cosine or constant; got {schedule!r}")
    final = losses.get(loss, str(model.task))
    keys = _tensor.keys(generator, x)
    directions = _directions(model, x, y, final) if restarts > 1 else []
    climbs = [final] * steps
    if loss is None and final is losses.margin:
        climbs[: steps // 2] = [losses.soft_margin] * (steps // 2)
    first = (4.0 if threat.p == 1 else 2.0) if step_size is None else step_size
    sizes: list[float | None] = [first] * steps
    if schedule == "cosine":
        sizes = [first * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps - 1)]
        sizes.append(None)
    best, value = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    for restart in range(restarts):
        if len(rows) == 0:
            break
        held, around = threat.select(rows), x[rows]
        start = around
        if restart or (random_start and model.task == "classification"):
            start = around + held.sample(around, _tensor.fold(keys[rows], restart))
        goal = directions[(restart - 1) % len(directions)][rows] if restart and directions else None
        path = _Path(rows, around, y[rows], start, goal, momentum)
        left = _climb(model, path, held, final, climbs, sizes, stop_when_broken)
        for done in left:
            better = done.value > value[done.rows]
            better |= done.broken
            best[done.rows[better]] = done.best[better]
            value[done.rows[better]] = done.value[better]
        rows = left[-1].rows[~left[-1].broken]
    return threat.enclose(x, best)


class _Path:
    """Samples on their way, one row of every tensor each, and the best points they passed."""

    def __init__(
        self,
        rows: Tensor,
        x: Tensor,
        y: Tensor,
        start: Tensor,
        goal: Tensor | None,
        momentum: float,
    ) -> None:
        self.rows, self.x, self.y, self.point, self.goal = rows, x, y, start, goal
        self.best = x.clone()
        self.value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.momentum, self.velocity = momentum, torch.zeros_like(x) if momentum else None

    def record(self, value: Tensor, broken: Tensor | None) -> None:
        """Keep the better points; a break counts, whatever the loss says."""
        value = value.to(self.value.dtype)
        better = value > self.value
        self.value = torch.fmax(self.value, value)
        if broken is not None:
            self.broken, better = broken, better | broken
        torch.where(column(better, self.x), self.point, self.best, out=self.best)

    def part(self, index: Tensor) -> "_Path":
        """Return some of the samples."""
        piece = copy.copy(self)
        for name, held in vars(self).items():
            if isinstance(held, Tensor):
                setattr(piece, name, held[index])
        return piece

    def push(self, gradient: Tensor) -> Tensor:
        """Return the gradient, or with momentum a copy of the velocity that it adds to."""
        if self.velocity is None:
            return gradient
        self.velocity = self.momentum * self.velocity + _unit(gradient)
        return self.velocity.clone()


def _climb(
    model: Model,
    path: _Path,
    threat: LpBall,
    final: losses.Loss,
    climbs: list[losses.Loss],
    sizes: list[float | None],
    stop: bool,
) -> list[_Path]:
    """Ascend; return the samples in the groups in which they left, the last group last.

    ``climbs`` are what each step follows (the goal of the path, if it has one, comes first), and
    ``final`` is what counts. A size of None is the step to the argmax of the threat.
    """
    left = []
    step = _stepper(threat, path.x)
    for climb, size in zip([*climbs, None], [*sizes, None], strict=True):
        gradient = None
        if climb is None:  # the end of the last step
            output = model(path.point)
            value, _ = final.look(output, path.y)
        else:
            goal = climb if path.goal is None else _Along(path.goal, final)
            gradient, value, output = model.gradient(path.point, path.y, goal)
        broken = None
        if stop:  # the sign of the margin tells
            margin = final is losses.margin
            broken = value > 0 if margin else final.broken(output, path.y)
        path.record(value, broken)
        if gradient is None:
            break
        if stop and bool(path.broken.any()):
            going = (~path.broken).nonzero().squeeze(1)
            left.append(path.part(path.broken))
            path, gradient = path.part(going), gradient[going]
            if len(going) == 0:
                break
            threat = threat.select(going)
            step = _stepper(threat, path.x)
        path.point = step(path.point, path.push(gradient), size)
    return [*left, path]


def _stepper(threat: LpBall, x: Tensor) -> Step:
    """Return the step from a point along a direction around fixed x, which writes to neither.

    x + δ ← project(δ + size·steepest(direction)); a size of None is the argmax of the threat.
    """
    if math.isinf(threat.p):  # no feature takes anything from another
        low, high = threat.span(x)
        plain = isinstance(threat.eps, float) and threat.scale is None
        free = replace(threat, lower=None, upper=None, mask=None)
        unit = free.argmax(torch.ones_like(x)) if not plain else threat.eps

        def clipped(point: Tensor, direction: Tensor, size: float | None) -> Tensor:
            if size is None:
                point, size = x, 1.0
            if isinstance(unit, float):
                return torch.add(point, direction.sign_(), alpha=unit * size).clamp_(low, high)
            return torch.addcmul(point, direction.sign_(), unit, value=size).clamp_(low, high)

        return clipped

    project = threat.projector(x)

    def projected(point: Tensor, direction: Tensor, size: float | None) -> Tensor:
        if size is None:
            return x + threat.argmax(direction, x)
        if threat.p == 1:  # fill features up to their walls, or a step is spent on one stuck there
            move = replace(threat, eps=threat.eps * size).argmax(direction, point)
        else:  # features that stand at the wall they are pushed at are left out
            free = replace(threat, lower=None, upper=None, mask=None)
            move = free.argmax(threat.inward(direction, point)) * size
        return x + project(move.add_(point - x))

    return projected


def _directions(model: Model, x: Tensor, y: Tensor, loss: losses.Loss) -> list[Tensor]:
    """Weights (n, outputs) of the outputs that the restarts of an untargeted attack head for."""
    if loss in (losses.squared_error, losses.absolute_error):
        up = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return [up, -up]
    if loss is not losses.margin:
        return []
    output = model(x)
    order = output.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
    own = torch.zeros_like(output).scatter(1, y[:, None], 1.0)
    return [torch.zeros_like(own).scatter(1, rival[:, None], 1.0) - own for rival in order.T]


@dataclass(frozen=True, eq=False)
class _Along:
    """Climb ⟨direction, output⟩, and count by the final loss."""

    direction: Tensor
    final: losses.Loss

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective of the final loss, and the direction."""
        return self.final.objective(output, y), self.direction


def _unit(gradient: Tensor) -> Tensor:
    """∇/‖∇‖₁, by the largest entry first, so that neither huge nor tiny gradients are lost."""
    rows = flat(gradient)
    top = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(top > 0, top, 1)
    return (rows / rows.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient.shape)
