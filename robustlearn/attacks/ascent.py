"""What the ascents share: paths with their best points, runs, directions and steps."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from robustlearn import losses
from robustlearn._tensor import column, flat
from robustlearn.models import Model
from robustlearn.models.base import Objective
from robustlearn.threats import LpBall

UNTARGETED = (losses.margin, losses.soft_margin, losses.log_odds, losses.dlr, losses.scaled_margin)

Step = Callable[[Tensor, Tensor, float | None], Tensor]
Run = Callable[[int, Tensor], "list[Path]"]


class Rows:
    """An object whose tensors have one row a sample."""

    def part(self, index: Tensor) -> Self:
        """Return some of the samples."""
        piece = copy.copy(self)
        for name, held in vars(self).items():
            if isinstance(held, Tensor):
                setattr(piece, name, held[index])
        return piece


class Path(Rows):
    """Samples on their way, and the best points they passed."""

    def __init__(
        self, rows: Tensor, x: Tensor, y: Tensor, start: Tensor, goal: Tensor | None
    ) -> None:
        self.rows, self.x, self.y, self.point, self.goal = rows, x, y, start, goal
        self.best = x.clone()
        self.value = torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def record(self, seen: Tensor, value: Tensor, broken: Tensor | None) -> Tensor:
        """Keep the better points seen, tell which (n,); a break counts, whatever the loss says."""
        value = value.to(self.value.dtype)
        better = value > self.value
        self.value = torch.fmax(self.value, value)
        if broken is not None:
            self.broken, better = broken, better | broken
        torch.where(column(better, self.x), seen, self.best, out=self.best)
        return better

    def measure(self, model: Model, final: losses.Loss, *, stop: bool) -> None:
        """Look at the best points again: what counts is the final loss in full precision."""
        output = model(self.best)
        self.value = final.objective(output, self.y).to(self.value.dtype)
        if stop:
            self.broken = self.broken | final.broken(output, self.y)


def best_of(x: Tensor, runs: int, run: Run) -> Tensor:
    """Call ``run(r, rows)`` for r = 0, 1, … on the samples that stand; return the best points.

    A run returns its samples in groups, each with the best point and its value.
    """
    best, value = x.clone(), torch.full((len(x),), -torch.inf, dtype=x.dtype, device=x.device)
    rows = torch.arange(len(x), device=x.device)
    for number in range(runs):
        if len(rows) == 0:
            break
        left = run(number, rows)
        for done in left:
            better = (done.value > value[done.rows]) | done.broken
            best[done.rows[better]] = done.best[better]
            value[done.rows[better]] = done.value[better]
        rows = torch.cat([done.rows[~done.broken] for done in left]).sort().values
    return best


def sharp(loss: losses.Loss) -> losses.Loss:
    """Return a loss with the same order of points and directions of ascent, unsaturated.

    The cross-entropy is log(1 + eᵘ) of the log-odds u: it rises with u, and its gradient is that
    of u times σ(u), which vanishes where the logits are saturated.
    """
    return losses.log_odds if loss is losses.cross_entropy else loss


def confirmed(
    model: Model,
    seen: Tensor,
    y: Tensor,
    final: losses.Loss,
    broken: Tensor,
    precision: str | None,
) -> Tensor:
    """Of the samples that are broken in a low precision, keep those that are in full precision."""
    if precision is None or not bool(broken.any()):
        return broken
    rows = broken.nonzero().squeeze(1)
    agreed = final.broken(model(seen[rows]), y[rows])
    return broken.index_put((rows,), agreed)


def directions(model: Model, x: Tensor, y: Tensor, loss: losses.Loss) -> list[Tensor]:
    """Weights (n, outputs) of the outputs that the restarts of an untargeted attack head for."""
    if loss in (losses.squared_error, losses.absolute_error):
        up = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return [up, -up]
    if loss not in UNTARGETED:
        return []
    output = model(x)
    own = torch.zeros_like(output).scatter(1, y[:, None], 1.0)
    order = rivals(output, y)
    return [torch.zeros_like(own).scatter(1, rival[:, None], 1.0) - own for rival in order.T]


def rivals(output: Tensor, y: Tensor) -> Tensor:
    """Return the other classes in the order of their logits, the largest first, (n, K − 1)."""
    return output.scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]


@dataclass(frozen=True, eq=False)
class Along:
    """Climb ⟨direction, output⟩, and count by the final loss."""

    direction: Tensor
    final: Objective

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective of the final loss, and the direction."""
        return self.final.look(output, y)[0], self.direction.to(output.dtype)


def unwalled(threat: LpBall) -> LpBall:
    """Return the threat without its walls."""
    return replace(threat, lower=None, upper=None, mask=None)


def reach(threat: LpBall, x: Tensor) -> float | Tensor:
    """How far a feature may go by itself, walls aside: ε·scale, a number where that is one."""
    if isinstance(threat.eps, float) and threat.scale is None:
        return threat.eps
    return replace(unwalled(threat), p=math.inf).argmax(torch.ones_like(x))


def stepper(threat: LpBall, x: Tensor) -> Step:
    """Return the step from a point along a direction around fixed x, which may write to the last.

    x + δ ← project(δ + size·steepest(direction)); a size of None is the argmax of the threat.
    """
    if math.isinf(threat.p):  # no feature takes anything from another
        low, high = threat.span(x)
        unit = reach(threat, x)

        def clipped(point: Tensor, direction: Tensor, size: float | None) -> Tensor:
            if size is None:
                point, size = x, 1.0
            if isinstance(unit, float):
                return torch.add(point, direction.sign_(), alpha=unit * size).clamp_(low, high)
            return torch.addcmul(point, direction.sign_(), unit, value=size).clamp_(low, high)

        return clipped

    project, free, ball = threat.projector(x), unwalled(threat), threat.relaxed()

    def projected(point: Tensor, direction: Tensor, size: float | None) -> Tensor:
        if size is None:
            return x + threat.argmax(direction, x)
        if threat.p == 1:  # fill features up to their walls, or a step is spent on one stuck there
            move = replace(ball, eps=ball.eps * size).argmax(threat.inward(direction, point), point)
        else:  # features that stand at the wall they are pushed at are left out
            move = free.argmax(threat.inward(direction, point)) * size
        return x + project(move.add_(point - x))

    return projected


def unit(gradient: Tensor) -> Tensor:
    """∇/‖∇‖₁, by the largest entry first, so that neither huge nor tiny gradients are lost."""
    rows = flat(gradient)
    top = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(top > 0, top, 1)
    return (rows / rows.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient.shape)
