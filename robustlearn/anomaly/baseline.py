"""The plain baseline: the mean distance to the nearest normal rows."""

from typing import Any

import torch
from torch import Tensor

from robustlearn.anomaly.base import BAGGED, Detector
from robustlearn.anomaly.fusion import Score
from robustlearn.anomaly.neighbors import Reference
from robustlearn.anomaly.scaling import SCALINGS, Map, reach
from robustlearn.errors import InputError
from robustlearn.registry import COUNT
from robustlearn.threats import LpBall


class MeanNeighborDetector(Detector):
    """score(x) = mean of ‖x − xᵢ‖₂ over the k nearest normal rows xᵢ, after scaling.

    It is hard to beat: compare every other detector with it. A row of the training data is not
    its own neighbour.

    Parameters
    ----------
    n_neighbors : k; at most all other rows.
    scaling : ``"range"``, cut so that huge outliers among the training rows hide nothing
        (`scaling.by_range`); ``"standard"``, by mean and standard deviation, which one such row
        makes blind; ``"rank"``; or ``"none"``.
    contamination, false_alarm, calibration, max_rows, random_state : as for
        `HardNegativeDetector`; without critics, ``calibration="bagged"`` leaves one row out each.

    Attributes
    ----------
    score_, offset_, calibration_ : as for `HardNegativeDetector`.

    Examples
    --------
    >>> import numpy as np
    >>> rows = np.random.default_rng(0).normal(size=(300, 2))
    >>> MeanNeighborDetector().fit(rows).predict([[0.0, 0.0], [6.0, 6.0]])
    array([ 1, -1])
    """

    def __init__(
        self,
        *,
        n_neighbors: int = 5,
        scaling: str = "range",
        contamination: Any = "auto",
        false_alarm: float = 0.05,
        calibration: Any = BAGGED,
        max_rows: int = 20_000,
        random_state: Any = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.scaling = scaling
        self.contamination = contamination
        self.false_alarm = false_alarm
        self.calibration = calibration
        self.max_rows = max_rows
        self.random_state = random_state

    def _learnt(self, rows: Tensor, generator: torch.Generator) -> Score:
        return MeanDistance(SCALINGS[self.scaling](rows), rows, int(self.n_neighbors))

    def _check_options(self) -> None:
        super()._check_options()
        self._check_numbers({"n_neighbors": COUNT})
        if self.scaling not in SCALINGS:
            raise InputError(f"scaling must be one of {', '.join(SCALINGS)}; got {self.scaling!r}")


class MeanDistance(Score):
    """The mean distance to the k nearest of some rows."""

    def __init__(self, scaling: Map, rows: Tensor, neighbors: int) -> None:
        super().__init__()
        self.scaling = scaling
        self.reference = Reference(scaling(rows), neighbors=neighbors)
        self.of_training = self(rows)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean distance, (n,)."""
        return self.reference.nearest(self.scaling(x))[0].mean(1)

    def enclosed(self, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
        """Bound the mean distance: each of the distances changes by at most the threat's reach."""
        apart, _ = self.reference.every(self.scaling(x))
        far = reach(self.scaling, x, threat, self.reference.p)
        below = (apart[:, :-1] - far[:, None]).clamp_min(0).mean(1)
        return below, apart[:, 1:].mean(1) + far
