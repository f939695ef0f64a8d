"""The vote of a model among noisy copies of its input."""

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.models.around import Around
from robustlearn.models.base import Model, Objective

CHUNK = 2**23  # numbers in the noisy copies that go through the model together
ABSTAIN = -1
GUIDES = 8  # copies whose mean gradient leads an attack


class Smoothed(Around):
    """g(x) = argmax_k P(f(x + σξ) = k), ξ ~ N(0, I); of a regressor the median of f(x + σξ).

    Outputs are the logarithms of the shares of the votes (half a vote for every class), or the
    median, of ``votes`` copies. The noise is the same at every point and call, so that outputs
    repeat; a certificate draws its own. An attack climbs on the mean of softmax(f(x + σξ)) over
    a few of the copies.

    Parameters
    ----------
    inner : a `Model`; a black box will do.
    sigma : σ > 0, in units of x.
    votes : copies for each prediction.
    seed : of the noise.

    Notes
    -----
    Source: Cohen, Rosenfeld and Kolter (2019); the gradient is that of Salman et al. (2019), the
    median that of Chiang et al. (2020). A prediction from votes may differ from g near a tie.

    Examples
    --------
    >>> from robustlearn import wrap
    >>> model = Smoothed(wrap(torch.nn.Linear(2, 3)), sigma=0.5)
    >>> model(torch.zeros(5, 2)).shape
    torch.Size([5, 3])
    """

    def __init__(self, inner: Model, sigma: float, votes: int = 100, seed: int = 0) -> None:
        if not 0 < sigma < float("inf"):
            raise InputError(f"sigma must be positive and finite; got {sigma!r}")
        if votes < 1:
            raise InputError(f"votes must be at least 1; got {votes!r}")
        super().__init__(inner)
        self.sigma, self.votes, self.seed = float(sigma), votes, seed
        self.differentiable = inner.differentiable

    @property
    def name(self) -> str:
        """What to call the model in a report."""
        return f"{self.inner.name}, smoothed by noise of {self.sigma:g}"

    def noisy(self, x: Tensor, keys: Tensor, first: int, last: int) -> Tensor:
        """f(x + σξᵢ) for i = first … last − 1, (n, *shape) -> (n, last − first, …).

        Parameters
        ----------
        keys : (n,); the i-th noise of a sample depends on its key and i alone.
        """
        shape, parts = tuple(x.shape[1:]), []
        step = max(1, CHUNK // max(1, x.numel()))
        for start in range(first, last, step):
            numbers = torch.arange(start, min(last, start + step), device=x.device)
            drawn = _tensor.fold(keys[:, None], numbers).reshape(-1)
            noise = self.sigma * _tensor.normal(drawn, shape, torch.float64)  # with all its tail
            points = x.repeat_interleave(len(numbers), 0) + noise.to(x.dtype)
            output = self.inner(points)
            parts.append(output.reshape(len(x), len(numbers), *output.shape[1:]))
        return torch.cat(parts, 1)

    def gradient(
        self, x: Tensor, y: Tensor, loss: Objective, precision: str | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient at the mean softmax; objective and output are those of the vote."""
        found, _, _ = super().gradient(x, y, loss, precision)
        with torch.no_grad():
            output = self(x)
        return found, loss.look(output, y)[0], output

    def counts(self, x: Tensor, n: int, seed: int) -> Tensor:
        """Return how many of n votes each class has, (n, *shape) -> (n, K).

        The noise is that of `keys_of`, and not what the outputs are made from.
        """
        return _counted(self.noisy(x, keys_of(x, seed), 0, n)).cpu()

    def predict(self, x: Tensor, n: int = 1_000, alpha: float = 1e-3, seed: int = 1) -> Tensor:
        """argmax_k P(f(x + σξ) = k), or −1 where n votes do not tell.

        A class that is returned is the wrong one with probability at most α: of the votes for the
        two largest classes, a share as large as the first has is improbable in a tie (two-sided
        binomial test).

        Parameters
        ----------
        x : (n, *shape).

        Notes
        -----
        Source: Cohen, Rosenfeld and Kolter (2019), PREDICT.
        """
        with self.session(), torch.no_grad():
            top = self.counts(x, n, seed).topk(2, 1)
        first, second = top.values.numpy().T
        doubt = np.minimum(1, 2 * stats.binom.sf(first - 1, first + second, 0.5))
        return torch.where(torch.from_numpy(doubt <= alpha), top.indices[:, 0], ABSTAIN)

    def _copies(self, x: Tensor, count: int) -> Tensor:
        return self.noisy(x, _tensor.keys(self.seed, x), 0, count)

    def _forward(self, x: Tensor) -> Any:
        self.forwards += (self.votes - 1) * len(x)
        outputs = self._copies(x, self.votes)
        if outputs.dim() == 2:
            return outputs.median(1).values
        total = self.votes + outputs.shape[2] / 2
        return ((_counted(outputs) + 0.5) / total).log().to(x.dtype)

    def _climbed(self, x: Tensor) -> Tensor:
        """Return log of the mean softmax of a few copies; of a regressor their mean."""
        self.forwards += GUIDES * len(x)
        outputs = self._copies(x, GUIDES)
        if outputs.dim() == 2:
            return outputs.mean(1)
        return outputs.softmax(2).mean(1).clamp_min(torch.finfo(x.dtype).tiny).log()


def keys_of(x: Tensor, seed: int) -> Tensor:
    """Return a key for each sample, made of its contents and the seed."""
    bits = _tensor.flat(x.detach().double()).contiguous().view(torch.int64)
    place = torch.arange(bits.shape[1], dtype=torch.int64, device=x.device)
    return _tensor.fold(_tensor.fold(bits, place).sum(1), seed)


def _counted(outputs: Tensor) -> Tensor:
    """Count the votes, (n, votes, K) -> (n, K)."""
    return torch.nn.functional.one_hot(outputs.argmax(2), outputs.shape[2]).sum(1)
