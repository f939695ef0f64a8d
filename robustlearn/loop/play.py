"""The loop: epochs of turns, with validation, checkpoints and exact resume."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn.errors import InputError
from robustlearn.loop import checkpoint, randomness, sharded
from robustlearn.loop.history import History, Meter, Moment
from robustlearn.loop.options import Options
from robustlearn.loop.ranks import Ranks
from robustlearn.loop.record import Position, Record
from robustlearn.loop.samples import Batch, Samples
from robustlearn.loop.schedules import rate
from robustlearn.loop.sides import Side
from robustlearn.loop.turn import Game, Guard, Turn

Validate = Callable[[dict[str, nn.Module]], Mapping[str, float]]
Conclude = Callable[[History], Mapping[str, float]]
FP16_SCALE = 2.0**16  # torch.amp starts with it


def play(
    game: Game,
    samples: Any,
    *,
    epochs: int,
    batch_size: int | None = None,
    seed: int = 0,
    validate: Validate | None = None,
    figure: str | None = None,
    patience: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: float = 60.0,
    precision: str = "float32",
    compile: bool = False,
    channels_last: bool = False,
    pin_memory: bool = False,
    shard: bool = False,
    accumulate: int = 1,
    ema: float | None = None,
    clip: float | None = None,
    schedule: str = "constant",
    on_nonfinite: str = "skip",
    trackers: Sequence[Any] = (),
    progress: Callable[[Moment], None] | None = None,
    settings: Mapping[str, Any] | None = None,
    conclude: Conclude | None = None,
    timeout: float = 600.0,
) -> History:
    """Play ``epochs`` × steps turns of a game, and keep the best weights.

    All that is random is a function of (seed, epoch, step, sample number): the batches, the keys of
    `Turn.keys`, and torch's global state, seeded in each step for dropout and put back at the end.
    Hence a run that was killed at any moment and is resumed ends, on the same machine, with equal
    weights bit by bit and with equal rows but for the seconds. Started by ``torchrun`` or
    ``accelerate launch``, processes share each batch: weights are those of one process up to
    rounding, but for dropout and for batch norm, whose statistics are those of a process's part.

    Parameters
    ----------
    game : see `Game`. Its modules are moved to the device and trained in place.
    samples : `Samples`, or data of which they can be made.
    batch_size : samples per batch over all processes; by default that of a ``DataLoader``.
    validate : modules -> figures, called in every process after each epoch, modules in evaluation
        mode; what the first process finds counts. The best epoch is the one with the highest
        ``figure``, by default the first of them.
    patience : epochs without a better figure after which training stops.
    out : folder of the checkpoint, of ``NAME.safetensors`` with the best weights of each module,
        and of tracker logs. All processes read it, the first one writes.
    resume : go on from the checkpoint in ``out``; from the start if there is none yet.
    save_every : seconds between checkpoints.
    precision : ``float32``, ``bf16`` or ``fp16``: that of `Turn.autocast`. Weights stay float32;
        the losses of fp16 are scaled up against underflow, by what its gradients bear.
    compile : call the modules through ``torch.compile``, which pays over many steps.
    channels_last : lay out 4-D weights and batches with the channels innermost, as convolutions in
        a lower precision are fastest; batch and weights keep their shapes.
    pin_memory : copy each batch to page-locked memory first, so that training does not wait while
        an accelerator fetches it; without an effect on the CPU.
    shard : hold a part of each weight, gradient and optimiser state in each process (FSDP), where
        one device cannot hold them all; so too if Accelerate is configured for FSDP. Attacks then
        gather weights with every pass, and validation runs in step in all processes.
    accumulate : batches over which a gradient is the mean; updates happen after the last of them.
    ema : decay of a running mean of the weights, which is then validated and kept.
    clip : the largest Euclidean norm of a gradient.
    schedule : see `schedules.rate`.
    on_nonfinite : ``skip`` leaves an update out whose gradient is not finite; ``halve`` also halves
        the learning rate from there on; ``stop`` ends training and saves to ``out`` the batch whose
        losses were not finite, or all that the gradient was the mean of. An overflow of fp16
        gradients is none of this: it lowers the scale of the losses.
    trackers : names (``tensorboard``, ``mlflow``, ``wandb``) or trackers of Accelerate.
    progress : called in the first process after each step.
    settings : what else must be equal on resume, as plain values.
    conclude : called in every process once training is over, with what is returned; the figures
        that it gives are told to the trackers.
    timeout : seconds after which a process that hears nothing of the others gives up.

    Raises
    ------
    InputError for options that do not fit, data that raises, a checkpoint of another run, code or
    version, a folder that cannot be written to, and an epoch without a finite update.

    Examples
    --------
    >>> class Regression:
    ...     def __init__(self):
    ...         self.modules = {"model": nn.Linear(1, 1)}
    ...         parameters = self.modules["model"].parameters()
    ...         self.optimizers = {"model": torch.optim.SGD(parameters, 0.5)}
    ...     def step(self, batch, turn):
    ...         losses = (turn.module("model")(batch.x) - batch.y).square().squeeze(1)
    ...         turn.backward(losses)
    ...         turn.update("model")
    ...         return {"loss": losses}
    >>> x = torch.linspace(-1, 1, 64)[:, None]
    >>> history = play(Regression(), (x, 3 * x), epochs=20, batch_size=16)
    >>> history.rows[-1]["metrics"]["loss"] < 1e-4, round(float(history.weights["model"]["weight"]))
    (True, 3)
    """
    drawn = Samples.of(samples)
    options = Options(
        epochs=epochs,
        batch_size=batch_size if batch_size is not None else drawn.batch_size or 0,
        seed=seed,
        precision=precision,
        compile=compile,
        channels_last=channels_last,
        accumulate=accumulate,
        ema=ema,
        clip=clip,
        schedule=schedule,
        on_nonfinite=on_nonfinite,
        patience=patience,
        figure=figure,
    )
    options.check(game, validated=validate is not None)
    if resume and out is None:
        raise InputError("resume goes on with the run in a folder: give that as out")
    asked = {**options.asked(game, drawn), "settings": dict(settings or {})}
    record = None if out is None else Record(Path(out), asked)
    ranks = Ranks(timeout=timeout, trackers=trackers, out=out, pin_memory=pin_memory, shard=shard)
    with randomness.kept(ranks.device), ranks.tracked(asked):
        run = _Run(game, drawn, options, ranks, record, save_every, validate, progress)
        run.begin(resume)
        history = run.play()
        if conclude is not None:
            ranks.conclude(conclude(history), len(history.rows))
        return history


class _Run:
    """One call of `play`."""

    def __init__(
        self,
        game: Game,
        samples: Samples,
        options: Options,
        ranks: Ranks,
        record: Record | None,
        save_every: float,
        validate: Validate | None,
        progress: Callable[[Moment], None] | None,
    ) -> None:
        self.game, self.samples, self.options, self.ranks = game, samples, options, ranks
        self.record, self.save_every = record, save_every
        self.validate, self.progress = validate, progress
        self.sides = {
            name: Side(
                name,
                module,
                game.optimizers.get(name),
                ranks,
                compiled=options.compile,
                channels_last=options.channels_last,
                ema=options.ema,
            )
            for name, module in game.modules.items()
        }
        self.modes = {part: part.training for m in game.modules.values() for part in m.modules()}
        self.frozen = {name: _frozen(module) for name, module in game.modules.items()}
        game.modules.update({name: side.module for name, side in self.sides.items()})
        scale = FP16_SCALE if options.precision == "fp16" else 1.0
        self.guard = Guard(options.on_nonfinite, options.precision, self._keep, scale=scale)
        self.position, self.meter = Position(), Meter()
        self.best: dict[str, dict[str, Tensor]] = {}
        self.steps = samples.steps(options.batch_size)
        self.saved = self.started = time.perf_counter()
        self.compare = ranks.world > 1  # once an epoch: do all processes hold equal gradients?

    # ------------------------------------------------------------------ the loop

    def begin(self, resume: bool) -> None:
        """Read the checkpoint, or write the first one."""
        found = None if self.record is None else self.record.found(resume)
        self.ranks.wait()  # before the first process writes
        if self.record is None or found is None:
            self._save()
            return
        self.position, self.best = self.record.restore(*found, self.sides, self.game)
        self.meter = Meter(self.position.totals)
        self.guard.load(self.position.guard)

    def play(self) -> History:
        """Play what is left, and return the history."""
        self.started = time.perf_counter()
        while not self.position.stopped:
            for name, side in self.sides.items():
                side.module.train()
                for path in self.frozen[name]:
                    side.module.get_submodule(path).training = False
            self._epoch()
            self._close()
        for name, side in self.sides.items():
            side.close()
            self.game.modules[name] = side.given
        for part, mode in self.modes.items():
            part.training = mode
        at = self.position
        return History(at.rows, at.best, at.stopped, self.best, self.ranks.first)

    def _epoch(self) -> None:
        at, options = self.position, self.options
        batches = self.samples.batches(options.seed, at.epoch, options.batch_size)
        sizes = [len(index) for index in batches]
        self.compare = self.ranks.world > 1
        for index, x, y in self._loaded(batches[at.step :]):
            group = at.step // options.accumulate * options.accumulate
            inside = sizes[group : group + options.accumulate]
            last = at.step == group + len(inside) - 1
            self._turn(index, x, y, sizes[at.step], sum(inside), last)
            at.step += 1
            self._tell()
            if last and self._due():
                self._save()

    def _turn(
        self, index: Tensor, x: Tensor, y: Tensor, total: int, samples: int, last: bool
    ) -> None:
        at, options, ranks = self.position, self.options, self.ranks
        number = at.epoch * self.steps + at.step
        done = number / (options.epochs * self.steps)
        randomness.start(ranks.device, options.seed, "step", number, ranks.rank)
        factor = rate(options.schedule, done) * self.guard.rate
        for side in self.sides.values():
            side.set_rate(factor)
        share = 1.0 if ranks.rank < total else 0.0
        batch = Batch(index.to(ranks.device), x, y, total)
        turn = Turn(
            epoch=at.epoch,
            number=number,
            progress=done,
            _batch=batch,
            _seed=options.seed,
            _sides=self.sides,
            _ranks=ranks,
            _guard=self.guard,
            _clip=options.clip,
            _samples=samples,
            _last=last,
            _share=share,
            _compare=self.compare and last,
        )
        modules = [side.called for side in self.sides.values()]
        with ranks.unsynchronised(modules, when=not last):
            metrics = self._step(batch, turn)
        self._count(metrics, share)
        if last:
            self.compare = False
            self.guard.forget()
        for side in self.sides.values():
            side.settle(ranks)

    def _step(self, batch: Batch, turn: Turn) -> Mapping[str, Tensor]:
        if self.samples.augment is not None:
            keys = randomness.keys(self.options.seed, "augment", turn.epoch, batch.index)
            batch = replace(batch, x=self.samples.augment(batch.x, keys))
        try:
            return self.game.step(batch, turn)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"batch norm has no variance over a single sample: the batch of step {turn.number} "
                f"holds {batch.total} for {self.ranks.world} processes; use a larger batch_size"
            ) from error

    def _count(self, metrics: Mapping[str, Tensor], share: float) -> None:
        """Add metrics over the samples of all processes."""
        names = list(metrics)
        count = len(next(iter(metrics.values()))) if names else 0
        sums = [value.detach().float().sum() for value in metrics.values()]
        row = torch.stack([*sums, sums[0].new_tensor(count)]) if sums else torch.zeros(1)
        if names:
            self.meter.add(names, self.ranks.sum(row * share))

    def _loaded(self, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield sample numbers, x and y of this process's part of each batch."""
        at = self.position
        send = functools.partial(self.ranks.send, channels_last=self.options.channels_last)
        parts = [self.ranks.part(index) for index in batches]
        fetched = self.samples.fetch(parts, self.options.seed, at.epoch)
        for index in parts:
            try:
                x, y = next(fetched)
            except InputError as error:
                advice = "" if self.record is None else " and resume: the last checkpoint is whole"
                raise InputError(
                    f"epoch {at.epoch}, step {at.step}: {error}. Mend it{advice}"
                ) from error
            yield index, send(x), send(y)

    def _close(self) -> None:
        """End an epoch: validate, keep the best weights, decide whether to stop."""
        at, guard = self.position, self.guard
        if guard.updates == 0 and guard.skipped and not guard.overflows:  # else fp16 still tries
            raise InputError(
                f"no gradient of epoch {at.epoch} was finite ({guard.skipped} updates left out); "
                "lower the learning rate, clip the gradient, or look for NaN in the data"
            )
        figures = self._validated()
        row = {
            "epoch": at.epoch,
            "metrics": self.meter.means(),
            "validation": figures,
            "rates": {name: side.rates() for name, side in self.sides.items() if side.optimizer},
            "skipped": guard.skipped,
            "seconds": at.seconds + time.perf_counter() - self.started,
        }
        self._judge(figures)
        at.rows.append(row)
        self.ranks.log(row)
        self._tell(figures)
        at.epoch, at.step, at.seconds = at.epoch + 1, 0, 0.0
        guard.skipped = guard.updates = guard.overflows = 0
        self.meter, self.started = Meter(), time.perf_counter()
        if self._out_of_patience():
            at.stopped = "patience"
        elif at.epoch >= self.options.epochs:
            at.stopped = "finished"
        if self._due() or at.stopped:
            self._save()

    def _out_of_patience(self) -> bool:
        at, patience = self.position, self.options.patience
        if patience is None or at.best is None:
            return False
        return at.epoch - 1 - max(at.best, getattr(self.game, "settled", 0) - 1) >= patience

    def _tell(self, figures: Mapping[str, float] | None = None) -> None:
        if self.progress is not None and self.ranks.first:
            at = self.position
            self.progress(Moment(at.epoch, at.step, self.steps, self.meter.means, figures))

    def _validated(self) -> dict[str, float]:
        if self.validate is None:
            return {}
        randomness.start(self.ranks.device, self.options.seed, "validate", self.position.epoch)
        judged = {name: side.judged.eval() for name, side in self.sides.items()}
        found = {name: float(value) for name, value in self.validate(judged).items()}
        for side in self.sides.values():  # attacks on a module may have left gradients there
            side.module.zero_grad()
        return self.ranks.told(found)

    def _judge(self, figures: Mapping[str, float]) -> None:
        """Keep the weights if they are the best so far."""
        at = self.position
        if self.validate is None and at.epoch < self.options.epochs - 1:
            return
        value = math.inf if self.validate is None else self._figure(figures)
        if at.best is not None and not value > at.value:
            return
        at.best, at.value = at.epoch, -math.inf if math.isnan(value) else value
        self.best = {
            name: {key: checkpoint.owned(v) for key, v in sharded.weights(side.judged).items()}
            for name, side in self.sides.items()
        }
        if self.record is not None and self.ranks.first:
            for name, weights in self.best.items():
                checkpoint.export(self.record.folder / f"{name}.safetensors", weights)

    def _figure(self, figures: Mapping[str, float]) -> float:
        name = self.options.figure or next(iter(figures), "")
        if name not in figures:
            raise InputError(f"validate gave no figure {name!r}; it gave {list(figures)}")
        return figures[name]

    def _due(self) -> bool:
        return self.ranks.agreed(time.perf_counter() - self.saved >= self.save_every)

    def _save(self) -> None:
        """Write a checkpoint: it is the same in every process, so the first one does."""
        at, now = self.position, time.perf_counter()
        at.totals, at.guard = self.meter.read(), self.guard.state()
        at.seconds, self.started = at.seconds + now - self.started, now
        if self.record is not None and (self.ranks.first or self.ranks.sharded):
            self.record.write(at, self.sides, self.best, self.game, first=self.ranks.first)
        self.saved = time.perf_counter()

    def _keep(self, batches: list[Batch]) -> str:
        """Write batches to ``out``, one after the other; return what to tell of it."""
        if self.record is None or not batches:
            return ""
        path = self.record.folder / f"nonfinite-{self.ranks.rank}.safetensors"
        columns = {
            name: torch.cat([getattr(b, name) for b in batches]) for name in ("index", "x", "y")
        }
        checkpoint.export(path, columns)
        return f" ({'its batch is' if len(batches) == 1 else 'their batches are'} in {path})"


def _frozen(module: nn.Module) -> list[str]:
    """Return the parts that a module in training mode holds in evaluation mode.

    One that is in evaluation mode as a whole was used before, and nothing is meant by it.
    """
    parts = module.named_modules() if module.training else ()
    return [path for path, part in parts if not part.training]
