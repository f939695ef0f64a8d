"""Randomised smoothing: radii that hold with a stated probability, for any model."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from robustlearn.certify.base import CERTIFICATES, Certificate, classified, euclidean, interval
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.models.smoothed import Smoothed, keys_of
from robustlearn.threats import LpBall

LOOKS = (50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000)  # numbers of votes
LAST = 0.8  # share of the error that the last look may spend; the others share the rest
ALPHA = 1e-3
SELECTED = 100  # votes that choose the class where none is given
HOPELESS = 1e-3  # probability that a look gives a sample up that later looks would certify


def clopper_pearson(hits: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Return the largest p with P(Bin(n, p) ≥ hits) ≤ α: a lower bound on a probability.

    Exact: a share of at least 1 − α of all draws gives a bound that holds. It is the α-quantile
    of Beta(hits, n − hits + 1), and 0 for no hits. Source: Clopper and Pearson (1934).

    Examples
    --------
    >>> float(clopper_pearson(np.array([100]), 100, 0.001)[0].round(4))  # 0.001^(1/100)
    0.9333
    """
    hits = np.asarray(hits)
    return np.where(hits > 0, stats.beta.ppf(alpha, np.maximum(hits, 1), n - hits + 1), 0.0)


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    return isinstance(model, Smoothed) and euclidean(threat, tuple(x.shape[1:])) < math.inf


@CERTIFICATES.register("smoothing", applies=_applies)
def smoothing(
    model: Model,
    x: Tensor,
    threat: LpBall,
    y: Tensor | None,
    seconds: float = math.inf,
    *,
    looks: Sequence[int] = LOOKS,
    alpha: float = ALPHA,
    largest: bool = False,
    seed: int = 1,
) -> Certificate:
    """σ·Φ⁻¹(p) with p a lower bound on P(f(x + σξ) = y): within it a vote does not change.

    The votes are counted at several ``looks``, the error α is divided among them, and a sample
    leaves as soon as ε is certified or out of reach: the radius is then what is proven so far, of
    ``largest`` what the last look proves. Each sample's statement is wrong with probability at
    most α. Regressor: the median of f stays between the quantiles Φ(∓ε/σ) of f(x + σξ), bounded
    by order statistics. Norms other than ℓ2 by ‖δ‖₂ ≤ c·‖δ‖; the box is not made use of.

    Parameters
    ----------
    model : a `Smoothed`; x : (n, *shape).
    y : (n,) labels; if None 100 further votes choose the class.
    seconds : a sample may take; the looks say how much this takes.
    looks : numbers of votes, ascending.
    largest : whether to go on to the last look, for the largest radius.
    seed : of the noise of each sample, with its contents: it does not depend on the batch.

    Raises
    ------
    InputError for a model that is not smoothed.

    Notes
    -----
    Sources: Cohen, Rosenfeld and Kolter (2019); the median: Chiang et al. (2020). The looks are
    fixed and every bound holds at its own share of α, so that stopping costs nothing (union
    bound); giving a sample up early can only lose a certificate. ``certified`` is about the
    smoothed classifier, not about its predictions from few votes.
    """
    if not isinstance(model, Smoothed):
        raise InputError(f"{model.name} is not smoothed: certify a robustlearn Smoothed(model, σ)")
    if not looks or sorted(set(looks)) != list(looks) or looks[0] < 1 or not 0 < alpha < 1:
        raise InputError(f"looks ascend from 1 and 0 < alpha < 1; got {looks}, {alpha}")
    reach = torch.as_tensor(threat.eps, dtype=torch.float64).expand(len(x)).numpy()
    scale = euclidean(threat, tuple(x.shape[1:]))
    with model.session(), torch.no_grad():
        if model.task == "regression":
            return _median(model, x, reach * scale / model.sigma, y, looks[-1], alpha, seed)
        chosen = y
        if chosen is None:
            chosen = model.counts(x, SELECTED, seed + 1).argmax(1)
        target = stats.norm.cdf(reach * scale / model.sigma)
        share = _shares(model, x, chosen.cpu(), target, looks, alpha, largest, seed)
    quantile = np.where(share > 0.5, stats.norm.ppf(share), 0.0)
    radius = model.sigma * quantile / scale if scale else np.where(share > 0.5, np.inf, 0.0)
    return classified("smoothing", share > 0.5, radius, share >= target, alpha=alpha)


def _shares(
    model: Smoothed,
    x: Tensor,
    label: Tensor,
    target: np.ndarray,
    looks: Sequence[int],
    alpha: float,
    largest: bool,
    seed: int,
) -> np.ndarray:
    """Return a lower bound (n,) on the share of votes for the label."""
    best, hits = np.zeros(len(x)), np.zeros(len(x), dtype=int)
    rows, seen, keys = np.arange(len(x)), 0, keys_of(x, seed)
    for n, error in _errors(looks, alpha):
        some = torch.from_numpy(rows)
        outputs = model.noisy(x[some.to(x.device)], keys[some.to(x.device)], seen, n)
        hits[rows] += (outputs.argmax(2).cpu() == label[some, None]).sum(1).numpy()
        seen = n
        best[rows] = np.maximum(best[rows], clopper_pearson(hits[rows], n, error))
        reachable = 1 - clopper_pearson(n - hits[rows], n, HOPELESS)
        going = reachable > np.maximum(0.5, 0 if largest else target[rows])
        rows = rows[going & (largest | (best[rows] < target[rows]) | (best[rows] <= 0.5))]
        if not len(rows):
            break
    return best


def _errors(looks: Sequence[int], alpha: float) -> Iterator[tuple[int, float]]:
    """Yield each look with its share of α."""
    early = (1 - LAST) * alpha / max(1, len(looks) - 1)
    for number, n in enumerate(looks):
        last = number == len(looks) - 1
        yield n, (alpha - early * (len(looks) - 1)) if last else early


def _median(
    model: Smoothed,
    x: Tensor,
    reach: np.ndarray,
    y: Tensor | None,
    n: int,
    alpha: float,
    seed: int,
) -> Certificate:
    """Bound the median of a regressor by order statistics of n draws; α/2 on either side."""
    ends = []
    for row, count in enumerate(_ranks(reach, n, alpha)):
        drawn = model.noisy(x[row : row + 1], keys_of(x[row : row + 1], seed), 0, n)[0]
        ordered = drawn.double().sort().values.cpu().numpy()
        ends.append((ordered[count - 1], ordered[n - count]) if count else (-np.inf, np.inf))
    lower, upper = np.array(ends).T
    return interval("smoothing", lower, upper, y, alpha=alpha)


def _ranks(reach: np.ndarray, n: int, alpha: float) -> np.ndarray:
    """Return the largest k with P(fewer than k of n draws lie below Φ(−reach)) ≤ α/2; 0 for none.

    The k-th least draw is then below that quantile, and the k-th largest above Φ(reach), but
    for α.
    """
    return stats.binom.ppf(alpha / 2, n, stats.norm.cdf(-reach)).astype(int)
