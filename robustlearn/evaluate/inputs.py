"""What is evaluated, checked and brought into the form that the model takes."""

import datetime
import os
import platform
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

import robustlearn
from robustlearn import _tensor
from robustlearn.errors import InputError, ModelError
from robustlearn.models import Model
from robustlearn.threats import LpBall


def columns(x: Any) -> tuple[str, ...] | None:
    """Return the column names of a data frame."""
    return tuple(str(c) for c in x.columns) if hasattr(x, "columns") else None


def points(x: Any, threat: LpBall) -> Tensor:
    """Return the samples as a tensor on the CPU, free of NaN and of unscaled pixels."""
    points = _tensor.as_tensor(x).cpu()
    _tensor.check_points(points)
    if points.dtype == torch.uint8 and (threat.lower is None or threat.upper is None):
        raise InputError(
            "x holds 8-bit integers: divide by 255 if the model takes [0, 1], or give the threat "
            "lower=0, upper=255 and eps in those units"
        )
    return points


def numbers(indices: Any, n: int) -> Tensor:
    """Return the numbers of n samples in their data set, (n,) int64; None stands for 0 … n−1."""
    if indices is None:
        return torch.arange(n)
    found = _tensor.as_tensor(indices, "indices").cpu()
    if found.is_floating_point() or found.dtype == torch.bool:
        raise InputError(f"indices must be whole numbers; got {found.dtype}")
    if found.shape != (n,):
        raise InputError(
            f"indices must hold one number for each of the {n} samples; got shape "
            f"{tuple(found.shape)}"
        )
    values, counts = found.long().unique(return_counts=True)
    if len(values) < n:
        raise InputError(
            f"indices must differ, as they tell samples apart; {values[counts > 1][:5].tolist()} "
            "came more than once"
        )
    return found.long()


def seed(given: Any) -> int:
    """Return a seed, a whole number of 64 bits."""
    whole = isinstance(given, Integral) and not isinstance(given, bool)
    if not whole or not -(2**63) <= given < 2**63:
        raise InputError(f"seed must be a whole number that fits into 64 bits; got {given!r}")
    return int(given)


def finite(model: Model, output: Tensor) -> Tensor:
    """Return the clean output, or raise a ModelError if it holds NaN."""
    bad = output.reshape(len(output), -1).isnan().any(1)
    if bool(bad.any()):
        raise ModelError(
            f"{model.name} returned NaN for {int(bad.sum())} of {len(bad)} clean samples (first: "
            f"{bad.nonzero().squeeze(1)[:5].tolist()}); mend the model or leave those samples out"
        )
    return output


def environment(model: Model) -> dict[str, Any]:
    """Return time, versions and hardware: what a reader needs to repeat an evaluation."""
    import scipy
    import sklearn

    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "robustlearn": robustlearn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "scikit-learn": sklearn.__version__,
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
