"""What a linear model loses under attack: f(z, c) of the prediction z and c = ε‖D·w‖_q.

Regression: φ(|z − y| + c). Classification, y = ±1: ℓ(c − y·z). Both are the worst case over the
attack in closed form, because φ grows with the residual and ℓ with minus the margin. Written for
the solver as ψ(e) at the least *height* e above affine functions of (z, c), its floors.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, xlogy

from robustlearn.errors import InputError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Floor:
    """slope·z + lift·c + offset; slope and offset have one entry a row."""

    slope: Array | float
    lift: float
    offset: Array | float

    def __call__(self, z: Array, c: float) -> Array:
        """Return the floor of each row."""
        return self.slope * z + self.lift * c + self.offset


class Loss(ABC):
    """ψ with its derivatives, its conjugate and the floors.

    Attributes
    ----------
    classifies : whether y is ±1.
    smooth : there is one floor, and the height lies on it.
    limit : the largest ψ'.
    knee : where a quadratic ψ turns linear.
    power : p where ψ(t·e) = tᵖ·ψ(e), the knee scaled along; of regression.
    """

    classifies = False
    smooth = False
    limit = np.inf
    knee = np.inf
    power = 0

    def scaled(self, factor: float) -> "Loss":
        """Return the loss of y / factor."""
        return self

    @abstractmethod
    def value(self, e: Array) -> Array:
        """ψ(e)."""

    @abstractmethod
    def slope(self, e: Array) -> Array:
        """ψ'(e)."""

    @abstractmethod
    def curvature(self, e: Array) -> Array:
        """ψ''(e)."""

    @abstractmethod
    def conjugate(self, a: Array) -> Array:
        """sup over e of a·e − ψ(e), for 0 ≤ a ≤ limit."""

    def floors(self, y: Array) -> tuple[Floor, ...]:
        """Return what the height stays above: ±(z − y) + c."""
        return Floor(1.0, 1.0, -y), Floor(-1.0, 1.0, y)

    @abstractmethod
    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        """Return the best constant prediction, and multipliers (n,) that sum to 0 there."""

    def height(self, z: Array, c: float, y: Array) -> Array:
        """Return the least height: |z − y| + c, or c − y·z."""
        return np.maximum.reduce([floor(z, c) for floor in self.floors(y)])


class Squared(Loss):
    """(|z − y| + c)²."""

    power = 2

    def value(self, e: Array) -> Array:
        return e**2

    def slope(self, e: Array) -> Array:
        return 2 * e

    def curvature(self, e: Array) -> Array:
        return np.full_like(e, 2.0)

    def conjugate(self, a: Array) -> Array:
        return a**2 / 4

    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        z = float(weight @ y / weight.sum())
        return z, 2 * weight * (z - y)


class Absolute(Loss):
    """|z − y| + c."""

    limit, power = 1.0, 1

    def value(self, e: Array) -> Array:
        return e

    def slope(self, e: Array) -> Array:
        return np.ones_like(e)

    def curvature(self, e: Array) -> Array:
        return np.zeros_like(e)

    def conjugate(self, a: Array) -> Array:
        return np.zeros_like(a)

    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        order = np.argsort(y)
        middle = np.searchsorted(np.cumsum(weight[order]), weight.sum() / 2)
        z = float(y[order[min(middle, len(y) - 1)]])
        s = weight * np.sign(z - y)
        tied = y == z
        s[tied] = -weight[tied] * (s[~tied].sum() / weight[tied].sum())
        return z, s


class Huber(Loss):
    """H_k(|z − y| + c), H_k(t) = t²/2 up to t = k, k·t − k²/2 beyond."""

    power = 2

    def __init__(self, knee: float) -> None:
        if not (isinstance(knee, Real) and 0 < float(knee) < np.inf):
            raise InputError(f"the threshold of the Huber loss must be positive; got {knee}")
        self.knee = self.limit = float(knee)

    def scaled(self, factor: float) -> "Huber":
        """Return the loss of y / factor."""
        return Huber(min(max(self.knee / factor, 1e-300), 1e150))

    def value(self, e: Array) -> Array:
        return np.where(e <= self.knee, e**2 / 2, self.knee * e - self.knee**2 / 2)

    def slope(self, e: Array) -> Array:
        return np.minimum(e, self.knee)

    def curvature(self, e: Array) -> Array:
        return np.ones_like(e)  # of the quadratic part; the knee has a variable of its own

    def conjugate(self, a: Array) -> Array:
        return a**2 / 2

    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        def slope(z: float) -> float:
            return float(weight @ np.clip(z - y, -self.knee, self.knee))

        low, high = float(y.min()), float(y.max())
        z = low if low == high else float(brentq(slope, low, high, xtol=1e-15 * (high - low)))
        return z, weight * np.clip(z - y, -self.knee, self.knee)


class Logistic(Loss):
    """log(1 + exp(c − y·z))."""

    classifies, smooth, limit = True, True, 1.0

    def value(self, e: Array) -> Array:
        return np.logaddexp(0, e)

    def slope(self, e: Array) -> Array:
        return expit(e)

    def curvature(self, e: Array) -> Array:
        return expit(e) * expit(-e)

    def conjugate(self, a: Array) -> Array:
        return xlogy(a, a) + xlogy(1 - a, 1 - a)

    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        z = float(np.log(weight[y > 0].sum() / weight[y < 0].sum()))
        return z, -y * weight * expit(-y * z)

    def floors(self, y: Array) -> tuple[Floor, ...]:
        return (Floor(-y, 1.0, 0.0),)


class Hinge(Loss):
    """max(0, 1 + c − y·z)."""

    classifies, limit = True, 1.0

    def value(self, e: Array) -> Array:
        return e

    def slope(self, e: Array) -> Array:
        return np.ones_like(e)

    def curvature(self, e: Array) -> Array:
        return np.zeros_like(e)

    def conjugate(self, a: Array) -> Array:
        return -a  # of (1 + t)₊ as a function of t = c − y·z

    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        up, down = float(weight[y > 0].sum()), float(weight[y < 0].sum())
        even = np.where(y > 0, min(up, down) / up, min(up, down) / down)
        return float(np.sign(up - down)), -y * weight * even

    def floors(self, y: Array) -> tuple[Floor, ...]:
        return Floor(-y, 1.0, 1.0), Floor(np.zeros_like(y), 0.0, 0.0)


class SquaredHinge(Hinge):
    """max(0, 1 + c − y·z)²."""

    limit = np.inf

    def value(self, e: Array) -> Array:
        return e**2

    def slope(self, e: Array) -> Array:
        return 2 * e

    def curvature(self, e: Array) -> Array:
        return np.full_like(e, 2.0)

    def conjugate(self, a: Array) -> Array:
        return a**2 / 4 - a

    def constant(self, y: Array, weight: Array) -> tuple[float, Array]:
        z = float(weight @ y / weight.sum())
        return z, -2 * y * weight * (1 - y * z)


def get(name: str, knee: float = 1.35) -> Loss:
    """Return a loss by name."""
    known = {
        "squared": Squared,
        "absolute": Absolute,
        "huber": lambda: Huber(knee),
        "logistic": Logistic,
        "hinge": Hinge,
        "squared_hinge": SquaredHinge,
    }
    if not isinstance(name, str) or name not in known:
        raise InputError(f"loss must be one of {', '.join(known)}; got {name!r}")
    return known[name]()
