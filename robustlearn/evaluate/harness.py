"""Batches, memory, progress, cost, and the second measurement of every claim."""

import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn.errors import AttackError
from robustlearn.evaluate import draws
from robustlearn.evaluate.sharing import Shares
from robustlearn.evaluate.state import State
from robustlearn.models import Model
from robustlearn.threats import LpBall

Progress = Callable[[str, int, int], None]


@dataclass
class Harness:
    """A model and its samples, sent through in batches that fit.

    Every process has all samples; which of them it works on is what ``shares`` says.
    """

    model: Model
    x: Tensor
    y: Tensor
    threat: LpBall
    numbers: Tensor
    batch_size: int
    seed: int
    progress: Progress
    shares: Shares = field(default_factory=Shares)

    def __post_init__(self) -> None:
        self.loss = losses.get(None, str(self.model.task))

    def batches(self, stage: str, rows: Tensor, work: Callable[[Tensor], Any]) -> Iterator[Any]:
        """Yield (rows, work(rows)) batch by batch; a batch that exceeds the memory is halved.

        Progress is told under the name ``stage``, if that is not empty.
        """
        done, size = 0, self.batch_size
        if stage:
            self.progress(stage, 0, len(rows))
        while done < len(rows):
            batch = rows[done : done + size]
            try:
                result = work(batch)
            except (RuntimeError, MemoryError) as error:
                if not _tensor.is_out_of_memory(error) or len(batch) == 1:
                    raise
                size = max(1, len(batch) // 2)
                continue
            done += len(batch)
            self.batch_size = min(self.batch_size, size)
            if stage:
                self.progress(stage, done, len(rows))
            yield batch, result

    def outputs(self, stage: str, points: Tensor) -> Tensor:
        """Return the model's outputs on points (n, *shape), on the CPU.

        Predictions of a regressor come in float64: their errors are compared with a certificate,
        and a difference from a large target would be rounded in float32.
        """
        rows = torch.arange(len(points))
        parts = self.batches(stage, rows, lambda r: self.model(self._there(points[r])).cpu())
        with torch.no_grad():
            whole = torch.cat([output for _, output in parts])
        return whole.double() if self.model.task == "regression" else whole

    def shared(self, stage: str, points: Tensor) -> Tensor:
        """Return `outputs` on points that all processes hold, each computed in one of them."""
        rows = torch.arange(len(points))
        own = self.shares.own(rows)
        found = self.outputs(stage, points[own] if len(own) else points[:1])
        whole = found.new_empty(len(points), *found.shape[1:])
        whole[own] = found[: len(own)]
        self.shares.exchange(rows, whole)
        return whole

    def run(
        self, name: str, attack: Callable[..., Tensor], options: dict[str, Any], rows: Tensor
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (rows, x_adv) of an attack on some samples, batch by batch.

        Each point is checked against the threat in float64 without tolerance.
        """
        takes_keys = "generator" in inspect.signature(attack).parameters
        keys = draws.keys(self.seed, self.numbers)

        def work(batch: Tensor) -> Tensor:
            given = dict(options)
            if takes_keys:
                given.setdefault("generator", keys[batch].to(self.model.device))
            x = self._there(self.x[batch])
            threat = self.threat.select(batch)
            x_adv = attack(self.model, x, self._there(self.y[batch]), threat, **given)
            return self._checked(name, batch, x_adv)

        yield from self.batches(name, rows, work)

    def measured(self, rows: Tensor, x_adv: Tensor) -> tuple[Tensor, Tensor, int]:
        """Measure points a first time together, and what looks broken again in smaller batches.

        Returns
        -------
        value (n,), the margin or squared error; broken (n,) bool, where both measurements agree
        that the model is wrong; and the number of samples where they do not.
        """
        y = self.y[rows]
        first = self.outputs("", x_adv)
        value, claimed = self.loss(first, y), self.loss.broken(first, y)
        broken = claimed.clone()
        again = claimed.nonzero().squeeze(1)
        before = min(len(rows), self.batch_size)
        for part in again.split(max(1, before // 2)) if len(again) else ():
            points = self._there(x_adv[part])
            if len(part) == before:  # another size all the same
                points = torch.cat([points, points])
            with torch.no_grad():
                output = self.model(points)[: len(part)].cpu()
            broken[part] = self.loss.broken(output, y[part])
        return value, broken, int((claimed & ~broken).sum())

    def _there(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.model.device, non_blocking=True)

    def _checked(self, name: str, rows: Tensor, x_adv: Tensor) -> Tensor:
        x = self.x[rows]
        if x_adv.shape != x.shape or x_adv.dtype != x.dtype:
            raise AttackError(
                f"{name} returned {x_adv.dtype} of shape {tuple(x_adv.shape)} for {x.dtype} of "
                f"shape {tuple(x.shape)}"
            )
        x_adv = x_adv.detach().cpu()
        outside = ~self.threat.select(rows).contains(x, x_adv)
        if bool(outside.any()):
            raise AttackError(
                f"{name} left the threat in {int(outside.sum())} of {len(rows)} samples (first: "
                f"{rows[outside][:5].tolist()})"
            )
        return x_adv


@dataclass
class Tally:
    """What an attack has cost so far."""

    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    unstable: int = 0

    def add(self, stored: dict[str, np.ndarray]) -> None:
        """Add the cost of a batch that an earlier session finished."""
        self.forwards += int(stored["forwards"])
        self.backwards += int(stored["backwards"])
        self.seconds += float(stored["seconds"])

    def of_all(self, shares: Shares) -> "Tally":
        """Return the sums over processes, and the time of the slowest."""
        counts = torch.tensor([self.forwards, self.backwards, self.unstable])
        forwards, backwards, unstable = shares.collect(counts).sum(0).tolist()
        seconds = shares.collect(torch.tensor([self.seconds])).max()
        return Tally(forwards, backwards, float(seconds), unstable)


def attacked(
    harness: Harness,
    name: str,
    attack: Callable[..., Tensor],
    options: dict[str, Any],
    rows: Tensor,
    state: State | None,
    tally: Tally,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, x_adv) of an attack on this process's part of some samples.

    First comes what an earlier session left, of whatever processes; what is new is kept.
    """
    rows = harness.shares.own(rows)
    if state is not None:
        for stored in state.load(name):
            found = torch.from_numpy(stored["index"])
            kept = torch.isin(found, rows)
            if harness.shares.rank == 0:  # every process reads every file
                tally.add(stored)
            rows = rows[~torch.isin(rows, found)]
            if bool(kept.any()):
                points = torch.from_numpy(stored["x_adv"])[kept]
                yield found[kept], harness._checked(name, found[kept], points)
    model = harness.model
    before = (model.forwards, model.backwards, time.perf_counter())
    for batch, x_adv in harness.run(name, attack, options, rows):
        now = (model.forwards, model.backwards, time.perf_counter())
        cost = {
            "forwards": np.array(now[0] - before[0]),
            "backwards": np.array(now[1] - before[1]),
            "seconds": np.array(now[2] - before[2]),
        }
        tally.add(cost)
        if state is not None:
            state.save(name, {"index": batch.numpy(), "x_adv": x_adv.numpy(), **cost})
        yield batch, x_adv
        before = (model.forwards, model.backwards, time.perf_counter())
