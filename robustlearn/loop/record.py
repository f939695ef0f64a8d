"""What a run was asked for and where it stands, in checkpoints of a folder."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustlearn.errors import InputError
from robustlearn.loop import checkpoint
from robustlearn.loop.history import Row
from robustlearn.loop.options import compare
from robustlearn.loop.sharded import whole
from robustlearn.loop.sides import Side
from robustlearn.loop.turn import Game, Remembering

Found = tuple[dict[str, Tensor], dict[str, Any]]
Weights = dict[str, dict[str, Tensor]]


@dataclass
class Position:
    """Where training stands between two updates: what a checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0
    rows: list[Row] = field(default_factory=list)
    totals: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    best: int | None = None
    value: float = -math.inf
    stopped: str = ""
    guard: dict[str, float] = field(default_factory=dict)
    sides: dict[str, dict[str, Any]] = field(default_factory=dict)


class Record:
    """The folder of a run, and what was asked for there."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.folder, self.asked = folder, asked

    def found(self, resume: bool) -> Found | None:
        """Return the last checkpoint, or None at the start of a run.

        Raises
        ------
        InputError if there is one and ``resume`` is False, if it is of another run or version, if
        it is damaged, or if the folder cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the folder {self.folder} cannot be made ({error.strerror}); choose another"
            ) from error
        if not resume and checkpoint.exists(self.folder):
            raise InputError(
                f"{self.folder} holds a run already; resume it, or choose another folder"
            )
        found = checkpoint.newest(self.folder) if resume else None
        if found is not None:
            compare(found[1], {"version": _version(), "asked": self.asked}, str(self.folder))
        return found

    def write(
        self,
        at: Position,
        sides: Mapping[str, Side],
        best: Weights,
        game: Game,
        *,
        first: bool = True,
    ) -> None:
        """Write a checkpoint, or only lend this process's parts of it to the ``first``."""
        tensors: dict[str, Tensor] = {}
        for name, side in sides.items():
            held, at.sides[name] = side.state()
            tensors |= {f"side/{name}/{key}": value for key, value in held.items()}
        for name, weights in best.items():
            tensors |= {f"best/{name}/{key}": value for key, value in weights.items()}
        if isinstance(game, Remembering):
            tensors |= {f"game/{key}": whole(value) for key, value in game.state().items()}
        header = {"version": _version(), "asked": self.asked, "position": asdict(at)}
        if first:
            checkpoint.write(self.folder, tensors, header)

    def restore(
        self,
        tensors: dict[str, Tensor],
        header: dict[str, Any],
        sides: Mapping[str, Side],
        game: Game,
    ) -> tuple[Position, Weights]:
        """Put modules, optimisers and game back; return where training stands and what was best."""
        at, best = Position(**header["position"]), {}
        for name, side in sides.items():
            side.load(checkpoint.under(f"side/{name}/", tensors), at.sides[name])
            if weights := checkpoint.under(f"best/{name}/", tensors):
                best[name] = weights
        if isinstance(game, Remembering):
            game.load(checkpoint.under("game/", tensors))
        return at, best


def _version() -> dict[str, str]:
    package = importlib.import_module("robustlearn")  # which stands above all layers
    return {"robustlearn": package.__version__, "torch": torch.__version__}
