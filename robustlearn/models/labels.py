"""Labels in the user's words as columns of a model's output, checked on the way."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn.errors import InputError
from robustlearn.models.base import LOOKED_AT, Model


def labels(model: Model, x: Tensor, y: Any) -> Tensor:
    """Return labels as column numbers, or targets as floats; everything about them is checked."""
    array = np.array(y.detach().cpu().numpy() if isinstance(y, Tensor) else y)
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
        model.settle(x[:LOOKED_AT].to(model.device))
        return torch.tensor([place[v] for v in array.tolist()])
    if array.dtype.kind not in "biuf":
        raise InputError(f"y must hold class numbers 0 … K−1 (or targets); it holds {array.dtype}")
    some = x[:LOOKED_AT].to(model.device)
    model.settle(some, torch.as_tensor(array))
    if model.task == "regression":
        return torch.as_tensor(array, dtype=model.dtype)
    if array.dtype.kind == "f" and (array != np.round(array)).any():
        raise InputError(
            f"y must hold class numbers for the classifier {model.name}, but holds fractions like "
            f"{array[array != np.round(array)][0]:g}; wrap a regressor with task='regression'"
        )
    labels = torch.as_tensor(array.astype(np.int64))
    if model.num_classes is None:
        with torch.no_grad():
            model(some)
    check_range(model, labels)
    return labels


def check_range(model: Model, labels: Tensor) -> None:
    """Raise an InputError unless the labels are columns of the model's output."""
    count = int(model.num_classes or 0)
    low, high = (int(end) for end in labels.aminmax())
    if low < 0 or high >= count:
        raise InputError(
            f"labels out of range: y spans {low} to {high}, but "
            f"{model.name} has {count} classes, numbered from 0"
        )
