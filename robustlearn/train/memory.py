"""Perturbations that are kept from epoch to epoch, one a sample."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustlearn.errors import InputError


class Memory:
    """δ of each sample as bfloat16, in memory or in a file; zero until it is first put.

    bfloat16 has the range of float32, whatever the units of x, and 8 bits of precision.

    Parameters
    ----------
    samples : their number; shape : of one.
    file : where to keep them on disk, as a memory map; None for main memory.

    Notes
    -----
    Source: Zheng et al. (2020), who keep them through augmentations too; here a sample must look
    the same in every epoch.
    """

    def __init__(self, samples: int, shape: tuple[int, ...], file: Path | None = None) -> None:
        if samples < 1:
            raise InputError(f"perturbations are kept of at least one sample; got {samples}")
        size = (samples, *shape)
        if file is None:
            self.kept = torch.zeros(size, dtype=torch.bfloat16)
        else:  # numpy has no bfloat16
            mapped = np.lib.format.open_memmap(file, mode="w+", dtype=np.int16, shape=size)
            self.kept = torch.from_numpy(mapped).view(torch.bfloat16)

    def get(self, index: Tensor, like: Tensor) -> Tensor:
        """Return the perturbations (n, *shape) of some samples, of dtype and device of ``like``."""
        return self.kept[index.cpu()].to(like.device, like.dtype)

    def put(self, index: Tensor, delta: Tensor) -> None:
        """Keep the perturbations of some samples."""
        self.kept[index.cpu()] = delta.detach().to("cpu", torch.bfloat16)
