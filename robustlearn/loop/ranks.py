"""The processes that train together, and the device of each, by Accelerate."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import Tensor, nn

from robustlearn.errors import InputError
from robustlearn.loop import sharded


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
        shard: bool = False,
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
        kind = self.accelerator.distributed_type.name
        self.sharded = self.world > 1 and (shard or kind == "FSDP")
        self._check(int(os.environ.get("WORLD_SIZE", "1")))

    def _check(self, launched: int) -> None:
        if launched != self.world:
            raise InputError(
                f"{launched} processes were launched, but Accelerate was set up for {self.world} "
                "before; start training first, or make its Accelerator in each process"
            )
        kind = self.accelerator.distributed_type.name
        if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
            raise InputError(
                f"Accelerate is configured for {kind}, which this loop does not run on; configure "
                "it for several processes (DDP), or for FSDP"
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
        if self.world == 1 or self.sharded:  # a module that is held in parts does so itself
            return module
        with warnings.catch_warnings():  # its new name is not known to Accelerate
            warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
            return self.accelerator.prepare_model(module)

    def align(self, module: nn.Module) -> None:
        """Give a module the weights and buffers that the first process holds."""
        for value in (*module.parameters(), *module.buffers()) if self.world > 1 else ():
            value.data.copy_(broadcast(value.data.contiguous()))

    def in_parts(self, module: nn.Module) -> nn.Module:
        """Return a copy of which each process holds a part."""
        return sharded.in_parts(module, self.world)

    @contextlib.contextmanager
    def unsynchronised(self, modules: Iterable[nn.Module], *, when: bool) -> Iterator[None]:
        """Let gradients add up in each process, to be exchanged in a later step."""
        with contextlib.ExitStack() as stack:
            for module in modules if when and self.world > 1 else ():
                alone = sharded.unsynchronised if self.sharded else self.accelerator.no_sync
                stack.enter_context(alone(module))
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

    def each(self, value: Any) -> list[Any]:
        """Return what every process holds."""
        return [value] if self.world == 1 else gather_object([value])

    def told(self, value: Any) -> Any:
        """Return what the first process holds."""
        if self.world == 1:
            return value
        return broadcast_object_list([value])[0]

    def agreed(self, decision: bool) -> bool:
        """Return a decision of this process, or of the first where all must act alike."""
        return bool(self.told(decision)) if self.sharded else decision

    @contextlib.contextmanager
    def tracked(self, config: Mapping[str, Any]) -> Iterator[None]:
        """Open the trackers and tell them what of a run are numbers or words; then close.

        The ``settings`` of the one who called the loop stand beside those of the loop itself.
        """
        kinds = bool | int | float | str
        whole = {**config.get("settings", {}), **config}
        simple = {name: value for name, value in whole.items() if isinstance(value, kinds)}
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

    def conclude(self, figures: Mapping[str, float], epochs: int) -> None:
        """Tell the trackers what training was worth in the end."""
        if figures:
            final = {f"final/{name}": value for name, value in figures.items()}
            self.accelerator.log(final, step=epochs)

    def wait(self) -> None:
        """Wait for the others."""
        self.accelerator.wait_for_everyone()


def layout(channels_last: bool, dimensions: int) -> torch.memory_format:
    """Return the memory layout of a tensor: channels innermost is for those of 4 dimensions."""
    return torch.channels_last if channels_last and dimensions == 4 else torch.preserve_format
