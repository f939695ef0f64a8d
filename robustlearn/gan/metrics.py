"""How far two samples are apart, and what of the one is missing in the other.

All take samples as (n, d) and (m, d), of any size each; no gradient is kept.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.gan.kernels import median_bandwidth, rbf

CHUNK = 1024  # rows of a matrix of distances that are held at once


@torch.no_grad()
def mmd(real: Tensor, fake: Tensor, *, sigma: float | None = None) -> float:
    """MMD² = E k(x, x′) + E k(y, y′) − 2·E k(x, y), x ≠ x′, y ≠ y′: without bias, so also below 0.

    k is the Gaussian kernel of width σ. N(0, 1) against N(1, 1) at σ = 1: 2(1 − e^(−1/6))/√3 =
    0.17727. Source: Gretton et al. (2012), equation 3.

    Parameters
    ----------
    sigma : None for the median of the distances between points (`kernels.median_bandwidth`).

    Raises
    ------
    InputError for fewer than two samples, or samples of different dimension.

    Examples
    --------
    >>> source = torch.Generator().manual_seed(0)
    >>> real, fake = torch.randn(2, 2000, 1, generator=source)
    >>> round(mmd(real, fake + 1, sigma=1.0), 1)
    0.2
    """
    real, fake = _points(real, fake)
    sigma = median_bandwidth(real, fake) if sigma is None else sigma

    def within(x: Tensor) -> float:  # k(x, x) = 1 on the diagonal, however it is rounded
        inner = rbf(x, x, sigma).fill_diagonal_(0.0)
        return float(inner.sum()) / (len(x) * (len(x) - 1))

    return within(real) + within(fake) - 2 * float(rbf(real, fake, sigma).mean())


@torch.no_grad()
def wasserstein(real: Tensor, fake: Tensor) -> Tensor:
    """W₁ = ∫|F(t) − G(t)| dt of each column, exact: (n, d), (m, d) -> (d,).

    F and G are the empirical distribution functions of a column.

    Examples
    --------
    >>> wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [3.0], [4.0]]))
    tensor([2.5000])
    """
    x, y = (part.T.contiguous().sort(1).values for part in _points(real, fake, least=1))
    both = torch.cat([x, y], 1).sort(1).values
    levels = [
        torch.searchsorted(part, both[:, :-1].contiguous(), right=True).to(x) / part.shape[1]
        for part in (x, y)
    ]
    return ((levels[0] - levels[1]).abs() * both.diff(dim=1)).sum(1)


@torch.no_grad()
def sliced_wasserstein(
    real: Tensor, fake: Tensor, *, projections: int = 128, seed: int = 0
) -> float:
    """E W₁(⟨θ, x⟩, ⟨θ, y⟩) over directions θ, uniform on the sphere.

    Two samples that differ by a shift m are E|⟨θ, m⟩| apart, in the plane 2‖m‖/π. The directions
    are those of the seed, so that figures of several epochs can be compared. Source: Bonneel et
    al. (2015).

    Examples
    --------
    >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> round(sliced_wasserstein(x, x + torch.tensor([1.0, 0.0]), projections=4000), 2)
    0.64
    """
    real, fake = _points(real, fake, least=1)
    keys = _tensor.fold(_tensor.keys(seed, real.new_empty(projections)).to(real.device), 0)
    keys = _tensor.fold(keys, torch.arange(projections, device=real.device))
    directions = _tensor.normal(keys, (real.shape[1],), real.dtype)
    directions = (directions / directions.norm(dim=1, keepdim=True)).T
    return float(wasserstein(real @ directions, fake @ directions).mean())


@dataclass(frozen=True)
class Coverage:
    """Which of the known modes were found, and how well.

    Attributes
    ----------
    modes : how many modes have their share of samples of high quality.
    high_quality : share of the samples that lie close to a mode.
    reverse_kl : KL(generated ‖ uniform) over the modes nearest to the samples, in nats.
    shares : of the samples, close to each mode, (K,).
    """

    modes: int
    high_quality: float
    reverse_kl: float
    shares: Tensor


@torch.no_grad()
def mode_coverage(
    fake: Tensor, centres: Tensor, std: float, *, radius: float = 3.0, least: float = 0.1
) -> Coverage:
    """Count a mode if ≥ ``least``/K of the samples lie within ``radius`` standard deviations of it.

    All three figures are needed: one lucky sample would do for a mode if it were counted alone
    (``least`` = 0), a generator of a single point has only samples of high quality, and the reverse
    KL does not see what lies between modes. Source of the protocol: Srivastava et al. (2017) and
    Lin et al. (2018), who count every mode with a sample.

    Parameters
    ----------
    fake : (n, d) samples.
    centres : (K, d) of the modes, each as likely.
    std : standard deviation of a mode.

    Examples
    --------
    >>> found = mode_coverage(torch.zeros(10, 2), torch.tensor([[0.0, 0.0], [9.0, 0.0]]), std=0.1)
    >>> found.modes, found.high_quality, round(found.reverse_kl, 4)
    (1, 1.0, 0.6931)
    """
    centres, fake = _points(centres, fake, least=1)
    distance, nearest = _distances(fake, centres).min(1)
    close = distance <= radius * std
    count, n = len(centres), len(fake)
    shares = torch.bincount(nearest[close], minlength=count).to(fake) / n
    assigned = torch.bincount(nearest, minlength=count).double() / n
    divergence = torch.special.xlogy(assigned, assigned * count).sum()
    found = (shares >= least / count) & (shares > 0)
    return Coverage(int(found.sum()), float(close.double().mean()), float(divergence), shares)


@torch.no_grad()
def precision_recall(real: Tensor, fake: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated samples within the real manifold, and of real ones within the generated.

    The manifold of a sample is the union of balls around its points, each as large as the distance
    to the point's k-th neighbour. Source: Kynkäänniemi et al. (2019).

    Raises
    ------
    InputError unless both have more than k samples.

    Examples
    --------
    >>> x = torch.arange(10.0)[:, None]
    >>> precision_recall(x, x[:5] + 0.5)
    (1.0, 0.8)
    """
    real, fake = _points(real, fake, least=neighbours + 1)
    return _inside(real, fake, neighbours), _inside(fake, real, neighbours)


def precision_recall_curve(p: Tensor, q: Tensor, *, angles: int = 201) -> tuple[Tensor, Tensor]:
    """α(λ) = Σ min(λpᵢ, qᵢ) and β(λ) = Σ min(pᵢ, qᵢ/λ): precision and recall of q for p.

    q = αμ + (1 − α)ν and p = βμ + (1 − β)ν′ hold with a common part μ exactly for the pairs (α, β)
    below the curve. λ = tan of ``angles`` angles evenly in (0, π/2). Source: Sajjadi et al.
    (2018), theorem 3.

    Parameters
    ----------
    p, q : (K,) shares of the real and of the generated samples in K cells.

    Examples
    --------
    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 1.0])
    >>> precision, recall = precision_recall_curve(p, q)
    >>> round(float(precision.max()), 4), round(float(recall.max()), 4)
    (1.0, 0.5)
    """
    if p.shape != q.shape or p.dim() != 1:
        raise InputError(f"shares of the same cells were expected; got {p.shape} and {q.shape}")
    steps = torch.arange(1, angles + 1, dtype=p.dtype, device=p.device)
    ratio = torch.tan(steps / (angles + 1) * (torch.pi / 2))
    precision = torch.minimum(ratio[:, None] * p, q).sum(1)
    return precision, precision / ratio


@torch.no_grad()
def correlation_dimension(
    x: Tensor, *, window: int = 0, levels: tuple[float, float] = (1e-3, 2e-2)
) -> float:
    """d = d log C(r)/d log r, C(r) the share of pairs of points closer than r.

    The slope of a line through log C against log r between two levels of C: small enough for the
    shape as a whole not to matter, large enough to count. All n²/2 distances are held. Source:
    Grassberger and Procaccia (1983).

    Parameters
    ----------
    x : (n, d) points; in order of time, if they are a trajectory.
    window : pairs up to so many steps apart are left out: they are close because of the time.
    levels : of C.

    Raises
    ------
    InputError for too few points, and for so many copies that C is above the lowest level at r = 0.

    Examples
    --------
    >>> line = torch.rand(1500, 1, generator=torch.Generator().manual_seed(0))
    >>> round(correlation_dimension(line * torch.ones(3)), 1)
    1.0
    """
    x = _floats(_tensor.flat(x))
    distances = torch.cat([_beyond(x, row, window) for row in range(0, len(x), CHUNK)])
    low, high = (math.log10(level) for level in levels)
    wanted = torch.logspace(low, high, 20, dtype=torch.float64)
    ranks = (wanted * len(distances)).long()
    if len(distances) == 0 or int(ranks[0]) < 20:
        raise InputError(
            f"{len(distances)} pairs of points are too few for levels from {levels[0]}: give more "
            "points, or higher levels"
        )
    kept = distances.kthvalue(int(ranks[-1]) + 1).values
    radii = distances[distances <= kept].sort().values[ranks.to(x.device)].double()
    if not bool(radii[0] > 0):
        share = float((distances == 0).double().mean())
        raise InputError(
            f"{share:.1%} of the pairs of points coincide, and the lowest level is {levels[0]:g}: "
            "leave copies out, or give levels above that share"
        )
    radii = radii.log()
    rise = (ranks.to(radii) / len(distances)).log()
    radii, rise = radii - radii.mean(), rise - rise.mean()
    return float((radii * rise).sum() / radii.square().sum())


def _beyond(x: Tensor, row: int, window: int) -> Tensor:
    """Distances from points row … row + CHUNK to all that come more than ``window`` after."""
    part = _distances(x[row : row + CHUNK], x)
    return part[torch.ones_like(part, dtype=torch.bool).triu(row + window + 1)]


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """‖xᵢ − yⱼ‖, (n, m), without the shortcut that loses the digits of small ones."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _inside(centres: Tensor, points: Tensor, neighbours: int) -> float:
    """Share of the points within the balls around the centres."""
    radii = _distances(centres, centres).kthvalue(neighbours + 1, dim=1).values
    return float((_distances(points, centres) <= radii).any(1).double().mean())


def _floats(x: Tensor) -> Tensor:
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _points(real: Tensor, fake: Tensor, *, least: int = 2) -> tuple[Tensor, Tensor]:
    """Return both as (n, d) without gradient.

    Raises
    ------
    InputError for samples of different dimension, or too few.
    """
    real, fake = (_floats(_tensor.flat(part.detach())) for part in (real, fake))
    if real.shape[1] != fake.shape[1] or min(len(real), len(fake)) < least:
        raise InputError(
            f"at least {least} samples each, of one dimension, were expected; got "
            f"{tuple(real.shape)} and {tuple(fake.shape)}"
        )
    return real, fake
