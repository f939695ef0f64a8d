"""Attacks that follow the gradient of a loss: one step, or many with projection."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn._tensor import flat
from robustlearn.attacks.base import attack
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.threats import LpBall


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
    gradient, _, _ = model.gradient(x, y, chosen.objective)
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
    x, y, loss : as for `fgsm`.
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
    Source: Madry et al. (2018); for the rival classes Gowal et al. (2019). The default loss is
    the margin: unlike cross-entropy it does not vanish where the logits are saturated.

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
    chosen = losses.get(loss, str(model.task))
    keys = _tensor.keys(generator, x)
    best = _Best(x, chosen, stop_when_broken)
    directions = _directions(model, x, y, chosen) if restarts > 1 else []
    first = (4.0 if threat.p == 1 else 2.0) if step_size is None else step_size
    for restart in range(restarts):
        rows = best.standing()
        if len(rows) == 0:
            break
        around, labels, held = x[rows], y[rows], threat.select(rows)
        goal = directions[(restart - 1) % len(directions)][rows] if restart and directions else None
        delta, velocity = torch.zeros_like(around), torch.zeros_like(around)
        if restart or (random_start and model.task == "classification"):
            delta = held.sample(around, _tensor.fold(keys[rows], restart))
        for step in range(steps):
            objective = chosen.objective if goal is None else _along(goal)
            gradient, value, output = model.gradient(around + delta, labels, objective)
            if goal is not None:
                value = chosen.objective(output, labels)
            going = best.record(rows, around + delta, value, output, labels)
            if going is not None:
                rows, around, labels = rows[going], around[going], labels[going]
                delta, velocity, gradient = delta[going], velocity[going], gradient[going]
                held = held.select(going)
                if len(rows) == 0:
                    break
                goal = None if goal is None else goal[going]
            velocity = gradient if momentum == 0 else momentum * velocity + _unit(gradient)
            if schedule == "cosine" and step == steps - 1:
                delta = held.argmax(velocity, around)
                continue
            wave = (1 + math.cos(math.pi * step / steps)) / 2 if schedule == "cosine" else 1.0
            move = _steepest(held, velocity, around + delta, first * wave)
            delta = held.project(delta + move, around)
        if len(rows):
            output = model(around + delta)
            best.record(rows, around + delta, chosen.objective(output, labels), output, labels)
    return threat.restrict(x, best.point - x)


class _Best:
    """The best point so far of every sample, and which samples stand."""

    def __init__(self, x: Tensor, loss: losses.Loss, stop: bool) -> None:
        self.loss, self.stop = loss, stop
        self.point = x.clone()
        self.value = torch.full((len(x),), -torch.inf, device=x.device, dtype=x.dtype)
        self.broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)

    def standing(self) -> Tensor:
        """Rows that are still to be attacked."""
        return (~self.broken).nonzero().squeeze(1)

    def record(
        self, rows: Tensor, point: Tensor, value: Tensor, output: Tensor, y: Tensor
    ) -> Tensor | None:
        """Keep what is better; return which of the rows go on, or None for all of them."""
        better = value > self.value[rows]
        broken = self.loss.broken(output, y) if self.stop else torch.zeros_like(better)
        better |= broken  # a break counts, whatever the loss says
        everyone = len(rows) == len(self.point)
        kept = self.point if everyone else self.point[rows]
        kept = torch.where(better.reshape(-1, *[1] * (point.dim() - 1)), point, kept)
        if everyone:
            self.point = kept
        else:
            self.point[rows] = kept
        self.value[rows] = torch.where(better, value.to(self.value.dtype), self.value[rows])
        if not bool(broken.any()):
            return None
        self.broken[rows] |= broken
        return (~broken).nonzero().squeeze(1)


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


def _along(direction: Tensor) -> Any:
    """⟨direction, output⟩ per sample."""
    return lambda output, y: (direction * output).reshape(len(y), -1).sum(1)


def _unit(gradient: Tensor) -> Tensor:
    """∇/‖∇‖₁, by the largest entry first, so that neither huge nor tiny gradients are lost."""
    rows = flat(gradient)
    top = rows.abs().amax(1, keepdim=True)
    rows = rows / torch.where(top > 0, top, 1)
    return (rows / rows.abs().sum(1, keepdim=True).clamp_min(1)).reshape(gradient.shape)


def _steepest(threat: LpBall, gradient: Tensor, point: Tensor, size: float) -> Tensor:
    """Return the step of length size·ε in the threat's norm that gains most.

    For p = 1 the walls around the present point count, or the step would be spent on a feature
    that cannot move; for p = 2 features at a wall are left out; for p = ∞ no feature takes
    anything from another, so the projection alone is enough.
    """
    longer = replace(threat, eps=threat.eps * size)
    if threat.p == 1:
        return longer.argmax(gradient, point)
    if threat.p == 2 and (walls := threat._walls(gradient, point)) is not None:
        rows = flat(gradient)
        rows = torch.where(torch.where(rows > 0, walls[1], walls[0]) == 0, 0, rows)
        gradient = rows.reshape(gradient.shape)
    free = replace(longer, lower=None, upper=None)
    return free.argmax(gradient)
