"""Perturbations that are kept from epoch to epoch, one a sample."""

import functools
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robustlearn.errors import InputError
from robustlearn.loop import Samples
from robustlearn.tabular import Tabular
from robustlearn.threats import LpBall

LOOKED_AT = 8  # samples, to tell whether a data set draws them anew


class Memory:
    """δ of each sample as bfloat16, in memory or in a file; zero until it is first put.

    bfloat16 has the range of float32, whatever the units of x, and 8 bits of precision.

    Parameters
    ----------
    samples : their number; shape : of one.
    file : where to keep them on disk, as a memory map; None for main memory. It is made when
        it is first asked for, and a checkpoint holds a copy of it.
    resume : whether a run is asked to go on, whose file may be there already.
    begun : whether that run has a checkpoint; else nothing was put yet, and the file holds zeros.

    Raises
    ------
    InputError if there are no samples, if the file exists and no run is resumed or it is of other
    samples or of another run, and if its folder is missing.

    Notes
    -----
    Source: Zheng et al. (2020), who keep them through augmentations too; here a sample must look
    the same in every epoch.
    """

    def __init__(
        self,
        samples: int,
        shape: tuple[int, ...],
        file: Path | None = None,
        *,
        resume: bool = False,
        begun: bool = True,
    ) -> None:
        if samples < 1:
            raise InputError(f"perturbations are kept of at least one sample; got {samples}")
        self._size, self._file = (samples, *shape), file
        if file is not None:
            _check_file(file, self._size, resume, begun)

    @functools.cached_property
    def kept(self) -> Tensor:
        """The perturbations (samples, *shape), bfloat16."""
        if self._file is None:
            return torch.zeros(self._size, dtype=torch.bfloat16)
        mode = "r+" if self._file.exists() else "w+"
        mapped = np.lib.format.open_memmap(  # numpy has no bfloat16
            self._file, mode=mode, dtype=np.int16, shape=self._size
        )
        return torch.from_numpy(mapped).view(torch.bfloat16)

    def get(self, index: Tensor, like: Tensor) -> Tensor:
        """Return the perturbations (n, *shape) of some samples, of dtype and device of ``like``."""
        return self.kept[index.cpu()].to(like.device, like.dtype)

    def put(self, index: Tensor, delta: Tensor) -> None:
        """Keep the perturbations of some samples."""
        self.kept[index.cpu()] = delta.detach().to("cpu", torch.bfloat16)


def _check_file(file: Path, size: tuple[int, ...], resume: bool, begun: bool) -> None:
    """Raise an InputError where a store cannot be made without loss."""
    if not file.parent.is_dir():
        raise InputError(f"there is no folder {file.parent} to keep perturbations in; make it")
    if not file.exists():
        return
    if not resume:
        raise InputError(
            f"{file} exists, and keeping perturbations there would overwrite it: name another "
            "file, delete it, or go on with its run by resume=True"
        )
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        held = (found.shape, found.dtype)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{file} holds no perturbations ({error}): name another file") from error
    if held != (size, np.dtype(np.int16)):
        raise InputError(
            f"{file} holds {held[1]} of shape {held[0]}; expected perturbations of this run, int16 "
            f"of shape {size}: name its own file"
        )
    if not begun and found.any():
        raise InputError(
            f"{file} holds perturbations of another run, and this one has no checkpoint to go on "
            "from: name another file, or delete it"
        )


def memory_of(samples: Samples, file: Path | None, *, resume: bool, begun: bool) -> Memory:
    """Return a memory for samples that look the same in every epoch; options as of `Memory`.

    Raises
    ------
    InputError for samples that do not, and for a file that several processes would write to.
    """
    if not unchanging(samples):
        raise InputError("kept perturbations belong to unchanged samples: memory=False to augment")
    if file is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("several processes cannot keep perturbations in one file: memory=True")
    x, _ = next(samples.fetch([torch.tensor([0])], 0, 0))
    return Memory(samples.numbered, tuple(x.shape[1:]), file, resume=resume, begun=begun)


def moves_in_steps(threat: LpBall) -> bool:
    """Tell whether members stand on whole numbers, which a short step does not leave."""
    return isinstance(threat, Tabular) and (bool(threat.integer.any()) or bool(threat.groups))


def unchanging(samples: Samples) -> bool:
    """Tell whether a few samples look the same in every epoch."""
    if samples.augment is not None or samples.in_memory:
        return samples.augment is None
    some = [torch.arange(min(LOOKED_AT, len(samples)))]
    looks = [next(samples.fetch(some, 0, epoch))[0] for epoch in range(3)]
    return all(torch.equal(looks[0], look) for look in looks[1:])
