"""Minimise the mean worst-case loss of a linear model, and prove how good the minimum is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import scipy.linalg as sla
from numpy.typing import NDArray

from robustlearn.linear._bound import lower_bound
from robustlearn.linear._cholesky import factored, solved
from robustlearn.linear._design import Design
from robustlearn.linear._interior import Outcome, Rows, Settled, minimise
from robustlearn.linear._losses import Hinge, Loss, Squared
from robustlearn.linear._newton import Kinks, State, descend

Array = NDArray[np.float64]
T = TypeVar("T")
FEW = 6  # rows a column below which all rows are worked on at once
WINDOW = 0.15  # share of the rows, those of least residual, that the first round works on
ROUGH = 1e-3  # relative accuracy of the first round
ROUNDS = 12
INSIDE = 20  # how far below the tolerance the interior-point method aims: the proof takes some
FAR, NEAR = 0.3, 0.05  # room at its start, from afar and from a neighbouring solution
EXACT = 1e-4  # of the tolerance: the fall of the last Newton step
SOFT, SOFT_NEAR = 0.05, 0.005  # first μ of Newton's method, in typical residuals
DUST = 1e-7  # of the largest coefficient
CAP = 200_000  # most rows of the first round, unless the columns ask for more
NOTHING = 1e-12  # a loss that is none
WELL = 1e-4  # ratio of the pivots from which Cholesky's factor is as good as that of QR
BARELY = 1e-9  # of c: a residual so small has no sign


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
class Solution:
    """A model, its mean worst-case loss, and what no model can go below.

    Attributes
    ----------
    coef : (d,); intercept : float.
    objective : (1/Σω)·Σ ωᵢ·lossᵢ, the worst case at eps.
    bound : no model of this kind has a smaller objective.
    found : what the method left, among it the multipliers that prove the bound.
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
    found: Found
    eps: float
    eps_max: float
    start: float

    @property
    def steps(self) -> int:
        """Newton steps."""
        return self.found.steps

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


def solve(
    problem: Problem, *, tol: float = 1e-8, max_iter: int = 100, near: Found | None = None
) -> Solution:
    """Minimise to a relative gap of ``tol``; the gap says how far it got.

    ``near`` may be what was found at a neighbouring eps.
    """
    v, multipliers, eps_max = without(problem)
    found = Found(v, multipliers, 0)
    if problem.relative:
        problem = replace(problem, eps=problem.eps * eps_max, relative=False)
    total = float(problem.weight.sum())
    start = _once(problem, "start", lambda: problem.objective(v) / total)
    if problem.eps < eps_max:
        found = _method(problem)(problem, tol, max_iter, near)
        v = found.v
        reached = bool((problem.scale > 0).any())
        if problem.loss.classifies and reached and _left(problem, v) > 0:
            v = _widest(problem, v, tol)
    bound = problem.bound(v, found.multipliers, found.lifts) if found.bound is None else found.bound
    value = problem.objective(v)
    if value >= start * total:  # nothing gained: no feature at all, with its proof
        v, multipliers, _ = without(problem)
        bound, value = max(bound, problem.bound(v, multipliers)), start * total
    if problem.q == 1:
        v, value = _cleared(problem, v, value, tol)
    coef, intercept = problem.design.split(v)
    return Solution(
        coef,
        intercept,
        value / total,
        bound / total,
        found,
        problem.eps,
        eps_max,
        start,
    )


def _cleared(problem: Problem, v: Array, value: float, tol: float) -> tuple[Array, float]:
    """Return v with zeros where ‖·‖₁ leaves next to nothing, unless the objective minds."""
    reach = np.abs(problem.scale * v)
    clear = np.where((reach > 0) & (reach <= DUST * reach.max(initial=0.0)), 0.0, v)
    if np.array_equal(clear, v):
        return v, value
    left = problem.objective(clear)
    return (clear, left) if left <= value * (1 + tol / INSIDE) else (v, value)


def without(problem: Problem) -> tuple[Array, Array, float]:
    """Return the best model that uses no feature in reach, its multipliers, and ε_max.

    ε_max = ‖D⁻¹Xᵀs‖_p / Σ a, the least ε at which the multipliers prove it best of all.
    """
    return _once(problem, "without", lambda: _without(problem))


def _once(problem: Problem, name: str, make: Callable[[], T]) -> T:
    """Return what does not depend on eps, worked out once."""
    if name not in problem.known:
        problem.known[name] = make()
    return problem.known[name]


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
        found = _method(part)(part, 1e-12, 100, None)
        v[free], multipliers = found.v, found.multipliers
        margin = float((y * design.dot(v)).min())
        if problem.loss.classifies and margin > 0:  # no loss is left, or next to none
            v *= (np.log(1 / NOTHING) if problem.loss.smooth else 1.0) / margin
            multipliers = np.zeros_like(multipliers)
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


def _method(problem: Problem) -> Callable[[Problem, float, int, Found | None], Found]:
    """Choose how to solve."""
    squared = isinstance(problem.loss, Squared)
    if squared and len(problem.penalised) == 0:
        return _least_squares
    if problem.q == 2 and len(problem.penalised) > problem.design.rows:
        return _turned
    if squared and problem.design.rows > FEW * problem.design.columns:
        return _by_rounds
    return _at_once


def _least_squares(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
    root = np.sqrt(problem.weight)
    x = problem.design.take() * root[:, None]
    v = np.asarray(np.linalg.lstsq(x, root * problem.y, rcond=None)[0], dtype=np.float64)
    return Found(v, 2 * problem.weight * (problem.design.dot(v) - problem.y), 1)


def _at_once(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
    """Work on all rows."""
    rows = problem.rows()
    found = minimise(
        rows, _calm(problem, rows, _start(problem, rows.x)), tol=tol / INSIDE, max_iter=max_iter
    )
    return Found(found.v, found.dual, found.steps, lifts=found.lift)


def _start(problem: Problem, x: Array) -> Array:
    """Ridge regression, its penalty matched to the norm's."""
    n, m = x.shape
    heavy = x * problem.weight[:, None]
    ridge = 1e-9 * np.einsum("ij,ij->j", heavy, x)
    ridge[problem.penalised] *= 1e8
    ridge[ridge == 0] = 1.0  # columns of zeros
    if m <= n:
        return _definite(heavy.T @ x + np.diag(ridge), heavy.T @ problem.y)
    scaled = x / ridge
    kernel = scaled @ x.T + np.diag(1 / problem.weight)
    return scaled.T @ _definite(kernel, problem.y)


def _definite(matrix: Array, right: Array) -> Array:
    """Solve with a positive definite matrix, whatever the sizes of its columns."""
    size = np.sqrt(np.diag(matrix))
    return solved(factored(matrix / size[:, None] / size), right / size) / size


def _calm(problem: Problem, rows: Rows, v: Array) -> Array:
    """Return a start on the way from the best model without features, c no larger than its losses.

    In classification the scores and c are no larger than the labels ±1.
    """
    if len(problem.penalised) == 0:
        return v
    if not problem.loss.classifies:
        still = without(problem)[0]
        height = problem.loss.height(rows.x @ still, 0.0, problem.y)
        way = min(1.0, float(np.mean(height)) / max(problem.size(v), 1e-300))
        return still + way * (v - still)
    return v / max(1.0, float(np.sqrt(np.mean((rows.x @ v) ** 2))), problem.size(v))


def _widest(problem: Problem, v: Array, tol: float) -> Array:
    """Return the model of largest margin, where even the attack leaves the classes separable.

    min ‖D·w‖_q subject to y·z ≥ 1. It makes the hinge losses 0, and is the direction in which the
    logistic loss has its infimum 0; there it is taken so far that the loss is ``tol`` at most.
    """
    problem, attacked = replace(problem, eps=1.0), problem
    v = v / (problem.y * problem.design.dot(v)).min()
    # multipliers cannot exceed the least ‖D·w‖_q, so that this price on violations is exact
    price = np.full(len(problem.y), 10 * problem.size(v))
    rows = replace(problem.rows(), loss=Hinge(), cost=1.0, weight=price)
    found = minimise(rows, v, tol=1e-12)
    wide = _on_the_margin(problem, rows, found) if problem.q == 2 else found.v
    left = _left(attacked, wide)
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


def _turned(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
    """q = 2 and more columns than rows: w lies in the span of the rows, n numbers."""
    penalised, scale = problem.penalised, problem.scale
    x = problem.design.take()
    wide = x[:, penalised] / scale[penalised]
    free = np.setdiff1d(np.arange(x.shape[1]), penalised)
    lower, raised = _triangular(wide)
    k = lower.shape[1]
    part = Problem(
        Design(np.column_stack([lower, x[:, free]]), intercept=False),
        problem.y,
        problem.weight,
        np.append(np.ones(k), np.zeros(len(free))),
        problem.eps,
        2.0,
        problem.loss,
    )
    method = _by_rounds if isinstance(problem.loss, Squared) else _at_once
    found = method(part, tol, max_iter, None)
    v = np.zeros(x.shape[1])
    v[penalised] = raised(found.v[:k]) / scale[penalised]
    v[free] = found.v[k:]
    return replace(found, v=v, bound=None)


def _triangular(wide: Array) -> tuple[Array, Callable[[Array], Array]]:
    """Return L of wide = L·Qᵀ (Q orthonormal), and the map u ↦ Q·u.

    By Cholesky of wide·wideᵀ where that keeps the digits, or by QR, at four times the work.
    """
    try:
        lower = np.tril(factored(wide @ wide.T))
        if np.diag(lower).min() > WELL * np.diag(lower).max():
            return lower, lambda u: wide.T @ sla.solve_triangular(lower, u, lower=True, trans=1)
    except np.linalg.LinAlgError:
        pass
    turn, upper = sla.qr(wide.T, mode="economic")
    return upper.T, lambda u: turn @ u


def _by_rounds(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
    """Squared loss, many rows: try the quick methods first, and take what can be proven."""
    steps, start = 0, near
    methods = (_newton_rounds, _interior_rounds, _at_once)
    for method in methods[1:] if problem.q == np.inf else methods:
        start = found = method(problem, tol, max_iter, start)
        steps += found.steps
        objective, bound = (
            problem.objective(found.v),
            problem.bound(found.v, found.multipliers, found.lifts),
        )
        if objective - bound <= tol * objective:
            break
    return replace(found, steps=steps, bound=bound)


def _unsettled(problem: Problem, v: Array, residual: Array, sign: Array) -> NDArray[np.intp]:
    """Return the rows whose residual has not kept its sign, or has come to nothing beside c."""
    return np.flatnonzero((sign != 0) & (residual * sign <= BARELY * problem.size(v)))


def _newton_rounds(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
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


def _settled(problem: Problem, residual: Array, part: NDArray[np.intp]) -> tuple[Array, Settled]:
    """Return the signs of the rows outside ``part`` (0 inside), and what they add up to."""
    gram, moment, square = _sums(problem)
    sign = np.sign(residual)
    sign[part] = 0.0
    pull = problem.weight * sign
    along = problem.design.tdot(pull) if len(part) < len(sign) else np.zeros(len(moment))
    mass = float(np.abs(pull).sum())
    return sign, Settled(gram, moment, square, along, float(pull @ problem.y), mass)


def _interior_rounds(problem: Problem, tol: float, max_iter: int, near: Found | None) -> Found:
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


def _sums(problem: Problem) -> tuple[Array, Array, float]:
    """XᵀΩX, XᵀΩy and yᵀΩy."""

    def sums() -> tuple[Array, Array, float]:
        gram, moment = problem.design.gram(problem.weight, problem.y)
        return gram, moment, float(problem.weight @ problem.y**2)

    return _once(problem, "sums", sums)


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
        v = _definite(matrix, moment)
        fit = max(float(v @ (gram @ v) - 2 * moment @ v) + square, 1e-12 * square)
        c, bent = problem.size(v), float(shape @ v**2)
        new = c * (0.8 * np.sqrt(total * fit) + total * c) / max(bent, 1e-300)
        if abs(np.log(new / ridge)) < 1:
            break
        ridge = new
    return v
