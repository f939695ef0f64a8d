"""One anomaly score out of several: standardised on normal rows, weighted, and clipped."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlearn.anomaly.critics import Critics
from robustlearn.anomaly.neighbors import Density, Reference
from robustlearn.anomaly.scaling import Map, reach
from robustlearn.threats import LpBall

ANCHOR = 2  # columns of the plain log distance beside the four local ones
TINY = 1e-6  # a spread below this is none
NORMAL_QUARTILES = 1.349  # between the quartiles of a standard normal


@dataclass(frozen=True)
class Standard:
    """z = (s − median) / (interquartile range / 1.349), column by column, cut at ±``limit``."""

    median: Tensor
    spread: Tensor
    limit: float

    @classmethod
    def of(cls, scores: Tensor, limit: float = torch.inf) -> "Standard":
        """Learn from scores (n, k) of normal rows."""
        ordered = scores.sort(0).values
        quarter = [ordered[int(share * (len(scores) - 1))] for share in (0.25, 0.5, 0.75)]
        spread = (quarter[2] - quarter[0]) / NORMAL_QUARTILES
        other = scores.std(0, correction=0)
        spread = torch.where(spread > TINY, spread, other)
        return cls(quarter[1], torch.where(spread > TINY, spread, torch.ones_like(spread)), limit)

    def __call__(self, scores: Tensor) -> Tensor:
        """Standardise scores (n, k)."""
        return ((scores - self.median) / self.spread).clamp(-self.limit, self.limit)


class Score(nn.Module):
    """An anomaly score (n, d) -> (n,), and its values for training rows as if they were new."""

    of_training: Tensor

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the score over the threat at each x, (n,) below and above; infinite by default."""
        return _unknown(x[:, 0])


class Part(nn.Module):
    """A score of rows (n, d) as columns (n, k), and what it says of the rows it was learnt from.

    ``of_training`` (n, k) are the scores of the training rows as if each had been a new one.
    """

    of_training: Tensor

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the columns over the threat at each x, (n, k) each; infinite by default."""
        return _unknown(self(x[:1]).expand(len(x), -1))


class Densities(Part):
    """Log distances to the nearest normal rows in each geometry, and the plain one as an anchor.

    Columns: s₁ and s₅ of each `Density`, and ``ANCHOR`` times log d₅ of the first.
    """

    def __init__(self, geometries: Sequence[tuple[Map, float]], rows: Tensor, *, local: bool):
        super().__init__()
        self.maps = [scaling for scaling, _ in geometries]
        self.densities = [
            Density(Reference(scaling(rows), p), local=local) for scaling, p in geometries
        ]
        self.of_training = _columns([density.of_training for density in self.densities])

    def forward(self, x: Tensor) -> Tensor:
        """Return the columns, (n, 2·geometries + ANCHOR)."""
        pairs = zip(self.maps, self.densities, strict=True)
        return _columns([density(scaling(x)) for scaling, density in pairs])

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the columns by how far the threat reaches in each geometry."""
        low, high = (
            _columns([(bound[:, :-1], bound[:, -1]) for bound in side])
            for side in _bounds(self.maps, self.densities, x, threat)
        )
        return low, high


def _bounds(
    maps: Sequence[Map], densities: Sequence[Density], x: Tensor, threat: LpBall
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the lower bounds of each density over the threat, (n, 3), and the upper ones."""
    found = [
        density.enclosed(scaling(x), reach(scaling, x, threat, density.reference.p))
        for scaling, density in zip(maps, densities, strict=True)
    ]
    return [low for low, _ in found], [high for _, high in found]


def _columns(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    anchor = found[0][1][:, None].expand(-1, ANCHOR)
    return torch.cat([*(scores for scores, _ in found), anchor], 1)


class Distances(Part):
    """log d₅ to the normal rows after a map: what is left where values are discrete."""

    def __init__(self, scaling: Map, rows: Tensor) -> None:
        super().__init__()
        self.scaling = scaling
        self.density = Density(Reference(scaling(rows)), local=False)
        self.of_training = self.density.of_training[1][:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 1)."""
        return self.density(self.scaling(x))[1][:, None]

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the distance by how far the threat reaches after the map."""
        (low,), (high,) = _bounds([self.scaling], [self.density], x, threat)
        return low[:, -1:], high[:, -1:]


class Logits(Part):
    """The mean of the critics' logits, negated."""

    def __init__(self, view: "View", critics: Critics, rows: Tensor, seen: Tensor) -> None:
        super().__init__()
        self.view, self.critics = view, critics
        with torch.no_grad():
            logits = critics.of_all(view(rows)).T
        unseen = ~seen | seen.all(1, keepdim=True)  # a row that all critics saw is asked of all
        self.of_training = -((logits * unseen).sum(1) / unseen.sum(1))[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 1)."""
        return -self.critics.of_all(self.view(x)).mean(0)[:, None]


class Features(Part):
    """The mean log distance to five normal rows in each critic's last hidden layer."""

    def __init__(self, view: "View", critics: Critics, rows: Tensor) -> None:
        super().__init__()
        self.view, self.critics = view, critics
        with torch.no_grad():
            hidden = self._hidden(rows)
            self.densities = [Density(Reference(part), local=False) for part in hidden]
        found = [density.of_training[0][:, 1] for density in self.densities]
        self.of_training = torch.stack(found, 1).mean(1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, 1)."""
        pairs = zip(self.densities, self._hidden(x), strict=True)
        found = [density(part)[0][:, 1] for density, part in pairs]
        return torch.stack(found, 1).mean(1, keepdim=True)

    def _hidden(self, x: Tensor) -> Tensor:
        view = self.view(x)
        return self.critics.features(view.expand(self.critics.count, *view.shape))


@dataclass(frozen=True)
class View:
    """What the critics look at: rows after a map, divided by their root mean variance."""

    scaling: Map
    unit: Tensor

    @classmethod
    def of(cls, scaling: Map, rows: Tensor) -> "View":
        """Learn the unit from normal rows."""
        unit = scaling(rows).var(0, correction=0).mean().sqrt()
        return cls(scaling, torch.where(unit > 0, unit, torch.ones_like(unit)))

    def __call__(self, x: Tensor) -> Tensor:
        """Map rows (n, d)."""
        return self.scaling(x) / self.unit


class Fused(Score):
    """Σ_parts weight · mean over its columns of the standardised, clipped scores, (n, d) -> (n,).

    Parameters
    ----------
    parts : of the score.
    weights, limits : one number a part; columns are cut at ±limit.
    """

    def __init__(
        self, parts: Sequence[Part], weights: Sequence[float], limits: Sequence[float]
    ) -> None:
        super().__init__()
        self.parts, self.weights = list(parts), weights  # not registered: they stay on the CPU
        self.standards = [
            Standard.of(part.of_training, limit) for part, limit in zip(parts, limits, strict=True)
        ]
        self.of_training = self._sum([part.of_training for part in parts])

    def forward(self, x: Tensor) -> Tensor:
        """Return the anomaly score; higher is less normal."""
        return self._sum([part(x) for part in self.parts])

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the score by its parts; one that is clipped has its limits as bounds."""
        bounds = [part.enclosed(x, threat) for part in self.parts]
        low, high = (self._sum(list(side)) for side in zip(*bounds, strict=True))
        return low, high

    def _sum(self, found: Sequence[Tensor]) -> Tensor:
        terms = zip(self.weights, self.standards, found, strict=True)
        return torch.stack([w * standard(s).mean(1) for w, standard, s in terms]).sum(0)


def _unknown(like: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(like, -torch.inf), torch.full_like(like, torch.inf)
