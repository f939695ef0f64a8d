"""What came of training: rows per epoch, the best epoch, and its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]


@dataclass(eq=False)
class History:
    """Rows per epoch, and the weights that were best.

    Parameters
    ----------
    rows : per epoch ``epoch``, ``metrics`` (means over its samples), ``validation``, ``rates`` (the
        last learning rates), ``skipped`` (updates that were not finite) and ``seconds``.
    best : the epoch with the highest figure; the last one without validation.
    stopped : ``"finished"`` or ``"patience"``.
    weights : module -> state dictionary of the best epoch on the CPU; of the averaged weights if
        there are any.
    first : whether this is the first of the processes, the one that writes files.
    """

    rows: list[Row] = field(default_factory=list)
    best: int | None = None
    stopped: str = ""
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    first: bool = True


@dataclass(frozen=True, eq=False)
class Moment:
    """Where training stands, for a progress bar: after each step, and after each epoch.

    ``means()`` of the epoch's metrics waits for the device; ``validation`` holds the figures of
    the epoch once it has ended, and is None before.
    """

    epoch: int
    step: int
    steps: int
    means: Callable[[], dict[str, float]]
    validation: Mapping[str, float] | None = None


class Meter:
    """Sums over samples of what a game's steps return, read from the device only when asked."""

    def __init__(self, totals: Mapping[str, list[float]] | None = None) -> None:
        self.totals = {name: list(pair) for name, pair in (totals or {}).items()}
        self._pending: list[tuple[list[str], Tensor]] = []

    def add(self, names: list[str], sums: Tensor) -> None:
        """Take the sums (m,) of m metrics, and the number of samples as the last entry."""
        self._pending.append((names, sums))

    def read(self) -> dict[str, list[float]]:
        """Return [sum, samples] of each metric; the order of addition is that of the steps."""
        if not self._pending:
            return self.totals
        values = torch.cat([sums for _, sums in self._pending]).tolist()
        for names, _ in self._pending:
            count = values[len(names)]
            for name, value in zip(names, values, strict=False):
                pair = self.totals.setdefault(name, [0.0, 0.0])
                pair[0] += value
                pair[1] += count
            values = values[len(names) + 1 :]
        self._pending.clear()
        return self.totals

    def means(self) -> dict[str, float]:
        """Return the mean of each metric over the samples of the epoch so far."""
        return {name: total / count for name, (total, count) in self.read().items()}
