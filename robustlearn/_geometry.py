"""Rows of numbers against norms and caps: what threats and certificates share."""

import math

import torch
from torch import Tensor


def conjugate(p: float) -> float:
    """q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)


def row_norm(magnitude: Tensor, p: float) -> Tensor:
    """‖row‖_p of non-negative rows, for p = 0 the number of entries that are not zero.

    Powers of huge or tiny entries do not overflow or vanish.
    """
    if p in (0, 1) or math.isinf(p):
        return torch.linalg.vector_norm(magnitude, p, dim=1)
    top = magnitude.amax(1)
    safe = torch.where((top > 0) & top.isfinite(), top, 1)
    norm = safe * torch.linalg.vector_norm(magnitude / safe[:, None], p, dim=1)
    return torch.where(top.isinf(), torch.inf, norm)


def knapsack(gain: Tensor, room: Tensor | None, eps: Tensor) -> Tensor:
    """Spend ε on the coordinates of highest gain, each up to its room."""
    if room is None:
        first = gain.argmax(1, keepdim=True)
        worth = gain.gather(1, first) > 0
        return torch.zeros_like(gain).scatter(1, first, eps[:, None] * worth)
    by_gain, order = gain.sort(1, descending=True)
    space = room.gather(1, order)
    before = torch.nn.functional.pad(space.cumsum(1)[:, :-1], (1, 0))
    left = (eps[:, None] - before).clamp(min=0)
    spent = torch.where(by_gain > 0, torch.minimum(space, left), 0)
    return torch.zeros_like(gain).scatter(1, order, spent)


def largest(worth: Tensor, count: Tensor) -> Tensor:
    """Mark the ``count`` largest positive entries of each row, (n, d) bool; ties to the first."""
    order = worth.argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(worth.shape[1], device=worth.device).expand_as(order)
    ranked = torch.zeros_like(order).scatter(1, order, rank)
    return (ranked < count[:, None]) & (worth > 0)


def nearest_in_l0(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """min ‖u − size‖₂ over at most ε entries other than 0, 0 ≤ u ≤ room ≤ size.

    An entry that may move spares size² − (size − room)² = room·(2·size − room).
    """
    return torch.where(largest(room * (2 * size - room), eps.squeeze(1)), room, 0)


def crossing(gain: Tensor, room: Tensor, gap: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """min ‖u‖_p over Σ gainⱼuⱼ ≥ gap, 0 ≤ u ≤ room: the nearest point of a halfspace in a box.

    The maximiser of Σ gainⱼuⱼ in a ball (see `LpBall`) at the least radius that suffices: filled
    in the order of gain for p = 1 and of gain·room for p = 0, min(t, room) for p = ∞, and
    min(room, t·gain^(1/(p−1))) for 1 < p < ∞, with t as `level` finds it. Exact, O(d log d).

    Parameters
    ----------
    gain, room : (n, d), non-negative; ``room`` may be infinite.
    gap : (n,); where it is not positive, u is 0.

    Returns
    -------
    u (n, d), and (n,) bool whether it suffices; where not, u goes to the walls.
    """
    top = gain.amax(1, keepdim=True)
    safe = torch.where(top > 0, top, 1)
    gain, gap = gain / safe, (gap / safe.squeeze(1)).clamp(min=0)
    worth = torch.where(gain > 0, gain * room, 0)
    within = (worth.sum(1) >= gap) & ((gap == 0) | (top.squeeze(1) > 0))
    if p <= 1:
        order = gain.argsort(dim=1, descending=True, stable=True)
        if p == 0:
            by_worth = worth.gather(1, order).argsort(dim=1, descending=True, stable=True)
            order = order.gather(1, by_worth)
        taken, rate = worth.gather(1, order), gain.gather(1, order)
        before = torch.nn.functional.pad(taken.cumsum(1)[:, :-1], (1, 0))
        spent = torch.where(rate > 0, ((gap[:, None] - before) / rate).clamp(min=0), 0)
        u = torch.zeros_like(gain).scatter(1, order, spent)
    else:
        slope = torch.ones_like(gain) if math.isinf(p) else gain ** (1 / (p - 1))
        slope = torch.where(gain > 0, slope, 0)
        cap = torch.where(slope > 0, room / slope, torch.inf)
        t = level(gain * slope, cap, gap)[:, None]
        u = torch.where((slope > 0) & (gap > 0)[:, None], t * slope, 0)
    return torch.minimum(u, torch.where(gain > 0, room, 0)), within


def nearest_in_l2(size: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """min ‖u − size‖₂ over ‖u‖₂ ≤ ε, 0 ≤ u ≤ room: u = min(t·size, room) with t ≤ 1."""
    cap = (room / size).nan_to_num_(nan=math.inf, posinf=math.inf)
    t = level(size**2, cap**2, eps.squeeze(1) ** 2).sqrt().clamp(max=1)[:, None]
    return torch.minimum(t * size, room)


def nearest_in_l1(size: Tensor, room: Tensor, units: Tensor | None, eps: Tensor) -> Tensor:
    """min ‖u − size‖₂ over Σ wu ≤ ε, 0 ≤ u ≤ room, with w = 1/units: u = (size − τw) cut.

    The sum is piecewise linear in τ; it bends where a coordinate leaves its wall or zero.
    """
    weight = torch.ones_like(size) if units is None else (1 / units).expand_as(size)
    weight = torch.where(weight.isfinite(), weight, 0)  # a frozen feature: size is 0 there
    rate = weight**2
    zero_at = torch.where(weight > 0, size / weight, 0)
    wall_at = torch.where(weight > 0, (size - room) / weight, 0)
    bend, order = torch.cat([zero_at, wall_at], 1).sort(1, descending=True)
    change = torch.cat([rate, -rate], 1).gather(1, order)
    slope, offset = change.cumsum(1), (change * bend).cumsum(1)  # Σwu = offset − τ·slope
    spent = offset - bend * slope  # at each bend, rising as τ falls
    k = ((spent < eps).sum(1, keepdim=True) - 1).clamp(min=0)
    tau = (offset.gather(1, k) - eps) / slope.gather(1, k)
    tau = torch.where(slope.gather(1, k) > 0, tau, bend.gather(1, k)).clamp(min=0)
    return torch.minimum((size - tau * weight).clamp(min=0), room)


def nearest_in_ellipsoid(size: Tensor, room: Tensor, units: Tensor, eps: Tensor) -> Tensor:
    """min ‖u − size‖₂ over ‖u/units‖₂ ≤ ε, 0 ≤ u ≤ room: u = size/(1 + μ/units²) cut.

    ‖u/units‖ falls with μ; its root is bracketed and bisected in log μ down to rounding.
    """
    square = units.square()
    movable = square > 0

    def at(log_mu: Tensor) -> Tensor:
        shrunk = torch.where(movable, size / (1 + log_mu.exp() / square), 0)
        return torch.minimum(shrunk, room)

    biggest = (size.amax(1, keepdim=True) * units.amax() * size.shape[1]).clamp_min(1e-30)
    finfo = torch.finfo(size.dtype)
    smallest = square[movable].min() if bool(movable.any()) else square.new_ones(())
    low = torch.log(smallest * finfo.eps * finfo.eps).expand_as(eps).clone()
    high = torch.log(biggest / eps.clamp_min(finfo.tiny) + smallest)
    for _ in range(100):
        middle = (low + high) / 2
        spent = torch.where(movable, at(middle) / units, 0).square().sum(1, keepdim=True)
        low = torch.where(spent > eps**2, middle, low)
        high = torch.where(spent > eps**2, high, middle)
    return torch.where(eps > 0, at(high), 0)


def level(weight: Tensor, cap: Tensor, target: Tensor, sweeps: int = 12) -> Tensor:
    """Solve Σⱼ weightⱼ·min(t, capⱼ) = target for t ≥ 0, row by row.

    The left side is concave, increasing and piecewise linear in t, so Newton's method from
    below climbs to the solution without overshooting and ends on it exactly. A few O(d)
    sweeps settle most rows; one sort settles the rest, hence O(d log d) at worst.

    Parameters
    ----------
    weight, cap : (n, d), non-negative; ``cap`` may be infinite.
    target : (n,), non-negative.
    sweeps : Newton steps before the sort.

    Returns
    -------
    (n,) the level t; infinite where the left side stays below the target.
    """
    most = torch.finfo(cap.dtype).max
    worth = (weight * cap).nan_to_num_(nan=0.0, posinf=0.0)
    t = torch.where(target > 0, target / weight.sum(1), 0)
    for _ in range(sweeps):
        ahead = (cap - t[:, None]).sign_().clamp_(min=0)  # 1 or 0: `where` takes ten times as long
        free = (weight * ahead).sum(1)
        settled = (worth * ahead.neg_().add_(1)).sum(1)
        out_of_reach = torch.where(settled < target, most, t)
        risen = torch.where(free > 0, (target - settled) / free, out_of_reach).maximum(t)
        if torch.equal(risen, t):
            return torch.where(t < most, t, torch.inf)
        t = risen
    return _level_by_sorting(weight, cap, target)


def _level_by_sorting(weight: Tensor, cap: Tensor, target: Tensor) -> Tensor:
    """Solve as `level` does: the left side at every cap from prefix sums, then one segment."""
    cap, order = cap.sort(1)
    weight = weight.gather(1, order)
    part = torch.where(cap.isinf(), 0, weight * cap)
    # value of the coordinates that are capped earlier; not as a difference, which loses digits
    settled = torch.nn.functional.pad(part.cumsum(1)[:, :-1], (1, 0))
    free = weight.flip(1).cumsum(1).flip(1)  # slope of those that are not
    at_cap = torch.where(free > 0, settled + cap * free, settled)
    enough, k = (at_cap >= target[:, None]).max(1, keepdim=True)  # the first segment to reach it
    t = (target[:, None] - settled.gather(1, k)) / free.gather(1, k)
    t = torch.where(enough, t, torch.inf).squeeze(1)
    return torch.where(target > 0, t, 0)
