"""Which samples are looked at where not all are: random ones, whatever their order in the data."""

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn.models import Model

CHUNK = 256  # samples that are looked at together


def keys(seed: int, numbers: Tensor) -> Tensor:
    """Return one random key a sample, made of the seed and its number alone; (n,) int64."""
    return _tensor.fold(torch.full_like(numbers, seed), numbers)


def shuffled(seed: int, numbers: Tensor, use: int = 0) -> Tensor:
    """Return the rows (n,) in random order; another ``use`` is another, unrelated order."""
    drawn = keys(seed, numbers)
    return (_tensor.fold(drawn, use) if use else drawn).argsort()


def right(model: Model, x: Tensor, y: Tensor, order: Tensor, samples: int) -> Tensor:
    """Return the first rows in the order given that a classifier gets right, at most ``samples``.

    Looked at are as many as it takes, all of them if need be. The model is in a session.
    """
    found: list[Tensor] = []
    for rows in order.split(max(1, min(4 * samples, CHUNK))):
        output = model(x[rows].to(model.device)).cpu()
        found.append(rows[~losses.misclassified(output, y[rows])])
        if sum(map(len, found)) >= samples:
            break
    return torch.cat(found)[:samples]
