"""A device that computes: tensors that say they are elsewhere, and hold real numbers.

Every operation checks devices as an accelerator does, computes on the CPU, and wraps the result.
So ``.item()`` and early exits work, while a mix of devices, a CPU generator for a tensor on the
device, and ``.numpy()`` raise as they would there. Copies that do not wait, from pinned memory,
arrive when they are first asked for: what is done to their source before is seen. It cannot be
undone in a process that has imported this module. Written for the private hooks of torch 2.13.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

NAME = "stand_in"
aten = torch.ops.aten
LATE = []  # shapes of what was copied without waiting
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


class _Backend(_DummyBackendModule):
    """What ``torch.stand_in`` offers: the random state is the CPU's."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float16, torch.float32]

    def get_rng_state(self, device=0):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=0):
        torch.set_rng_state(state)

    def manual_seed_all(self, seed):
        torch.random.default_generator.manual_seed(seed)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)
_library = torch.library.Library("_", "IMPL")
_library.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # accepted, no casts


class Elsewhere(torch.Tensor):
    """A tensor on the device; ``held`` are its numbers."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )
        made._held, made._arrives = held, None
        return made

    @property
    def held(self):
        if self._arrives is not None:
            self._held, self._arrives = self._arrives(), None
        return self._held

    def __repr__(self):
        return f"Elsewhere({self.held})"

    def numpy(self, *_, **__):
        raise TypeError(f"can't convert {NAME} device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *_, **__):
        return self.numpy()

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Watch(TorchDispatchMode):
    """Sees what no tensor of the device takes part in: factories, and moves to the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _there(tensor):
    return isinstance(tensor, Elsewhere)


def _named(device):
    return device is not None and torch.device(device).type == NAME


def _run(function, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    some = any(map(_there, tensors))
    asked = kwargs.get("device")
    if some and function not in MOVES:
        _check_devices(function, args, tensors)
    if kwargs.get("generator") is not None and (some or _named(asked)):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    ends_there = _named(asked) or (some and asked is None)
    if function is aten.copy_.default:
        ends_there = _there(args[0])
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu") if _named(asked) else asked}
    if function is aten._pin_memory.default:
        return _pinned(args[0])
    if function is aten.is_pinned.default:
        return hasattr(args[0], "pinned")
    inside = tree_map(lambda t: t.held if _there(t) else t, (args, kwargs))
    result = function(*inside[0], **inside[1])
    if _late(function, args, kwargs) and ends_there:
        LATE.append(tuple(result.shape))
        found = Elsewhere(result)
        found._arrives = lambda: function(*inside[0], **inside[1])
        return found
    if function is aten._local_scalar_dense.default:
        return result
    present = {id(t.held): t for t in tensors if _there(t)}  # operations in place return them
    return tree_map(lambda out: _wrap(out, present, ends_there), result)


def _pinned(tensor):
    made = tensor.clone()
    made.pinned = True
    return made


def _late(function, args, kwargs):
    """Whether a copy goes on while the program does: it was asked to, and its source is pinned."""
    asked = function is aten._to_copy.default and kwargs.get("non_blocking")
    return bool(asked) and hasattr(args[0], "pinned")


def _wrap(out, present, ends_there):
    if not isinstance(out, torch.Tensor) or _there(out):
        return out
    if id(out) in present:
        return present[id(out)]
    return Elsewhere(out) if ends_there else out


def _check_devices(function, args, tensors):
    """Numbers may come from the CPU, and so may the indices of a tensor on the device."""
    indices = []
    if function in INDEXED:
        if not _there(args[0]):
            raise RuntimeError("indices should be either on cpu or on the same device (cpu)")
        indices = tree_leaves(args[1])
    for tensor in tensors:
        if not (_there(tensor) or tensor.dim() == 0 or any(tensor is i for i in indices)):
            raise RuntimeError(
                f"{function}: Expected all tensors to be on the same device, but found at least "
                f"two devices, {NAME}:0 and cpu!"
            )


@contextlib.contextmanager
def fake_device():
    """Let the device exist within the block; modules that move there get new parameters."""
    future = torch.__future__
    overwrite = future.get_overwrite_module_params_on_conversion()
    swap = future.get_swap_module_params_on_conversion()
    lift = torch._C._only_lift_cpu_tensors()
    future.set_overwrite_module_params_on_conversion(True)
    future.set_swap_module_params_on_conversion(False)
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) by way of the CPU
    try:
        with _Watch():
            yield DEVICE
    finally:
        future.set_overwrite_module_params_on_conversion(overwrite)
        future.set_swap_module_params_on_conversion(swap)
        torch._C._set_only_lift_cpu_tensors(lift)
