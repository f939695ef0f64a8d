"""Newton's method along a smoothed squared loss: quicker than the interior-point method.

For q = 1 and 2: Σ ω(|r| + c)² with |r| replaced by h = √(r² + μ²) while μ falls to nothing. The
multiplier σ of a kink, which h' = r/h only approaches, is carried along by itself (Chan, Golub and
Mulet, 1999), or all digits of h' would be lost once μ is small. Rows away from their kink enter
through XᵀΩX and sums. There is no guarantee that it gets to the end: who calls it asks for a proof
of what comes out, and turns to the interior-point method where there is none.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._cholesky import factored, solved
from robustlearn.linear._rows import Rows, Settled

Array = NDArray[np.float64]
SHRINK = 0.1  # of μ after a good step
LAG = 0.1  # of the fall of a step: μ waits where its own error is below that
SMALL = 1e-2  # curvature above the quadratic's from which a row counts by itself


class Kinks:
    """h = √(t² + μ²) for |t|, with multipliers of its own."""

    def __init__(self, count: int) -> None:
        self.multiplier = np.zeros(count)

    def look(self, t: Array, mu: float) -> None:
        """Take h, h' and the curvature at t."""
        self.h = np.sqrt(t * t + mu * mu)
        self.slope = t / self.h
        self.bend = np.maximum(1 - self.multiplier * self.slope, 0.0) / self.h

    def move(self, dt: Array) -> None:
        """Solve the linearised equation h·σ = t for σ, inside ±1."""
        old = self.multiplier
        new = self.slope + (1 - old * self.slope) / self.h * dt
        inside = 1 - 1e-3 * (1 - np.abs(old))
        self.multiplier = np.clip(new, -inside, inside)


@dataclass
class State:
    """Where the method stands: columns, μ of the rows and of the norm, and the multipliers."""

    v: Array
    mu: float
    nu: float
    corners: Kinks
    steps: int = 0


@dataclass(frozen=True)
class Norm:
    """c = ‖u‖_q of u = units·v, smoothed for q = 1."""

    q: float
    units: Array
    costly: NDArray[np.bool_]

    def value(self, v: Array, nu: float) -> float:
        """Return c."""
        u = self.units * v
        if self.q == 2:
            return float(np.linalg.norm(u))
        return float(np.sqrt(u[self.costly] ** 2 + nu * nu).sum())

    def look(self, v: Array, nu: float, corners: Kinks) -> tuple[float, Array, Array]:
        """Return c, its gradient, and the diagonal of its curvature (less gradient² / c, q = 2)."""
        u = self.units * v
        if self.q == 2:
            c = float(np.linalg.norm(u))
            return c, self.units * u / c, self.units**2 / c
        corners.look(u, nu)
        c = float(corners.h[self.costly].sum())
        return c, self.units * corners.slope, self.units**2 * corners.bend


def descend(rows: Rows, rest: Settled, state: State, kinks: Kinks, tol: float, most: int) -> None:
    """Minimise Σ ω(|r| + c)² over these rows and those settled; ``state`` and ``kinks`` change."""
    x, weight = rows.x, rows.weight
    m, total = len(state.v), rest.mass + float(weight.sum())
    units = np.zeros(m)
    units[rows.penalised] = rows.units
    norm = Norm(rows.q, units, units > 0)
    r = x @ state.v - rows.y
    for _ in range(most):
        v = state.v
        kinks.look(r, state.mu)
        c, by_c, diagonal = norm.look(v, state.nu, state.corners)
        pulled = x.T @ (weight * kinks.slope) + rest.pull
        plain = rest.gram @ v - rest.moment
        reach = float(rest.pull @ v) - rest.level + float(weight @ kinks.h)
        lever = reach + total * c
        gradient = plain + c * pulled + lever * by_c
        value = float(v @ (plain - rest.moment)) + rest.square + c * (2 * reach + total * c)
        # Newton's matrix, half of the Hessian
        extra = c * weight * kinks.bend
        part = np.flatnonzero(extra > SMALL * weight)
        kinked = x[part] * np.sqrt(extra[part, None])
        across = (pulled + (0.5 * total) * by_c)[:, None] * by_c
        h = rest.gram + kinked.T @ kinked + across + across.T
        if rows.q == 2:
            h -= (lever / c * by_c)[:, None] * by_c
        h[np.diag_indices(m)] += lever * diagonal + 1e-14 * np.diag(h)
        try:
            factor = factored(h)
        except np.linalg.LinAlgError:
            return
        dv = -solved(factor, gradient)
        down = float(gradient @ dv)
        smoothing = 2 * c * float(weight @ (kinks.h - np.abs(r)))
        if rows.q == 1:
            smoothing += 2 * lever * (c - float(np.abs(units * v).sum()))
        dr = x @ dv
        done = not -down > tol * value and smoothing <= tol * value
        line = _Line(rows, rest, norm, state, r, dv, dr, plain, total)
        length = 1.0 if done else line.search(value, down)
        kinks.move(dr)
        if rows.q == 1:
            state.corners.move(units * dv)
        state.v, r = v + length * dv, r + length * dr
        state.steps += 1
        if done:
            return
        if length > 0.3 and smoothing > LAG * -down:
            state.mu, state.nu = SHRINK * state.mu, SHRINK * state.nu


class _Line:
    """The smoothed objective along a step."""

    def __init__(
        self,
        rows: Rows,
        rest: Settled,
        norm: Norm,
        state: State,
        r: Array,
        dv: Array,
        dr: Array,
        plain: Array,
        total: float,
    ) -> None:
        v = state.v
        self.weight, self.norm, self.state, self.total = rows.weight, norm, state, total
        self.r, self.dr, self.dv = r, dr, dv
        self.fit = (
            float(v @ (plain - rest.moment)) + rest.square,
            2 * float(plain @ dv),
            float(dv @ (rest.gram @ dv)),
        )
        self.pull = float(rest.pull @ v) - rest.level, float(rest.pull @ dv)

    def at(self, length: float) -> float:
        """Return the objective there."""
        moved = self.r + length * self.dr
        c = self.norm.value(self.state.v + length * self.dv, self.state.nu)
        reach = self.pull[0] + length * self.pull[1]
        reach += float(self.weight @ np.sqrt(moved * moved + self.state.mu**2))
        fit = self.fit[0] + length * (self.fit[1] + length * self.fit[2])
        return fit + c * (2 * reach + self.total * c)

    def search(self, value: float, down: float) -> float:
        """Halve the step until the objective falls enough."""
        length = 1.0
        while length > 1e-4:
            if self.at(length) <= value + 2e-4 * length * down + 1e-13 * abs(value):
                break
            length *= 0.5
        return length
