"""The constraint ε‖D·w‖_q ≤ c inside an interior-point method, for q = 1, 2 and ∞.

A cone keeps slacks and multipliers. The multiplier of c is κ; that of w enters the gradient of the
columns. Newton's unknowns are the changes dw and dc. A *goal* says where slack times multiplier
is to go: None for zero (the predictor), a level for that level less the predictor's second-order
term.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Block:
    """What a cone adds to Newton's matrix.

    Its quadratic form is written in variables without products of w and c, nor the cancellation
    that comes with them, either dw = dw' + tilt·dc or dc = dc' + liftᵀdw: then it is
    dw'ᵀ(diagonal + outer·outerᵀ)dw' + corner·dc'².
    """

    diagonal: Array  # (k,)
    corner: float
    tilt: Array | float = 0.0  # (k,)
    lift: Array | float = 0.0  # (k,)
    outer: Array | None = None  # (k,)


def reach(value: Array, change: Array) -> float:
    """Return the largest t with value + t·change ≥ 0."""
    falling = change < 0
    if not falling.any():
        return np.inf
    return float((-value[falling] / change[falling]).min())


class Orthant:
    """Slacks ≥ 0, multipliers ≥ 0, and the step of both."""

    def __init__(self, slack: Array, dual: Array) -> None:
        self.slack, self.dual = slack, dual
        self.dslack, self.ddual = np.zeros_like(slack), np.zeros_like(dual)
        self.weight = dual / slack

    def aim(self, goal: float | None) -> Array:
        """Return g such that the new multiplier is g − weight·(change of slack)."""
        if goal is None:
            return np.zeros_like(self.slack)
        return (goal - self.dslack * self.ddual) / self.slack

    def move(self, dslack: Array, aim: Array) -> None:
        """Complete a step from the change of the slacks."""
        self.dslack, self.ddual = dslack, aim - self.weight * dslack - self.dual

    def reach(self) -> float:
        """Return how often the step fits."""
        return min(reach(self.slack, self.dslack), reach(self.dual, self.ddual))

    def product(self, length: float = 0.0) -> float:
        """Σ slack·multiplier after that part of the step."""
        slack, dual = self.slack + length * self.dslack, self.dual + length * self.ddual
        return float(np.vdot(slack, dual))

    def advance(self, length: float) -> None:
        """Take that part of the step."""
        self.slack = self.slack + length * self.dslack
        self.dual = self.dual + length * self.ddual
        self.weight = self.dual / self.slack


class Cone(ABC):
    """ε‖D·w‖_q ≤ c with ``units`` = ε·Dⱼ > 0 of the k penalised columns."""

    def __init__(self, units: Array) -> None:
        self.units = units

    @abstractmethod
    def size(self, w: Array) -> float:
        """ε‖D·w‖_q."""

    @abstractmethod
    def start(self, w: Array, room: float, kappa: float) -> float:
        """Start on the central path at w with multiplier κ; return c, by ``room`` too large."""

    @abstractmethod
    def degree(self) -> int:
        """Return the number of complementarity products."""

    @abstractmethod
    def balance(self) -> Array:
        """Return what the multipliers add to the gradient of the columns, (k,)."""

    @abstractmethod
    def block(self) -> Block:
        """Return what goes into Newton's matrix."""

    @abstractmethod
    def right(self, goal: float | None) -> tuple[Array, float]:
        """Return the right-hand side: of w (k,), and of c (of c' where there is a lift)."""

    @abstractmethod
    def move(self, dw: Array, dc: float, own: float) -> None:
        """Complete a step from dw, dc, and dc' where there is a lift."""

    @abstractmethod
    def reach(self) -> float:
        """Return how often the step fits."""

    @abstractmethod
    def product(self, length: float = 0.0) -> float:
        """Slack times multiplier after that part of the step."""

    @abstractmethod
    def advance(self, length: float) -> None:
        """Take that part of the step."""


class Nothing(Cone):
    """No column is penalised, or ε = 0: c stays 0."""

    def size(self, w: Array) -> float:
        return 0.0

    def start(self, w: Array, room: float, kappa: float) -> float:
        return 0.0

    def degree(self) -> int:
        return 0

    def balance(self) -> Array:
        return np.zeros(0)

    def block(self) -> Block:
        return Block(np.zeros(0), 1.0)

    def right(self, goal: float | None) -> tuple[Array, float]:
        return np.zeros(0), 0.0

    def move(self, dw: Array, dc: float, own: float) -> None:
        return

    def reach(self) -> float:
        return np.inf

    def product(self, length: float = 0.0) -> float:
        return 0.0

    def advance(self, length: float) -> None:
        return


class Largest(Cone):
    """q = ∞, the ℓ1 attack: c ± unitsⱼ·wⱼ ≥ 0."""

    def size(self, w: Array) -> float:
        return float(np.abs(self.units * w).max())

    def start(self, w: Array, room: float, kappa: float) -> float:
        u = self.units * w
        c = float(np.abs(u).max()) + room
        slack = np.stack([c - u, c + u])
        dual = (1 / slack) * (kappa / (1 / slack).sum())
        self.pair = Orthant(slack, dual)
        return c

    def degree(self) -> int:
        return self.pair.slack.size

    def balance(self) -> Array:
        return self.units * (self.pair.dual[0] - self.pair.dual[1])

    def block(self) -> Block:
        low, high = self.pair.weight
        both, tilt = low + high, (low - high) / (low + high)
        return Block(self.units**2 * both, float((4 * low * high / both).sum()), tilt / self.units)

    def right(self, goal: float | None) -> tuple[Array, float]:
        self.aim = self.pair.aim(goal)
        return -self.units * (self.aim[0] - self.aim[1]), float(self.aim.sum())

    def move(self, dw: Array, dc: float, own: float) -> None:
        du = self.units * dw
        self.pair.move(np.stack([dc - du, dc + du]), self.aim)

    def reach(self) -> float:
        return self.pair.reach()

    def product(self, length: float = 0.0) -> float:
        return self.pair.product(length)

    def advance(self, length: float) -> None:
        self.pair.advance(length)


class Total(Largest):
    """q = 1, the ℓ∞ attack: c = Σ τⱼ and τⱼ ± unitsⱼ·wⱼ ≥ 0."""

    def size(self, w: Array) -> float:
        return float(np.abs(self.units * w).sum())

    def start(self, w: Array, room: float, kappa: float) -> float:
        u = self.units * w
        tau = np.abs(u) + room / len(u)
        slack = np.stack([tau - u, tau + u])
        self.pair = Orthant(slack, kappa * slack[::-1] / slack.sum(0))
        return float(tau.sum())

    def block(self) -> Block:
        low, high = self.pair.weight
        self.both, self.tilt = low + high, (low - high) / (low + high)
        self.stiff = 1 / float((1 / self.both).sum())
        diagonal = self.units**2 * 4 * low * high / self.both
        return Block(diagonal, self.stiff, lift=self.units * self.tilt)

    def right(self, goal: float | None) -> tuple[Array, float]:
        self.aim = self.pair.aim(goal)
        total = self.aim.sum(0)
        self.mean = float((total / self.both).sum()) * self.stiff
        columns = self.units * (self.tilt * total - (self.aim[0] - self.aim[1]))
        return columns, self.mean

    def move(self, dw: Array, dc: float, own: float) -> None:
        du = self.units * dw
        kappa = self.mean - own * self.stiff
        dtau = (self.aim.sum(0) - kappa) / self.both + self.tilt * du
        self.pair.move(np.stack([dtau - du, dtau + du]), self.aim)


class Euclidean(Cone):
    """q = 2, the ℓ2 attack: a second-order cone, with Nesterov and Todd's scaling."""

    def size(self, w: Array) -> float:
        return float(np.linalg.norm(self.units * w))

    def start(self, w: Array, room: float, kappa: float) -> float:
        u = self.units * w
        c = float(np.linalg.norm(u)) + room
        self.slack = np.append(c, u)
        self.dual = kappa * np.append(1.0, -u / c)
        self.dslack, self.ddual = np.zeros_like(self.slack), np.zeros_like(self.dual)
        return c

    def degree(self) -> int:
        return 1

    def balance(self) -> Array:
        return -self.units * self.dual[1:]

    def block(self) -> Block:
        ahead, behind = (_hyperbolic(v, v) for v in (self.slack, self.dual))
        if not min(ahead, behind) > 0:
            raise FloatingPointError("rounding has left the second-order cone")
        s, z = self.slack / np.sqrt(ahead), self.dual / np.sqrt(behind)
        mirrored = np.append(z[0], -z[1:])
        point = (s + mirrored) / np.sqrt(2 * (1 + s @ z))  # the point with W·z = W⁻¹·s
        self.point = point
        self.eta = (ahead / behind) ** 0.25
        scale = 1 / self.eta**2
        spread = 2 * point[0] ** 2 - 1
        tilt = 2 * point[0] / spread * point[1:] / self.units
        outer = np.sqrt(2 * scale) * self.units * point[1:]
        return Block(scale * self.units**2, scale / spread, tilt, outer=outer)

    def right(self, goal: float | None) -> tuple[Array, float]:
        if goal is None:
            self.aim = np.zeros_like(self.dual)
        else:
            even = self._scaled(self.dual)
            wanted = -_jordan(self._unscaled(self.dslack), self._scaled(self.ddual))
            wanted[0] += goal
            self.aim = self._unscaled(_divide(even, wanted))
        return self.units * self.aim[1:], float(self.aim[0])

    def move(self, dw: Array, dc: float, own: float) -> None:
        self.dslack = np.append(dc, self.units * dw)
        turned = self._unscaled(self._unscaled(self.dslack))
        self.ddual = self.aim - turned - self.dual

    def _scaled(self, v: Array) -> Array:
        """W·v."""
        head, tail = self.point[0], self.point[1:]
        along = tail @ v[1:]
        rest = v[1:] + (v[0] + along / (1 + head)) * tail
        return self.eta * np.append(head * v[0] + along, rest)

    def _unscaled(self, v: Array) -> Array:
        """W⁻¹·v."""
        head, tail = self.point[0], self.point[1:]
        along = tail @ v[1:]
        rest = v[1:] + (along / (1 + head) - v[0]) * tail
        return np.append(head * v[0] - along, rest) / self.eta

    def reach(self) -> float:
        return min(_to_the_edge(self.slack, self.dslack), _to_the_edge(self.dual, self.ddual))

    def product(self, length: float = 0.0) -> float:
        return float((self.slack + length * self.dslack) @ (self.dual + length * self.ddual))

    def advance(self, length: float) -> None:
        self.slack = self.slack + length * self.dslack
        self.dual = self.dual + length * self.ddual


def _hyperbolic(a: Array, b: Array) -> float:
    """a₀b₀ − a₁ᵀb₁, for a = b without cancellation."""
    if a is b:
        size = float(np.linalg.norm(a[1:]))
        return float((a[0] - size) * (a[0] + size))
    return float(a[0] * b[0] - a[1:] @ b[1:])


def _jordan(a: Array, b: Array) -> Array:
    return np.append(a @ b, a[0] * b[1:] + b[0] * a[1:])


def _divide(a: Array, b: Array) -> Array:
    """Solve a ∘ v = b."""
    head = (a[0] * b[0] - a[1:] @ b[1:]) / _hyperbolic(a, a)
    return np.append(head, (b[1:] - head * a[1:]) / a[0])


def _to_the_edge(a: Array, da: Array) -> float:
    """Return the largest t for which a + t·da stays in the second-order cone.

    That is the smallest positive root of start + 2·cross·t + square·t², if it has one.
    """
    square, cross, start = _hyperbolic(da, da), _hyperbolic(a, da), _hyperbolic(a, a)
    inside = cross**2 - square * start
    if inside < 0 or (square >= 0 and cross >= 0):
        return np.inf
    root = float(np.sqrt(inside))
    return start / (root - cross) if cross < 0 else (cross + root) / -square


def cone(q: float, units: Array) -> Cone:
    """Return the cone of ‖units·w‖_q ≤ c."""
    kinds: dict[float, type[Cone]] = {1.0: Total, 2.0: Euclidean, np.inf: Largest}
    return kinds[q](units) if len(units) else Nothing(units)
