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
        self._takes_torch: bool | None = None
        if self.num_classes is not None and self.task is None:
            self.task = "classification"

    def _forward(self, x: Tensor) -> Any:
        if self._takes_torch is None:
            self._takes_torch = self._choose(x)
        output = self._call(x, self._takes_torch)
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

    def _call(self, x: Tensor, as_torch: bool) -> Any:
        point = x.detach().cpu().clone()  # the function may write into it
        with torch.no_grad():
            return self.source(point if as_torch else point.numpy())

    def _choose(self, x: Tensor) -> bool:
        failed = []
        for as_torch in (False, True):
            try:
                self._call(x, as_torch)
            except Exception as error:
                failed.append(f"{type(error).__name__}: {error}")
            else:
                return as_torch
        raise InputError(
            f"{self.name} failed on a batch of shape {tuple(x.shape)}, given as a numpy array "
            f"({failed[0]}) and as a torch tensor ({failed[1]})"
        )
