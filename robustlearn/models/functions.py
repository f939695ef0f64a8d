"""Any callable on arrays as a black box."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn.errors import InputError, ModelError
from robustlearn.models.base import Model


class FunctionModel(Model):
    """A callable on numpy or torch arrays, tried in that order: no gradient.

    It returns scores (n, K), one number a sample, or, with ``num_classes``, predicted labels.
    """

    def __init__(self, function: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._takes: str | None = None
        if self.num_classes is not None and self.task is None:
            self.task = "classification"

    def _forward(self, x: Tensor) -> Any:
        if self._takes is None:
            self._takes = self._choose(x)
        output = self._call(x, self._takes)
        whole = np.asarray(output) if not isinstance(output, Tensor) else output.cpu().numpy()
        if whole.ndim == 1 and whole.dtype.kind in "iub" and self.num_classes is not None:
            if whole.size and not 0 <= whole.min() <= whole.max() < self.num_classes:
                raise ModelError(
                    f"{self.name} returned labels from {whole.min()} to {whole.max()}, but "
                    f"num_classes is {self.num_classes}"
                )
            self._probabilities = False
            return torch.as_tensor(np.eye(self.num_classes)[whole.astype(int)], device=x.device)
        return output

    def _call(self, x: Tensor, kind: str) -> Any:
        point = x.detach().cpu().clone()  # the function may write into it
        with torch.no_grad():
            if kind == "numpy":
                return self.source(point.numpy())
            return self.source(point.float() if kind == "torch float32" else point)

    def _choose(self, x: Tensor) -> str:
        failed = []
        for kind in ("numpy", "torch", "torch float32"):
            try:
                self._call(x, kind)
            except Exception as error:
                failed.append(f"as {kind}: {type(error).__name__}: {error}")
            else:
                return kind
        raise InputError(
            f"{self.name} failed on a batch of shape {tuple(x.shape)}: {'; '.join(failed)}"
        )
