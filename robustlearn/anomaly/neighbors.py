"""Distances to the nearest normal rows: found by scikit-learn, measured once more in torch.

In many features scikit-learn finds rows by products of matrices, which are fast and lose digits far
from the origin; what they may have missed is searched for by differences.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from robustlearn.errors import InputError

FEW = 5  # neighbours whose mean distance tells the density
NEAREST = (1, FEW)
SMOOTHING = 0.5  # of the median distance among normal rows, added to the local one
EXACT = "donot_use_mm_for_euclid_dist"  # products of matrices lose the digits of small distances
SLACK = 1e-9  # of a distance, for rounding
EPSILON = 2.0**-52  # scikit-learn multiplies in float64, also what comes in float32
LEAST = 1e-140  # a spread whose square is still a number
BLOCK = 256  # rows whose differences to others are held at once
FLOOR = 1e-2  # of the median distance: below it two rows count as equal


@dataclass
class Reference:
    """Normal rows to which distances are measured.

    The rows found are the nearest ones whatever the offset and the spread of the points: where
    rounding may hide a nearer one, all distances are measured, which costs O(n·d) a row in place of
    a share of a product of matrices (some ten times as much).

    An exact copy of the row that is asked about is left out once, so that rows of the training
    data and new rows are scored alike: d₁(x) of a training row is the distance to another one.

    Parameters
    ----------
    points : (n, d) rows, scaled.
    p : norm of the distances.
    neighbors : how many are looked up, at most n − 1.
    """

    points: Tensor
    p: float = 2.0
    neighbors: int = FEW
    centre: Tensor = field(init=False, repr=False)
    index: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.neighbors = min(self.neighbors, len(self.points) - 1)
        self.centre = self.points.median(0).values
        spread = float((self.points - self.centre).abs().max())
        if 0 < spread < LEAST:
            raise InputError(
                f"rows at most {spread:.1e} apart cannot be told apart: squares of their distances "
                "vanish; scale the features first, for example scaling='range'"
            )
        asked = min(self.neighbors + 2, len(self.points))
        self.index = NearestNeighbors(n_neighbors=asked, p=self.p)
        self.index.fit((self.points - self.centre).cpu().numpy())

    def nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances (n, k) in ascending order, and the rows that they belong to.

        The distances can be differentiated by x, the choice of the rows is held fixed.
        """
        apart, rows = self.every(x)
        first = (apart[:, :1] == 0).long()
        kept = first + torch.arange(self.neighbors, device=x.device)
        return apart.gather(1, kept), rows.gather(1, kept)

    def every(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same with copies of x among the rows, and one row more: (n, k + 1)."""
        rows = self._found(x.detach())
        apart, order = self._apart(x, rows).sort(dim=1)
        return apart, rows.gather(1, order)

    def _found(self, x: Tensor) -> Tensor:
        """Return the k + 1 nearest rows, (n, k + 1); found once more where rounding hides them."""
        reported, found = self.index.kneighbors((x - self.centre).cpu().numpy())
        candidates = torch.as_tensor(found, device=x.device)
        apart, order = self._apart(x, candidates).sort(dim=1)
        rows = candidates.gather(1, order)[:, : self.neighbors + 1]
        if self.p != 2 or candidates.shape[1] == len(self.points):
            return rows
        last = torch.as_tensor(reported[:, -1]).to(x)
        doubtful = self._doubtful(x, apart[:, self.neighbors], last).nonzero().squeeze(1)
        for part in doubtful.split(BLOCK):
            every = torch.cdist(x[part], self.points, self.p, EXACT)
            rows[part] = every.topk(self.neighbors + 1, largest=False).indices
        return rows

    def _doubtful(self, x: Tensor, apart: Tensor, last: Tensor) -> Tensor:
        """Tell where a row that was not reported may be nearer than ``apart``, (n,) bool.

        Products of matrices are wrong in ‖x − y‖² by at most E = 2(d + 8)·2⁻⁵²·(‖x‖ + ‖y‖)², and a
        nearer y is no longer than ‖x‖ + apart. None is missed if apart² ≤ last² − E, ``last`` the
        greatest distance that was reported; what 2E ≤ 10⁻⁹·apart² may hide does not count.
        """
        length = (x - self.centre).norm(dim=1)
        error = 2 * (x.shape[1] + 8) * EPSILON * (2 * length + apart).square()
        none_nearer = apart.square() <= (last.square() - error).clamp_min(0)
        return ~(none_nearer | (2 * error <= SLACK * apart.square()))

    def _apart(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the distances of x (n, d) to the rows (n, k) of each."""
        pairs = zip(x.split(BLOCK), rows.split(BLOCK), strict=True)
        return torch.cat(
            [
                torch.linalg.vector_norm(some[:, None] - self.points[near], self.p, dim=2)
                for some, near in pairs
            ]
        )


class Density:
    """s_k(x) = log d_k(x) − log(ρ(x) + ½·median d₅), k = 1 and 5: distances in local units.

    d_k is the mean distance to the k nearest normal rows, ρ the geometric mean of d₅ at the
    five nearest ones. Where these lie close together, the score is the logarithm of the
    distance; where normal data is sparse, the distance counts in units of its spacing.

    Parameters
    ----------
    reference : the `Reference`, with five neighbours.
    local : if False, s_k(x) = log d_k(x).

    Notes
    -----
    The ratio is that of the local outlier factor (Breunig et al., 2000); the added median is
    ours, and keeps repeated rows, at which ρ is zero, from making all others anomalous. Distances
    below a hundredth of their median count as that.
    """

    def __init__(self, reference: Reference, *, local: bool = True) -> None:
        self.reference, self.local = reference, local
        apart, rows = reference.nearest(reference.points)
        self.copies = float((apart[:, 0] == 0).double().mean())  # share of rows that repeat
        means = _means(apart)
        self.typical = [_typical(mean) for mean in means]
        self.own = means[-1].clamp_min(1e-3 * self.typical[-1]).log()
        self.of_training = self._score(apart, rows)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (n, 2), s₁ and s₅, and (n,), log d₅; higher is less normal."""
        return self._score(*self.reference.nearest(x))

    def enclosed(self, x: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Bound s₁, s₅ and log d₅, (n, 3) each, over all points within ``reach`` (n,) of x.

        The i-th distance changes by at most the reach; a copy counts below, and is left out above.
        The neighbours at such a point lie within d₆(x) + 2·reach of x, so that ρ is a mean over
        five of the rows there.
        """
        apart, _ = self.reference.every(x)
        below = (apart[:, :-1] - reach[:, None]).clamp_min(0)
        above = apart[:, 1:] + reach[:, None]
        low, high = (self._logs(part) for part in (below, above))
        if self.local:
            least, most = self._around(x, apart[:, -1] + 2 * reach)
            low, high = low - self._unit(most)[:, None], high - self._unit(least)[:, None]
        plain = [self._logs(part)[:, -1:] for part in (below, above)]
        return torch.cat([low, plain[0]], 1), torch.cat([high, plain[1]], 1)

    def _around(self, x: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
        """Bound the mean of log d₅ over the neighbours, which are among the rows within."""
        points, p = self.reference.points, self.reference.p
        near = torch.cdist(x, points, p, EXACT) <= within[:, None] * (1 + SLACK)
        few = self.reference.neighbors
        least = torch.where(near, self.own, torch.inf).topk(few, 1, largest=False).values.mean(1)
        return least, torch.where(near, self.own, -torch.inf).topk(few, 1).values.mean(1)

    def _score(self, apart: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        logs = self._logs(apart)
        if not self.local:
            return logs, logs[:, -1]
        return logs - self._unit(self.own[rows].mean(1))[:, None], logs[:, -1]

    def _logs(self, apart: Tensor) -> Tensor:
        pairs = zip(_means(apart), self.typical, strict=True)
        return torch.stack([mean.clamp_min(FLOOR * typical).log() for mean, typical in pairs], 1)

    def _unit(self, around: Tensor) -> Tensor:
        return torch.logaddexp(around, around.new_tensor(math.log(SMOOTHING * self.typical[-1])))


def _means(apart: Tensor) -> list[Tensor]:
    return [apart[:, :k].mean(1) for k in NEAREST]


def _typical(distance: Tensor) -> float:
    """Return the median of the distances that are not zero; 1 if there is none."""
    positive = distance[distance > 0]
    return float(positive.median()) if len(positive) else 1.0
