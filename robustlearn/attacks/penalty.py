"""Minimal-norm attacks that weigh the distance against the loss."""

from typing import Any

import torch
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.attacks._hunt import Hunt, cosine
from robustlearn.attacks.base import attack
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.registry import NOT_NEGATIVE, Range
from robustlearn.threats import LpBall

BETAS = 0.9, 0.999  # of Adam
TINY = 1e-8  # what Adam adds to its divisor
SMOOTH = 1e-3  # σ of the smooth count, in widths of the box, squared


@attack(needs="gradient", norms="2", minimal=True, confidence=NOT_NEGATIVE)
def carlini_wagner(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 40,
    searches: int = 4,
    step_size: float = 0.03,
    confidence: float = 0.0,
    rivals: int = 9,
    polish: int = 5,
) -> Tensor:
    """Minimise the squared distance and c times the hinge of the margin; c is searched for.

    min over u in the box of ‖u/r‖₂² + c·max(0, confidence + margin/margin₀), u = δ / scale, by
    Adam with projection; r is the distance to the boundary linearised at x and margin₀ the
    margin there, so that c = 2 is the threshold of a linear model, whatever its gain. c is
    multiplied by five until the first success, and then bisected.

    Parameters
    ----------
    x, y, loss, polish, rivals : as for `ddn`.
    steps : per search, of one gradient each.
    searches : values of c.
    step_size : of Adam, in units of r; it falls to a hundredth along a cosine, and is doubled
        after each search without any success.
    confidence : share of the clean margin by which the boundary is to be passed.

    Returns
    -------
    As for `deepfool`.

    Notes
    -----
    Source: Carlini and Wagner (2017). Their change of variable, tanh, cannot move a feature that
    stands at a wall; the projection can.

    Examples
    --------
    >>> net, x = torch.nn.Linear(2, 3), torch.tensor([[0.0, 1.0]])
    >>> threat = LpBall(2, 5.0, lower=0.0, upper=1.0)
    >>> bool(threat.contains(x, carlini_wagner(net, x, net(x).argmax(1), threat)))
    True
    """
    hunt = Hunt(model, x, y, threat, loss)
    first = hunt.open(rivals)
    length = hunt.norm(first)
    length = torch.where(length > 0, length, hunt.reach.to(length.dtype).clamp_min(1e-12))
    c, rate = torch.full_like(length, 4.0), torch.full_like(length, step_size)
    low, high = torch.zeros_like(c), torch.full_like(c, torch.inf)
    u = torch.zeros_like(first)
    for _ in hunt.rounds(searches):
        u, won = _descent(hunt, c, length, steps, rate, confidence)
        rate = torch.where(hunt.distance.isinf(), 2 * rate, rate)
        low, high = torch.where(won, low, c), torch.where(won, c, high)
        c = torch.where(high.isinf(), 5 * c, (low + high) / 2)
    return hunt.end(u, polish)


def _descent(
    hunt: Hunt, c: Tensor, length: Tensor, steps: int, rate: Tensor, confidence: float
) -> tuple[Tensor, Tensor]:
    """Minimise for one c per sample; return the last u, and whether any point was adversarial."""
    rows, length = hunt.all(), length[:, None]
    u = torch.zeros_like(flat(hunt.x))
    adam = _Adam()
    won, start = torch.zeros_like(c, dtype=torch.bool), None
    for step in range(steps):
        gradient, value, broken = hunt.look(u, rows)
        start = value.abs().clamp_min(torch.finfo(value.dtype).tiny) if start is None else start
        short = (value / start < confidence)[:, None]
        pull = torch.where(short, (c / start)[:, None] * gradient * length, 0)
        slope = 2 * u / length - pull
        won |= broken
        width = rate[:, None] * length * cosine(1, 0.01, step, steps)
        u = (u - width * adam.step(slope)).clamp(hunt.low, hunt.high)
    return u, won | hunt.test(u, rows)


@attack(
    needs="gradient", norms="0", minimal=True, threshold=Range(0, 1, "[]"), change=Range(0, 1, "[]")
)
def sigma_zero(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 200,
    step_size: float = 1.0,
    threshold: float = 0.3,
    change: float = 0.01,
    rivals: int = 9,
    polish: int = 5,
) -> Tensor:
    """Descend the margin and a smooth count of changed features; small changes are set to zero.

    Σ u²/(u² + σ)/d + max(0, margin), by Adam on normalised slopes in u = δ / width of the
    box, and after each step u ← 0 where |u| < τ; τ rises while u is adversarial, else it falls.

    Parameters
    ----------
    x, y, loss, polish, rivals : as for `ddn`.
    steps : of one gradient each.
    step_size : the first α, of the largest entry of u; it falls to a tenth along a cosine.
    threshold : the first τ.
    change : what τ changes by, times α.

    Returns
    -------
    As for `deepfool`.

    Raises
    ------
    InputError for a threat without both walls.

    Notes
    -----
    Source: Cinà et al. (2025). There the margin enters by its value, so that its weight depends
    on the gain of the logits; here by its gradient over its largest entry.

    Examples
    --------
    >>> net, x = torch.nn.Linear(2, 3), torch.tensor([[0.0, 1.0]])
    >>> threat = LpBall(0, 1, lower=0.0, upper=1.0)
    >>> bool(threat.contains(x, sigma_zero(net, x, net(x).argmax(1), threat)))
    True
    """
    hunt = Hunt(model, x, y, threat, loss)
    if threat.lower is None or threat.upper is None:
        raise InputError("sigma_zero counts in widths of the box: give lower and upper")
    u, rows, adam = torch.zeros_like(hunt.open(rivals)), hunt.all(), _Adam()
    tau = torch.full_like(u[:, :1], threshold)
    for step in hunt.rounds(steps):
        alpha = cosine(step_size, step_size / 10, step, steps)
        gradient, _, broken = hunt.look(u, rows)
        broken = broken[:, None]
        count = 2 * SMOOTH * u / (u.square() + SMOOTH).square() / u.shape[1]
        slope = count - torch.where(broken, 0, _by_largest(gradient))
        u = (u - alpha * adam.step(_by_largest(slope))).clamp(hunt.low, hunt.high)
        tau = torch.where(broken, tau + change * alpha, tau - change * alpha).clamp(0, 1)
        u = torch.where(u.abs() < tau, 0, u)
    return hunt.end(u, polish)


class _Adam:
    """Running means of slopes and of their squares, and the step that they make."""

    def __init__(self) -> None:
        self.steps, self.mean, self.square = 0, torch.zeros(()), torch.zeros(())

    def step(self, slope: Tensor) -> Tensor:
        """Return mean/√square, both freed from the bias of their start at 0."""
        self.steps += 1
        self.mean = BETAS[0] * self.mean.to(slope) + (1 - BETAS[0]) * slope
        self.square = BETAS[1] * self.square.to(slope) + (1 - BETAS[1]) * slope.square()
        size = (self.square / (1 - BETAS[1] ** self.steps)).sqrt()
        return self.mean / (1 - BETAS[0] ** self.steps) / (size + TINY)


def _by_largest(rows: Tensor) -> Tensor:
    top = rows.abs().amax(1, keepdim=True)
    return rows / torch.where(top > 0, top, 1)
