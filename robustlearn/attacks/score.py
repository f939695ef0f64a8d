"""Attacks that only ask for outputs: for black boxes, and for networks whose gradient lies."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn._tensor import flat
from robustlearn.attacks.base import attack
from robustlearn.models import Model
from robustlearn.threats import LpBall

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@attack(needs="scores", norms="1, 2, inf")
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
    """Random search over blocks of features, keeping what raises the loss.

    Start at a random corner (stripes for images). At each query pick a block, a square of an
    image or a random subset of other features, set it to one random sign per channel (per
    feature) times the budget, project, and accept if the loss rose. The block's share of the
    features starts at ``share`` and is halved as the search goes on.

    Parameters
    ----------
    x, y, loss : as for `fgsm`.
    queries : forward passes a sample.
    share : first share of the features in a block.
    generator : as for `LpBall.sample`.

    Returns
    -------
    (n, *shape), in the threat without tolerance. Samples leave when they are broken.

    Notes
    -----
    Source: Andriushchenko et al. (2020), with their schedule. That is the method for p = ∞; for
    p = 1 and 2 the same blocks, projected, stand in for their special moves.

    Examples
    --------
    >>> threat = LpBall(float("inf"), 0.5)
    >>> x, y = torch.zeros(1, 3), torch.tensor([0])
    >>> square(lambda a: a @ [[1, -1]] * 3, x, y, threat, queries=20)  # a black box
    tensor([[-0.5000, -0.5000, -0.5000]])
    """
    chosen = losses.get(loss, str(model.task))
    keys = _tensor.keys(generator, x)
    best = x.clone()
    output = model(x)
    value = chosen.objective(output, y)
    rows = (~chosen.broken(output, y)).nonzero().squeeze(1)
    for query in range(queries):
        if len(rows) == 0:
            break
        held, around, now = threat.select(rows), x[rows], _tensor.fold(keys[rows], query)
        if query == 0:
            wish = _corner(held, around, now)
        else:
            present = best[rows] - around
            inside = _block(present, now, _share(share, query, queries))
            wish = torch.where(inside, _signs(held, around, now, inside), present)
        point = held.restrict(around, wish)
        output = model(point)
        reached = chosen.objective(output, y[rows]).to(value.dtype)
        broken = chosen.broken(output, y[rows])
        better = (reached > value[rows]) | broken
        best[rows[better]], value[rows[better]] = point[better], reached[better]
        rows = rows[~broken]
    return best


def _share(first: float, query: int, queries: int) -> float:
    passed = sum(query * 10_000 / queries > mark for mark in HALVINGS)
    return first / 2**passed


def _is_image(x: Tensor) -> bool:
    return x.dim() >= 3 and min(x.shape[-2:]) > 1


def _extent(threat: LpBall, like: Tensor) -> Tensor:
    """The largest change of each feature alone, (n, *shape)."""
    alone = replace(threat, p=float("inf"), lower=None, upper=None)
    return alone.argmax(torch.ones_like(like))


def _corner(threat: LpBall, x: Tensor, keys: Tensor) -> Tensor:
    """Random signs times the budget, constant along the columns of an image."""
    shape = list(x.shape[1:])
    if _is_image(x):
        shape[-2] = 1
    signs = torch.where(_tensor.uniform(keys, tuple(shape), x.dtype) < 0.5, -1.0, 1.0).to(x.dtype)
    return signs * _extent(threat, x)


def _block(present: Tensor, keys: Tensor, share: float) -> Tensor:
    """Return a random square of each image, or a random subset of features, (n, *shape) bool."""
    n, shape = len(present), tuple(present.shape[1:])
    if not _is_image(present):
        chance = _tensor.uniform(_tensor.fold(keys, 0), shape, present.dtype)
        lowest = flat(chance) == flat(chance).amin(1, keepdim=True)  # at least one feature
        return (chance < share) | lowest.reshape(present.shape)
    height, width = shape[-2:]
    side = min(max(1, round((share * height * width) ** 0.5)), height, width)
    corner = _tensor.uniform(_tensor.fold(keys, 0), (2,), torch.float64)
    top = (corner[:, 0] * (height - side + 1)).long()[:, None]
    left = (corner[:, 1] * (width - side + 1)).long()[:, None]
    row = torch.arange(height, device=present.device)[None]
    column = torch.arange(width, device=present.device)[None]
    inside = ((row >= top) & (row < top + side))[:, :, None]
    inside = inside & ((column >= left) & (column < left + side))[:, None, :]
    return inside.reshape(n, *[1] * (len(shape) - 2), height, width).expand(present.shape)


def _signs(threat: LpBall, x: Tensor, keys: Tensor, inside: Tensor) -> Tensor:
    """One random sign per channel of an image or per feature, times what the block may change."""
    shape = list(x.shape[1:])
    if _is_image(x):
        shape[-2:] = [1, 1]
    drawn = _tensor.uniform(_tensor.fold(keys, 1), tuple(shape), x.dtype)
    signs = torch.where(drawn < 0.5, -1.0, 1.0).to(x.dtype)
    extent = _extent(threat, x)
    if threat.p in (1, 2):  # the budget is shared by the block
        size = flat(inside).sum(1).to(x.dtype) ** (1 / threat.p)
        extent = extent / size.reshape(-1, *[1] * (x.dim() - 1))
    return signs * extent
