"""Minimal-norm attacks on a ball that shrinks while they succeed and grows while they fail."""

import math
from typing import Any

import torch
from torch import Tensor

from robustlearn._geometry import knapsack
from robustlearn.attacks._hunt import Hunt, cosine, unit
from robustlearn.attacks.base import attack
from robustlearn.models import Model
from robustlearn.threats import LpBall


@attack(needs="gradient", norms="2", minimal=True)
def ddn(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.2,
    rivals: int = 9,
    polish: int = 5,
) -> Tensor:
    """Decouple direction and norm: a normalised step, then back to a sphere of adapted radius.

    u ← r·w/‖w‖₂ cut at the walls, w = u + α·r·∇/‖∇‖₂, with r ← (1 − γ)r where u is adversarial
    and (1 + γ)r where not; u = δ / scale.

    Parameters
    ----------
    x, y, loss, polish : as for `deepfool`.
    steps : of one gradient each.
    step_size : the first α; it falls to a hundredth along a cosine.
    gamma : γ, share of the radius; it falls to 0.001 along a cosine.
    rivals : classes whose boundary, linearised at x, is looked at for the first step, of one
        gradient each.

    Returns
    -------
    As for `deepfool`.

    Notes
    -----
    Source: Rony et al. (2019). There the step is absolute, γ stays at 0.05, and the box is
    applied after the sphere; here the cut keeps the radius.

    Examples
    --------
    >>> net, x = torch.nn.Linear(2, 3), torch.full((1, 2), 0.5)
    >>> threat = LpBall(2, 5.0)
    >>> bool(threat.contains(x, ddn(net, x, net(x).argmax(1), threat)))
    True
    """
    hunt = Hunt(model, x, y, threat, loss)
    u, radius = _start(hunt, rivals)
    for step in hunt.rounds(steps):
        gradient, _, broken = hunt.look(u, hunt.all())
        change = cosine(gamma, 0.001, step, steps)
        radius = torch.where(broken, radius * (1 - change), radius * (1 + change))
        radius = torch.minimum(radius, hunt.reach.to(u.dtype))
        alpha = cosine(step_size, step_size / 100, step, steps)
        wish = u + alpha * radius[:, None] * unit(hunt.inward(gradient, u))
        u = hunt.stretch(wish, radius)
    return hunt.end(u, polish)


@attack(needs="gradient", norms="0, 1, 2, inf", minimal=True)
def fmn(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 100,
    step_size: float | None = None,
    gamma: float = 0.2,
    rivals: int = 9,
    polish: int = 5,
) -> Tensor:
    """Ascend within a ball whose radius follows the nearest adversarial point found.

    u ← project(u + the steepest step of ‖·‖_p = α·r) on ‖u‖_p ≤ r and the walls; where u is
    adversarial r ← (1 − γ)·min(r, ‖u_best‖), where not r ← (1 + γ)r, and before the first success
    ‖u‖ plus the distance to the boundary linearised at u; u = δ / scale.

    Parameters
    ----------
    x, y, loss, polish, rivals : as for `ddn`.
    steps : of one gradient each.
    step_size : the first α, by default 1, and 4 for p = 1; it falls to a hundredth along a
        cosine.
    gamma : γ, share of the radius (at least one feature for p = 0); it falls to 0.001 along a
        cosine.

    Returns
    -------
    As for `deepfool`.

    Notes
    -----
    Source: Pintor et al. (2021). There the step is absolute and along ∇/‖∇‖₂ for every p, γ is
    0.05, and the box is applied after the projection; here the projection on ball and box is
    exact. For p = 0 the step is ∇/‖∇‖₂ of length α·√r.

    Examples
    --------
    >>> net, x = torch.nn.Linear(2, 3), torch.full((1, 2), 0.5)
    >>> threat = LpBall(math.inf, 5.0)
    >>> bool(threat.contains(x, fmn(net, x, net(x).argmax(1), threat)))
    True
    """
    hunt = Hunt(model, x, y, threat, loss)
    u, radius = _start(hunt, rivals)
    first = (4.0 if hunt.p == 1 else 1.0) if step_size is None else step_size
    for step in hunt.rounds(steps):
        gradient, value, broken = hunt.look(u, hunt.all())
        change = cosine(gamma, 0.001, step, steps)
        radius = _followed(hunt, u, radius, gradient, value, broken, change)
        alpha = cosine(first, first / 100, step, steps)
        u = hunt.project(u + _steepest(hunt, u, gradient, alpha * radius), radius)
    return hunt.end(u, polish)


def _start(hunt: Hunt, rivals: int) -> tuple[Tensor, Tensor]:
    """Return the first u, across the nearest linearised boundary, and its norm (ε where u = 0)."""
    u, reach = hunt.open(rivals), hunt.reach.to(hunt.x.dtype)
    length = hunt.norm(u)
    radius = torch.where(length > 0, torch.minimum(length, reach), reach)
    return u, radius


def _followed(
    hunt: Hunt,
    u: Tensor,
    radius: Tensor,
    gradient: Tensor,
    value: Tensor,
    broken: Tensor,
    change: float,
) -> Tensor:
    """Return the next radius of `fmn`."""
    step, _ = hunt.cross(gradient, -value, hunt.all(), u)
    foreseen = hunt.norm(u) + hunt.norm(step)
    nearest = torch.minimum(radius, hunt.distance.to(radius.dtype))
    if hunt.p == 0:
        smaller = torch.minimum(nearest - 1, (nearest * (1 - change)).floor())
        larger = torch.maximum(radius + 1, (radius * (1 + change)).ceil())
    else:
        smaller, larger = nearest * (1 - change), radius * (1 + change)
    larger = torch.where(hunt.distance.isfinite(), larger, torch.maximum(foreseen, larger))
    return torch.minimum(torch.where(broken, smaller, larger), hunt.reach.to(radius.dtype))


def _steepest(hunt: Hunt, u: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
    """Return the step of ‖·‖_p = size that gains most; for p = 0 of ‖·‖₂ = √size, of any width."""
    inward = hunt.inward(gradient, u)
    if math.isinf(hunt.p):
        return size[:, None] * inward.sign()
    if hunt.p == 1:
        room = torch.where(gradient > 0, hunt.high - u, u - hunt.low)
        return knapsack(inward.abs(), room, size) * gradient.sign()
    return (size if hunt.p else size.sqrt())[:, None] * unit(inward)
