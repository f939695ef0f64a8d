"""What is known of scikit-learn's affine estimators and steps, as numbers: no torch.

An estimator of scikit-learn is known by its own class, not by a subclass, which may compute
something else.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustlearn.errors import InputError

Array = NDArray[np.float64]

LINEAR_CLASSIFIERS = {
    "LinearDiscriminantAnalysis",
    "LinearSVC",
    "LogisticRegression",
    "LogisticRegressionCV",
    "PassiveAggressiveClassifier",
    "Perceptron",
    "RidgeClassifier",
    "RidgeClassifierCV",
    "SGDClassifier",
}
LINEAR_REGRESSORS = {
    "ARDRegression",
    "BayesianRidge",
    "ElasticNet",
    "ElasticNetCV",
    "HuberRegressor",
    "Lars",
    "LarsCV",
    "Lasso",
    "LassoCV",
    "LassoLars",
    "LassoLarsCV",
    "LassoLarsIC",
    "LinearRegression",
    "LinearSVR",
    "OrthogonalMatchingPursuit",
    "OrthogonalMatchingPursuitCV",
    "PassiveAggressiveRegressor",
    "QuantileRegressor",
    "Ridge",
    "RidgeCV",
    "SGDRegressor",
    "TheilSenRegressor",
}
OURS = {
    "AdversarialClassifier",
    "AdversarialClassifierCV",
    "AdversarialRegressor",
    "AdversarialRegressorCV",
}


@dataclass(frozen=True)
class Scale:
    """(x − shift) / divisor + offset, feature by feature."""

    shift: Array
    divisor: Array
    offset: Array


@dataclass(frozen=True)
class Matrix:
    """weight·x + bias, weight (outputs, features)."""

    weight: Array
    bias: Array


@dataclass(frozen=True)
class Clip:
    """min(max(x, low), high)."""

    low: float
    high: float


Map = Scale | Matrix | Clip


def pieces(estimator: Any) -> list[Any]:
    """Return the steps of a pipeline of scikit-learn, or the estimator alone."""
    if known(estimator, {"Pipeline"}):
        return [step for _, step in estimator.steps]
    return [estimator]


def final_step(estimator: Any) -> Any:
    """Return what predicts, whatever kind of pipeline it is."""
    steps = getattr(estimator, "steps", None)
    return steps[-1][1] if isinstance(steps, list) else estimator


def known(estimator: Any, names: set[str]) -> bool:
    """Tell scikit-learn's own class of that name, and ours."""
    kind = type(estimator)
    home = "robustlearn" if kind.__name__ in OURS else "sklearn"
    return kind.__name__ in names and kind.__module__.split(".")[0] == home


def affine(estimator: Any) -> Matrix:
    """Compose a fitted linear estimator, or a pipeline of affine steps before one.

    decision_function(x), or predict(x) of a regressor, is weight·x + bias.

    Raises
    ------
    InputError naming what is not known to be affine.
    """
    *steps, last = pieces(estimator)
    whole = predictor(last)
    if whole is None:
        raise InputError(f"{type(last).__name__} is not known to be a linear model")
    weight, bias = whole.weight, whole.bias
    for step in reversed(steps):
        maps = transformer(step)
        if maps is None or any(isinstance(piece, Clip) for piece in maps):
            raise InputError(f"{type(step).__name__} is not known to be an affine step")
        for piece in reversed(maps):
            if isinstance(piece, Scale):
                bias = bias + weight @ (piece.offset - piece.shift / piece.divisor)
                weight = weight / piece.divisor
            elif isinstance(piece, Matrix):
                bias, weight = bias + weight @ piece.bias, weight @ piece.weight
    return Matrix(weight, bias)


def predictor(estimator: Any) -> Matrix | None:
    """Return the weights of a linear estimator that is known."""
    if isinstance(getattr(estimator, "classes_", None), list):
        raise InputError("estimators with several outputs at once are not supported")
    if not known(estimator, LINEAR_CLASSIFIERS | LINEAR_REGRESSORS | OURS):
        return None
    weight = np.atleast_2d(_dense(estimator.coef_))
    count = max(1, len(weight)) if hasattr(estimator, "classes_") else 1
    if len(weight) != count or (len(weight) == 1) != (outputs(estimator) == 1):
        raise InputError("estimators with several outputs at once are not supported")
    return _matrix(weight, estimator.intercept_)


def outputs(estimator: Any) -> int:
    """How many columns the decision function has by right."""
    classes = getattr(estimator, "classes_", None)
    return 1 if classes is None or len(classes) == 2 else len(classes)


def transformer(step: Any) -> list[Map] | None:
    """Return the maps of a fitted transformer that is affine (or a clipped affine one)."""
    if step is None or step == "passthrough":
        return []
    features = getattr(step, "n_features_in_", 0)
    if known(step, {"StandardScaler"}):
        return [_scale(features, step.mean_ if step.with_mean else None, step.scale_)]
    if known(step, {"RobustScaler"}):
        return [_scale(features, getattr(step, "center_", None), getattr(step, "scale_", None))]
    if known(step, {"MaxAbsScaler"}):
        clip: list[Map] = [Clip(-1.0, 1.0)] if getattr(step, "clip", False) else []
        return [_scale(features, None, step.scale_), *clip]
    if known(step, {"MinMaxScaler"}):
        clip = [Clip(*map(float, step.feature_range))] if step.clip else []
        return [_scale(features, None, 1 / step.scale_, step.min_), *clip]
    if known(step, {"PCA", "IncrementalPCA"}):
        return _principal_components(step)
    if known(step, {"TruncatedSVD", "GaussianRandomProjection", "SparseRandomProjection"}):
        return [_matrix(step.components_, 0.0)]
    if known(step, {"FastICA"}):
        return [_scale(features, getattr(step, "mean_", None)), _matrix(step.components_, 0.0)]
    if type(step).__module__.startswith("sklearn.feature_selection"):
        return [_matrix(np.eye(features)[step.get_support()], 0.0)]
    return None


def _principal_components(step: Any) -> list[Map]:
    maps: list[Map] = [_scale(step.n_features_in_, step.mean_), _matrix(step.components_, 0.0)]
    if not step.whiten:
        return maps
    spread = np.sqrt(step.explained_variance_)
    return [*maps, _scale(len(spread), None, np.maximum(spread, np.finfo(spread.dtype).eps))]


def _scale(features: int, shift: Any = None, divisor: Any = None, offset: Any = None) -> Scale:
    zero = np.zeros(features)
    return Scale(
        zero if shift is None else np.asarray(shift, dtype=np.float64),
        zero + 1 if divisor is None else np.asarray(divisor, dtype=np.float64),
        zero if offset is None else np.asarray(offset, dtype=np.float64),
    )


def _matrix(weight: Any, bias: Any) -> Matrix:
    weight = np.atleast_2d(_dense(weight))
    bias = np.broadcast_to(np.asarray(bias, dtype=np.float64).reshape(-1), len(weight))
    return Matrix(weight, bias.copy())


def _dense(values: Any) -> Array:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
