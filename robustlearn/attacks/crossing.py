"""Minimal-norm attacks that step to the boundary of the linearised classes."""

from typing import Any

import torch
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.attacks._hunt import Hunt, Toward
from robustlearn.attacks.base import attack
from robustlearn.models import Model
from robustlearn.registry import NOT_NEGATIVE, POSITIVE, Range
from robustlearn.threats import LpBall

DAMPINGS = 4  # halvings of a step that leads away from the boundary


@attack(needs="gradient", minimal=True, overshoot=NOT_NEGATIVE)
def deepfool(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 50,
    overshoot: float = 0.02,
    rivals: int = 9,
    polish: int = 5,
) -> Tensor:
    """Step across the nearest linearised class boundary until the class has changed.

    u ← u + (1 + overshoot)·argmin over rivals j of ‖v_j‖_p, v_j = argmin ‖v‖_p over
    ⟨∇(z_j − z_y)(u), v⟩ ≥ (z_y − z_j)(u) and u + v in the box, where u = δ / scale.

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels, or the classes to reach with ``targeted_margin``.
    loss : ``"margin"`` (by default) or ``"targeted_margin"``.
    steps : at most, each of as many gradients as there are rivals; a sample leaves once it has
        crossed.
    overshoot : share of each step that is added to it.
    rivals : of the other classes those of largest logit.
    polish : steps, of one gradient each, that draw the point found towards the boundary.

    Returns
    -------
    (n, *shape), in the threat without tolerance: the nearest adversarial point found, where it
    lies within ε; else the point of largest objective seen in the threat.

    Notes
    -----
    Source: Moosavi-Dezfooli, Fawzi and Frossard (2016), there without box. The step within the
    box is exact for each p ≥ 1 and for p = 0, so that it is the whole attack on linear models. A
    step after which the margin is no smaller is halved, up to four times.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> _ = net.weight.data.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]])), net.bias.data.zero_()
    >>> x_adv = deepfool(net, torch.tensor([[0.0, -1.0]]), torch.tensor([0]), LpBall(2, 1.0))
    >>> x_adv.round(decimals=2)  # 0.8 away, along the weights
    tensor([[ 0.4800, -0.3600]])
    """
    hunt = Hunt(model, x, y, threat, loss)
    goals = hunt.rivals(rivals)
    u, rows = torch.zeros_like(flat(hunt.x)), hunt.all()
    value = hunt.height.clone()
    for _ in range(steps):
        if len(rows) == 0:
            break
        step = (1 + overshoot) * _shortest(hunt, u[rows], rows, goals)
        u[rows], value[rows], broken = _damped(hunt, u[rows], step, value[rows], rows)
        rows = rows[~broken]
    return hunt.end(u, polish)


def _damped(
    hunt: Hunt, u: Tensor, step: Tensor, before: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Step, halving the step of a sample until the objective rises: u, objective, broken."""
    low, high = hunt.low[rows], hunt.high[rows]
    reached = (u + step).clamp(low, high)
    broken, value = hunt.measure(reached, rows)
    for halving in range(1, DAMPINGS + 1):
        back = ((value <= before) & ~broken).nonzero().squeeze(1)
        if len(back) == 0:
            break
        shorter = u[back] + step[back] / 2**halving
        reached[back] = shorter.clamp(low[back], high[back])
        broken[back], value[back] = hunt.measure(reached[back], rows[back])
    return reached, value, broken


def _shortest(hunt: Hunt, u: Tensor, rows: Tensor, goals: list[Toward | None]) -> Tensor:
    """Return the least step across one of the linearised boundaries; the farthest if none is."""
    best, shortest = torch.zeros_like(u), torch.full_like(u[:, 0], torch.inf)
    for goal in goals:
        gradient, value, _ = hunt.look(u, rows, goal and goal.at(rows))
        step, within = hunt.cross(gradient, -value, rows, u)
        length = torch.where(within, hunt.norm(step), torch.finfo(u.dtype).max)
        nearer = length < shortest
        shortest = torch.where(nearer, length, shortest)
        best = torch.where(nearer[:, None], step, best)
    return best


@attack(
    needs="gradient",
    norms="1, 2, inf",
    minimal=True,
    alpha_max=Range(0, 1, "[]"),
    eta=POSITIVE,
    beta=Range(0, 1, "[]"),
)
def fab(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 20,
    rivals: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    polish: int = 5,
) -> Tensor:
    """Go to the linearised boundary of one class after another, always drawn towards x.

    u ← (1 − α)(u + η·d) + α·η·d₀, where d leads from u and d₀ from x to the nearest point of
    the boundary linearised at u, in the box; α = min(‖d‖/(‖d‖ + ‖d₀‖), α_max). What is
    adversarial goes back: u ← β·u.

    Parameters
    ----------
    x, y, loss, polish : as for `deepfool`.
    steps : per rival, of one gradient and one forward pass.
    rivals : classes aimed at, one after another, in the order of their logits.
    alpha_max, eta, beta : the constants α_max, η and β.

    Returns
    -------
    As for `deepfool`.

    Notes
    -----
    Source: Croce and Hein (2020), in the targeted form of AutoAttack, there with 100 steps. The
    projections are exact in the box for p = 1, 2 and ∞, and before the first success a step after
    which the margin is no smaller is halved, up to four times.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 3)
    >>> x, threat = torch.full((1, 2), 0.5), LpBall(1, 5.0)
    >>> x_adv = fab(net, x, net(x).argmax(1), threat)
    >>> bool(threat.contains(x, x_adv))
    True
    """
    hunt = Hunt(model, x, y, threat, loss)
    u, rows, clean = torch.zeros_like(flat(hunt.x)), hunt.all(), hunt.height.clone()
    for goal in hunt.rivals(rivals):
        u, height = torch.zeros_like(u), clean
        for _ in range(steps):
            gradient, value, _ = hunt.look(u, rows, goal)
            onwards = _to_boundary(hunt, gradient, -value, rows, u)
            direct = _to_boundary(hunt, gradient, (gradient * u).sum(1) - value, rows)
            length, from_x = hunt.norm(onwards), hunt.norm(direct)
            bias = (length / (length + from_x)).nan_to_num(0).clamp(max=alpha_max)[:, None]
            step = (1 - bias) * (u + eta * onwards) + bias * eta * direct - u
            found = hunt.distance.isfinite()
            floor = torch.where(found, -torch.inf, height)  # any step will do
            u, height, broken = _damped(hunt, u, step, floor, rows)
            u = torch.where(broken[:, None], beta * u, u)
    return hunt.end(u, polish)


def _to_boundary(
    hunt: Hunt, gradient: Tensor, gap: Tensor, rows: Tensor, around: Tensor | None = None
) -> Tensor:
    """Return the least v with ⟨gradient, v⟩ = gap, of either sign."""
    sign = torch.where(gap < 0, -1, 1).to(gap.dtype)
    return hunt.cross(gradient * sign[:, None], gap.abs(), rows, around)[0]
