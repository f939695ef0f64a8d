"""Batches of anything as tensors, row-wise helpers, and one random stream per sample."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn.errors import InputError

GOLDEN = -7046029254386353131  # 2⁶⁴/φ as a signed integer: the increment of splitmix64


def as_tensor(values: Any, name: str = "x") -> Tensor:
    """Array, tensor, data frame or nested list as a detached tensor of numbers."""
    if isinstance(values, Tensor):
        return values.detach()
    array = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
    if array.dtype == object and hasattr(values, "dtypes"):  # columns of several kinds
        kinds = np.atleast_1d(np.asarray(values.dtypes))
        if all(getattr(kind, "kind", "O") in "biuf" for kind in kinds):
            array = array.astype(float)
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{name} must hold numbers, but its type is {array.dtype}; "
            "encode text and categories as numbers first"
        )
    array = np.array(array, copy=True)  # owned and writable: torch warns about read-only memory
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a smaller batch may help."""
    said = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and ("out of memory" in said or "can't allocate memory" in said)
    )


def check_points(x: Tensor) -> None:
    """Raise an InputError for an empty batch, or one that holds NaN or infinity."""
    if x.dim() == 0 or x.numel() == 0:
        raise InputError(f"x has shape {tuple(x.shape)}: there is no sample to look at")
    low, high = x.aminmax()
    if bool(low.isfinite() & high.isfinite()):
        return
    bad = ~flat(x).isfinite().all(1)
    raise InputError(
        f"x holds NaN or infinity in {int(bad.sum())} of {len(x)} samples (first: "
        f"{bad.nonzero().squeeze(1)[:5].tolist()}); drop or impute them"
    )


def flat(x: Tensor) -> Tensor:
    """View a batch as (n, d)."""
    return x.reshape(len(x), math.prod(x.shape[1:]))


def per_sample(values: Tensor | float, like: Tensor) -> Tensor:
    """Shape a number, or one number per sample, so that it broadcasts against ``like``."""
    return column(torch.as_tensor(values, dtype=like.dtype, device=like.device), like)


def column(values: Tensor, like: Tensor) -> Tensor:
    """Shape one entry per sample so that it broadcasts against ``like``, its dtype kept."""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def keys(generator: torch.Generator | Tensor | int | None, like: Tensor) -> Tensor:
    """One random key per sample: what makes a result independent of its neighbours.

    ``generator`` is a torch generator (independent keys are drawn from it), a number (the
    same key for every sample), a tensor with one key per sample, or None (torch's global
    generator). Random numbers made from keys by `uniform` and `normal` do not depend on the
    batch that a sample travels in, nor on the device.
    """
    n = len(like)
    if isinstance(generator, Tensor):
        if generator.shape != (n,) or generator.dtype != torch.int64:
            raise InputError(
                f"one int64 key per sample was expected, shape ({n},); "
                f"got {generator.dtype} of shape {tuple(generator.shape)}"
            )
        return generator.to(like.device)
    if isinstance(generator, int):
        if not -(2**63) <= generator < 2**63:
            raise InputError(f"a seed must fit into 64 bits; got {generator}")
        return torch.full((n,), generator, dtype=torch.int64, device=like.device)
    device = generator.device if generator is not None else torch.device("cpu")
    drawn = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator, device=device)
    return drawn.to(like.device)


def fold(keys: Tensor, number: int | Tensor) -> Tensor:
    """Mix a number, or one number per sample, into the keys: new, unrelated keys."""
    number = torch.as_tensor(number, dtype=torch.int64, device=keys.device)
    return _mix(keys + (number + 1) * GOLDEN)


def uniform(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Independent uniform numbers in [0, 1), shape (n, *shape), by splitmix64 in counter mode."""
    count = int(np.prod(shape, dtype=np.int64))
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    bits = _mix(_mix(keys)[:, None] + counter * GOLDEN)
    digits = 53 if dtype == torch.float64 else 24
    drawn = _shift(bits, 64 - digits).to(dtype).mul_(2.0**-digits)
    return drawn.reshape(len(keys), *shape)


def normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Independent standard normal numbers, shape (n, *shape), by Box and Muller's transform."""
    radius = torch.sqrt(-2 * torch.log1p(-uniform(fold(keys, 0), shape, dtype)))
    return radius * torch.cos(2 * torch.pi * uniform(fold(keys, 1), shape, dtype))


def _shift(bits: Tensor, by: int) -> Tensor:
    """Shift right, filling with zeros (torch fills with the sign)."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """Finalise as splitmix64 does (Steele, Lea and Flood, 2014); integers wrap at 2⁶⁴."""
    bits = _shift(bits, 30).bitwise_xor_(bits).mul_(-4658895280553007687)
    bits = _shift(bits, 27).bitwise_xor_(bits).mul_(-7723592293110705685)
    return _shift(bits, 31).bitwise_xor_(bits)
