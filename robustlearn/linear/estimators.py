"""Linear models trained for the worst case, as scikit-learn estimators with a certified gap."""

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data

from robustlearn.errors import InputError
from robustlearn.linear import _losses
from robustlearn.linear._design import Design, is_native
from robustlearn.linear._norms import dual_norm
from robustlearn.linear._problem import Problem
from robustlearn.linear._report import doubts, tell, tell_range
from robustlearn.linear._solve import Solution, solve
from robustlearn.linear._units import robust_scale
from robustlearn.linear.closed_form import budget, units

Array = NDArray[np.float64]


class _Adversarial(BaseEstimator):
    """What the estimators share: the problem, its solution, and what is told of it."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _problem(
        self, X: Any, y: Array, weight: Array, loss: Any, kept: NDArray[np.bool_]
    ) -> Problem:
        """Return the problem at eps, which may be relative to eps_max, of the rows kept."""
        eps, relative = budget(self.eps), flag("relative", self.relative)
        accuracy(self.tol, self.max_iter)
        design = Design(X, intercept=bool(self.fit_intercept), kept=kept)
        scale = units(self.feature_scale, X.shape[1])
        scale = np.append(scale, np.zeros(design.columns - len(scale)))
        q = dual_norm(self.norm)
        return Problem(design, y[kept], weight[kept], scale, eps, q, loss, relative=relative)

    def _told(self, problems: Iterable[Problem], *, quiet: bool) -> list[Solution]:
        """Solve, and warn of what is not proven."""
        found = [solve(one, tol=self.tol, max_iter=self.max_iter) for one in problems]
        if not quiet:
            name, classifies = type(self).__name__, hasattr(self, "classes_")
            tell(name, doubts(found, self.tol, classifies=classifies), self.tol, len(found))
            tell_range(name, found)
        return found


def accuracy(tol: Any, max_iter: Any) -> None:
    """Check the tolerance and the number of steps."""
    if isinstance(tol, bool) or not (isinstance(tol, Real) and 0 < float(tol) < 1):
        raise InputError(f"tol, the relative gap, lies between 0 and 1; got {tol!r}")
    if isinstance(max_iter, bool) or not (isinstance(max_iter, Integral) and int(max_iter) >= 1):
        raise InputError(f"max_iter must be a whole number from 1 up; got {max_iter!r}")


def flag(name: str, value: Any) -> bool:
    """Return a yes or no, checked."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def regression_loss(
    name: Any, threshold: Any, relative: Any, y: Array, weight: Array, *, intercept: bool
) -> _losses.Loss:
    """Return the loss, a ``relative`` threshold of Huber's in robust standard deviations of y."""
    loss = _losses.get(name, threshold)
    if loss.classifies:
        raise InputError(f"the {name} loss is for AdversarialClassifier and its CV")
    if flag("huber_relative", relative) and isinstance(loss, _losses.Huber):
        kept = weight > 0
        size = robust_scale(y[kept], weight[kept], intercept=intercept)
        return _losses.get(name, float(threshold) * size)
    return loss


def checked(estimator: Any, X: Any, y: Any, **options: Any) -> tuple[Any, NDArray[Any]]:
    """Return X and y as scikit-learn has them.

    Dask arrays, torch tensors and files stay where they are: their NaN is found by the first pass.
    """
    if not is_native(X):
        return validate_data(
            estimator, X, y, accept_sparse="csr", dtype=[np.float64, np.float32], **options
        )
    if len(X.shape) != 2:
        raise InputError(f"X has {len(X.shape)} dimensions; expected (samples, features)")
    y = y.detach().cpu().numpy() if hasattr(y, "detach") else np.asarray(y)
    if y.shape != (X.shape[0],):
        raise InputError(f"X has {X.shape[0]} samples, y has shape {y.shape}")
    if y.dtype.kind == "f" and not np.isfinite(y).all():
        raise InputError("y holds NaN or infinity")
    estimator.n_features_in_ = int(X.shape[1])
    if hasattr(estimator, "feature_names_in_"):  # of an earlier fit
        del estimator.feature_names_in_
    return X, y


def scores(estimator: Any, X: Any, w: Array) -> Array:
    """Return Xw, (n,)."""
    if not is_native(X):
        X = validate_data(
            estimator, X, accept_sparse="csr", dtype=[np.float64, np.float32], reset=False
        )
    elif X.shape[1] != estimator.n_features_in_:
        raise InputError(f"X has {X.shape[1]} features; expected {estimator.n_features_in_}")
    return Design(X, intercept=False).dot(w)


def weights(sample_weight: Any, n: int) -> Array:
    """Return the weights of n samples, checked."""
    if sample_weight is None:
        return np.ones(n)
    if isinstance(sample_weight, Real):
        sample_weight = np.full(n, float(sample_weight))
    weight = check_array(
        sample_weight, ensure_2d=False, dtype=np.float64, input_name="sample_weight"
    )
    if weight.shape != (n,):
        raise InputError(f"sample_weight has shape {weight.shape}; expected ({n},)")
    if (weight < 0).any() or not weight.any():
        raise InputError("sample_weight must not be negative, and not zero for all samples")
    return weight


def signs_of(y: NDArray[Any], weight: Array) -> tuple[NDArray[Any], list[Array]]:
    """Return the classes of weight and ±1 for each model: one for two classes, else one a class."""
    classes = np.unique(y[weight > 0])
    if len(classes) < 2:
        raise InputError(
            f"a classifier needs samples of at least 2 classes; y holds only 1 class, "
            f"{classes.tolist()}"
        )
    chosen = classes[1:] if len(classes) == 2 else classes
    return classes, [np.where(y == one, 1.0, -1.0) for one in chosen]


class AdversarialRegressor(RegressorMixin, _Adversarial):
    r"""min over (w, b) of the mean of max over ‖δ/D‖_p ≤ ε of φ(wᵀ(x + δ) + b − y).

    The inner maximum is φ(|wᵀx + b − y| + ε‖D·w‖_q), 1/p + 1/q = 1: for the square
    (|wᵀx + b − y| + ε‖D·w‖_q)². The problem is convex; an interior-point method solves it to a
    relative duality gap of ``tol``, and the gap is proven from the data, not estimated.

    Parameters
    ----------
    eps : budget ε ≥ 0 of the attack on the inputs, in units of ``feature_scale``; in units of
        ``eps_max_``, from which on w = 0 is best, if ``relative``.
    norm : p of the attack, 1, 2 or inf.
    loss : φ: ``"squared"`` r², ``"absolute"`` |r|, or ``"huber"`` (r²/2, linear from
        ``huber_threshold`` on), which resists label outliers too.
    relative : whether eps is a fraction of ``eps_max_``.
    fit_intercept : whether there is a b.
    feature_scale : (d,) D: the unit in which the change of each feature is counted, 0 for a feature
        that cannot change; 1 by default.
    huber_threshold : k of the Huber loss, in units of y.
    huber_relative : whether ``huber_threshold`` is in robust standard deviations of y instead,
        1.4826·median |y − median(y)| (|y| without an intercept). In units of y a threshold far
        below the residuals makes the Huber loss an absolute loss.
    tol : relative duality gap to reach.
    max_iter : most Newton steps of one run.

    Attributes
    ----------
    coef_ : (d,); intercept_ : float.
    objective_ : the (weighted) mean worst-case loss.
    dual_gap_ : objective_ minus a proven lower bound of what any w, b can have.
    eps_ : the ε that was used; eps_max_ : the ε from which on w = 0 is best (exact, but an upper
        bound for the absolute loss).
    huber_threshold_ : k as it was used, in units of y; only with the Huber loss.
    n_iter_ : Newton steps.

    Raises
    ------
    ValueError for a negative eps, another norm or loss, or data that do not fit. A gap above
    ``tol`` is a `ConvergenceWarning`, one that float64 cannot hold a `RuntimeWarning`.

    Notes
    -----
    y is centred and scaled before it is solved for, X centred where it is far from zero; objective
    and gap are in the user's units.

    Where X lies: a `numpy.memmap` (a whole one, mode "r", "r+" or "w+") is read in blocks; a
    `dask.array` is worked on where its blocks lie, a torch tensor on its device.

    ====================================== ====================================================
    loss                                   what is held in this process, or goes over the wire
    ====================================== ====================================================
    squared, n > 6·(d + 1)                 in each pass a vector of d columns to the workers and
                                           one number a row back; once XᵀX, d² numbers a block;
                                           rows of small residual, at most the larger of 15% (no
                                           more than 200,000) and 6·(d + 1) in the first round
    squared, fewer rows, or eps = 0;       all of X, once, as float64: dask and torch data are
    absolute, huber; classification        copied to the memory of this process, arrays too
                                           if there is an intercept. Besides 20 (logistic) to
                                           60 (huber) numbers a row, some blocks of 32 MiB,
                                           and, with fewer rows than columns, more copies of X
    ====================================== ====================================================

    The graph of a dask array is computed anew in each pass, some twenty of them: ``persist`` it
    first. Rows of zero weight stay in a file; of other arrays a copy without them is made.

    The objective is not least squares plus a penalty, and not Huber's loss: (|r| + c)² has a kink
    at 0 and quadratic tails. Source of the problem: Ribeiro, Zachariah, Bach and Schön (2023).

    Examples
    --------
    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> model = AdversarialRegressor(eps=0.1, relative=True).fit(X, y)
    >>> bool(model.dual_gap_ <= 1e-8 * model.objective_)
    True
    """

    def __init__(
        self,
        eps: float = 0.1,
        *,
        norm: Any = 2,
        loss: str = "squared",
        relative: bool = False,
        fit_intercept: bool = True,
        feature_scale: Any = None,
        huber_threshold: float = 1.35,
        huber_relative: bool = False,
        tol: float = 1e-8,
        max_iter: int = 100,
    ) -> None:
        self.eps = eps
        self.norm = norm
        self.loss = loss
        self.relative = relative
        self.fit_intercept = fit_intercept
        self.feature_scale = feature_scale
        self.huber_threshold = huber_threshold
        self.huber_relative = huber_relative
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "AdversarialRegressor":
        """Fit to X (n, d), dense or sparse, and y (n,); weights count samples."""
        X, y = checked(self, X, y, y_numeric=True)
        y = np.asarray(y, dtype=np.float64)
        weight = weights(sample_weight, len(y))
        loss = regression_loss(
            self.loss,
            self.huber_threshold,
            self.huber_relative,
            y,
            weight,
            intercept=bool(self.fit_intercept),
        )
        self._fitted(X, y, weight, loss)
        return self

    def _fitted(
        self, X: Any, y: Array, weight: Array, loss: _losses.Loss, *, quiet: bool = False
    ) -> list[Solution]:
        """Fit to what has been checked, and return the solution."""
        problem = self._problem(X, y, weight, loss, weight > 0)
        (solution,) = found = self._told([problem], quiet=quiet)
        self.coef_, self.intercept_ = solution.coef, solution.intercept
        self.objective_, self.dual_gap_ = solution.objective, solution.gap
        self.eps_, self.eps_max_ = solution.eps, solution.eps_max
        self.n_iter_ = solution.steps
        if isinstance(loss, _losses.Huber):
            self.huber_threshold_ = loss.knee
        elif hasattr(self, "huber_threshold_"):
            del self.huber_threshold_
        return found

    def predict(self, X: Any) -> Array:
        """Return wᵀx + b, (n,)."""
        check_is_fitted(self)
        return scores(self, X, self.coef_) + self.intercept_


class AdversarialClassifier(ClassifierMixin, _Adversarial):
    r"""min over (w, b) of the mean of max over ‖δ/D‖_p ≤ ε of ℓ(y(wᵀ(x + δ) + b)), y = ±1.

    The inner maximum is ℓ(y(wᵀx + b) − ε‖D·w‖_q): each sample loses the margin that the attack
    can take. Two classes are solved exactly. With K > 2 classes one model a class is trained
    against the rest, each exactly; the sum of their worst-case losses, ``objective_``, is an
    *upper bound* of the worst case of their sum, because one δ need not be worst for all K.

    Parameters
    ----------
    loss : ℓ(m): ``"logistic"`` log(1 + e^−m), ``"hinge"`` max(0, 1 − m), or
        ``"squared_hinge"``.
    eps, norm, relative, fit_intercept, feature_scale, tol, max_iter : as for
        `AdversarialRegressor`; with ``relative`` each of the K models has its own eps_max.

    Attributes
    ----------
    classes_ : (K,).
    coef_ : (1, d) or (K, d); intercept_ : (1,) or (K,).
    objective_, dual_gap_ : as for `AdversarialRegressor`, summed over the K models.
    eps_ : the ε that was used; (K,), one a model, if ``relative`` and K > 2, because each has its
        own eps_max. eps_max_ : the largest of the models (for the hinge an upper bound).
    n_iter_ : the largest number of Newton steps.

    Raises
    ------
    ValueError as for `AdversarialRegressor`. Where the classes are separable at ε no minimum is
    attained; a `ConvergenceWarning` says so, one for all K models.

    Notes
    -----
    All of X is held in this process, once a model, as for the losses other than the squared one of
    `AdversarialRegressor`: dask and torch data are copied to host memory.

    Examples
    --------
    >>> from sklearn.datasets import load_breast_cancer
    >>> X, y = load_breast_cancer(return_X_y=True)
    >>> X = (X - X.mean(0)) / X.std(0)
    >>> model = AdversarialClassifier(eps=0.1, norm="inf").fit(X, y)
    >>> float(round(model.score(X, y), 2))
    0.98
    """

    def __init__(
        self,
        eps: float = 0.1,
        *,
        norm: Any = 2,
        loss: str = "logistic",
        relative: bool = False,
        fit_intercept: bool = True,
        feature_scale: Any = None,
        tol: float = 1e-8,
        max_iter: int = 100,
    ) -> None:
        self.eps = eps
        self.norm = norm
        self.loss = loss
        self.relative = relative
        self.fit_intercept = fit_intercept
        self.feature_scale = feature_scale
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "AdversarialClassifier":
        """Fit to X (n, d), dense or sparse, and labels y (n,); weights count samples."""
        X, y = checked(self, X, y)
        check_classification_targets(y)
        weight = weights(sample_weight, len(y))
        loss = _losses.get(self.loss)
        if not loss.classifies:
            raise InputError(f"the {self.loss} loss is for AdversarialRegressor")
        self._fitted(X, y, weight, loss)
        return self

    def _fitted(
        self,
        X: Any,
        y: NDArray[Any],
        weight: Array,
        loss: _losses.Loss,
        *,
        quiet: bool = False,
    ) -> list[Solution]:
        """Fit to what has been checked, and return the solutions."""
        self.classes_, signs = signs_of(y, weight)
        found = self._told(
            (self._problem(X, one, weight, loss, weight > 0) for one in signs), quiet=quiet
        )
        self.coef_ = np.stack([one.coef for one in found])
        self.intercept_ = np.array([one.intercept for one in found])
        self.objective_ = sum(one.objective for one in found)
        self.dual_gap_ = sum(one.gap for one in found)
        budgets = np.array([one.eps for one in found])
        self.eps_ = budgets if self.relative and len(found) > 1 else float(budgets[0])
        self.eps_max_ = max(one.eps_max for one in found)
        self.n_iter_ = max(one.steps for one in found)
        return found

    def decision_function(self, X: Any) -> Array:
        """Return wᵀx + b, (n,) for two classes, (n, K) for more."""
        check_is_fitted(self)
        columns = np.stack([scores(self, X, w) for w in self.coef_], axis=1) + self.intercept_
        return columns[:, 0] if len(self.classes_) == 2 else columns

    def predict(self, X: Any) -> NDArray[Any]:
        """Return the class of the largest score, (n,)."""
        found = self.decision_function(X)
        index = (found > 0).astype(int) if found.ndim == 1 else found.argmax(1)
        return self.classes_[index]
