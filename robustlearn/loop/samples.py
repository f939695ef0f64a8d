"""Which samples are in which batch, and how they are fetched."""

import copy
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.loop.randomness import generator, mixed, seeded

CHUNK = 256  # samples that are fetched at a time to be held out
Augment = Callable[[Tensor, Tensor], Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """The samples of one process in one step.

    Parameters
    ----------
    index : (n,) int64, the samples' numbers; extra data is numbered on after the data itself.
    x, y : (n, *shape) and (n, *); y is (n, 0) where the data has no labels.
    total : number of samples of the step over all processes.
    """

    index: Tensor
    x: Tensor
    y: Tensor
    total: int


class Samples:
    """Samples in batches: each epoch a permutation, or draws with weights.

    Sample i is drawn with probability wᵢ/Σw, n times an epoch with replacement; without weights
    every sample comes exactly once. With extra data a share ``ratio`` of every batch is extra,
    and an epoch is one pass over the data itself. The batches of an epoch are of equal size, up
    to one sample, so that none is a leftover. All this is a function of (seed, epoch) alone.

    Parameters
    ----------
    data : a pair (x, y) or x alone, as arrays or tensors; a torch ``Dataset`` of pairs (x, y); or a
        ``DataLoader`` in batches, of which dataset, batch_size, collate_fn, num_workers and
        pin_memory are used.
    weights : class -> weight (labels in memory are needed), or one weight per sample.
    extra : more data of the same kind, mixed in; of a ``DataLoader`` its dataset is.
    ratio : the share of extra samples in a batch, 0 ≤ ratio < 1.
    augment : (x, keys) -> x on the device, with one random key per sample
        (``robustlearn._tensor.uniform`` and ``normal`` make numbers of them).

    Raises
    ------
    InputError for data without samples, x and y of different lengths, a data set without
    numbered samples, a ``DataLoader`` whose sampler picks among them, a weight that is negative or
    of a class without samples; and when samples are fetched, for data that raises.

    Examples
    --------
    >>> samples = Samples((torch.arange(5.0)[:, None], torch.tensor([0, 0, 1, 1, 1])))
    >>> [len(batch) for batch in samples.batches(seed=0, epoch=0, batch_size=2)]
    [2, 2, 1]
    """

    def __init__(
        self,
        data: Any,
        *,
        weights: Mapping[int, float] | Sequence[float] | Tensor | None = None,
        extra: Any = None,
        ratio: float = 0.0,
        augment: Augment | None = None,
    ) -> None:
        self.batch_size: int | None = None
        self._cast: Callable[[Pair], Pair] = _as_it_is
        self.augment, self.ratio = augment, ratio
        self._loading: dict[str, Any] = {}
        if isinstance(data, DataLoader):
            self.batch_size = _plain_batches(data)
            self._loading = {
                "collate_fn": data.collate_fn,
                "num_workers": data.num_workers,
                "pin_memory": data.pin_memory,
            }
            data = data.dataset
        if isinstance(extra, DataLoader):
            _plain_batches(extra)
            extra = extra.dataset
        self._sources = [_source(part) for part in ([data] if extra is None else [data, extra])]
        self._lengths = [_length(source) for source in self._sources]
        _check_alike(self._sources)
        self._cumulated = None if weights is None else self._weights(weights).cumsum(0)
        if not (0 <= ratio < 1 and (ratio > 0) == (extra is not None)):
            raise InputError(
                "ratio is the share of extra samples in a batch: expected 0 < ratio < 1 with extra "
                f"data and 0 without, got {ratio:g} {'without' if extra is None else 'with'} it"
            )

    @classmethod
    def of(cls, data: Any) -> "Samples":
        """Return data as samples, if it is not so already."""
        return data if isinstance(data, Samples) else cls(data)

    def typed(self, dtype: torch.dtype, *, classes: bool = False) -> "Samples":
        """Return the samples with x and y in ``dtype``, y of an integer type as int64.

        With ``classes`` all y are int64; an InputError, now or when fetched, for fractions.
        """
        typed = copy.copy(self)
        typed._cast = functools.partial(_cast, dtype=dtype, classes=classes)
        typed._sources = [typed._cast(part) if _held(part) else part for part in self._sources]
        return typed

    def split(self, out: Tensor) -> tuple["Samples", tuple[Tensor, Tensor]]:
        """Return the samples without those numbered ``out`` (n,), and x and y of these."""
        parts = [self._fetched(part) for part in out.split(CHUNK)]
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[out] = False
        left, rest = stays.nonzero().squeeze(1), copy.copy(self)
        source = self._sources[0]
        kept = _taken(source, left) if _held(source) else Subset(source, left.tolist())
        rest._sources = [kept, *self._sources[1:]]
        rest._lengths = [_length(kept), *self._lengths[1:]]
        if self._cumulated is not None:
            weights = torch.diff(self._cumulated, prepend=self._cumulated.new_zeros(1))
            rest._cumulated = weights[left].cumsum(0)
        x, y = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return rest, (x, y)

    def __len__(self) -> int:
        return self._lengths[0]

    @property
    def numbered(self) -> int:
        """How many samples have a number: those of the data, and the extra ones."""
        return sum(self._lengths)

    @property
    def in_memory(self) -> bool:
        """Whether all samples are tensors, and none is fetched from a data set."""
        return all(_held(source) for source in self._sources)

    def labels(self) -> list[Tensor]:
        """Return y of the data and of the extra data, of what is in memory."""
        return [source[1] for source in self._sources if _held(source) and source[1].numel()]

    def fingerprint(self) -> str:
        """Return a hash of the sizes, the options and of all samples in memory."""
        facts = [self._lengths, self.ratio, self.augment is not None]
        digest = hashlib.sha256(repr(facts).encode())
        for values in itertools.chain(*(part for part in self._sources if _held(part))):
            rows = values.cpu().contiguous()
            digest.update(rows.reshape(-1).view(torch.uint8).numpy().data)
        if self._cumulated is not None:
            digest.update(self._cumulated.numpy().data)
        return digest.hexdigest()[:16]

    def batches(self, seed: int, epoch: int, batch_size: int) -> list[Tensor]:
        """Return the sample numbers of each batch of an epoch."""
        source = generator(seed, "order", epoch)
        steps, extras = self._plan(batch_size)
        own = torch.tensor_split(self._draw(source), steps)
        if not extras:
            return list(own)
        n, count = self._lengths
        rounds = [torch.randperm(count, generator=source) for _ in range(-(-extras // count))]
        more = torch.tensor_split(n + torch.cat(rounds)[:extras], steps)
        return [torch.cat(pair) for pair in zip(own, more, strict=True)]

    def steps(self, batch_size: int) -> int:
        """Return the number of batches of an epoch."""
        return self._plan(batch_size)[0]

    def fetch(self, batches: list[Tensor], seed: int, epoch: int) -> Iterator[tuple[Any, Any]]:
        """Yield x and y of the given sample numbers, batch by batch."""
        try:
            for pair in self._pairs(batches, seed, epoch):
                yield self._cast(pair)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the data raised {type(error).__name__}: {error}") from error

    def _fetched(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return next(self.fetch([index], 0, 0))

    def _pairs(self, batches: list[Tensor], seed: int, epoch: int) -> Iterator[tuple[Any, Any]]:
        if self.in_memory:
            return ((self._rows(index, 0), self._rows(index, 1)) for index in batches)
        parts = [TensorDataset(*part) if _held(part) else part for part in self._sources]
        plan = [[(int(i), mixed(seed, "sample", epoch, int(i))) for i in b] for b in batches]
        loader = DataLoader(
            _Seeded(ConcatDataset(parts), self._item(len(parts))),
            batch_sampler=plan,
            generator=generator(seed, "loader", epoch),
            **self._loading,
        )
        return (_pair(collated) for collated in loader)

    def _item(self, sources: int) -> Callable[[Any], Any]:
        """Return what makes items of several sources go into one batch, if torch collates them."""
        plain = self._loading.get("collate_fn", default_collate) is default_collate
        return functools.partial(_item, cast=self._cast) if plain and sources > 1 else _as_it_is

    def _plan(self, batch_size: int) -> tuple[int, int]:
        """Return the number of steps of an epoch, and how many samples of it are extra."""
        n = len(self)
        extras = round(n * self.ratio / (1 - self.ratio))
        steps = -(-(n + extras) // batch_size)
        while -(-n // steps) + -(-extras // steps) > batch_size and steps < n:
            steps += 1
        return steps, extras

    def _draw(self, source: torch.Generator) -> Tensor:
        if self._cumulated is None:
            return torch.randperm(len(self), generator=source)
        points = torch.rand(len(self), generator=source, dtype=torch.float64)
        found = torch.searchsorted(self._cumulated, points * self._cumulated[-1], right=True)
        return found.clamp_(max=len(self) - 1)

    def _weights(self, weights: Any) -> Tensor:
        if isinstance(weights, Mapping):
            weights = self._per_class(weights)
        values = torch.as_tensor(weights, dtype=torch.float64).cpu()
        if values.shape != (len(self),):
            raise InputError(
                f"weights must hold one number per sample, shape ({len(self)},), or one per class "
                f"as a mapping; got shape {tuple(values.shape)}"
            )
        if not bool((values >= 0).all() & values.isfinite().all() & (values.sum() > 0)):
            raise InputError("weights must be finite and not negative, and not all zero")
        return values

    def _per_class(self, weights: Mapping[int, float]) -> Tensor:
        source = self._sources[0]
        if not _held(source) or source[1].dim() != 1:
            raise InputError(
                "weights of classes need the labels in memory as (n,); give one weight per sample"
            )
        labels = source[1].cpu()
        present = {int(label) for label in labels.unique()}
        if empty := sorted(set(weights) - present):
            raise InputError(f"weights names classes without samples: {empty}; leave them out")
        if missing := sorted(present - set(weights)):
            raise InputError(f"weights leaves out the classes {missing}; give each a weight")
        values = torch.zeros(len(labels), dtype=torch.float64)
        for label, weight in weights.items():
            values[labels == label] = weight
        return values

    def _rows(self, index: Tensor, which: int) -> Tensor:
        """Gather x (0) or y (1) of some samples from the data and the extra data."""
        first = self._sources[0][which]
        if len(self._sources) == 1:
            return first[index.to(first.device)]
        own = index < len(self)
        more = self._sources[1][which]
        rows = first.new_empty((len(index), *first.shape[1:]))
        rows[own.to(rows.device)] = first[index[own].to(first.device)]
        rows[~own.to(rows.device)] = more[(index[~own] - len(self)).to(more.device)].to(rows)
        return rows


class _Seeded(Dataset):
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


def _source(data: Any) -> Any:
    """Return a pair of tensors, or a data set with numbered samples."""
    if isinstance(data, Samples):
        raise InputError("extra must be data, not samples; weights and augment belong to the whole")
    if isinstance(data, IterableDataset):
        raise InputError(
            "the samples of an IterableDataset have no numbers, so that its batches could not be "
            "drawn nor resumed; give a data set with __getitem__ and __len__"
        )
    if isinstance(data, Dataset):
        return data
    pair = data if isinstance(data, tuple | list) and len(data) == 2 else (data, None)
    x = _tensor.as_tensor(pair[0])
    y = x.new_empty(len(x), 0) if pair[1] is None else _tensor.as_tensor(pair[1], "y")
    if len(x) != len(y):
        raise InputError(f"x has {len(x)} samples, y has {len(y)}; expected as many")
    return x, y


def _plain_batches(loader: DataLoader) -> int:
    """Return the size of a loader's batches, which hold all samples in their order or a random one.

    Raises
    ------
    InputError for any other: batches are drawn here, and its choice of samples would be lost.
    """
    size = _length(_source(loader.dataset))
    batches = loader.batch_sampler
    if type(batches) is not BatchSampler:
        given = "no batches" if batches is None else f"batches by {type(batches).__name__}"
        raise InputError(f"a DataLoader with batch_size is expected, and this one gives {given}")
    sampler = batches.sampler
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


def _as_it_is(given: Any) -> Any:
    return given


def _cast(pair: Pair, *, dtype: torch.dtype, classes: bool) -> Pair:
    x, y = pair
    if classes and y.is_floating_point() and not torch.equal(y, y.round()):
        raise InputError(
            f"y holds fractions like {float(y[y != y.round()][0]):g}; expected class numbers"
        )
    return x.to(dtype), y.long() if classes or not y.is_floating_point() else y.to(dtype)


def _item(given: Any, *, cast: Callable[[Pair], Pair]) -> Pair:
    """Return one item of a data set as tensors (*shape) and (*)."""
    x, y = given if isinstance(given, tuple | list) and len(given) == 2 else (given, [])
    return cast((torch.as_tensor(x), torch.as_tensor(y)))


def _taken(pair: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    x, y = pair
    return x[index.to(x.device)], y[index.to(y.device)]


def _check_alike(sources: list[Any]) -> None:
    """Raise an InputError for data and extra data in memory that do not go into one batch."""
    if len(sources) < 2 or not all(_held(source) for source in sources):
        return
    for name, own, more in zip("xy", *sources, strict=True):
        if own.shape[1:] != more.shape[1:]:
            raise InputError(
                f"extra data must be of the same kind: a sample's {name} has shape "
                f"{tuple(own.shape[1:])} in the data, {tuple(more.shape[1:])} in the extra data"
            )


def _held(source: Any) -> bool:
    return isinstance(source, tuple)


def _length(source: Any) -> int:
    length = len(source[0]) if _held(source) else len(source)
    if length == 0:
        raise InputError("the data holds no sample; expected at least one")
    return length


def _pair(collated: Any) -> tuple[Any, Any]:
    """Return x and y of what a data loader gives, which may be x alone."""
    if isinstance(collated, Tensor):
        return collated, collated.new_empty(len(collated), 0)
    if isinstance(collated, tuple | list) and len(collated) == 2:
        return torch.as_tensor(collated[0]), torch.as_tensor(collated[1])
    raise InputError(
        f"a data set must give pairs (x, y), or x alone; got {type(collated).__name__}"
    )
