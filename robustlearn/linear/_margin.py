"""Separable classes: no minimum of the loss is attained, the widest margin is what is meant."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._interior import Outcome, minimise
from robustlearn.linear._losses import Hinge
from robustlearn.linear._problem import Problem
from robustlearn.linear._rows import Rows

Array = NDArray[np.float64]


def widest(problem: Problem, v: Array, tol: float) -> Array:
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
    left = margin_left(attacked, wide)
    if left <= 0:
        return v
    return wide * (np.log(2 / tol) if problem.loss.smooth else 1.0) / left


def margin_left(problem: Problem, v: Array) -> float:
    """Return the least margin that the attack leaves: min y·z − c."""
    return float((problem.y * problem.design.dot(v)).min()) - problem.size(v)


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
