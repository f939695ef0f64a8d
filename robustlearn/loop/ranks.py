"""The processes that train together, and the device of each, by Accelerate."""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from robustlearn.errors import InputError


class Ranks:
    """One process among ``world``: its number, its device, and what it tells the others.

    Started by ``accelerate launch`` or ``torchrun`` there are many processes, otherwise one.
    What a process does not hear of the others within ``timeout`` seconds ends it with an error.
    """

    def __init__(
        self,
        *,
        timeout: float = 600.0,
        trackers: Sequence[Any] = (),
        out: Any = None,
        pin_memory: bool = False,
    ) -> None:
        known = {str(name) for name in get_available_trackers()}
        if missing := [t for t in trackers if isinstance(t, str) and t not in known]:
            raise InputError(f"trackers {missing} are not installed; there are: {sorted(known)}")
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision="no",  # Turn.autocast does it: Accelerate would change the module
            log_with=list(trackers) or None,
            project_dir=out,
            kwargs_handlers=[
                # Side.settle sees to the buffers, so that two forwards may precede a backward;
                # searching for unused parameters keeps the order in which gradients are summed,
                # which DDP otherwise changes after its first step: also the first one on resume
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=timedelta(seconds=timeout)),
            ],
        )
        self.device: torch.device = self.accelerator.device
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.pinned = pin_memory and self.device.type != "cpu"
        self._check(int(os.environ.get("WORLD_SIZE", "1")))

    def _check(self, launched: int) -> None:
        if launched != self.world:
            raise InputError(
                f"{launched} processes were launched, but Accelerate was set up for {self.world} "
                "before; start training first, or make its Accelerator in each process"
            )
        kind = self.accelerator.distributed_type.name
        if kind != "NO" and not kind.startswith("MULTI_"):
            raise InputError(
                f"Accelerate is configured for {kind}, which this loop does not run on; configure "
                "it for several processes that hold a copy of the modules each (DDP)"
            )

    @property
    def first(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def send(self, values: Tensor, *, channels_last: bool = False) -> Tensor:
        """Return values on the device of this process, without waiting where that can be."""
        if self.pinned:
            values = values.pin_memory()
        form = layout(channels_last, values.dim())
        return values.to(self.device, non_blocking=True, memory_format=form)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return a module whose gradients are averaged over the processes."""
        return module if self.world == 1 else self.accelerator.prepare_model(module)

    @contextlib.contextmanager
    def unsynchronised(self, modules: Iterable[nn.Module], *, when: bool) -> Iterator[None]:
        """Let gradients add up in each process, to be exchanged in a later step."""
        with contextlib.ExitStack() as stack:
            for module in modules if when and self.world > 1 else ():
                stack.enter_context(self.accelerator.no_sync(module))
            yield

    def part(self, index: Tensor) -> Tensor:
        """Return this process's share of a batch: every ``world``-th sample.

        A process for which none is left takes the first one, to stay in step.
        """
        own = index[self.rank :: self.world]
        return own if len(own) else index[:1]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor of one shape."""
        return values if self.world == 1 else self.accelerator.reduce(values, "sum")

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over the processes, in one message."""
        if self.world == 1 or not tensors:
            return
        parts = torch.cat([tensor.reshape(-1) for tensor in tensors])
        means = self.sum(parts) / self.world
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, mean in zip(tensors, means.split(sizes), strict=True):
            tensor.copy_(mean.reshape(tensor.shape))

    def gather(self, rows: Tensor) -> list[Tensor]:
        """Return the rows of every process, of which each may have another number."""
        if self.world == 1:
            return [rows]
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = self.accelerator.gather(padded).split(max(counts))
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def told(self, value: Any) -> Any:
        """Return what the first process holds."""
        if self.world == 1:
            return value
        return broadcast_object_list([value])[0]

    @contextlib.contextmanager
    def tracked(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Open the trackers and tell them the settings that are numbers or words; then close."""
        kinds = bool | int | float | str
        simple = {name: value for name, value in config.items() if isinstance(value, kinds)}
        self.accelerator.init_trackers("robustlearn", simple)
        try:
            yield
        finally:
            for tracker in self.accelerator.trackers if self.first else ():
                tracker.finish()

    def log(self, row: Mapping[str, Any]) -> None:
        """Tell the trackers the figures of an epoch."""
        figures = {"skipped": row["skipped"], "seconds": row["seconds"]}
        for group in ("metrics", "validation"):
            figures |= {f"{group}/{name}": value for name, value in row[group].items()}
        self.accelerator.log(figures, step=row["epoch"])

    def wait(self) -> None:
        """Wait for the others."""
        self.accelerator.wait_for_everyone()


def layout(channels_last: bool, dimensions: int) -> torch.memory_format:
    """Return the memory layout of a tensor: channels innermost is for those of 4 dimensions."""
    return torch.channels_last if channels_last and dimensions == 4 else torch.preserve_format
