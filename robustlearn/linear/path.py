"""Many budgets: the path of models over ε."""

from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils.validation import check_X_y

from robustlearn.errors import InputError
from robustlearn.linear import _losses
from robustlearn.linear._design import Design
from robustlearn.linear._norms import dual_norm
from robustlearn.linear._problem import Found, Problem
from robustlearn.linear._report import doubts, tell, tell_range
from robustlearn.linear._solve import Solution, edge, solve
from robustlearn.linear.closed_form import units
from robustlearn.linear.estimators import accuracy, regression_loss, weights

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
    huber_relative: bool = False,
    sample_weight: Any = None,
    tol: float = 1e-8,
    max_iter: int = 100,
) -> Path:
    """Solve min over (w, b) of the mean worst-case loss for many budgets, the largest first.

    What does not depend on ε (for the squared loss XᵀX) is worked out once, and each solution
    starts from its neighbour.

    Parameters
    ----------
    X : (n, d), dense or sparse; y : (n,), for the classification losses two classes.
    eps : (k,) budgets; by default ``n_eps`` from ε_max down to ``shortest`` of it, evenly in the
        logarithm.
    shortest : share of ε_max, above 0 and at most 1; n_eps : whole number from 1 up.
    norm, loss, fit_intercept, feature_scale, huber_threshold, huber_relative, tol, max_iter : as
        for `AdversarialRegressor`.
    sample_weight : (n,) not negative.

    Raises
    ------
    InputError for parameters out of their range, more classes than two, and where no feature is of
    any use (a constant y), unless ``eps`` is given. Gaps above ``tol`` are one
    `ConvergenceWarning`.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> path = regularization_path(X, y, n_eps=5)
    >>> path.coef.shape, bool((path.gap <= 1e-8 * path.objective).all())
    ((5, 10), True)
    """
    accuracy(tol, max_iter)
    chosen = _losses.get(loss, huber_threshold)
    X, y = check_X_y(X, y, accept_sparse="csr", dtype=np.float64, y_numeric=not chosen.classifies)
    weight = weights(sample_weight, len(y))
    kept = weight > 0
    if chosen.classifies:
        classes = np.unique(y[kept])
        if len(classes) != 2:
            raise InputError(f"the path of a classifier is for two classes; y holds {len(classes)}")
        y = np.where(y == classes[1], 1.0, -1.0)
    else:
        threshold = huber_threshold, huber_relative
        chosen = regression_loss(loss, *threshold, y, weight, intercept=bool(fit_intercept))
    problem = prepared(X, y, weight, chosen, norm, fit_intercept, feature_scale, kept)
    largest = edge(problem)
    budgets = grid(eps, n_eps, shortest, largest)
    found = solutions(problem, budgets, tol, max_iter)
    doubtful = doubts(found, tol, classifies=chosen.classifies)
    tell("regularization_path", doubtful, tol, len(found))
    tell_range("regularization_path", found)
    return Path(
        budgets,
        largest,
        np.stack([one.coef for one in found]),
        np.array([one.intercept for one in found]),
        np.array([one.objective for one in found]),
        np.array([one.gap for one in found]),
        np.array([one.steps for one in found]),
    )


def grid(eps: Any, n_eps: Any, shortest: Any, largest: float) -> Array:
    """Return falling budgets: those given, or ``n_eps`` from the largest that matters down."""
    if isinstance(n_eps, bool) or not (isinstance(n_eps, Integral) and int(n_eps) >= 1):
        raise InputError(f"n_eps must be a whole number from 1 up; got {n_eps!r}")
    if isinstance(shortest, bool) or not (isinstance(shortest, Real) and 0 < float(shortest) <= 1):
        raise InputError(
            f"shortest, a share of eps_max, lies above 0 and up to 1; got {shortest!r}"
        )
    if eps is None:
        if not largest > 0:
            raise InputError(
                "no feature is of any use (is y constant, or X zero?), so that there is no eps_max "
                "to start from; give eps"
            )
        return np.geomspace(largest, float(shortest) * largest, int(n_eps))
    try:
        budgets = np.sort(np.asarray(eps, dtype=np.float64).ravel())[::-1]
    except (TypeError, ValueError):
        raise InputError(f"eps must hold numbers; got {eps!r}") from None
    if not (len(budgets) and np.isfinite(budgets).all() and (budgets >= 0).all()):
        raise InputError(
            f"eps must hold at least one budget, all finite, and must not be negative; got {eps!r}"
        )
    return budgets


def solutions(problem: Problem, budgets: Array, tol: float, max_iter: int) -> list[Solution]:
    """Solve at falling budgets, each from its neighbour."""
    found: list[Solution] = []
    near: Found | None = None
    for eps in budgets:
        one = solve(replace(problem, eps=float(eps)), tol=tol, max_iter=max_iter, near=near)
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
    kept: NDArray[np.bool_],
) -> Problem:
    """Return the problem of the rows kept of arrays that have been checked, at eps = 0."""
    design = Design(X, intercept=bool(fit_intercept), kept=kept)
    scale = units(feature_scale, X.shape[1])
    scale = np.append(scale, np.zeros(design.columns - len(scale)))
    return Problem(design, y[kept], weight[kept], scale, 0.0, dual_norm(norm), loss)
