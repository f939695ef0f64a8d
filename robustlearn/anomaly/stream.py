"""A random part of all rows that have come, in bounded memory."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Stream:
    """A uniform sample of at most ``most`` of the rows added so far.

    Source: Vitter (1985), algorithm R: the t-th row is kept with probability most/t, in the place
    of a random other one.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.most, self.came = most, 0
        self.rows: NDArray[np.float64] = np.empty((0, 0))
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, rows: NDArray[np.float64]) -> Tensor:
        """Take rows in; return which of the rows kept are new, (kept,) bool."""
        room = max(0, self.most - self.came)
        first, later = rows[:room], rows[room:]
        before = len(self.rows)
        self.rows = np.concatenate([self.rows, first]) if before else first.copy()
        self.came += len(first)
        new = torch.arange(len(self.rows)) >= before
        places = torch.rand(len(later), generator=self.generator, dtype=torch.float64)
        places = (places * torch.arange(self.came + 1, self.came + len(later) + 1)).long()
        self.came += len(later)
        for number in (places < self.most).nonzero().flatten().tolist():
            self.rows[places[number]] = later[number]
            new[places[number]] = True
        return new
