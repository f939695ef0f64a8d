"""What is evaluated, checked and brought into the form that the model takes."""

import datetime
import os
import platform
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


def labels(model: Model, x: Tensor, y: Any) -> Tensor:
    """Return labels as column numbers, or targets as floats; everything about them is checked."""
    array = np.array(y.detach().cpu() if isinstance(y, Tensor) else y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (len(x),):
        hint = "; for one-hot labels give y.argmax(axis=1)" if array.ndim == 2 else ""
        raise InputError(f"x has {len(x)} samples, but y has shape {array.shape}{hint}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError("y holds NaN or infinity")
    if model.classes is not None:
        known = np.asarray(model.classes)
        place = {value: column for column, value in enumerate(known.tolist())}
        strange = sorted({str(v) for v in array.tolist() if v not in place})
        if strange:
            raise InputError(
                f"y holds labels that {model.name} does not know: {', '.join(strange[:5])}; it "
                f"knows {', '.join(map(str, known[:10]))}"
            )
        return torch.tensor([place[v] for v in array.tolist()])
    if array.dtype.kind not in "biuf":
        raise InputError(f"y must hold class numbers 0 … K−1 (or targets); it holds {array.dtype}")
    first = x[:1].to(model.device)
    model.settle(first, torch.as_tensor(array))
    if model.task == "regression":
        return torch.as_tensor(array, dtype=model.dtype)
    if array.dtype.kind == "f" and (array != np.round(array)).any():
        raise InputError(
            f"y must hold class numbers for the classifier {model.name}, but holds fractions like "
            f"{array[array != np.round(array)][0]:g}; wrap a regressor with task='regression'"
        )
    labels = torch.as_tensor(array.astype(np.int64))
    model(first)
    count = int(model.num_classes or 0)
    if int(labels.min()) < 0 or int(labels.max()) >= count:
        raise InputError(
            f"labels out of range: y spans {int(labels.min())} to {int(labels.max())}, but "
            f"{model.name} has {count} classes, numbered from 0"
        )
    return labels


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
