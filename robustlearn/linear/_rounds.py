"""Squared loss and many rows: work on those of small residual, the signs of the others settled.

What has a settled sign enters a quadratic form through XᵀΩX and sums, so that a step costs what
the few rows cost. Signs are checked afterwards on all rows.
"""

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._cholesky import definite
from robustlearn.linear._interior import minimise
from robustlearn.linear._newton import Kinks, State, descend
from robustlearn.linear._problem import Found, Problem
from robustlearn.linear._rows import Settled

Array = NDArray[np.float64]
FEW = 6  # rows a column below which all rows are worked on at once
INSIDE = 20  # how far below the tolerance the interior-point method aims: the proof takes some
WINDOW = 0.15  # share of the rows, those of least residual, that the first round works on
ROUGH = 1e-3  # relative accuracy of the first round
ROUNDS = 12
FAR, NEAR = 0.3, 0.05  # room at its start, from afar and from a neighbouring solution
EXACT = 1e-4  # of the tolerance: the fall of the last Newton step
SOFT, SOFT_NEAR = 0.05, 0.005  # first μ of Newton's method, in typical residuals
CAP = 200_000  # most rows of the first round, unless the columns ask for more
BARELY = 1e-9  # of c: a residual so small has no sign


def newton_rounds(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
    """Work on the rows of small residual, with the sign of the others settled, then check these."""
    design, y, weight = problem.design, problem.y, problem.weight
    n, m = design.rows, design.columns
    v = _ridge(problem) if near is None else near.v
    residual = design.dot(v) - y
    typical, size = float(np.median(np.abs(residual))), float(np.abs(problem.scale * v).mean())
    soft = SOFT if near is None else SOFT_NEAR
    state = State(v, soft * typical, soft * problem.eps * size, Kinks(m))
    sigma = np.zeros(n)
    if near is not None and near.kinks is not None and near.corners is not None:
        sigma, state.corners.multiplier = near.kinks.copy(), near.corners.copy()
    window = _window(n, m)
    few = window > n / 2
    part = np.arange(n) if few else _smallest(residual, window)
    goal = EXACT * tol if few else ROUGH
    for _ in range(ROUNDS):
        sign, rest = _settled(problem, residual, part)
        kinks = Kinks(len(part))
        kinks.multiplier = sigma[part]
        descend(problem.rows(part, rest), rest, state, kinks, goal, max_iter)
        residual = design.dot(state.v) - y
        sigma[part] = kinks.multiplier
        wrong = _unsettled(problem, state.v, residual, sign)
        if goal < ROUGH and not len(wrong):
            break
        if goal == ROUGH:
            part, goal = _smallest(residual, int(max(3 * m, len(part) / 4))), EXACT * tol
        else:
            part = np.union1d(part, wrong)
            again = float(np.abs(residual[wrong]).max()) / state.mu
            state.mu, state.nu = state.mu * max(again, 1.0), state.nu * max(again, 1.0)
    signs = np.sign(residual)
    signs[part] = sigma[part]
    multipliers = 2 * weight * (residual + problem.size(state.v) * signs)
    corners = state.corners.multiplier
    return Found(state.v, multipliers, state.steps, kinks=signs, corners=corners)


def interior_rounds(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
    """Do the same by the interior-point method."""
    design, y, weight = problem.design, problem.y, problem.weight
    n, m = design.rows, design.columns
    v = _ridge(problem) if near is None else near.v
    residual = design.dot(v) - y
    part = _smallest(residual, _window(n, m))
    steps, last = 0, tol / INSIDE
    goal, room = (max(ROUGH, last), FAR) if near is None else (last, NEAR)
    for _ in range(ROUNDS):
        sign, rest = _settled(problem, residual, part)
        found = minimise(problem.rows(part, rest), v, room=room, tol=goal, max_iter=max_iter)
        steps += found.steps
        v = found.v
        residual = design.dot(v) - y
        wrong = _unsettled(problem, v, residual, sign)
        if goal == last and not len(wrong):
            break
        before, room = part, NEAR
        if goal > last:
            part, goal = _smallest(residual, int(max(3 * m, len(part) / 4))), last
        else:
            part = np.union1d(part, wrong)
    else:
        part = before
    multipliers = 2 * weight * (residual + problem.size(v) * np.sign(residual))
    multipliers[part] = found.dual
    return Found(v, multipliers, steps)


def _settled(problem: Problem, residual: Array, part: NDArray[np.intp]) -> tuple[Array, Settled]:
    """Return the signs of the rows outside ``part`` (0 inside), and what they add up to."""
    gram, moment, square = _sums(problem)
    sign = np.sign(residual)
    sign[part] = 0.0
    pull = problem.weight * sign
    along = problem.design.tdot(pull) if len(part) < len(sign) else np.zeros(len(moment))
    mass = float(np.abs(pull).sum())
    return sign, Settled(gram, moment, square, along, float(pull @ problem.y), mass)


def _unsettled(problem: Problem, v: Array, residual: Array, sign: Array) -> NDArray[np.intp]:
    """Return the rows whose residual has not kept its sign, or has come to nothing beside c."""
    return np.flatnonzero((sign != 0) & (residual * sign <= BARELY * problem.size(v)))


def _sums(problem: Problem) -> tuple[Array, Array, float]:
    """XᵀΩX, XᵀΩy and yᵀΩy."""

    def sums() -> tuple[Array, Array, float]:
        gram, moment = problem.design.gram(problem.weight, problem.y)
        return gram, moment, float(problem.weight @ problem.y**2)

    return problem.once("sums", sums)


def _window(n: int, m: int) -> int:
    """Return how many rows the first round works on."""
    return int(max(FEW * m, min(WINDOW * n, CAP)))


def _smallest(residual: Array, count: int) -> NDArray[np.intp]:
    if count >= len(residual):
        return np.arange(len(residual))
    return np.sort(np.argpartition(np.abs(residual), count - 1)[:count])


def _ridge(problem: Problem) -> Array:
    """Ridge regression from the sums, its penalty that of c at its own solution."""
    gram, moment, square = _sums(problem)
    total, scale = float(problem.weight.sum()), problem.scale
    costly = problem.penalised
    shape = scale**2 * float((np.diag(gram)[costly] / scale[costly] ** 2).mean())
    ridge = 0.1
    for _ in range(2):
        matrix = gram.copy()
        matrix[np.diag_indices(len(gram))] += ridge * shape + 1e-12 * np.diag(gram)
        v = definite(matrix, moment)
        fit = max(float(v @ (gram @ v) - 2 * moment @ v) + square, 1e-12 * square)
        c, bent = problem.size(v), float(shape @ v**2)
        new = c * (0.8 * np.sqrt(total * fit) + total * c) / max(bent, 1e-300)
        if abs(np.log(new / ridge)) < 1:
            break
        ridge = new
    return v
