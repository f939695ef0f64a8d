"""Minimise the mean worst-case loss of a linear model, and prove how good the minimum is."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import scipy.linalg as sla
from numpy.typing import NDArray

from robustlearn.linear._cholesky import definite, factored
from robustlearn.linear._design import Design
from robustlearn.linear._interior import minimise
from robustlearn.linear._losses import Squared
from robustlearn.linear._margin import margin_left, widest
from robustlearn.linear._norms import dual_norm
from robustlearn.linear._problem import Found, Problem
from robustlearn.linear._rounds import FEW, INSIDE, interior_rounds, newton_rounds
from robustlearn.linear._rows import Rows, weighted_gram
from robustlearn.linear._units import Units, normalised, tamed

Array = NDArray[np.float64]
DUST = 1e-7  # of the largest coefficient
NOTHING = 1e-12  # a loss that is none
ASIDE = (1e-9, 1e-8, 1e-6, 1e-4, 1e-2)  # shares of eps
CANCELLED = 1e-15  # of the sum of sizes: a sum that is rounding
NEGLIGIBLE = 1e-14  # gap, in losses of the best model without features, that is none
WELL = 1e-4  # ratio of the pivots from which Cholesky's factor is as good as that of QR


@dataclass(frozen=True)
class Solution:
    """A model, its mean worst-case loss, and what no model can go below.

    Attributes
    ----------
    columns : (m,) the model in the columns of the design, ``inner_objective``, ``inner_bound`` and
        ``inner_start`` (of the best model that uses no feature in reach): in the solver's units of
        y, with ``units`` back to the user's, in which the properties are.
    found : what the method left, in the solver's units, among it the multipliers of the bound.
    eps_max : from there on no feature that the attack reaches is used. Exact where the best model
        without them has only one set of multipliers, an upper bound for the absolute and the
        hinge loss.
    eps : the budget that was used.
    """

    design: Design
    units: Units
    columns: Array
    inner_objective: float
    inner_bound: float
    inner_start: float
    found: Found
    eps: float
    eps_max: float

    @cached_property
    def _model(self) -> tuple[Array, float]:
        return self.units.model(*self.design.split(self.columns))

    @property
    def coef(self) -> Array:
        """w, (d,)."""
        return self._model[0]

    @property
    def intercept(self) -> float:
        """b."""
        return self._model[1]

    @property
    def objective(self) -> float:
        """(1/Σω)·Σ ωᵢ·lossᵢ, the worst case at eps."""
        return self.units.value(self.inner_objective)

    @property
    def bound(self) -> float:
        """No model of this kind has a smaller objective."""
        return self.units.value(self.inner_bound)

    @property
    def start(self) -> float:
        """The objective of the best model that uses no feature in reach."""
        return self.units.value(self.inner_start)

    @property
    def gap(self) -> float:
        """objective − bound; its size where it is `contradicted`: no more is known then."""
        return self.units.value(self._gap)

    @property
    def _gap(self) -> float:
        difference = self.inner_objective - self.inner_bound
        return -difference if self.contradicted else max(difference, 0.0)

    @property
    def contradicted(self) -> bool:
        """Whether the bound exceeds the objective by more than rounding: one of them is wrong."""
        excess = self.inner_bound - self.inner_objective
        return excess > 1e-11 * self.inner_objective and excess > NEGLIGIBLE * self.inner_start

    @property
    def steps(self) -> int:
        """Newton steps."""
        return self.found.steps

    def proven(self, tol: float) -> bool:
        """Tell whether the objective is proven to within ``tol`` of itself, or is next to none."""
        near = self._gap <= max(tol * self.inner_objective, NEGLIGIBLE * self.inner_start)
        return near and not self.contradicted

    @property
    def unheld(self) -> bool:
        """Whether the objective is too large or too small for the user's units."""
        value = self.objective
        return bool(np.isinf(value)) or (value == 0 and self.inner_objective > 0)

    @property
    def vanishing(self) -> bool:
        """Whether next to nothing is left of the loss."""
        return self.inner_objective < 1e-3 * self.inner_start


def solve(
    problem: Problem, *, tol: float = 1e-8, max_iter: int = 100, near: Found | None = None
) -> Solution:
    """Minimise to a relative gap of ``tol``; the gap says how far it got.

    ``near`` may be what was found at a neighbouring eps.
    """
    units, inner = _normalised(problem)
    task, ratio = inner.once("tamed", lambda: tamed(inner))
    task = replace(task, eps=problem.eps, relative=problem.relative)
    solution = _solved(task, units, tol, max_iter, near)
    if task.loss is inner.loss:
        return solution
    true = replace(inner, eps=solution.eps, relative=False)
    total = float(inner.weight.sum())
    return replace(
        solution,
        inner_objective=true.objective(solution.columns) / total,
        inner_bound=ratio * solution.inner_bound,
        inner_start=true.objective(without(task)[0]) / total,
    )


def edge(problem: Problem) -> float:
    """Return ε_max, from which on no feature in reach is used."""
    _, inner = _normalised(problem)
    task, _ = inner.once("tamed", lambda: tamed(inner))
    return without(task)[2]


def _normalised(problem: Problem) -> tuple[Units, Problem]:
    return problem.once("normalised", lambda: normalised(problem))


def _solved(
    problem: Problem, units: Units, tol: float, max_iter: int, near: Found | None
) -> Solution:
    """Solve in the units that the problem has."""
    v, multipliers, eps_max = without(problem)
    found = Found(v, multipliers, 0)
    if problem.relative:
        problem = replace(problem, eps=problem.eps * eps_max, relative=False)
    total = float(problem.weight.sum())
    start = problem.once("start", lambda: problem.objective(v) / total)
    if problem.eps < eps_max:
        found = _method(problem)(problem, tol, max_iter, near)
        v = found.v
        reached = bool((problem.scale > 0).any())
        if problem.loss.classifies and reached and margin_left(problem, v) > 0:
            v = widest(problem, v, tol)
    bound = problem.bound(v, found.multipliers, found.lifts) if found.bound is None else found.bound
    value = problem.objective(v)
    attacked = problem.loss.classifies and len(problem.penalised) > 0
    if bound <= 0 and attacked and margin_left(problem, v) <= 0:
        bound = _aside(problem, tol, max_iter, value)
    if value >= start * total:  # nothing gained: no feature at all, with its proof
        v, multipliers, _ = without(problem)
        bound, value = max(bound, problem.bound(v, multipliers)), start * total
    if problem.q == 1:
        v, value = _cleared(problem, v, value, tol)
    return Solution(
        problem.design,
        units,
        v,
        value / total,
        bound / total,
        start,
        found,
        problem.eps,
        eps_max,
    )


def _aside(problem: Problem, tol: float, max_iter: int, value: float) -> float:
    """Return the bound by the multipliers of slightly smaller budgets, which have room to spare.

    Those of eps(1 − δ) meet the conditions of eps with a share δ left, in which what least squares
    or rounding leave undone disappears; the bound is lower by about that share.
    """
    best = 0.0
    for share in ASIDE:
        near = replace(problem, eps=problem.eps * (1 - share))
        found = _method(near)(near, tol, max_iter, None)
        best = max(best, problem.bound(found.v, found.multipliers, found.lifts))
        if best >= value * (1 - 10 * share):
            break
    return best


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
    return problem.once("without", lambda: _without(problem))


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
    p = dual_norm(problem.q)
    pull = float(np.linalg.norm(design.tdot(multipliers)[costly] / scale[costly], p))
    if not isinstance(problem.loss, Squared):  # multipliers that cancel leave rounding
        most = design.tdot_size(multipliers)[costly] / scale[costly]
        pull = pull if pull > CANCELLED * float(np.linalg.norm(most, p)) else 0.0
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
    weight = problem.weight
    ridge = 1e-9 * np.einsum("ij,ij,i->j", x, x, weight)
    ridge[problem.penalised] *= 1e8
    ridge[ridge == 0] = 1.0  # columns of zeros
    if m <= n:
        return definite(weighted_gram(x, weight) + np.diag(ridge), x.T @ (weight * problem.y))
    scaled = x / ridge
    kernel = scaled @ x.T + np.diag(1 / problem.weight)
    return scaled.T @ definite(kernel, problem.y)


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
    methods = (newton_rounds, interior_rounds, _at_once)
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
