"""Many budgets: the path of models over ε."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_array, check_X_y

from robustlearn.errors import InputError
from robustlearn.linear import _losses
from robustlearn.linear._design import Design
from robustlearn.linear._problem import Found, Problem
from robustlearn.linear._solve import Solution, edge, solve
from robustlearn.linear.closed_form import dual_norm, units
from robustlearn.linear.estimators import weights

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Path:
    """Models over the budget.

    Attributes
    ----------
    eps : (k,) falling; eps_max : from there on no feature is used.
    coef : (k, d); intercept : (k,).
    objective, gap : (k,) the mean worst-case loss at each eps, and how far it is proven.
    steps : (k,) Newton steps.
    """

    eps: Array
    eps_max: float
    coef: Array
    intercept: Array
    objective: Array
    gap: Array
    steps: NDArray[np.int64]

    def plot(self, ax: Any = None, names: list[str] | None = None) -> Any:
        """Draw the coefficients over eps on matplotlib axes, and return these."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        for j, line in enumerate(self.coef.T):
            ax.plot(self.eps, line, label=None if names is None else names[j])
        ax.axvline(self.eps_max, color="0.6", linestyle=":")
        ax.set(xscale="log", xlabel="budget ε of the attack", ylabel="coefficient")
        if names is not None:
            ax.legend(fontsize="small")
        return ax


def regularization_path(
    X: Any,
    y: Any,
    *,
    eps: Any = None,
    n_eps: int = 20,
    shortest: float = 0.01,
    norm: Any = 2,
    loss: str = "squared",
    fit_intercept: bool = True,
    feature_scale: Any = None,
    huber_threshold: float = 1.35,
    sample_weight: Any = None,
    tol: float = 1e-8,
) -> Path:
    """Solve min over (w, b) of the mean worst-case loss for many budgets, the largest first.

    What does not depend on ε (for the squared loss XᵀX) is worked out once, and each solution
    starts from its neighbour.

    Parameters
    ----------
    X : (n, d), dense or sparse; y : (n,), for the classification losses two classes.
    eps : (k,) budgets; by default ``n_eps`` from ε_max down to ``shortest`` of it, evenly in the
        logarithm.
    norm, loss, fit_intercept, feature_scale, huber_threshold, tol : as for
        `AdversarialRegressor`.
    sample_weight : (n,) not negative.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> path = regularization_path(X, y, n_eps=5)
    >>> path.coef.shape, bool((path.gap <= 1e-8 * path.objective).all())
    ((5, 10), True)
    """
    chosen = _losses.get(loss, huber_threshold)
    X, y = check_X_y(X, y, accept_sparse="csr", dtype=np.float64, y_numeric=not chosen.classifies)
    if chosen.classifies:
        classes = np.unique(y)
        if len(classes) != 2:
            raise InputError(f"the path of a classifier is for two classes; y holds {len(classes)}")
        y = np.where(y == classes[1], 1.0, -1.0)
    weight = weights(sample_weight, len(y))
    kept = weight > 0
    problem = prepared(X[kept], y[kept], weight[kept], chosen, norm, fit_intercept, feature_scale)
    largest = edge(problem)
    if eps is None:
        budgets = np.geomspace(largest, shortest * largest, n_eps)
    else:
        budgets = np.sort(check_array(eps, ensure_2d=False, dtype=np.float64).ravel())[::-1]
        if budgets[-1] < 0:
            raise InputError("eps must not be negative")
    found = solutions(problem, budgets, tol)
    return Path(
        budgets,
        largest,
        np.stack([one.coef for one in found]),
        np.array([one.intercept for one in found]),
        np.array([one.objective for one in found]),
        np.array([one.gap for one in found]),
        np.array([one.steps for one in found]),
    )


def solutions(problem: Problem, budgets: Array, tol: float) -> list[Solution]:
    """Solve at falling budgets, each from its neighbour."""
    found: list[Solution] = []
    near: Found | None = None
    for eps in budgets:
        one = solve(replace(problem, eps=float(eps)), tol=tol, near=near)
        near = one.found if one.coef.any() else None
        found.append(one)
    return found


def prepared(
    X: Any,
    y: Array,
    weight: Array,
    loss: _losses.Loss,
    norm: Any,
    fit_intercept: bool,
    feature_scale: Any,
) -> Problem:
    """Return the problem of arrays that have been checked, at eps = 0."""
    design = Design(X, intercept=fit_intercept)
    scale = units(feature_scale, X.shape[1])
    scale = np.append(scale, np.zeros(design.columns - len(scale)))
    return Problem(design, y, weight, scale, 0.0, dual_norm(norm), loss)
