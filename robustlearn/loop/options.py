"""The options of a run, what they must be, and what must not change on resume."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from robustlearn.errors import InputError
from robustlearn.loop.code import code_hash
from robustlearn.loop.samples import Samples
from robustlearn.loop.schedules import rate
from robustlearn.loop.sides import plain
from robustlearn.loop.turn import DTYPES, ON_NONFINITE, Game

TOLD = 6  # differences that are told one by one


@dataclass(frozen=True)
class Options:
    """What `play` was asked for, as far as the weights depend on it."""

    epochs: int
    batch_size: int
    seed: int
    precision: str
    compile: bool
    channels_last: bool
    accumulate: int
    ema: float | None
    clip: float | None
    schedule: str
    on_nonfinite: str
    patience: int | None
    figure: str | None

    def check(self, game: Game, *, validated: bool) -> None:
        """Raise an InputError for options that cannot be."""
        counts = {"epochs": self.epochs, "accumulate": self.accumulate, "patience": self.patience}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1; got {value}")
        if self.batch_size < 1:
            raise InputError(
                f"batch_size must be at least 1; got {self.batch_size} (a DataLoader may give it)"
            )
        if self.precision not in DTYPES:
            raise InputError(f"precision is one of {', '.join(DTYPES)}; got {self.precision!r}")
        if self.on_nonfinite not in ON_NONFINITE:
            raise InputError(
                f"on_nonfinite is one of {', '.join(ON_NONFINITE)}; got {self.on_nonfinite!r}"
            )
        if self.ema is not None and not 0 <= self.ema < 1:
            raise InputError(f"ema is a decay in [0, 1); got {self.ema}")
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"clip is the largest norm of a gradient, above 0; got {self.clip}")
        rate(self.schedule, 0.0)
        if not validated and (self.patience is not None or self.figure is not None):
            raise InputError("patience and figure look at what validate finds: give that too")
        if strangers := sorted(set(game.optimizers) - set(game.modules)):
            raise InputError(
                f"the optimizers {strangers} belong to no module; the game has {list(game.modules)}"
            )

    def asked(self, game: Game, samples: Samples) -> dict[str, Any]:
        """Return what a checkpoint is a checkpoint of, as plain values."""
        optimizers = {
            name: [type(optimizer).__name__, *map(plain, optimizer.state_dict()["param_groups"])]
            for name, optimizer in game.optimizers.items()
        }
        return {
            **asdict(self),
            "data": samples.fingerprint(),
            "optimizers": optimizers,
            "modules": {name: _described(module) for name, module in game.modules.items()},
        }


def compare(before: Mapping[str, Any], now: Mapping[str, Any], place: str) -> None:
    """Raise an InputError that names what changed since the checkpoint in ``place``."""
    now = json.loads(json.dumps(now))
    for group, reason in (
        ("version", "was written by other code ({}): install that, or start in another folder"),
        ("asked", "is of another run ({}): ask for what it asked for, or use another folder"),
    ):
        old, new = before[group], now[group]
        differ = list(_differences(old, new))
        if differ:
            more = [f"{len(differ) - TOLD} more"] if len(differ) > TOLD else []
            told = "; ".join([*differ[:TOLD], *more])
            raise InputError(f"the checkpoint in {place} " + reason.format(told))


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Yield what differs, by the name of its innermost entry, old and new."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(old.get(key), new.get(key), inner)
    elif old != new:
        yield f"{name} was {_short(old)}, is {_short(new)}"


def _described(module: nn.Module) -> dict[str, Any]:
    """Return the classes of a network's parts with a hash of their code, and shapes of tensors."""
    parts = {name or "network": _class(part) for name, part in module.named_modules()}
    shapes = {key: list(value.shape) for key, value in module.state_dict().items()}
    return {"parts": parts, "shapes": shapes}


def _class(part: nn.Module) -> str:
    """Return the name of a class, with its settings if it is torch's, else a hash of its code."""
    kind = type(part)
    if kind.__module__.startswith("torch."):
        return f"{kind.__qualname__}({part.extra_repr()})"
    code = code_hash(kind)
    return kind.__qualname__ if code is None else f"{kind.__qualname__} {code}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
