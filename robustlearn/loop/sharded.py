"""Modules of which each process holds a part of every weight: fully sharded data parallelism.

A part is gathered before a forward or backward pass and let go after it; gradients arrive as
parts of their mean. Whatever asks for a whole tensor must be asked in all processes.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**20  # numbers in a block that is gathered by itself


def whole(value: Tensor) -> Tensor:
    """Return all of a tensor of which this process may hold a part."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def local(value: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory."""
    return value.to_local() if hasattr(value, "to_local") else value


def alike(value: Tensor, like: Any) -> Tensor:
    """Return this process's part of a whole tensor, if that is how ``like`` is held."""
    if not hasattr(like, "full_tensor") or hasattr(value, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the whole state dictionary of a module."""
    return {name: whole(value) for name, value in module.state_dict().items()}


def load(module: nn.Module, given: Mapping[str, Tensor]) -> None:
    """Load a whole state dictionary into a module, whether it is held in parts or not."""
    present = module.state_dict()
    module.load_state_dict({name: alike(v, present.get(name)) for name, v in given.items()})


def in_parts(module: nn.Module, world: int) -> nn.Module:
    """Return a copy of a module of which each process holds a part.

    Blocks of Sequentials and lists that are large are gathered one after the other, the rest at
    once. Buffers are whole everywhere.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made = copy.deepcopy(module)
    mesh = init_device_mesh(next(made.parameters()).device.type, (world,))
    for block in reversed(list(_blocks(made))):
        fully_shard(block, mesh=mesh)
    fully_shard(made, mesh=mesh)
    return made


@contextmanager
def unsynchronised(module: nn.Module) -> Iterator[None]:
    """Let gradients add up in each process, to be exchanged in a later pass."""
    module.set_requires_gradient_sync(False)  # type: ignore[operator]
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)  # type: ignore[operator]


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        for block in part.children() if isinstance(part, nn.Sequential | nn.ModuleList) else ():
            listed = isinstance(block, nn.ModuleList | nn.ModuleDict)  # they have no forward pass
            if not listed and sum(p.numel() for p in block.parameters()) >= LARGE:
                yield block


def rebound(optimizer: torch.optim.Optimizer, before: Mapping[str, Tensor], now: nn.Module) -> None:
    """Let an optimiser follow the parameters of another module, with what it remembers of them."""
    moved = {before[name]: new for name, new in now.named_parameters()}
    for group in optimizer.param_groups:
        group["params"] = [moved.get(parameter, parameter) for parameter in group["params"]]
    for old, new in moved.items():
        if old is not new and old in optimizer.state:
            entries = optimizer.state.pop(old)
            optimizer.state[new] = {k: held(value, new) for k, value in entries.items()}


def held(value: object, parameter: Tensor) -> object:
    """Return what an optimiser remembers of a parameter, in the parts that this is held in."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return alike(value, parameter) if hasattr(parameter, "full_tensor") else whole(value)
