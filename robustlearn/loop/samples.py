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
    ConcatDataset,
    DataLoader,
    Subset,
    TensorDataset,
    default_collate,
)

from robustlearn.errors import InputError
from robustlearn.loop import sources
from robustlearn.loop.randomness import generator, mixed
from robustlearn.loop.sources import Pair

CHUNK = 256  # samples that are fetched at a time to be held out
Augment = Callable[[Tensor, Tensor], Tensor]


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
        self._cast: Callable[[Pair], Pair] = sources.as_it_is
        self.augment, self.ratio = augment, ratio
        self._loading: dict[str, Any] = {}
        if isinstance(data, DataLoader):
            self.batch_size = sources.plain_batches(data)
            self._loading = {
                "collate_fn": data.collate_fn,
                "num_workers": data.num_workers,
                "pin_memory": data.pin_memory,
            }
            data = data.dataset
        if isinstance(data, Samples) or isinstance(extra, Samples):
            raise InputError(
                "data and extra must be data, not samples; weights and augment belong to the whole"
            )
        if isinstance(extra, DataLoader):
            sources.plain_batches(extra)
            extra = extra.dataset
        given = [data] if extra is None else [data, extra]
        self._sources = [sources.source(part) for part in given]
        self._lengths = [sources.length(source) for source in self._sources]
        sources.check_alike(self._sources)
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
        typed._cast = functools.partial(sources.cast, dtype=dtype, classes=classes)
        typed._sources = [typed._cast(one) if sources.held(one) else one for one in self._sources]
        return typed

    def split(self, out: Tensor) -> tuple["Samples", tuple[Tensor, Tensor]]:
        """Return the samples without those numbered ``out`` (n,), and x and y of these."""
        parts = [self._fetched(part) for part in out.split(CHUNK)]
        stays = torch.ones(len(self), dtype=torch.bool)
        stays[out] = False
        left, rest = stays.nonzero().squeeze(1), copy.copy(self)
        own = self._sources[0]
        kept = sources.taken(own, left) if sources.held(own) else Subset(own, left.tolist())
        rest._sources = [kept, *self._sources[1:]]
        rest._lengths = [sources.length(kept), *self._lengths[1:]]
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
        return all(sources.held(source) for source in self._sources)

    def labels(self) -> list[Tensor]:
        """Return y of the data and of the extra data, of what is in memory."""
        return [source[1] for source in self._sources if sources.held(source) and source[1].numel()]

    def fingerprint(self) -> str:
        """Return a hash of the sizes, the options and of all samples in memory."""
        facts = [self._lengths, self.ratio, self.augment is not None]
        digest = hashlib.sha256(repr(facts).encode())
        for values in itertools.chain(*(part for part in self._sources if sources.held(part))):
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
        parts = [TensorDataset(*part) if sources.held(part) else part for part in self._sources]
        plan = [[(int(i), mixed(seed, "sample", epoch, int(i))) for i in b] for b in batches]
        loader = DataLoader(
            sources.Seeded(ConcatDataset(parts), self._item()),
            batch_sampler=plan,
            generator=generator(seed, "loader", epoch),
            **self._loading,
        )
        return (sources.pair(collated) for collated in loader)

    def _item(self) -> Callable[[Any], Any]:
        """Return what makes items of several sources go into one batch, if torch collates them."""
        plain = self._loading.get("collate_fn", default_collate) is default_collate
        if len(self._sources) == 1 or not plain:
            return sources.as_it_is
        return functools.partial(sources.item, cast=self._cast)

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
        if not sources.held(source) or source[1].dim() != 1:
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
