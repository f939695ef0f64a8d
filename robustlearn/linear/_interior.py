"""Primal–dual interior-point method for min Σ ωᵢ·ψ(eᵢ) over columns v and c ≥ ε‖D·w‖_q.

Mehrotra's predictor and corrector. Slacks are functions of (v, c, e), so the iterates stay primal
feasible; the multipliers of the floors are the dual certificate. Heights and the inner variables
of the cone are eliminated one by one, which leaves a system of the columns and one or two numbers:
XᵀΘX + diagonal if there are more rows than columns, or its twin in the rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._cholesky import factored, solved
from robustlearn.linear._cones import Block, Cone, cone
from robustlearn.linear._rows import ALMOST, Heights, Rows

Array = NDArray[np.float64]
Solve = Callable[[Array], Array]
AIM = 1e-3  # of the tolerance
WAIT, LONG_WAIT = 1, 40  # steps without progress, below the tolerance and above
WIDE = 2  # columns a row from which the matrix of the rows is the smaller work
REFINE = 4  # refinements of a step from the rows' system: fewer leave too few digits at the end


@dataclass
class Outcome:
    """Columns v, multipliers by z and by c, relative complementarity and residual, steps."""

    v: Array
    dual: Array
    lift: Array
    product: float
    residual: float
    steps: int

    @property
    def worst(self) -> float:
        """What is left to do."""
        return max(self.product, self.residual)


def minimise(
    rows: Rows, v: Array, *, room: float = 0.3, tol: float = 1e-10, max_iter: int = 100
) -> Outcome:
    """Minimise from v on, heights and c starting ``room`` above their floors.

    It goes on below ``tol`` while that is quick, because the model gains digits after the
    objective has all of its own, and returns the best of its iterates.
    """
    ball = cone(rows.q, rows.units)
    heights = Heights(
        rows.loss, rows.y, rows.weight, reached=len(rows.units) > 0 and rows.cost is None
    )
    w, z = v[rows.penalised], rows.x @ v
    size = ball.size(w)
    scale = float(np.mean(np.abs(rows.loss.height(z, size, rows.y)))) + 1e-12
    margin = room * (size if size > 0 else scale)
    heights.start(z, size + margin, room * scale)
    by_z, by_c = heights.multipliers()
    kappa = float(by_c.sum()) + rows.gradient(by_z, z, v, size + margin)[1]
    c = ball.start(w, margin, kappa)
    best = Outcome(v, np.zeros_like(z), np.zeros_like(z), np.inf, np.inf, 0)
    first, lowest, stale = 0.0, np.inf, 0
    for step in range(max_iter + 1):
        z = rows.x @ v
        residual, _ = rows.gradient(heights.multipliers()[0], z, v, c)
        residual[rows.penalised] += ball.balance()
        value = rows.value(heights.e, z, v, c)
        total = heights.product() + ball.product()
        product = total / value
        lever = float(heights.multipliers()[1].sum())  # what a unit of c costs
        error = _loss_of_bound(residual, rows, max(c, value / max(lever, 1e-300))) / value
        first = value if step == 0 else first
        now = Outcome(v, *heights.multipliers(), product, error, step)
        gained = now.worst < 0.9 * best.worst or value < 0.9 * lowest
        stale, lowest = 0 if gained else stale + 1, min(value, lowest)
        if now.worst < best.worst or value <= tol * first:
            best = now
        patience = WAIT if best.worst <= tol else LONG_WAIT
        if best.worst <= AIM * tol or step == max_iter or value <= tol * first or stale > patience:
            break
        if rows.loss.smooth and heights.e.max() < 0:  # separable: the infimum is 0, far out
            best = now
            break
        least = 0.1 * value * (tol if best.worst > tol else AIM * tol)
        try:
            with np.errstate(all="ignore"):
                dv, dc, length = _step(rows, heights, ball, z, v, c, total, least)
        except (FloatingPointError, np.linalg.LinAlgError):
            break  # the end of what floating point numbers can tell apart
        if not (np.isfinite(dv).all() and np.isfinite(dc)):
            break
        v, c = v + length * dv, c + length * dc
        heights.advance(length)
        ball.advance(length)
    return replace(best, steps=step)


def _loss_of_bound(residual: Array, rows: Rows, height: float) -> float:
    """Return about what the residual of stationarity takes from the bound, at a typical height."""
    penalised = np.abs(residual[rows.penalised] / rows.units).max(initial=0.0)
    free = np.abs(residual[rows.free]) * rows.worth
    with np.errstate(over="ignore"):
        return float(penalised * height + free.sum())


def _step(
    rows: Rows,
    heights: Heights,
    ball: Cone,
    z: Array,
    v: Array,
    c: float,
    total: float,
    least: float,
) -> tuple[Array, float, float]:
    """Predict, correct, and return dv, dc and the length of the step."""
    m = len(v)
    zz, lean, corner = heights.block()
    block = ball.block()
    tilt, lift = np.zeros(m), np.zeros(m)
    tilt[rows.penalised], lift[rows.penalised] = block.tilt, block.lift
    twin = len(rows.penalised) > WIDE * len(rows.y) and rows.rest is None and block.outer is None
    solve = (_twin if twin else _dense)(rows, zz, lean, tilt, lift, corner, block)
    level: float | None = None
    for predicting in (True, False):
        by_z, by_c = heights.right(level)
        grad_v, grad_c = rows.gradient(by_z, z, v, c)
        columns, number = ball.right(level)
        right = np.append(lift * -(by_c + grad_c) - grad_v, number - by_c - grad_c)
        right[rows.penalised] += columns
        right[m] += tilt @ right[:m]
        step = solve(right)
        own = float(step[m])
        dc = own + float(lift @ step[:m])
        dv = step[:m] + tilt * dc
        heights.move(rows.x @ dv, dc)
        ball.move(dv[rows.penalised], dc, own)
        length = min(1.0, heights.reach(), ball.reach())
        if predicting:
            left = heights.product(length) + ball.product(length)
            count = heights.degree() + ball.degree()
            if count == 0:
                break
            level = max(min((left / total) ** 3, 0.5) * total, least) / count
    return dv, dc, min(1.0, ALMOST * min(heights.reach(), ball.reach()))


def _dense(
    rows: Rows, zz: Array, lean: Array, tilt: Array, lift: Array, corner: float, block: Block
) -> Solve:
    """Solve with the matrix of the columns."""
    h = rows.matrix(zz, lean)
    m = len(tilt)
    h[m, m] += corner
    if np.any(tilt):
        h[:m, m] += h[:m, :m] @ tilt
        h[m, m] += tilt @ (h[m, :m] + h[:m, m])
    if np.any(lift):
        across = np.outer(h[:m, m] + 0.5 * h[m, m] * lift, lift)
        h[:m, :m] += across + across.T
        h[:m, m] += h[m, m] * lift
    h[m, :m] = h[:m, m]
    diagonal = rows.near.copy()
    diagonal[rows.penalised] += block.diagonal
    diagonal[m] += block.corner
    if block.outer is not None:
        outer = np.zeros(m + 1)
        outer[rows.penalised] = block.outer
        h += np.outer(outer, outer)
    factor = _factor(h, diagonal)
    return lambda right: solved(factor, right)


def _factor(h: Array, diagonal: Array) -> Array:
    """Factor h + diagonal; more is added where rounding has made it indefinite."""
    extra: Array | float = 0.0
    for _ in range(12):
        shifted = h.copy()
        shifted[np.diag_indices(len(h))] += diagonal + extra
        try:
            return factored(shifted)
        except np.linalg.LinAlgError:
            extra = np.maximum(100 * extra, 1e-15 * (np.abs(np.diag(h)) + diagonal))
    raise FloatingPointError("Newton's matrix is not positive definite")


def _twin(
    rows: Rows, zz: Array, lean: Array, tilt: Array, lift: Array, corner: float, block: Block
) -> Solve:
    """Solve through the matrix of the rows, K = 1/Θ + AΛ⁻¹Aᵀ, refined on the whole system.

    c is one more column without penalty: the unknowns are (dw, df, s) with s = Θ(A·dw + F·df).
    With dc = c' + liftᵀdw there is one more row, liftᵀ, and A = (X + lean·liftᵀ; liftᵀ).
    """
    penalised, m = rows.penalised, len(tilt)
    free = np.append(rows.free, m)
    tilted = rows.x @ tilt if np.any(tilt) else 0.0
    columns = np.column_stack([rows.x[:, rows.free], lean + tilted])
    wide, push = rows.wide, lift[penalised]
    load = block.diagonal + rows.near[penalised]
    root = np.sqrt(load)
    scaled = wide / root
    k = scaled @ scaled.T
    lifted = bool(np.any(lift))
    if lifted:
        columns = np.vstack([columns, np.eye(len(free))[-1]])
        zz, corner = np.append(zz, max(corner, 1e-300)), 0.0
        along = scaled @ (push / root)
        own = float(push @ (push / load))
        side = along + own * lean
        k += np.outer(lean, along) + np.outer(side, lean)
        k = np.block([[k, side[:, None]], [side[None], np.array([[own]])]])
    corners = np.diag(rows.near[free] + np.append(np.zeros(len(rows.free)), corner + block.corner))
    factor = _factor(k, 1 / zz)
    through = solved(factor, columns)
    small = columns.T @ through + corners

    def forth(dw: Array) -> Array:
        if not lifted:
            return wide @ dw
        pushed = float(push @ dw)
        return np.append(wide @ dw + lean * pushed, pushed)

    def back(s: Array) -> Array:
        return wide.T @ s[:-1] + push * float(lean @ s[:-1] + s[-1]) if lifted else wide.T @ s

    def once(w: Array, f: Array, r: Array) -> tuple[Array, Array, Array]:
        base = solved(factor, forth(w / load) - r)
        df = np.asarray(np.linalg.solve(small, f - columns.T @ base), dtype=np.float64)
        s = base + through @ df
        return (w - back(s)) / load, df, s

    def solve(right: Array) -> Array:
        w, f = right[penalised], right[free]
        dw, df, s = once(w, f, np.zeros(len(zz)))
        for _ in range(REFINE):
            left = w - load * dw - back(s)
            below = s / zz - forth(dw) - columns @ df
            fix = once(left, f - columns.T @ s - corners @ df, below)
            dw, df, s = dw + fix[0], df + fix[1], s + fix[2]
        step = np.empty(m + 1)
        step[penalised], step[free] = dw, df
        return step

    return solve
