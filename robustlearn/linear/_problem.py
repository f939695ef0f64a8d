"""The problem of a linear model under attack, and what a method leaves of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._bound import lower_bound
from robustlearn.linear._design import Design
from robustlearn.linear._losses import Loss
from robustlearn.linear._rows import Rows, Settled

Array = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """Columns v, multipliers of the rows, steps; the bound where it has been worked out.

    ``lifts`` are the multipliers by c where the method has its own.

    ``kinks`` and ``corners`` are the multipliers of the kinks of |r| and of ‖D·v‖₁, for those who
    start near.
    """

    v: Array
    multipliers: Array
    steps: int
    bound: float | None = None
    lifts: Array | None = None
    kinks: Array | None = None
    corners: Array | None = None


@dataclass(frozen=True)
class Problem:
    """min over v of Σ ω·loss(z, y; c) with z = Xv and c = ε‖D·v‖_q.

    ``scale`` = D, one number a column of the design, 0 where a column costs nothing. A
    ``relative`` eps is in units of the ε_max of `without`. ``known`` holds what does not depend on
    eps, once it is known; a copy at another eps shares it.
    """

    design: Design
    y: Array
    weight: Array
    scale: Array
    eps: float
    q: float
    loss: Loss
    relative: bool = False
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def penalised(self) -> NDArray[np.intp]:
        """The columns that the attack reaches."""
        return np.flatnonzero((self.scale > 0) & (self.eps > 0))

    def size(self, v: Array) -> float:
        """c = ε‖D·v‖_q."""
        return self.eps * float(np.linalg.norm(self.scale * v, self.q))

    def objective(self, v: Array) -> float:
        """Σ ω·loss."""
        height = self.loss.height(self.design.dot(v), self.size(v), self.y)
        return float(self.weight @ self.loss.value(height))

    def bound(self, v: Array, multipliers: Array, lifts: Array | None = None) -> float:
        """Return a proven lower bound of the least objective."""
        return lower_bound(
            self.design,
            self.y,
            self.weight,
            self.scale,
            self.eps,
            self.q,
            self.loss,
            v,
            multipliers,
            lifts,
        )

    def rows(self, part: NDArray[np.intp] | None = None, rest: Settled | None = None) -> Rows:
        """Return some of the rows (all by default) for the interior-point method."""
        index = slice(None) if part is None else part
        return Rows(
            self.loss,
            self.design.take(part),
            self.y[index],
            self.weight[index],
            self.penalised,
            self.eps * self.scale[self.penalised],
            self.q,
            rest,
        )

    def once(self, name: str, make: Callable[[], T]) -> T:
        """Return what does not depend on eps, worked out once."""
        if name not in self.known:
            self.known[name] = make()
        return self.known[name]
