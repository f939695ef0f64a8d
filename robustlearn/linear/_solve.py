"""Minimise the mean worst-case loss of a linear model, and prove how good the minimum is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import scipy.linalg as sla
from numpy.typing import NDArray

from robustlearn.linear._bound import lower_bound
from robustlearn.linear._design import Design
from robustlearn.linear._interior import Outcome, Rows, Settled, minimise
from robustlearn.linear._losses import Hinge, Loss, Squared

Array = NDArray[np.float64]
FEW = 6  # rows a column below which all rows are worked on at once
WINDOW = 0.15  # share of the rows, those of least residual, that the first round works on
ROUGH = 1e-3  # relative accuracy of the first round
ROUNDS = 12
INSIDE = 20  # how far below the tolerance the methods aim: the proof takes some of it
NEAR = 0.05  # room at the start from a neighbouring solution


@dataclass(frozen=True)
class Solution:
    """A model, its mean worst-case loss, and what no model can go below.

    Attributes
    ----------
    coef : (d,); intercept : float.
    objective : (1/Σω)·Σ ωᵢ·lossᵢ, the worst case at eps.
    bound : no model of this kind has a smaller objective.
    multipliers : (n,) ω·∂loss/∂z of the rows, that prove it.
    steps : Newton steps.
    eps_max : from there on no feature that the attack reaches is used. Exact where the best model
        without them has only one set of multipliers, an upper bound for the absolute and the
        hinge loss.
    eps : the budget that was used.
    start : the objective of the best model that uses no feature in reach.
    """

    coef: Array
    intercept: float
    objective: float
    bound: float
    multipliers: Array
    steps: int
    eps: float
    eps_max: float
    start: float

    @property
    def gap(self) -> float:
        """objective − bound."""
        return max(self.objective - self.bound, 0.0)


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

    def bound(self, v: Array, multipliers: Array) -> float:
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


def solve(
    problem: Problem, *, tol: float = 1e-8, max_iter: int = 100, near: Array | None = None
) -> Solution:
    """Minimise to a relative gap of ``tol``; the gap says how far it got.

    ``near`` may name the columns v of the solution at a neighbouring eps.
    """
    v, multipliers, eps_max = without(problem)
    if problem.relative:
        problem = replace(problem, eps=problem.eps * eps_max, relative=False)
    total, steps = float(problem.weight.sum()), 0
    start = problem.objective(v) / total
    if problem.eps < eps_max:
        v, multipliers, steps = _method(problem)(problem, tol, max_iter, near)
        if problem.loss.classifies and _left(problem, v) > 0:
            v = _widest(problem, v, tol)
    coef, intercept = problem.design.split(v)
    objective, bound = problem.objective(v) / total, problem.bound(v, multipliers) / total
    return Solution(
        coef, intercept, objective, bound, multipliers, steps, problem.eps, eps_max, start
    )


Found = tuple[Array, Array, int]  # v, multipliers of the rows, steps


def without(problem: Problem) -> tuple[Array, Array, float]:
    """Return the best model that uses no feature in reach, its multipliers, and ε_max.

    ε_max = ‖D⁻¹Xᵀs‖_p / Σ a, the least ε at which the multipliers prove it best of all.
    """
    if "without" not in problem.known:
        problem.known["without"] = _without(problem)
    return problem.known["without"]


def _without(problem: Problem) -> tuple[Array, Array, float]:
    design, y, weight, scale = problem.design, problem.y, problem.weight, problem.scale
    costly = scale > 0
    free = np.flatnonzero(~costly)
    v = np.zeros(design.columns)
    if len(free) == 0:
        multipliers = _at_zero(problem)
    elif len(free) == 1 and design.intercept:
        v[-1], multipliers = problem.loss.constant(y, weight)
    else:
        some = Design(design.take()[:, free], intercept=False)
        part = Problem(some, y, weight, np.zeros(len(free)), 0.0, problem.q, problem.loss)
        v[free], multipliers, _ = _method(part)(part, 1e-12, 100, None)
    if not costly.any():
        return v, multipliers, 0.0
    a = np.abs(multipliers)
    if not problem.loss.classifies:
        a = np.maximum(a, weight * problem.loss.slope(np.abs(design.dot(v) - y)))
    p = {1.0: np.inf, 2.0: 2.0, np.inf: 1.0}[problem.q]
    pull = float(np.linalg.norm(design.tdot(multipliers)[costly] / scale[costly], p))
    return v, multipliers, pull / float(a.sum()) if a.any() else 0.0


def _at_zero(problem: Problem) -> Array:
    """Return multipliers of the prediction 0."""
    y, weight, loss = problem.y, problem.weight, problem.loss
    height = loss.height(np.zeros_like(y), 0.0, y)
    return -np.sign(y) * weight * loss.slope(height)


def _method(problem: Problem) -> Callable[[Problem, float, int, Array | None], Found]:
    """Choose how to solve."""
    squared = isinstance(problem.loss, Squared)
    if squared and len(problem.penalised) == 0:
        return _least_squares
    if problem.q == 2 and len(problem.penalised) > problem.design.rows:
        return _turned
    if squared and problem.design.rows > FEW * problem.design.columns:
        return _by_rounds
    return _at_once


def _least_squares(problem: Problem, tol: float, max_iter: int, near: Array | None) -> Found:
    root = np.sqrt(problem.weight)
    x = problem.design.take() * root[:, None]
    v = np.asarray(np.linalg.lstsq(x, root * problem.y, rcond=None)[0], dtype=np.float64)
    return v, 2 * problem.weight * (problem.design.dot(v) - problem.y), 1


def _at_once(problem: Problem, tol: float, max_iter: int, near: Array | None) -> Found:
    """Work on all rows."""
    rows = problem.rows()
    found = minimise(rows, _start(problem, rows.x), tol=tol / INSIDE, max_iter=max_iter)
    return found.v, found.dual, found.steps


def _start(problem: Problem, x: Array) -> Array:
    """Ridge regression, its penalty matched to the norm's."""
    n, m = x.shape
    heavy = x * problem.weight[:, None]
    ridge = np.full(m, 1e-9 * float(np.einsum("ij,ij->", heavy, x)) / m)
    ridge[problem.penalised] += float(np.einsum("ij,ij->", heavy, x)) / m * 0.1
    if m <= n:
        return sla.solve(heavy.T @ x + np.diag(ridge), heavy.T @ problem.y, assume_a="pos")
    scaled = x / ridge
    kernel = scaled @ x.T + np.diag(1 / problem.weight)
    return scaled.T @ sla.solve(kernel, problem.y, assume_a="pos")


def _widest(problem: Problem, v: Array, tol: float) -> Array:
    """Return the model of largest margin, where even the attack leaves the classes separable.

    min ‖D·w‖_q subject to y·z ≥ 1. It makes the hinge losses 0, and is the direction in which the
    logistic loss has its infimum 0; there it is taken so far that the loss is ``tol`` at most.
    """
    rows = replace(problem.rows(), loss=Hinge(), cost=1.0)
    # a price of 10/ε on violations is exact: multipliers cannot exceed ‖D·w‖_q ≤ 1/ε
    rows = replace(
        rows, units=rows.units / problem.eps, weight=np.full(len(rows.y), 10 / problem.eps)
    )
    found = minimise(rows, v / problem.size(v) * problem.eps, tol=1e-12)
    wide = _on_the_margin(problem, rows, found) if problem.q == 2 else found.v
    left = _left(problem, wide)
    if left <= 0:
        return v
    return wide * (np.log(2 / tol) if problem.loss.smooth else 1.0) / left


def _on_the_margin(problem: Problem, rows: Rows, found: Outcome) -> Array:
    """Return the same with the digits that the norm's roundness costs: solve for those at 1.

    min ‖D·w‖₂ subject to y·z = 1 on the rows whose multipliers say that they bind.
    """
    binding = np.abs(found.dual) > 1e-5 * np.abs(found.dual).max()
    free = np.delete(np.arange(len(found.v)), rows.penalised)
    wide, few = rows.x[binding][:, rows.penalised] / rows.units, rows.x[binding][:, free]
    empty = np.zeros((len(free), len(free)))
    matrix = np.block([[wide @ wide.T, few], [few.T, empty]])
    right = np.append(rows.y[binding], np.zeros(len(free)))
    solved = np.linalg.lstsq(matrix, right, rcond=None)[0]
    v = found.v.copy()
    v[rows.penalised] = wide.T @ solved[: len(wide)] / rows.units
    v[free] = solved[len(wide) :]
    holds = (rows.y * (rows.x @ v)).min() > 1 - 1e-9
    return v if holds and problem.size(v) <= problem.size(found.v) * (1 + 1e-9) else found.v


def _left(problem: Problem, v: Array) -> float:
    """Return the least margin that the attack leaves: min y·z − c."""
    return float((problem.y * problem.design.dot(v)).min()) - problem.size(v)


def _turned(problem: Problem, tol: float, max_iter: int, near: Array | None) -> Found:
    """q = 2 and more columns than rows: w lies in the span of the rows, n numbers."""
    penalised, scale = problem.penalised, problem.scale
    x = problem.design.take()
    turn, lower = sla.qr((x[:, penalised] / scale[penalised]).T, mode="economic")
    free = np.setdiff1d(np.arange(x.shape[1]), penalised)
    small = np.column_stack([lower.T, x[:, free]])
    k = lower.shape[1]
    rows = Rows(
        problem.loss, small, problem.y, problem.weight, np.arange(k), np.full(k, problem.eps), 2.0
    )
    start = np.zeros(small.shape[1])
    ridge = 0.1 * float(np.einsum("ij,ij->", lower, lower)) / k
    gram = lower.T @ lower
    gram[np.diag_indices(k)] += ridge
    start[:k] = lower @ sla.solve(gram, problem.y, assume_a="pos") if len(lower) == k else 0.0
    found = minimise(rows, start, tol=tol / INSIDE, max_iter=max_iter)
    v = np.zeros(x.shape[1])
    v[penalised] = turn @ found.v[:k] / scale[penalised]
    v[free] = found.v[k:]
    return v, found.dual, found.steps


def _by_rounds(problem: Problem, tol: float, max_iter: int, near: Array | None) -> Found:
    """Squared loss, many rows: work on those of small residual, settle the sign of the others.

    A row whose residual keeps its sign is quadratic, and counts through sums that are made once.
    Rows whose sign turns out otherwise join those that are worked on.
    """
    design, y, weight = problem.design, problem.y, problem.weight
    n, m = design.rows, design.columns
    gram, moment, square = _sums(problem)
    v = _ridge(problem, gram, moment, square) if near is None else near
    residual = design.dot(v) - y
    part = _smallest(residual, int(max(FEW * m, WINDOW * n)))
    steps, goal, room = 0, ROUGH, 0.3
    if near is not None:
        goal, room = 0.0, NEAR
    for _ in range(ROUNDS):
        goal = max(goal, tol / INSIDE)
        sign = np.sign(residual)
        settled = sign * weight
        settled[part] = 0.0
        rest = Settled(
            gram,
            moment,
            square,
            design.tdot(settled),
            float(settled @ y),
            float(np.abs(settled).sum()),
        )
        found = minimise(problem.rows(part, rest), v, room=room, tol=goal, max_iter=max_iter)
        steps += found.steps
        v = found.v
        residual = design.dot(v) - y
        wrong = (np.sign(residual) != sign) & (settled != 0)
        if goal <= tol / INSIDE and not wrong.any():
            break
        if goal > tol / INSIDE:
            part = _smallest(residual, int(max(3 * m, len(part) / 4)))
            goal, room = 0.0, 0.02
        else:
            part = np.union1d(part, np.flatnonzero(wrong))
    multipliers = 2 * weight * (residual + problem.size(v) * np.sign(residual))
    multipliers[part] = found.dual if len(found.dual) == len(part) else multipliers[part]
    return v, multipliers, steps


def _sums(problem: Problem) -> tuple[Array, Array, float]:
    """XᵀΩX, XᵀΩy and yᵀΩy."""
    if "sums" not in problem.known:
        gram, moment = problem.design.gram(problem.weight, problem.y)
        problem.known["sums"] = gram, moment, float(problem.weight @ problem.y**2)
    return problem.known["sums"]


def _smallest(residual: Array, count: int) -> NDArray[np.intp]:
    if count >= len(residual):
        return np.arange(len(residual))
    return np.sort(np.argpartition(np.abs(residual), count - 1)[:count])


def _ridge(problem: Problem, gram: Array, moment: Array, square: float) -> Array:
    """Ridge regression from the sums, its penalty that of c at its own solution."""
    total, scale = float(problem.weight.sum()), problem.scale
    penalised = problem.penalised
    shape = scale**2 * float(np.trace(gram)) / len(gram)
    ridge = 0.1
    for _ in range(3):
        matrix = gram + np.diag(ridge * shape + 1e-12 * np.diag(gram))
        v = sla.solve(matrix, moment, assume_a="pos")
        fit = max(float(v @ (gram @ v) - 2 * moment @ v) + square, 1e-12 * square)
        c = problem.size(v)
        weighted = float(shape[penalised] @ v[penalised] ** 2)
        new = c * (0.8 * np.sqrt(total * fit) + total * c) / max(weighted, 1e-300)
        if abs(np.log(new / ridge)) < 0.3:
            break
        ridge = new
    return v
