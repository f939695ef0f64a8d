"""The columns of a linear model, passed over in blocks of rows: centred, with an intercept."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 2**22  # numbers held at a time
FAR = 1.0  # a mean is taken off a column where it exceeds so many standard deviations


class Design:
    """(X − shift, 1): n rows, and m columns, the last for the intercept where there is one.

    X is an array, a `numpy.memmap`, or a sparse matrix; only blocks of it are copied, so that X
    may be larger than memory. Columns far from zero are centred: it changes the intercept alone.
    """

    def __init__(self, x: Any, *, intercept: bool) -> None:
        self.x, self.intercept = x, intercept
        self.rows, self.features = x.shape
        self.columns = self.features + intercept
        self.shift = np.zeros(self.features)
        if intercept:
            mean, square = self._moments()
            spread = np.sqrt(np.maximum(square - mean**2, 0))
            self.shift = np.where(np.abs(mean) > FAR * spread, mean, 0.0)

    def _moments(self) -> tuple[Array, Array]:
        """Return mean and mean square of the columns."""
        total, square = np.zeros(self.features), np.zeros(self.features)
        for block in self._raw():
            total += block[1].sum(0)
            square += np.einsum("ij,ij->j", block[1], block[1])
        return total / self.rows, square / self.rows

    def _raw(self) -> Iterator[tuple[slice, Array]]:
        step = max(1, BLOCK // max(1, self.features))
        for start in range(0, self.rows, step):
            part = slice(start, min(start + step, self.rows))
            yield part, self._dense(self.x[part])

    def _dense(self, part: Any) -> Array:
        part = part.toarray() if hasattr(part, "toarray") else part
        return np.asarray(part, dtype=np.float64)

    def _blocks(self) -> Iterator[tuple[slice, Array]]:
        centred = self.shift.any()
        for part, block in self._raw():
            yield part, block - self.shift if centred else block

    def gram(self, weight: Array, y: Array) -> tuple[Array, Array]:
        """Return XᵀΩX (m, m) and XᵀΩy (m,)."""
        d = self.features
        gram, moment = np.zeros((self.columns, self.columns)), np.zeros(self.columns)
        even = bool((weight == 1).all())
        for part, block in self._blocks():
            heavy = block if even else block * np.sqrt(weight[part])[:, None]
            gram[:d, :d] += heavy.T @ heavy
            moment[:d] += block.T @ (weight[part] * y[part])
            if self.intercept:
                gram[:d, d] += block.T @ weight[part]
        if self.intercept:
            gram[d, :d] = gram[:d, d]
            gram[d, d], moment[d] = weight.sum(), weight @ y
        return gram, moment

    def dot(self, v: Array) -> Array:
        """X·v."""
        d, z = self.features, np.empty(self.rows)
        for part, block in self._blocks():
            z[part] = block @ v[:d]
        return z + v[d] if self.intercept else z

    def tdot(self, s: Array) -> Array:
        """Xᵀ·s."""
        d, total = self.features, np.zeros(self.columns)
        for part, block in self._blocks():
            total[:d] += block.T @ s[part]
        if self.intercept:
            total[d] = s.sum()
        return total

    def take(self, rows: NDArray[np.intp] | None = None) -> Array:
        """Return some rows (all by default) with all their columns."""
        count = self.rows if rows is None else len(rows)
        taken = np.empty((count, self.columns))
        if rows is None:
            for part, block in self._blocks():
                taken[part, : self.features] = block
        else:
            taken[:, : self.features] = self._dense(self.x[rows])
            taken[:, : self.features] -= self.shift
        if self.intercept:
            taken[:, -1] = 1.0
        return taken

    def split(self, v: Array) -> tuple[Array, float]:
        """Return the coefficients of X itself, and the intercept."""
        if not self.intercept:
            return v.copy(), 0.0
        return v[:-1].copy(), float(v[-1] - self.shift @ v[:-1])
