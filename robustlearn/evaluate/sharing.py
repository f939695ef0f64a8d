"""How the samples of an evaluation are split over processes, and how their results meet again."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from robustlearn.errors import InputError

CHUNK = 1024  # samples of each process that are exchanged at once
Made = TypeVar("Made")


def world() -> int:
    """Return how many processes ``torchrun`` or ``accelerate launch`` has started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def first() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return world() == 1 or os.environ.get("RANK", "0") == "0"


class Shares:
    """One of the processes that evaluate together; most often there is no other.

    Entry k of the samples of a stage is the work of process k mod world. Between stages every
    process knows everything, so that all choose the same samples for the next one.
    """

    def __init__(self) -> None:
        self.world, self.rank = world(), 0
        if self.world > 1:
            from robustlearn.loop.ranks import Ranks

            self._ranks = Ranks()
            self.rank = self._ranks.rank

    def own(self, rows: Tensor) -> Tensor:
        """Return the part of some sample numbers (k,) that this process works on."""
        return rows[self.rank :: self.world]

    def exchange(self, rows: Tensor, *tables: Tensor) -> None:
        """Fill the entries ``rows`` (k,) of tables (n, *) with those of the process they belong to.

        The tables are on the CPU; entries are sent in chunks, as the device may hold few of them.
        """
        if self.world == 1 or len(rows) == 0:
            return
        for part in rows.split(CHUNK * self.world):
            owners = torch.cat([part[rank :: self.world] for rank in range(self.world)])
            for table in tables:
                sent = table[self.own(part)].to(self._ranks.device)
                table[owners] = torch.cat(self._ranks.gather(sent)).cpu()

    def collect(self, values: Tensor) -> Tensor:
        """Return values (m,) of every process on the CPU, (world, m)."""
        if self.world == 1:
            return values[None]
        return torch.stack(self._ranks.gather(values[None].to(self._ranks.device))).cpu()[:, 0]

    def divided(self, n: int, make: Callable[[Tensor], Made]) -> list[tuple[Tensor, Made]]:
        """Return sample numbers and ``make(numbers)`` of every process; together they are all n.

        Raises
        ------
        InputError in every process, if any had to raise one.
        """
        every = torch.arange(n)
        if self.world == 1:
            return [(every, make(every))]
        rows, made, error = self.own(every), None, None
        rows = rows if len(rows) else every[:1]  # what makes it may not know an empty batch
        try:
            made = make(rows)
        except InputError as raised:
            error = raised
        parts = self._ranks.each((rows, made, error))
        for *_, error in parts:
            if error is not None:
                raise error
        return [(rows, made) for rows, made, _ in parts]

    def told(self, value: Made) -> Made:
        """Return what the first process holds: where rounding may differ, all do as it does."""
        return value if self.world == 1 else self._ranks.told(value)

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """Return ``make()``, called in the first process before it is called in the others."""
        if self.world == 1:
            return make()
        made: Any = make() if self.rank == 0 else None
        self._ranks.wait()
        made = made if self.rank == 0 else make()
        self._ranks.wait()
        return made
