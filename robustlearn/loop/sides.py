"""One module of a game with its optimiser, its average, and what an update does to them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robustlearn.errors import InputError
from robustlearn.loop import sharded
from robustlearn.loop.checkpoint import under
from robustlearn.loop.ranks import Ranks, layout

WARM_UP = 10  # updates that the average's horizon starts with


class Average:
    """w̄ ← d·w̄ + (1 − d)·w, d = min(decay, (1 + t)/(10 + t)), over weights and buffers.

    The buffers are averaged as well, so that batch norm has statistics that belong to w̄.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay, self.updates = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take the module's present weights into the average."""
        share = 1 - min(self.decay, (1 + self.updates) / (WARM_UP + self.updates))
        self.updates += 1
        mine, theirs = _tensors(self.module), _tensors(module)
        floats = [i for i, value in enumerate(theirs) if value.is_floating_point()]
        torch._foreach_lerp_([mine[i] for i in floats], [theirs[i] for i in floats], share)
        for own, other in zip(mine, theirs, strict=True):
            if not other.is_floating_point():
                own.copy_(other)


class Side:
    """A module, the module as it is called, and its optimiser, on the device of this process."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: Optimizer | None,
        ranks: Ranks,
        *,
        compiled: bool,
        channels_last: bool,
        ema: float | None,
    ) -> None:
        if ranks.sharded and (compiled or channels_last):
            raise InputError("modules held in parts (shard) go without compile and channels_last")
        self.name, self.given, self.optimizer = name, module, optimizer
        _move(module, optimizer, ranks.device, layout(channels_last, 4))
        ranks.align(module)  # before its average is made of it
        wanted = ema is not None and optimizer is not None
        self.average = Average(module, ema) if wanted and ema is not None else None
        if ranks.sharded and optimizer is not None:
            module = ranks.in_parts(module)
            sharded.rebound(optimizer, dict(self.given.named_parameters()), module)
            if self.average is not None:
                self.average.module = ranks.in_parts(self.average.module)
        self.module = module
        # each shape is compiled for itself: what a shape computes must not depend on which came
        # first, for a resumed run begins with another one
        fast = torch.compile(module, dynamic=False) if compiled else module
        self.plain: nn.Module = fast  # type: ignore[assignment]
        self.called = ranks.wrap(self.plain) if optimizer is not None else self.plain
        self.buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._good = [buffer.clone() for buffer in self.buffers]
        self._moved = False
        for group in optimizer.param_groups if optimizer else ():
            group.setdefault("initial_lr", group["lr"])

    @property
    def judged(self) -> nn.Module:
        """The module whose weights are validated and kept: the average if there is one."""
        return self.module if self.average is None else self.average.module

    def set_rate(self, factor: float) -> None:
        """Set the learning rate to a multiple of the optimiser's own."""
        for group in self.optimizer.param_groups if self.optimizer else ():
            group["lr"] = group["initial_lr"] * factor

    def rates(self) -> list[float]:
        """Return the learning rate of each group of parameters."""
        groups = self.optimizer.param_groups if self.optimizer else ()
        return [float(group["lr"]) for group in groups]

    def gradients(self) -> list[Tensor]:
        """Return the gradients that the optimiser is about to follow."""
        groups = self._followed.param_groups
        found = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if not found:
            raise InputError(f"no gradient reached {self.name!r}: call turn.backward(losses) first")
        return found

    def follow(self) -> None:
        """Take a step of the optimiser, and the new weights into the average."""
        self._followed.step()
        self._followed.zero_grad()
        if self.average is not None:
            self.average.update(self.module)
        self._moved = True

    @torch.no_grad()
    def settle(self, ranks: Ranks) -> None:
        """End a step: buffers become equal in all processes, and good if an update was."""
        ranks.average(self.buffers)
        if self.buffers and self._moved:
            torch._foreach_copy_(self._good, self.buffers)
        self._moved = False

    @torch.no_grad()
    def decline(self) -> None:
        """Drop the gradients, and what the batch left in the buffers."""
        self._followed.zero_grad()
        if self.buffers:
            torch._foreach_copy_(self.buffers, self._good)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return weights, average and optimiser as tensors, and the rest as plain values."""
        tensors = {f"module/{key}": v for key, v in sharded.weights(self.module).items()}
        facts: dict[str, Any] = {}
        if self.average is not None:
            averaged = sharded.weights(self.average.module)
            tensors |= {f"average/{key}": value for key, value in averaged.items()}
            facts["updates"] = self.average.updates
        if self.optimizer is not None:
            given = self.optimizer.state_dict()
            facts["groups"] = [plain(group) for group in given["param_groups"]]
            facts["values"] = {}
            for number, entries in given["state"].items():
                for key, value in entries.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer/{number}/{key}"] = sharded.whole(value)
                    else:
                        facts["values"][f"{number}/{key}"] = value
        return tensors, facts

    def load(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        sharded.load(self.module, under("module/", tensors))
        if self.average is not None:
            sharded.load(self.average.module, under("average/", tensors))
            self.average.updates = facts["updates"]
        if self.optimizer is not None:
            values = {**under("optimizer/", tensors), **facts["values"]}
            self._load_optimizer(values, facts["groups"])
        if self.buffers:
            torch._foreach_copy_(self._good, self.buffers)

    def _load_optimizer(self, values: dict[str, Any], groups: list[dict[str, Any]]) -> None:
        state: dict[int, dict[str, Any]] = {}
        followed = [p for group in self._followed.param_groups for p in group["params"]]
        for path, value in values.items():
            number, key = path.split("/", 1)
            entries = state.setdefault(int(number), {})
            entries[key] = sharded.held(value, followed[int(number)])
        present = self._followed.state_dict()["param_groups"]
        merged = [
            {key: _like(saved.get(key, value), value) for key, value in group.items()} | new
            for group, saved in zip(present, groups, strict=True)
            for new in [{key: saved[key] for key in saved.keys() - group.keys()}]
        ]
        self._followed.load_state_dict({"state": state, "param_groups": merged})

    def close(self) -> None:
        """Give the module that was given its weights, if a copy in parts was trained."""
        if self.given is self.module:
            return
        self.given.load_state_dict(sharded.weights(self.module))
        sharded.rebound(self._followed, dict(self.module.named_parameters()), self.given)

    @property
    def _followed(self) -> Optimizer:
        if self.optimizer is None:
            raise InputError(f"{self.name!r} has no optimiser; name it in the game's optimizers")
        return self.optimizer


def _move(
    module: nn.Module,
    optimizer: Optimizer | None,
    device: torch.device,
    memory_format: torch.memory_format,
) -> None:
    """Move a module, and its optimiser where that makes new parameters of the old ones."""
    before: dict[str, Tensor] = dict(module.named_parameters())
    module.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    if optimizer is not None:
        sharded.rebound(optimizer, before, module)
        optimizer.load_state_dict(optimizer.state_dict())  # moves what it remembers


def _tensors(module: nn.Module) -> list[Tensor]:
    return [sharded.local(value) for value in (*module.parameters(), *module.buffers())]


def plain(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what JSON can hold of a group of parameters, but for their numbers."""
    kinds = bool | int | float | str | list | tuple | None
    return {key: v for key, v in group.items() if key != "params" and isinstance(v, kinds)}


def _like(saved: Any, present: Any) -> Any:
    return tuple(saved) if isinstance(present, tuple) else saved
