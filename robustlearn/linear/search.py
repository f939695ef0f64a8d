"""The budget that does best on held-out data, as scikit-learn estimators."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import check_cv
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from robustlearn.errors import InputError
from robustlearn.linear import _losses
from robustlearn.linear._problem import Problem
from robustlearn.linear._report import Doubt, doubts, tell, tell_range
from robustlearn.linear._solve import edge
from robustlearn.linear.closed_form import budget, units
from robustlearn.linear.estimators import (
    AdversarialClassifier,
    AdversarialRegressor,
    accuracy,
    regression_loss,
    signs_of,
    weights,
)
from robustlearn.linear.path import grid, prepared, solutions

Array = NDArray[np.float64]
FLOATS = [np.float64, np.float32]
PASSED_ON = ("norm", "loss", "fit_intercept", "feature_scale", "tol", "max_iter")


class _Search(BaseEstimator):
    """What both searches share: held-out worst-case losses over a grid of budgets."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _keep(self, best: Any) -> None:
        """Take over what the best model knows."""
        self.best_ = best
        for name in (
            "coef_",
            "intercept_",
            "objective_",
            "dual_gap_",
            "eps_",
            "eps_max_",
            "n_iter_",
        ):
            setattr(self, name, getattr(best, name))

    def _choose(self, X: Any, y: Any, weight: Array, signs: list[Array], loss: Any) -> float:
        """Return the best eps; ``signs`` are the targets of the models, one or one a class."""
        accuracy(self.tol, self.max_iter)
        attack = budget(self.attack_eps, "attack_eps")
        everything = np.arange(len(y))
        largest = max(edge(self._prepared(X, one, weight, loss, everything)) for one in signs)
        given = np.zeros(1) if self.eps is None and not largest > 0 else self.eps
        self.eps_path_ = grid(given, self.n_eps, self.shortest, largest)
        if len(y) < 2:
            raise InputError("cross-validation needs more than 1 sample")
        folds = check_cv(self.cv, y, classifier=loss.classifies)
        self._doubts: list[Doubt] = []
        self._solved = 0
        losses = [
            self._held_out(X, weight, signs, loss, attack, train, test)
            for train, test in folds.split(X, y)
        ]
        self.loss_path_ = np.stack(losses, axis=1)
        if not np.isfinite(self.loss_path_).all():
            raise InputError(
                "a loss held out is not a finite number: scale the target and the features"
            )
        return float(self.eps_path_[self.loss_path_.mean(1).argmin()])

    def _prepared(
        self, X: Any, y: Array, weight: Array, loss: Any, part: NDArray[np.intp]
    ) -> Problem:
        part = part[weight[part] > 0]
        given = self.norm, self.fit_intercept, self.feature_scale
        kept = np.ones(len(part), dtype=bool)
        return prepared(X[part], y[part], weight[part], loss, *given, kept)

    def _held_out(
        self,
        X: Any,
        weight: Array,
        signs: list[Array],
        loss: Any,
        attack: float,
        train: NDArray[np.intp],
        test: NDArray[np.intp],
    ) -> Array:
        """Return the mean worst-case loss on a fold at ``attack_eps`` for each budget."""
        train, test = np.arange(len(weight))[train], np.arange(len(weight))[test]
        train, test = train[weight[train] > 0], test[weight[test] > 0]
        if not (len(train) and len(test)):
            raise InputError(
                "the samples of a part of the cross-validation have no weight; use fewer folds, or "
                "shuffle"
            )
        total = np.zeros(len(self.eps_path_))
        reach = units(self.feature_scale, X.shape[1])
        for one in signs:
            if loss.classifies and len(np.unique(one[train])) < 2:
                raise InputError(
                    "a fold of the cross-validation lacks a class (of positive weight); use fewer "
                    "folds"
                )
            problem = self._prepared(X, one, weight, loss, train)
            found = solutions(problem, self.eps_path_, self.tol, self.max_iter)
            self._doubts += doubts(found, self.tol, classifies=loss.classifies)
            self._solved += len(found)
            for k, model in enumerate(found):
                with np.errstate(over="ignore", invalid="ignore"):  # told by who asks
                    c = attack * np.linalg.norm(reach * model.coef, problem.q)
                    z = X[test] @ model.coef + model.intercept
                    value = loss.value(loss.height(np.asarray(z), float(c), one[test]))
                    total[k] += np.average(value, weights=weight[test])
        return total

    def _finish(self, best: Any, X: Any, y: Any, weight: Array, loss: Any) -> None:
        """Fit the best model to all data, and warn once of all that is not proven."""
        best.n_features_in_ = X.shape[1]
        found = best._fitted(X, y, weight, loss, quiet=True)
        self._doubts += doubts(found, self.tol, classifies=loss.classifies)
        name = type(self).__name__
        tell(name, self._doubts, self.tol, self._solved + len(found))
        tell_range(name, found)
        del self._doubts, self._solved
        self._keep(best)


class AdversarialRegressorCV(RegressorMixin, _Search):
    """`AdversarialRegressor` with the ε of least held-out loss.

    ε* = argmin over the grid of the mean over the folds of
    mean φ(|wᵀx + b − y| + attack_eps·‖D·w‖_q) on the part held out.

    Parameters
    ----------
    eps : budgets to try; by default ``n_eps`` from ε_max down to ``shortest`` of it.
    attack_eps : the budget at which the part held out is attacked; 0 measures the clean loss.
    cv : folds, as scikit-learn has it; 5 by default.
    norm, loss, fit_intercept, feature_scale, huber_threshold, huber_relative, tol, max_iter : as
        for `AdversarialRegressor`; a relative threshold counts in the scale of all of y.

    Attributes
    ----------
    eps_path_ : (k,); loss_path_ : (k, folds) the held-out losses.
    best_ : the `AdversarialRegressor` at the best ε, fitted to all data; its attributes are found
        here too.

    Raises
    ------
    InputError for parameters out of their range, and where a part of the cross-validation has no
    weight, or lacks a class. Gaps above ``tol``, in the folds or at the end, are one
    `ConvergenceWarning`.

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> search = AdversarialRegressorCV(n_eps=8).fit(X, y)
    >>> search.loss_path_.shape
    (8, 5)
    """

    def __init__(
        self,
        eps: Any = None,
        *,
        n_eps: int = 20,
        shortest: float = 0.01,
        attack_eps: float = 0.0,
        cv: Any = None,
        norm: Any = 2,
        loss: str = "squared",
        fit_intercept: bool = True,
        feature_scale: Any = None,
        huber_threshold: float = 1.35,
        huber_relative: bool = False,
        tol: float = 1e-8,
        max_iter: int = 100,
    ) -> None:
        self.eps = eps
        self.n_eps = n_eps
        self.shortest = shortest
        self.attack_eps = attack_eps
        self.cv = cv
        self.norm = norm
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.feature_scale = feature_scale
        self.huber_threshold = huber_threshold
        self.huber_relative = huber_relative
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "AdversarialRegressorCV":
        """Choose ε and fit to all of X (n, d) and y (n,)."""
        X, y = validate_data(self, X, y, accept_sparse="csr", y_numeric=True, dtype=FLOATS)
        y = np.asarray(y, dtype=np.float64)
        weight = weights(sample_weight, len(y))
        threshold = self.huber_threshold, self.huber_relative
        loss = regression_loss(self.loss, *threshold, y, weight, intercept=bool(self.fit_intercept))
        eps = self._choose(X, y, weight, [y], loss)
        names = (*PASSED_ON, "huber_threshold", "huber_relative")
        same = {name: getattr(self, name) for name in names}
        self._finish(AdversarialRegressor(eps, **same), X, y, weight, loss)
        return self

    def predict(self, X: Any) -> Array:
        """Return wᵀx + b, (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=FLOATS, reset=False)
        return self.best_.predict(X)


class AdversarialClassifierCV(ClassifierMixin, _Search):
    """`AdversarialClassifier` with the ε of least held-out loss.

    ε* = argmin over the grid of the mean over the folds of mean ℓ(y(wᵀx + b) − attack_eps·‖D·w‖_q)
    on the part held out, summed over the K one-against-rest models if there are more classes
    than two.

    Parameters
    ----------
    eps, n_eps, shortest, attack_eps, cv : as for `AdversarialRegressorCV`.
    norm, loss, fit_intercept, feature_scale, tol, max_iter : as for `AdversarialClassifier`.

    Attributes
    ----------
    eps_path_ : (k,); loss_path_ : (k, folds) the held-out losses.
    best_ : the `AdversarialClassifier` at the best ε, fitted to all data; its attributes are found
        here too.

    Raises
    ------
    InputError for parameters out of their range, and where a part of the cross-validation has no
    weight, or lacks a class. Gaps above ``tol``, in the folds or at the end, are one
    `ConvergenceWarning`.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> search = AdversarialClassifierCV(n_eps=4, shortest=0.1, cv=3)
    >>> search = search.fit((X - X.mean(0)) / X.std(0), y)
    >>> search.loss_path_.shape
    (4, 3)
    """

    def __init__(
        self,
        eps: Any = None,
        *,
        n_eps: int = 20,
        shortest: float = 0.01,
        attack_eps: float = 0.0,
        cv: Any = None,
        norm: Any = 2,
        loss: str = "logistic",
        fit_intercept: bool = True,
        feature_scale: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
    ) -> None:
        self.eps = eps
        self.n_eps = n_eps
        self.shortest = shortest
        self.attack_eps = attack_eps
        self.cv = cv
        self.norm = norm
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.feature_scale = feature_scale
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "AdversarialClassifierCV":
        """Choose ε and fit to all of X (n, d) and labels y (n,)."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=FLOATS)
        check_classification_targets(y)
        weight = weights(sample_weight, len(y))
        loss = _losses.get(self.loss)
        if not loss.classifies:
            raise InputError(f"the {self.loss} loss is for AdversarialRegressorCV")
        self.classes_, signs = signs_of(y, weight)
        eps = self._choose(X, y, weight, signs, loss)
        same = {name: getattr(self, name) for name in PASSED_ON}
        self._finish(AdversarialClassifier(eps, **same), X, y, weight, loss)
        return self

    def decision_function(self, X: Any) -> Array:
        """Return wᵀx + b, (n,) for two classes, (n, K) for more."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=FLOATS, reset=False)
        return self.best_.decision_function(X)

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the class of the largest score, (n,)."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", dtype=FLOATS, reset=False)
        return self.best_.predict(X)
