"""The Gaussian kernel, and how wide to make it."""

import torch
from torch import Tensor

from robustlearn.errors import InputError


def rbf(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """k(x_i, y_j) = exp(−‖x_i − y_j‖² / 2σ²), (n, d), (m, d) -> (n, m).

    Squares come from scalar products, and are cut off at 0 where rounding would make them
    negative. Points are centred first, so that a common offset costs no digits.

    Examples
    --------
    >>> rbf(torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), 1.0)
    tensor([[1.0000, 0.3679]])
    """
    if not sigma > 0:
        raise InputError(f"a bandwidth is positive; got {sigma}")
    return torch.exp(squared_distances(x, y) / (-2 * sigma**2))


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_i − y_j‖², (n, d), (m, d) -> (n, m); differentiable also where it is 0."""
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    return (lengths - 2 * x @ y.T).clamp_min(0.0)


def median_bandwidth(x: Tensor, y: Tensor) -> float:
    """σ = the median of ‖a − b‖ over the pairs a ≠ b of both samples together.

    The heuristic of Gretton et al. (2012); where more than half of the pairs coincide, as in
    discrete data, the median over those that do not. At most 2,000 points are looked at, evenly
    spaced in the order given.

    Raises
    ------
    InputError if all points are equal, or none are a finite distance apart.
    """
    points = torch.cat([x, y]).detach()
    points = points[:: max(1, -(-len(points) // 2000))]
    apart = torch.pdist(points)  # by differences: equal points are at 0
    apart = apart[apart.isfinite()]
    distinct = apart[apart > 0]
    if not len(distinct):
        why = "all points coincide" if len(apart) else "no two points are a finite distance apart"
        raise InputError(f"{why}: there is no distance to go by; mend the data, or give sigma=1.0")
    middle = float(apart.median())
    return middle if middle > 0 else float(distinct.median())
