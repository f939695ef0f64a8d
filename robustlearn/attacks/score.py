"""Attacks that only ask for outputs: for black boxes, and for networks whose gradient lies."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn._tensor import column, flat, per_sample
from robustlearn.attacks.base import attack
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.registry import NOT_NEGATIVE, POSITIVE
from robustlearn.threats import LpBall

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries
SLACK = 1e-6  # of ε, left to the rounding of a float32 length: no projection is then needed
TILES = 5  # along a side of the image that the L2 search starts from

Walls = tuple[Tensor, Tensor]  # of the threat around x, as `LpBall.span` has them
Move = Callable[[LpBall, Tensor, Walls, Tensor, Tensor, float], Tensor]


@attack(needs="scores", norms="0, 1, 2, inf")
def square(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    queries: int = 1000,
    share: float = 0.8,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """Random search over blocks or sets of features, keeping what raises the loss.

    x_adv ← x_adv + m if that raises the loss, where the random move m stays in the threat and
    changes a share of the features, which is halved as the search goes on:

    - images, p = ∞: a square goes to one random corner of the budget per channel;
    - images, p = 2: a square gets a pattern of two hills, paid by what another square spent;
    - images, p = 1: a square gets one random sign per channel, and the sum is projected;
    - p = 0, images or not: ⌊ε⌋ features stand at one of their walls; a share of them goes back
      to x, and as many random others go to a random wall;
    - other samples: random features that can move go to the `argmax` of a random direction,
      with the budget that is left once as many moved features went back to x (p < ∞).

    Parameters
    ----------
    x, y, loss : as for `fgsm`.
    queries : forward passes a sample, at most; the first is for x itself.
    share : first share of the features in a block, for p = 0 of the ⌊ε⌋.
    generator : as for `LpBall.sample`.

    Returns
    -------
    (n, *shape), in the threat without tolerance. Samples leave when they are broken.

    Raises
    ------
    InputError for p = 0 without both walls.

    Notes
    -----
    Source: Andriushchenko et al. (2020), with their schedule, stripes and hills (section 3.3);
    for p = 0 Croce et al. (2022), who change whole pixels and colours with a slower schedule.
    Their search may draw a square that stands at its corner already, and waste the query; here
    its sign is turned. Their first square for p = 2 is a tenth of the image; here ``share`` is
    one for all, as in AutoAttack.

    Examples
    --------
    >>> threat = LpBall(float("inf"), 0.5)
    >>> x, y = torch.zeros(1, 3), torch.tensor([0])
    >>> square(lambda a: a @ ([[1, -1]] * 3), x, y, threat, queries=20)  # a black box
    tensor([[-0.5000, -0.5000, -0.5000]])
    """
    chosen = losses.get(loss, str(model.task))
    keys = _tensor.keys(generator, x)
    start, move = moves(threat, x)
    best = x.clone()
    output = model(x)
    value = chosen.objective(output, y)
    rows = (~chosen.broken(output, y)).nonzero().squeeze(1)
    held, around = threat.select(rows), x[rows]
    low, high = held.span(around)
    for query in range(queries - 1):
        if len(rows) == 0:
            break
        walls, now = (low, high), _tensor.fold(keys[rows], query)
        part = share_at(share, query, queries)
        wish = (move if query else start)(held, around, walls, best[rows] - around, now, part)
        free = math.isinf(held.p) and held.convex  # no feature takes anything from another
        point = (around + wish).clamp(*walls) if free else held.restrict(around, wish)
        output = model(point)
        reached = chosen.objective(output, y[rows]).to(value.dtype)
        broken = chosen.broken(output, y[rows])
        better = (reached > value[rows]) | broken
        best[rows[better]], value[rows[better]] = point[better], reached[better]
        if bool(broken.any()):
            left = ~broken
            rows, around, low, high = (part[left] for part in (rows, around, low, high))
            held = threat.select(rows)
    return best


def share_at(first: float, query: int, queries: int) -> float:
    """Return the share of the features in a block: halved as the search goes on."""
    passed = sum(query * 10_000 / queries > mark for mark in HALVINGS)
    return first / 2**passed


def _is_image(x: Tensor) -> bool:
    return x.dim() >= 3 and min(x.shape[-2:]) > 1


def moves(threat: LpBall, x: Tensor) -> tuple[Move, Move]:
    """Return the first move and the others: (threat, x, walls, δ, keys, share) -> wished-for δ."""
    if threat.p == 0:
        return _scatter, _swap
    if not _is_image(x):
        return _refill_all, _refill
    if math.isinf(threat.p):
        return _stripes, _corner_square
    return (_tiles, _exchange) if threat.p == 2 else (_stripes, _shared_square)


def _signs(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.where(_tensor.uniform(keys, shape, dtype) < 0.5, -1.0, 1.0).to(dtype)


# ---------------------------------------------------------------------- images


def _extent(threat: LpBall, like: Tensor) -> Tensor:
    """The largest change of each feature alone, (n, *shape), were there no wall."""
    alone = replace(threat, p=float("inf"), lower=None, upper=None)
    return alone.argmax(torch.ones_like(like))


def _stripes(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """Random signs times the budget, constant along the columns of an image."""
    shape = (*x.shape[1:-2], 1, x.shape[-1])
    return _signs(keys, shape, x.dtype) * _extent(threat, x)


def _window(x: Tensor, keys: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random square of each image: (n, height, width) bool, and the coordinates in it.

    Returns
    -------
    inside, and for each row (n, height) and column (n, width) its number in the square, cut to it.
    """
    height, width = x.shape[-2:]
    corner = _tensor.uniform(keys, (2,), torch.float64)
    down, right = (
        torch.arange(size, device=x.device)[None] - (draw * (size - side + 1)).long()[:, None]
        for size, draw in ((height, corner[:, 0]), (width, corner[:, 1]))
    )
    rows, columns = ((at >= 0) & (at < side) for at in (down, right))
    inside = rows[:, :, None] & columns[:, None, :]
    return inside, down.clamp(0, side - 1), right.clamp(0, side - 1)


def _side(x: Tensor, share: float) -> int:
    height, width = x.shape[-2:]
    return min(max(1, round((share * height * width) ** 0.5)), height, width)


def _block(x: Tensor, keys: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """A random square of each image, (n, *shape) bool, and one random sign per channel."""
    inside, _, _ = _window(x, _tensor.fold(keys, 0), _side(x, share))
    inside = inside.reshape(len(x), *[1] * (x.dim() - 3), *x.shape[-2:]).expand(x.shape)
    return inside, _signs(_tensor.fold(keys, 1), (*x.shape[1:-2], 1, 1), x.dtype)


def _corner_square(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """For p = ∞: the square goes to a corner of the budget, to the other one if it is there."""
    inside, signs = _block(x, keys, share)
    low, high = walls
    corner, share_in = torch.lerp(low, high, (signs + 1) / 2), inside.to(x.dtype)
    moved = torch.lerp(present, corner - x, share_in)  # `where` takes ten times as long
    idle = flat(moved == present).all(1).nonzero().squeeze(1)
    other = torch.lerp(low[idle], high[idle], (1 - signs[idle]) / 2) - x[idle]
    moved[idle] = torch.lerp(present[idle], other, share_in[idle])
    return moved


def _shared_square(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """For p = 1: the square shares the budget evenly; the projection weighs it against the rest."""
    inside, signs = _block(x, keys, share)
    size = per_sample(flat(inside).sum(1).to(x.dtype), x)
    return torch.where(inside, signs * _extent(threat, x) / size, present)


def _hill(height: int, width: int, like: Tensor) -> Tensor:
    """Σ_{j > r} 1/j² at Chebyshev distance r from the centre: a pyramid with a sharp top."""
    down = (torch.arange(height, device=like.device) - height // 2).abs()
    right = (torch.arange(width, device=like.device) - width // 2).abs()
    distance = torch.maximum(down[:, None], right[None])
    steps = 1 / torch.arange(1, int(distance.max()) + 2, device=like.device) ** 2
    return steps.flip(0).cumsum(0).flip(0)[distance].to(like.dtype)


def _hills(side: int, like: Tensor) -> Tensor:
    """Two hills of opposite signs, one above the other, (side, side)."""
    half = side // 2
    lower = _hill(side - half, side, like)
    return torch.cat([_hill(half, side, like), -lower]) if half else lower


def _tiles(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """For p = 2: a grid of hills with random signs, of the length of the budget."""
    height, width = x.shape[-2:]
    side = max(1, min(height, width) // TILES)
    down, right = (torch.arange(size, device=x.device) for size in (height, width))
    pattern = _hill(side, side, x)[down % side][:, right % side]
    shape = (*x.shape[1:-2], -(-height // side), -(-width // side))
    signs = _signs(keys, shape, x.dtype)[..., down // side, :][..., right // side]
    grown = signs * pattern * _extent(threat, x)
    return grown / per_sample(threat.norm(grown).clamp_min(1e-30), x) * per_sample(threat.eps, x)


def _exchange(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """For p = 2: hills are added to one square, with the length that another square gives up.

    In units of scale u = δ/scale, per channel of C: u₁ ← a·t/‖t‖ and u₂ ← 0, where
    t = ±hills/‖hills‖ + u₁/‖u₁‖ and a² = ‖u₁ ∪ u₂‖² + (ε² − ‖u‖²)/C.
    """
    unit = _extent(threat, x) / per_sample(threat.eps, x).clamp_min(1e-30)
    shape = (len(x), -1, *x.shape[-2:])
    unit = unit.reshape(shape)
    spent = torch.where(unit > 0, present.reshape(shape) / unit, 0)
    side = min(max(3, _side(x, share) // 2 * 2 + 1), *x.shape[-2:])
    first, down, right = _window(x, _tensor.fold(keys, 0), side)
    second, _, _ = _window(x, _tensor.fold(keys, 1), side)
    first, second = first[:, None], second[:, None]
    turn = (_tensor.uniform(_tensor.fold(keys, 2), (1,), x.dtype) < 0.5)[..., None]
    hills = _hills(side, x)
    hills = torch.where(
        turn, hills[down[:, :, None], right[:, None]], hills.T[down[:, :, None], right[:, None]]
    )
    signs = _signs(_tensor.fold(keys, 3), (spent.shape[1], 1, 1), x.dtype)
    grown = _unit(hills[:, None] * first * signs * (unit > 0)) + _unit(spent * first)
    eps = per_sample(threat.eps, spent) * (1 - SLACK)
    unused = (eps**2 - _length(spent, (1, 2, 3)) ** 2).clamp(min=0)
    given = _length(spent * (first | second)) ** 2 + unused / spent.shape[1]
    moved = torch.where(first, _unit(grown) * given.sqrt(), torch.where(second, 0, spent))
    low, high = walls
    return (moved * unit).reshape(x.shape).clamp(low - x, high - x)


def _length(x: Tensor, over: tuple[int, ...] = (2, 3)) -> Tensor:
    return torch.linalg.vector_norm(x, dim=over, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """x/‖x‖₂ per channel, zero where x is."""
    return x / _length(x).clamp_min(torch.finfo(x.dtype).tiny)


# ---------------------------------------------------------------------- sets of features, p = 0


def _scatter(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """⌊ε⌋ random features go to a random wall."""
    return _swap(threat, x, walls, torch.zeros_like(x), keys, 1.0)


def _swap(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """Some of the changed features go back to x, and random ones to a random wall instead."""
    low, high = walls
    if not bool((low.isfinite() & high.isfinite()).all()):
        raise InputError("p = 0 bounds no change by itself: give the threat lower and upper")
    most = per_sample(threat.eps, x.double()).reshape(-1).expand(len(x)).floor()
    count = (share * most).round().clamp(min=1)
    released = threat.tied(_some(flat(present) != 0, count, _tensor.fold(keys, 0)).reshape(x.shape))
    kept = torch.where(released, 0, present)
    number = most - threat.norm(kept.double())
    free = flat((low < high) & (kept == 0))
    others = free & ~flat(released)
    free = torch.where((others.sum(1) < number)[:, None], free, others)
    chosen = threat.tied(_some(free, number, _tensor.fold(keys, 1)).reshape(x.shape))
    up = _tensor.uniform(_tensor.fold(keys, 2), tuple(x.shape[1:]), x.dtype) < 0.5
    up = (low == x) | (up & (high != x))  # not to where x stands
    return torch.where(chosen, torch.where(up, high, low) - x, kept)


# ---------------------------------------------------------------------- rows of features


def _refill_all(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """A random extreme member."""
    return threat.argmax(_direction(walls, keys), x)


def _refill(
    threat: LpBall, x: Tensor, walls: Walls, present: Tensor, keys: Tensor, share: float
) -> Tensor:
    """Some features go to the argmax of a random direction, others give back what they spent."""
    movable = _movable(walls)
    count = (share * movable.sum(1)).round().clamp(min=1).long()
    chosen = threat.tied(_some(movable, count, _tensor.fold(keys, 0)).reshape(x.shape))
    released = chosen
    if not math.isinf(threat.p):
        given = _some(flat(present) != 0, count, _tensor.fold(keys, 1)).reshape(x.shape)
        released = chosen | threat.tied(given)
    kept = torch.where(released, 0, present)
    left = replace(threat, eps=_left(threat, kept))
    direction = torch.where(chosen, _direction(walls, _tensor.fold(keys, 2)), 0)
    moved = kept + left.argmax(direction, x)
    idle = flat(moved == present).all(1)
    if bool(idle.any()):
        moved = torch.where(column(idle, x), kept + left.argmax(-direction, x), moved)
    return moved


def _movable(walls: Walls) -> Tensor:
    low, high = walls
    return flat(low < high)


def _direction(walls: Walls, keys: Tensor) -> Tensor:
    """Random signs and sizes, in units of what each feature may change; zero if it may not."""
    low, high = walls
    drawn = 2 * _tensor.uniform(keys, tuple(low.shape[1:]), low.dtype) - 1
    return torch.where(low < high, drawn / (high - low), 0)


def _some(among: Tensor, count: Tensor, keys: Tensor) -> Tensor:
    """Return ``count`` random features of those that are True, (n, d) bool."""
    draw = _tensor.uniform(keys, (among.shape[1],), torch.float64).masked_fill(~among, 2)
    rank = draw.argsort(1).argsort(1)
    return among & (rank < count[:, None])


def _left(threat: LpBall, kept: Tensor) -> Tensor:
    """(ε^p − ‖kept‖^p)^(1/p): what others may spend; ε itself for p = ∞."""
    eps = per_sample(threat.eps, kept.double()).reshape(-1).expand(len(kept))
    if math.isinf(threat.p):
        return eps
    share = threat.norm(kept.double()) / eps.clamp_min(torch.finfo(eps.dtype).tiny)
    return eps * (1 - share**threat.p).clamp(min=0) ** (1 / threat.p)


# ---------------------------------------------------------------------- estimated gradients


@attack(needs="scores", norms="1, 2, inf", radius=POSITIVE, momentum=NOT_NEGATIVE)
def nes(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    queries: int = 1000,
    directions: int = 10,
    radius: float = 0.1,
    noise: str = "normal",
    momentum: float = 0.5,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """Gradient ascent whose gradient is estimated from outputs at mirrored random points.

    g = 1/(2m) Σᵢ (f(x_adv + r·uᵢ) − f(x_adv − r·uᵢ)) uᵢ, v ← momentum·v + g/‖g‖₁,
    x_adv ← project(x_adv + α·steepest(v)); α falls from 2ε to 0 as a cosine, and the best point
    on the path counts.

    Parameters
    ----------
    x, y, loss : as for `fgsm`.
    queries : forward passes a sample, at most; a step takes 2·directions + 1 of them, in one
        batch of 2·directions copies.
    directions : m, random directions a step.
    radius : r, in units of what each feature may change. Larger for models with steps (trees).
    noise : ``"normal"`` (natural evolution strategies), or ``"signs"``: u = ±1, SPSA.
    momentum : share of the last direction that is kept: it averages the noise.
    generator : as for `LpBall.sample`.

    Returns
    -------
    (n, *shape), in the threat without tolerance. Samples leave when they are broken.

    Notes
    -----
    Source: Ilyas et al. (2018), and Uesato et al. (2018) for signs. Probes are cut to the box.

    Examples
    --------
    >>> threat = LpBall(float("inf"), 0.5)
    >>> x, y = torch.zeros(1, 3), torch.tensor([0])
    >>> nes(lambda a: a @ ([[1, -1]] * 3), x, y, threat, queries=50)
    tensor([[-0.5000, -0.5000, -0.5000]])
    """
    if noise not in ("normal", "signs"):
        raise InputError(f"noise must be normal or signs; got {noise!r}")
    if queries < 2 * directions + 2:
        raise InputError(
            f"a step takes {2 * directions + 1} queries and x takes one; got {queries} in all"
        )
    chosen = losses.get(loss, str(model.task))
    keys = _tensor.keys(generator, x)
    steps = (queries - 1) // (2 * directions + 1)
    best, point, velocity = x.clone(), x.clone(), torch.zeros_like(x)
    output = model(x)
    value = chosen.objective(output, y)
    rows = (~chosen.broken(output, y)).nonzero().squeeze(1)
    for k in range(steps):
        if len(rows) == 0:
            break
        held, around, here, now = threat.select(rows), x[rows], point[rows], _tensor.fold(keys, k)
        reach = torch.where(_movable_where(held, around), _extent(held, around), 0)
        probes = _mirrored(held, around, here, now[rows], directions, radius * reach, noise)
        rise = _rise(model, chosen, probes, y[rows])
        gradient = torch.einsum("mn,mn...->n...", rise, probes[0] - probes[1])
        gradient = torch.where(reach > 0, gradient / reach**2, 0)
        velocity[rows] = momentum * velocity[rows] + gradient / per_sample(
            flat(gradient).abs().sum(1).clamp_min(torch.finfo(x.dtype).tiny), x
        )
        size = 1 + math.cos(math.pi * k / steps)
        free = replace(held, lower=None, upper=None)
        moved = here - around + size * free.argmax(held.inward(velocity[rows], here))
        point[rows] = here = held.restrict(around, held.project(moved, around))
        output = model(here)
        reached = chosen.objective(output, y[rows]).to(value.dtype)
        broken = chosen.broken(output, y[rows])
        better = (reached > value[rows]) | broken
        best[rows[better]], value[rows[better]] = here[better], reached[better]
        rows = rows[~broken]
    return best


def _movable_where(threat: LpBall, x: Tensor) -> Tensor:
    return _movable(threat.span(x)).reshape(x.shape)


def _mirrored(
    threat: LpBall,
    x: Tensor,
    point: Tensor,
    keys: Tensor,
    directions: int,
    radius: Tensor,
    noise: str,
) -> Tensor:
    """Return points on both sides of ``point``, cut to the box: (2, directions, n, *shape)."""
    shape = (directions, *x.shape[1:])
    drawn = (_tensor.normal if noise == "normal" else _signs)(keys, shape, x.dtype)
    drawn = drawn.transpose(0, 1) * radius
    low, high = replace(threat, eps=threat.eps * 1e6).span(x)
    return torch.stack([point + drawn, point - drawn]).clamp(low, high)


def _rise(model: Model, loss: losses.Loss, probes: Tensor, y: Tensor) -> Tensor:
    """Return the objective's differences (directions, n) between mirrored points, in one batch."""
    sides, directions, n = probes.shape[:3]
    output = model(probes.reshape(sides * directions * n, *probes.shape[3:]))
    value = loss.objective(output, y.repeat(sides * directions)).reshape(sides, directions, n)
    return (value[0] - value[1]).to(probes.dtype).nan_to_num(0)
