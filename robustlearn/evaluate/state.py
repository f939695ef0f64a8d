"""Finished batches on disk, so that an evaluation goes on after a kill."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from robustlearn.errors import InputError

VERSION = 2
SAME = {"outputs": 1e-6, "gradients": 1e-4, "clean": 1e-5}  # in units of the largest entry


class State:
    """A folder with what was asked of which model, and a file for each finished batch of an attack.

    Files are written beside their place and then renamed, so that a file that is there is whole.
    Of several processes, number ``rank`` of ``world`` writes the files with numbers rank + k·world.
    """

    def __init__(
        self,
        folder: Path,
        question: dict[str, Any],
        behaviour: dict[str, np.ndarray],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._number, self._world = rank, world
        self._earlier = sorted(folder.glob("*/*.npz"))  # not what others will write meanwhile
        asked = {"version": VERSION, **question}
        path = folder / "question.json"
        if path.is_file():
            self._continue(path, asked, behaviour)
        else:
            _write(folder / "clean.npz", behaviour)
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(asked, indent=1), encoding="utf-8")
            os.replace(temporary, path)

    def _continue(
        self, path: Path, asked: dict[str, Any], behaviour: dict[str, np.ndarray]
    ) -> None:
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is damaged ({error}); remove {self.folder}") from error
        asked = json.loads(json.dumps(asked))
        changed = sorted(key for key in {*before, *asked} if before.get(key) != asked.get(key))
        stored = _read(self.folder / "clean.npz")
        if not changed and stored is not None and not _same(stored, behaviour):
            changed = ["model"]
        if changed:
            raise InputError(
                f"{self.folder} holds the state of another evaluation: {', '.join(changed)} "
                "changed since; go on with what was asked then, or choose another folder"
            )

    def save(self, attack: str, batch: dict[str, np.ndarray]) -> None:
        """Keep a finished batch."""
        folder = self._of(attack)
        folder.mkdir(exist_ok=True)
        while (path := folder / f"{self._number:06d}.npz").exists():
            self._number += self._world
        _write(path, batch)

    def load(self, attack: str) -> list[dict[str, np.ndarray]]:
        """Return the batches of an attack from before; damaged files count as not there."""
        place = self._of(attack)
        found = [_read(path) for path in self._earlier if path.parent == place]
        return [batch for batch in found if batch is not None]

    def _of(self, attack: str) -> Path:
        return self.folder / "".join(c if c.isalnum() or c in "-_.=" else "_" for c in attack)


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    try:
        with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _same(before: dict[str, np.ndarray], now: dict[str, np.ndarray]) -> bool:
    """Tell whether two behaviours are those of one model."""
    return before.keys() == now.keys() and all(
        _close(before[key], now[key], SAME[key]) for key in now
    )


def _close(one: np.ndarray, other: np.ndarray, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    size = np.abs(other[np.isfinite(other)]).max(initial=0.0)
    return np.allclose(one, other, rtol=0, atol=tolerance * size, equal_nan=True)
