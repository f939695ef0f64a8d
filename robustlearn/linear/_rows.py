"""The rows of a problem as the interior-point method meets them: heights, floors, multipliers."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._cones import Orthant
from robustlearn.linear._design import BLOCK
from robustlearn.linear._losses import Loss

Array = NDArray[np.float64]
ALMOST = 0.995  # of the way to the boundary
PROX = 1e-8  # of a column's own curvature is added: a proximal term bends the path, not its end
TRUST = 2.0  # how much more than foreseen a smooth loss may bend along a step
PLAIN = 1e-3  # share of curvature above the quadratic's from which a row counts by itself


def weighted_gram(x: Array, weight: Array) -> Array:
    """Return XᵀΩX (m, m) in blocks of rows, of which alone there are copies."""
    root, m = np.sqrt(weight), x.shape[1]
    total: Array | None = None
    step = max(1, BLOCK // max(1, m))
    for start in range(0, len(x), step):
        scaled = x[start : start + step] * root[start : start + step, None]
        part = scaled.T @ scaled
        total = part if total is None else np.add(total, part, out=total)
    return np.zeros((m, m)) if total is None else total


class Heights:
    """The rows: heights above their floors, and the multipliers of the floors."""

    def __init__(self, loss: Loss, y: Array, weight: Array, *, reached: bool) -> None:
        self.loss, self.weight = loss, weight
        floors = loss.floors(y)
        self.lift = np.array([[floor.lift * reached] for floor in floors])
        self.tilt = np.stack([np.broadcast_to(floor.slope, y.shape) for floor in floors])
        self.offset = np.stack([np.broadcast_to(floor.offset, y.shape) for floor in floors])

    def start(self, z: Array, c: float, room: float) -> None:
        """Start on the central path, ``room`` above the floors."""
        under = self.tilt * z + self.lift * c + self.offset
        if self.loss.smooth:
            self.e = under[0]
            return
        self.e = under.max(0) + room
        if self._knee:  # H_k(e) = min over the relief o ≥ 0 of (e − o)²/2 + k·o
            over = self.e - self.loss.knee
            relief = (over + np.sqrt(over**2 + self.loss.knee * self.e)) / 2
            self.relief = Orthant(relief, self.weight * (relief - over))
        slack = self.e - under
        self.pair = Orthant(slack, self._slope() * slack[::-1] / slack.sum(0))

    @property
    def _knee(self) -> bool:
        return bool(np.isfinite(self.loss.knee))

    def _slope(self) -> Array:
        if self._knee:
            return self.weight * (self.e - self.relief.slack)
        return self.weight * self.loss.slope(self.e)

    def degree(self) -> int:
        """Return the number of complementarity products."""
        if self.loss.smooth:
            return 0
        return self.pair.slack.size + (self.relief.slack.size if self._knee else 0)

    def multipliers(self) -> tuple[Array, Array]:
        """Return the derivatives of the Lagrangian by z and by c, row by row."""
        dual = self._slope()[None] if self.loss.smooth else self.pair.dual
        return (self.tilt * dual).sum(0), (self.lift * dual).sum(0)

    def block(self) -> tuple[Array, Array, float]:
        """Return zz, lean and corner of the quadratic form Σ zz·(dz + lean·dc)² + corner·dc²."""
        bend = self.weight * self.loss.curvature(self.e)
        if self.loss.smooth:
            return self.tilt[0] ** 2 * bend, self.lift[0] / self.tilt[0], 0.0
        if self._knee:
            bend = bend * self.relief.weight / (bend + self.relief.weight)
        d = self.pair.weight
        self.stiff = bend + d.sum(0)
        self.by_z, self.by_c = (d * self.tilt).sum(0), (d * self.lift).sum(0)
        both = d[0] * d[1]  # what follows has no differences of large numbers
        tilt, lift = self.tilt[0] - self.tilt[1], self.lift[0] - self.lift[1]
        zz = bend * (d * self.tilt**2).sum(0) + both * tilt**2
        zc = bend * (d * self.tilt * self.lift).sum(0) + both * tilt * lift
        cross = self.tilt[0] * self.lift[1] - self.tilt[1] * self.lift[0]
        return zz / self.stiff, zc / zz, float((bend * both * cross**2 / zz).sum())

    def right(self, goal: float | None) -> tuple[Array, float]:
        """Return the multipliers by z (rows) and by c (their sum) after a step of dz = dc = 0."""
        if self.loss.smooth:
            by_z, by_c = self.multipliers()
            return by_z, float(by_c.sum())
        slope = self._slope()
        if self._knee:
            self.relief_aim = self.relief.aim(goal)
            self.pull = slope - self.weight * self.loss.knee + self.relief_aim
            slope = slope - self.weight * self.pull / (self.weight + self.relief.weight)
        self.aim = self.pair.aim(goal)
        self.rise = (self.aim.sum(0) - slope) / self.stiff
        by_z = (self.aim * self.tilt).sum(0) - self.by_z * self.rise
        by_c = (self.aim * self.lift).sum(0) - self.by_c * self.rise
        return by_z, float(by_c.sum())

    def move(self, dz: Array, dc: float) -> None:
        """Complete a step."""
        under = self.tilt * dz + self.lift * dc
        if self.loss.smooth:
            self.de = under[0]
            return
        self.de = self.rise + (self.by_z * dz + self.by_c * dc) / self.stiff
        self.pair.move(self.de - under, self.aim)
        if self._knee:
            do = (self.pull + self.weight * self.de) / (self.weight + self.relief.weight)
            self.relief.move(do, self.relief_aim)

    def reach(self) -> float:
        """Return how often the step fits: into the floors, or into what its curvature foresaw."""
        if self.loss.smooth:
            return self._foreseen()
        return min(self.pair.reach(), self.relief.reach() if self._knee else np.inf)

    def _foreseen(self) -> float:
        """Halve a step until the loss bends no more than TRUST times as much as foreseen."""
        loss, e, de = self.loss, self.e, self.de
        now, slope = float(self.weight @ loss.value(e)), float(self.weight @ (loss.slope(e) * de))
        bend = 0.5 * float(self.weight @ (loss.curvature(e) * de**2))
        length = 1.0 / ALMOST
        for _ in range(30):
            then = float(self.weight @ loss.value(e + length * de))
            if then - now - length * slope <= TRUST * length**2 * bend + 1e-14 * now:
                break
            length *= 0.5
        return length

    def product(self, length: float = 0.0) -> float:
        """Slack times multiplier after that part of the step."""
        if self.loss.smooth:
            return 0.0
        return self.pair.product(length) + (self.relief.product(length) if self._knee else 0.0)

    def advance(self, length: float) -> None:
        """Take that part of the step."""
        self.e = self.e + length * self.de
        if not self.loss.smooth:
            self.pair.advance(length)
        if self._knee:
            self.relief.advance(length)


@dataclass
class Settled:
    """Rows of a squared loss whose sign is settled: Σ ω(sign·(z − y) + c)².

    ``gram`` = XᵀΩX, ``moment`` = XᵀΩy and ``square`` = yᵀΩy are of *all* rows; the rows that the
    method works on are taken off again. ``pull`` = Xᵀ(ω·sign), ``level`` = Σ ω·sign·y and
    ``mass`` = Σ ω are of the settled rows.
    """

    gram: Array
    moment: Array
    square: float
    pull: Array
    level: float
    mass: float

    def gradient(self, v: Array, c: float) -> tuple[Array, float]:
        """Return the derivatives by v (the quadratic part: of all rows) and by c."""
        by_v = 2 * (self.gram @ v - self.moment + c * self.pull)
        return by_v, float(2 * (self.pull @ v - self.level + self.mass * c))

    def value(self, v: Array, c: float) -> float:
        """Return the sum (the quadratic part: of all rows)."""
        fit = v @ (self.gram @ v) - 2 * (self.moment @ v) + self.square
        return float(fit + 2 * c * (self.pull @ v - self.level) + self.mass * c**2)


@dataclass(frozen=True)
class Rows:
    """Rows with all their columns, of which those ``penalised`` have ``units`` = ε·D."""

    loss: Loss
    x: Array
    y: Array
    weight: Array
    penalised: NDArray[np.intp]
    units: Array
    q: float
    rest: Settled | None = None
    cost: float | None = None  # if given c costs so much in the objective, and nothing in the rows

    @cached_property
    def free(self) -> NDArray[np.intp]:
        """The columns that are not penalised."""
        return np.setdiff1d(np.arange(self.x.shape[1]), self.penalised)

    @cached_property
    def wide(self) -> Array:
        """The penalised columns."""
        first = len(self.penalised)
        if first and self.penalised[-1] == first - 1:  # a view
            return self.x[:, :first]
        return self.x[:, self.penalised]

    @cached_property
    def worth(self) -> Array:
        """What a unit of residual in a free column changes in Σ s·y when it is taken off."""
        x = self.x[:, self.free]
        square = np.einsum("ij,ij,i->j", x, x, self.weight)
        return np.abs(x).T @ (self.weight * np.abs(self.y)) / np.where(square > 0, square, 1)

    @cached_property
    def near(self) -> Array:
        """PROX of the curvature of each column and of c, at a typical height."""
        if self.rest is not None:
            square = np.diag(self.rest.gram)
        else:
            square = np.einsum("ij,ij,i->j", self.x, self.x, self.weight)
        square = np.append(np.where(square > 0, square, 1.0), self.weight.sum())
        height = np.array(1.0 if self.loss.classifies else np.abs(self.y).mean())
        bend = float(self.loss.slope(height) / height) / 2 if height > 0 else 1.0
        return PROX * bend * square

    def gradient(self, by_z: Array, z: Array, v: Array, c: float) -> tuple[Array, float]:
        """Return the derivatives by v and c that belong to multipliers by z."""
        if self.rest is None:
            return self.x.T @ by_z, self.cost or 0.0
        by_v, by_c = self.rest.gradient(v, c)
        return by_v + self.x.T @ (by_z - 2 * self.weight * (z - self.y)), by_c

    def value(self, e: Array, z: Array, v: Array, c: float) -> float:
        """Return the objective at heights e."""
        value = float(self.weight @ self.loss.value(e))
        if self.rest is not None:
            value += self.rest.value(v, c) - float(self.weight @ (z - self.y) ** 2)
        value += (self.cost or 0.0) * c
        return value

    def matrix(self, zz: Array, lean: Array) -> Array:
        """Return the Hessian in (v, c) of these rows and of those settled."""
        m = self.x.shape[1]
        h = np.empty((m + 1, m + 1))
        h[:m, m] = self.x.T @ (zz * lean)
        h[m, m] = zz @ lean**2
        if self.rest is None:
            h[:m, :m] = weighted_gram(self.x, zz)
        else:
            extra = zz - 2 * self.weight
            part = np.flatnonzero(extra > PLAIN * self.weight)
            kinked = self.x[part] * np.sqrt(extra[part, None])
            h[:m, :m] = 2 * self.rest.gram + kinked.T @ kinked
            h[:m, m] += 2 * self.rest.pull
            h[m, m] += 2 * self.rest.mass
        h[m, :m] = h[:m, m]
        return h
