"""What samples are drawn from: pairs of tensors in memory, and data sets that give items."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.loop.randomness import seeded

Pair = tuple[Tensor, Tensor]


class Seeded(Dataset):
    """A data set whose random numbers are a function of the sample's own seed.

    Otherwise augmentations that draw from global streams would depend on which worker had
    fetched what before, and a resumed run would see other images.
    """

    def __init__(self, samples: Dataset, item: Callable[[Any], Any]) -> None:
        self._samples, self._item = samples, item

    def __getitem__(self, number: tuple[int, int]) -> Any:
        index, seed = number
        with seeded(seed):
            return self._item(self._samples[index])


def source(data: Any) -> Any:
    """Return a pair of tensors, or a data set with numbered samples."""
    if isinstance(data, IterableDataset):
        raise InputError(
            "the samples of an IterableDataset have no numbers, so that its batches could not be "
            "drawn nor resumed; give a data set with __getitem__ and __len__"
        )
    if isinstance(data, Dataset):
        return data
    given = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
    x = _tensor.as_tensor(given[0])
    y = x.new_empty(len(x), 0) if given[1] is None else _tensor.as_tensor(given[1], "y")
    if len(x) != len(y):
        raise InputError(f"x has {len(x)} samples, y has {len(y)}; expected as many")
    return x, y


def plain_batches(loader: DataLoader) -> int:
    """Return the size of a loader's batches, which hold all samples in their order or a random one.

    Raises
    ------
    InputError for any other: batches are drawn here, and its choice of samples would be lost.
    """
    size = length(source(loader.dataset))
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        given = "no batches" if batches is None else f"batches by {type(batches).__name__}"
        raise InputError(f"a DataLoader with batch_size is expected, and this one gives {given}")
    sampler: Any = batches.sampler
    once = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement
    )
    if not once or len(sampler) != size:
        raise InputError(
            f"a DataLoader that draws each of its {size} samples once an epoch is expected, and "
            f"the {type(sampler).__name__} of this one may not, which would be lost: give a Subset "
            "without a sampler, or Samples(…, weights=…)"
        )
    return batches.batch_size


def as_it_is(given: Any) -> Any:
    """Return what is given."""
    return given


def cast(both: Pair, *, dtype: torch.dtype, classes: bool) -> Pair:
    """Return x in ``dtype``, and y so too, or as int64 if its type is whole or it holds classes."""
    x, y = both
    if classes and y.is_floating_point() and not torch.equal(y, y.round()):
        raise InputError(
            f"y holds fractions like {float(y[y != y.round()][0]):g}; expected class numbers"
        )
    return x.to(dtype), y.long() if classes or not y.is_floating_point() else y.to(dtype)


def item(given: Any, *, cast: Callable[[Pair], Pair]) -> Pair:
    """Return one item of a data set as tensors (*shape) and (*)."""
    x, y = given if isinstance(given, tuple | list) and len(given) == 2 else (given, [])
    return cast((torch.as_tensor(x), torch.as_tensor(y)))


def taken(both: Pair, index: Tensor) -> Pair:
    """Return some rows of x and y."""
    x, y = both
    return x[index.to(x.device)], y[index.to(y.device)]


def check_alike(sources: list[Any]) -> None:
    """Raise an InputError for data and extra data in memory that do not go into one batch."""
    if len(sources) < 2 or not all(held(one) for one in sources):
        return
    for name, own, more in zip("xy", *sources, strict=True):
        if own.shape[1:] != more.shape[1:]:
            raise InputError(
                f"extra data must be of the same kind: a sample's {name} has shape "
                f"{tuple(own.shape[1:])} in the data, {tuple(more.shape[1:])} in the extra data"
            )


def held(given: Any) -> bool:
    """Tell whether a source is a pair of tensors, and none to fetch from."""
    return isinstance(given, tuple)


def length(given: Any) -> int:
    """Return how many samples a source holds, at least one."""
    size = len(given[0]) if held(given) else len(given)
    if size == 0:
        raise InputError("the data holds no sample; expected at least one")
    return size


def pair(collated: Any) -> tuple[Any, Any]:
    """Return x and y of what a data loader gives, which may be x alone."""
    if isinstance(collated, Tensor):
        return collated, collated.new_empty(len(collated), 0)
    if isinstance(collated, tuple | list) and len(collated) == 2:
        return torch.as_tensor(collated[0]), torch.as_tensor(collated[1])
    raise InputError(
        f"a data set must give pairs (x, y), or x alone; got {type(collated).__name__}"
    )
