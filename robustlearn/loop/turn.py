"""What a game is, and what the loop hands to each of its steps."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robustlearn.errors import InputError
from robustlearn.loop import randomness, sharded
from robustlearn.loop.ranks import Ranks
from robustlearn.loop.samples import Batch
from robustlearn.loop.sides import Side

DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
ON_NONFINITE = ("skip", "halve", "stop")
COUNTS = ("rate", "skipped", "updates", "scale", "finite", "overflows")
GROWTH = 2000  # finite updates before the scale of fp16 losses is doubled, as torch.amp does


class Game(Protocol):
    """Modules, their optimisers by the same names, and one step.

    ``step(batch, turn)`` computes losses through ``turn.module(name)``, calls ``turn.backward`` and
    ``turn.update``, and returns metrics per sample, (n,) each. A game that remembers more than
    its modules and optimisers do is `Remembering` too; one that changes as it is played may say
    by ``settled: int`` in how many epochs it does: patience begins after them.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]

    def step(self, batch: Batch, turn: "Turn") -> Mapping[str, Tensor]: ...  # noqa: D102


@runtime_checkable
class Remembering(Protocol):
    """A game with a state of its own, the same in every process (`Turn.gather` makes it so)."""

    def state(self) -> dict[str, Tensor]: ...  # noqa: D102
    def load(self, state: dict[str, Tensor]) -> None: ...  # noqa: D102


@dataclass
class Guard:
    """What is done when a gradient is not finite, and the scale of fp16 losses.

    Finite losses of a gradient that is not were scaled up too far, where they were scaled at all:
    the scale is halved. Losses that are not finite are the fault of their batch.
    """

    on_nonfinite: str
    precision: str
    keep: Callable[[list[Batch]], str]
    rate: float = 1.0
    skipped: int = 0
    updates: int = 0
    scale: float = 1.0
    finite: int = 0
    overflows: int = 0
    group: list[tuple[int, Tensor]] = field(default_factory=list)
    batches: dict[int, Batch] = field(default_factory=dict)

    def state(self) -> dict[str, float]:
        """Return what must be known to go on."""
        return {name: getattr(self, name) for name in COUNTS}

    def load(self, state: Mapping[str, float]) -> None:
        """Take back what `state` returned."""
        for name in COUNTS:
            setattr(self, name, state[name])

    def accept(self) -> None:
        """Count a finite update."""
        self.updates += 1
        self.finite += 1
        if self.precision == "fp16" and self.finite % GROWTH == 0:
            self.scale *= 2

    def look(self, number: int, batch: Batch, losses: Tensor) -> None:
        """Note whether the losses of a step are finite, without waiting for the device."""
        self.group.append((number, losses.detach().isfinite().all()))
        if self.on_nonfinite == "stop":
            self.batches[number] = batch

    def forget(self) -> None:
        """Begin another group of steps over which gradients accumulate."""
        self.group.clear()
        self.batches.clear()

    def refuse(self, name: str, ranks: Ranks) -> None:
        """Count an update that is left out; halve the learning rate or stop if asked to."""
        self.skipped += 1
        self.finite = 0
        guilty = self._guilty(ranks)
        if self.scale > 1 and not guilty:
            self.scale /= 2
            self.overflows += 1
        elif self.on_nonfinite == "halve":
            self.rate /= 2
        elif self.on_nonfinite == "stop":
            what = f"the losses of {name!r} are" if guilty else f"the gradient of {name!r} is"
            numbers = guilty or list(self.batches)
            steps = ("step " if len(numbers) == 1 else "steps ") + ", ".join(map(str, numbers))
            kept = self.keep([self.batches[number] for number in numbers])
            raise InputError(
                f"{what} not finite at {steps}{kept}; look for NaN in the data, lower the learning "
                "rate, clip the gradient, or use on_nonfinite='skip'"
            )

    def _guilty(self, ranks: Ranks) -> list[int]:
        """Return the steps of the group whose losses were not finite in one of the processes."""
        if not self.group:  # the game computed the gradient itself
            return []
        counts = ranks.sum(torch.stack([~finite for _, finite in self.group]).float()).tolist()
        pairs = zip(self.group, counts, strict=True)
        return list(dict.fromkeys(number for (number, _), count in pairs if count))


@dataclass(eq=False)
class Turn:
    """One step of a game: where it stands, its random keys, and its gradients.

    Parameters
    ----------
    epoch, number : the epoch, and the step counted over all epochs; both from 0.
    progress : the share of training that is done, in [0, 1).
    """

    epoch: int
    number: int
    progress: float
    _batch: Batch
    _seed: int
    _sides: dict[str, Side]
    _ranks: Ranks
    _guard: Guard
    _clip: float | None
    _samples: int  # over which the gradient is a mean: those of all processes and batches
    _last: bool  # of the batches over which gradients accumulate
    _share: float  # 0 if the batch only keeps this process in step with the others
    _compare: bool

    def __post_init__(self) -> None:
        self._scale = self._guard.scale  # one scale for all losses of a step, whatever happens

    @functools.cached_property
    def keys(self) -> Tensor:
        """One random key per sample, (n,): a function of seed, epoch and sample number alone."""
        return randomness.keys(self._seed, "keys", self.epoch, self._batch.index)

    def module(self, name: str) -> nn.Module:
        """Return a module to be called where the weights' gradient is wanted."""
        return self._side(name).called

    def unwrapped(self, name: str) -> nn.Module:
        """Return a module to be called for other gradients: they are not exchanged."""
        return self._side(name).plain

    def autocast(self, precision: str | None = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which a module computes at a precision, or at the loop's."""
        dtype = DTYPES[precision or self._guard.precision]
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self._ranks.device.type, dtype)

    def backward(self, losses: Tensor) -> None:
        """Add ∇(1/N)Σᵢ ℓᵢ to the gradients, N the samples of all processes and batches.

        Parameters
        ----------
        losses : (n,), one per sample of this process's batch.

        Raises
        ------
        InputError for losses of another shape.
        """
        if losses.shape != self._batch.index.shape:
            raise InputError(
                f"backward takes one loss per sample, shape {tuple(self._batch.index.shape)}; got "
                f"{tuple(losses.shape)}: leave out the mean, the loop takes it"
            )
        self._guard.look(self.number, self._batch, losses)
        world = self._ranks.world  # gradients are averaged over processes, hence the factor
        factor = self._share * world * self._scale / self._samples
        (losses.float().sum() * factor).backward()

    def slopes(self, losses: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        """Return ∂(1/N)Σᵢ ℓᵢ/∂t of tensors, N the samples of this batch in all processes.

        Parameters
        ----------
        losses : (n,), one per sample of this process's batch; their graph is used up.
        tensors : the same in all processes; None is returned for those the losses do not need.

        Raises
        ------
        InputError where each process holds a part of them only.
        """
        if self._ranks.sharded:
            raise InputError(
                "gradients of weights that are held in parts arrive with turn.backward alone: "
                "train without shard=True, or without awp"
            )
        factor = self._share * self._ranks.world * self._scale / self._batch.total
        found = torch.autograd.grad(losses.float().sum() * factor, tensors, allow_unused=True)
        present = [slope for slope in found if slope is not None]
        self._ranks.average(present)
        if self._scale != 1:
            torch._foreach_div_(present, self._scale)
        return list(found)

    @torch.no_grad()
    def update(self, name: str) -> bool:
        """Follow the gradient of a module: clip, step, clear, average; True if weights moved.

        Where gradients accumulate over batches nothing happens before the last of them. An update
        that is not finite is left out, together with what its batch did to batch-norm statistics.

        Raises
        ------
        InputError if no gradient is there, if processes hold different ones, or if a gradient
        is not finite and training is to stop then.
        """
        if not self._last or not self.limited(name):
            return False
        self._side(name).follow()
        self._guard.accept()
        return True

    def limited(self, name: str) -> bool:
        """Clip the gradient of a module, as `update` does; False if it is not finite: dropped.

        For games that make a step of their own, such as one to look ahead by.
        """
        side = self._side(name)
        gradients = side.gradients()
        if self._scale != 1:
            torch._foreach_div_(gradients, self._scale)
        norm = torch.nn.utils.get_total_norm(gradients)
        if self._compare:
            self._check_equal(name, sharded.whole(norm))
        if not bool(sharded.whole(norm).isfinite()):
            side.decline()
            self._guard.refuse(name, self._ranks)
            return False
        if self._clip is not None:
            torch._foreach_mul_(gradients, (self._clip / (norm + 1e-6)).clamp(max=1.0))
        return True

    def gather(self, rows: Tensor) -> Tensor:
        """Return per-sample rows (n, *) of every process as one tensor (total, *).

        Gather ``batch.index`` the same way to know whose they are.
        """
        if self._ranks.world == 1:
            return rows
        return torch.cat(self._ranks.gather(rows[: len(rows) if self._share else 0]))

    def _side(self, name: str) -> Side:
        if name not in self._sides:
            raise InputError(f"the game has no module {name!r}; it has {list(self._sides)}")
        return self._sides[name]

    def _check_equal(self, name: str, norm: Tensor) -> None:
        norms = torch.cat(self._ranks.gather(norm.reshape(1)))
        if bool((norms - norms[0]).abs().max() > 1e-3 * norms[0].abs()):
            raise InputError(
                f"the processes hold different gradients of {name!r}: compute the losses through "
                f"turn.module({name!r}), which exchanges them, not through the game's own module"
            )
