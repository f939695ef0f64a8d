"""The columns of a linear model, passed over in blocks of rows: centred, with an intercept."""

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustlearn.errors import InputError

Array = NDArray[np.float64]
BLOCK = 2**22  # numbers held at a time
FAR = 1.0  # a mean is taken off a column where it exceeds so many standard deviations


class Design:
    """(X − shift, 1): n rows, and m columns, the last for the intercept where there is one.

    X may be an array, a `numpy.memmap`, a sparse matrix, a `dask.array` (blocks of rows, worked on
    where they lie) or a torch tensor on any device. Every pass is a sum, or a list, over blocks of
    rows: what travels is the vector of columns and one number a row, in the first pass an
    m × m matrix a block, and later the few rows that a solver asks for by `take`. Only blocks
    are copied, so that X may be larger than memory. Columns far from zero are centred: it changes
    the intercept alone.

    ``kept`` tells which rows count (all by default). Others of a file in memory are left where they
    are, those of an array are dropped in a copy, those of a dask array by its own graph.

    What a solver holds in memory is up to it: the squared loss with many rows asks by `take` for
    rows of small residual only; the others take all rows once (`take`), as a copy with a column
    for the intercept, or X itself where it is dense, float64, and there is neither an intercept
    nor a shift.
    """

    def __init__(self, x: Any, *, intercept: bool, kept: NDArray[np.bool_] | None = None) -> None:
        whole = kept is None or bool(kept.all())
        self.index = None if kept is None or whole or not is_mapped(x) else np.flatnonzero(kept)
        self.x = x if whole or self.index is not None else x[kept]
        self.intercept = intercept
        self.rows, self.features = self.x.shape
        if self.index is not None:
            self.rows = len(self.index)
        self.columns = self.features + intercept
        self.shift = np.zeros(self.features)
        if intercept or is_native(x):
            total, square = self._summed(_moments)
            if not np.isfinite(square).all():
                raise InputError("X holds NaN or infinity; drop or impute these samples")
        if intercept:
            mean = total / self.rows
            spread = np.sqrt(np.maximum(square / self.rows - mean**2, 0))
            self.shift = np.where(np.abs(mean) > FAR * spread, mean, 0.0)

    def gram(self, weight: Array, y: Array) -> tuple[Array, Array]:
        """Return XᵀΩX (m, m) and XᵀΩy (m,)."""
        d = self.features
        square, moment, mass = self._summed(_gram, weight, y)
        if not self.intercept:
            return square, moment
        gram = np.empty((d + 1, d + 1))
        gram[:d, :d], gram[:d, d], gram[d, :d], gram[d, d] = square, mass, mass, weight.sum()
        return gram, np.append(moment, weight @ y)

    def dot(self, v: Array) -> Array:
        """X·v."""
        z = np.concatenate(list(self._each(_dot, w=v[: self.features])))
        return z + v[-1] if self.intercept else z

    def tdot(self, s: Array) -> Array:
        """Xᵀ·s."""
        (total,) = self._summed(_tdot, s)
        return np.append(total, s.sum()) if self.intercept else total

    def tdot_size(self, s: Array) -> Array:
        """|X|ᵀ·|s|, against which the rounding of Xᵀ·s is measured."""
        (total,) = self._summed(_tdot_size, np.abs(s))
        return np.append(total, np.abs(s).sum()) if self.intercept else total

    def pick(self, columns: NDArray[np.intp]) -> Array:
        """Return some columns of all rows, (n, k)."""
        inner = columns[columns < self.features]
        picked = np.empty((self.rows, len(columns)))
        start = 0
        for block in self._each(partial(_picked, columns=inner.tolist())):
            picked[start : start + len(block), columns < self.features] = block
            start += len(block)
        picked[:, columns >= self.features] = 1.0
        return picked

    def take(self, rows: NDArray[np.intp] | None = None) -> Array:
        """Return some rows (all by default), in their order, with all their columns; not to change.

        All rows of a dense X that needs no further column and no shift are X itself, not a copy.
        """
        if rows is None and self._is_taken():
            return np.asarray(self.x)
        count = self.rows if rows is None else len(rows)
        taken = np.empty((count, self.columns))
        if rows is None:
            start = 0
            for block in self._each(_itself):
                taken[start : start + len(block), : self.features] = block
                start += len(block)
        elif is_mapped(self.x):
            for part in self._parts():
                first, last = np.searchsorted(rows, [part.start, part.stop])
                near = self._block(part)[rows[first:last] - part.start]
                taken[first:last, : self.features] = near - self.shift
        else:
            part = self.x[rows]
            taken[:, : self.features] = _numpy(part.compute() if _is_dask(part) else part)
            if self.shift.any():
                taken[:, : self.features] -= self.shift
        if self.intercept:
            taken[:, -1] = 1.0
        return taken

    def split(self, v: Array) -> tuple[Array, float]:
        """Return the coefficients of X itself, and the intercept."""
        if not self.intercept:
            return v.copy(), 0.0
        return v[:-1].copy(), float(v[-1] - self.shift @ v[:-1])

    def _summed(self, task: Callable[..., Any], *along: Array) -> tuple[Array, ...]:
        """Return the sums over the blocks of what a task returns."""
        total: list[Array] | None = None
        for parts in self._each(task, *along):
            if total is None:
                total = [np.array(part, dtype=np.float64) for part in parts]
            else:
                for so_far, part in zip(total, parts, strict=True):
                    so_far += part
        return tuple(total or ())

    def _each(self, task: Callable[..., Any], *along: Array, w: Array | None = None) -> Any:
        """Run task(block, the same rows of each of ``along``, w) on every block of rows."""
        shift = self.shift if self.shift.any() else None
        if _is_dask(self.x):
            return _distributed(self.x, task, along, w, shift)
        return (
            _run(task, self._block(part), [a[part] for a in along], w, shift)
            for part in self._parts()
        )

    def _is_taken(self) -> bool:
        """Tell whether X is its own matrix in memory as it is."""
        x = self.x
        return (
            isinstance(x, np.ndarray)
            and not is_mapped(x)
            and x.dtype == np.float64
            and bool(x.flags.c_contiguous)
            and not self.intercept
            and not self.shift.any()
        )

    def _block(self, part: slice) -> Any:
        """Return some rows, of those kept."""
        if self.index is None:
            return _rows(self.x, part)
        chosen = self.index[part]
        return _rows(self.x, slice(int(chosen[0]), int(chosen[-1]) + 1))[chosen - chosen[0]]

    def _parts(self) -> Iterator[slice]:
        step = max(1, BLOCK // max(1, self.features))
        for start in range(0, self.rows, step):
            yield slice(start, min(start + step, self.rows))


def is_native(x: Any) -> bool:
    """Tell what is worked on where it lies: dask arrays, torch tensors, and files in memory."""
    return _is_dask(x) or hasattr(x, "new_tensor") or is_mapped(x)


def _is_dask(x: Any) -> bool:
    return hasattr(x, "dask") and hasattr(x, "to_delayed")


def is_mapped(x: Any) -> bool:
    """Tell a whole `numpy.memmap` that its file can stand for from arrays, and parts of one.

    What is written to a copy-on-write map (mode "c") is not in the file, and a map of an unnamed
    temporary file cannot be opened again: these are sliced as arrays are.
    """
    return (
        isinstance(x, np.memmap)
        and isinstance(x.base, mmap.mmap)
        and x.flags.c_contiguous
        and x.mode in ("r", "r+", "w+")
        and x.filename is not None
    )


def _rows(x: Any, part: slice) -> Any:
    """Return some rows; those of a file are mapped anew, so that they leave memory afterwards."""
    if not is_mapped(x):
        return x[part]
    start = x.offset + part.start * x.strides[0]
    shape = (part.stop - part.start, *x.shape[1:])
    return np.memmap(x.filename, dtype=x.dtype, mode="r", offset=start, shape=shape)


def _distributed(
    x: Any, task: Callable[..., Any], along: tuple[Array, ...], w: Array | None, shift: Any
) -> Any:
    """Run a task on the blocks of a dask array, where they lie."""
    import dask

    x = x.rechunk({1: -1})
    ends = np.cumsum(x.chunks[0])
    parts = [slice(end - size, end) for end, size in zip(ends, x.chunks[0], strict=True)]
    blocks = x.to_delayed().ravel()
    run = dask.delayed(_run)
    return dask.compute(
        *(
            run(task, block, [a[part] for a in along], w, shift)
            for block, part in zip(blocks, parts, strict=True)
        )
    )


def _run(
    task: Callable[..., Any], block: Any, along: list[Array], w: Array | None, shift: Array | None
) -> Any:
    """Run a task on a block: numbers of the block's own kind go in, arrays of numpy come out."""
    if hasattr(block, "toarray"):
        block = block.toarray()
    if hasattr(block, "new_tensor"):  # of torch: keep to its device
        block = block.double()
        given = [block.new_tensor(a) for a in (*along, *(() if w is None else (w,)))]
        if shift is not None:
            block = block - block.new_tensor(shift)
    else:
        block = np.asarray(block, dtype=np.float64)
        given = [*along, *(() if w is None else (w,))]
        if shift is not None:
            block = block - shift
    result = task(block, *given)
    return tuple(map(_numpy, result)) if isinstance(result, tuple) else _numpy(result)


def _numpy(values: Any) -> Array:
    if hasattr(values, "toarray"):
        values = values.toarray()
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _moments(block: Any) -> Any:
    return block.sum(0), (block * block).sum(0)


def _gram(block: Any, weight: Any, y: Any) -> Any:
    heavy = block if bool((weight == 1).all()) else block * (weight**0.5)[:, None]
    return heavy.T @ heavy, block.T @ (weight * y), block.T @ weight


def _dot(block: Any, w: Any) -> Any:
    return block @ w


def _tdot(block: Any, s: Any) -> Any:
    return (block.T @ s,)


def _picked(block: Any, columns: list[int]) -> Any:
    return block[:, columns]


def _tdot_size(block: Any, s: Any) -> Any:
    return (abs(block).T @ s,)


def _itself(block: Any) -> Any:
    return block
