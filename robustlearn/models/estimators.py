"""scikit-learn estimators: exact differentiable twins of the affine ones, and black boxes."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlearn.errors import InputError
from robustlearn.models.base import Model
from robustlearn.models.network import Rows, Standardize, TorchModel

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
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "logistic": nn.Sigmoid,
}


class NoTwinError(Exception):
    """The estimator has no exact differentiable form here."""


class Clamp(nn.Module):
    """min(max(x, low), high)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Cut a batch."""
        return x.clamp(self.low, self.high)


def wrap_estimator(estimator: Any, **options: Any) -> Model:
    """Return an exact float64 twin where there is one, else a black box."""
    _check_fitted(estimator)
    try:
        twin = _twin(estimator)
    except NoTwinError:
        return EstimatorModel(estimator, **options)
    final = _final(estimator)
    classes = getattr(final, "classes_", None)
    options["task"] = "regression" if classes is None else "classification"
    # the layers give decision values and predictions, whatever they look like
    options["output"] = "logits"
    model = TorchModel(twin, source=estimator, classes=classes, **options)
    if not _agrees(model, estimator):
        black_box = EstimatorModel(estimator, **{**options, "output": "auto"})
        black_box.note(
            f"the differentiable form of {black_box.name} did not reproduce its outputs, so it "
            "is treated as a black box; please report this with the version of scikit-learn"
        )
        return black_box
    return model


class EstimatorModel(Model):
    """A fitted estimator asked for its scores: no gradient."""

    def __init__(self, estimator: Any, **options: Any) -> None:
        final = _final(estimator)
        classes = getattr(final, "classes_", None)
        kind = _estimator_type(estimator)
        if kind not in ("classifier", "regressor"):
            raise InputError(
                f"{type(estimator).__name__} is neither a classifier nor a regressor; wrap a "
                "function instead: wrap(lambda x: scores of shape (n, classes))"
            )
        options["task"] = "classification" if kind == "classifier" else "regression"
        if isinstance(classes, list):
            raise InputError("estimators with several outputs at once are not supported")
        if classes is not None and len(classes) < 2:
            raise InputError(f"{type(estimator).__name__} knows one class only: {classes[0]!r}")
        super().__init__(estimator, classes=classes, **options)
        names = ("decision_function", "predict_proba", "predict")
        methods = names if self.task == "classification" else ("predict",)
        self.method = next(name for name in methods if hasattr(estimator, name))
        if self._probabilities is None:
            self._probabilities = self.method == "predict_proba"

    def settle(self, x: Tensor, y: Tensor | None = None) -> None:
        """Ask for labels instead of scores where the two disagree on x."""
        if self.task == "regression" or self.method == "predict":
            return
        rows = x.detach().reshape(len(x), -1).cpu().double().numpy()
        predicted = np.asarray(self.source.predict(as_trained(self.source, rows)))
        scores = np.asarray(getattr(self.source, self.method)(as_trained(self.source, rows)))
        columns = 1 if self.num_classes == 2 and scores.ndim == 1 else self.num_classes
        if scores.reshape(len(x), -1).shape[1] == columns:
            best = scores > 0 if columns == 1 else scores.argmax(1)
            if (np.asarray(self.classes)[np.asarray(best, int)] == predicted).all():
                return
        self.note(
            f"{self.name} predicts other classes than its {self.method} ranks first: its "
            "predicted labels are used, and attacks have no scores to follow"
        )
        self.method, self._probabilities = "predict", False

    def _forward(self, x: Tensor) -> Any:
        rows = x.detach().reshape(len(x), -1).cpu().double().numpy()
        output = np.asarray(getattr(self.source, self.method)(as_trained(self.source, rows)))
        if self.method == "predict" and self.task == "classification":
            output = (output.reshape(-1, 1) == np.asarray(self.classes)).astype(float)
        return torch.as_tensor(output.astype(float), device=x.device)


def as_trained(estimator: Any, rows: np.ndarray) -> Any:
    """Give the rows the column names that the estimator was fitted with, if any."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return rows
    import pandas

    return pandas.DataFrame(rows, columns=names)


def _estimator_type(estimator: Any) -> str | None:
    from sklearn.base import BaseEstimator, is_classifier, is_regressor

    if not isinstance(estimator, BaseEstimator):  # something with the same methods
        classifies = hasattr(estimator, "classes_") or hasattr(estimator, "predict_proba")
        return "classifier" if classifies else "regressor"
    if is_classifier(estimator):
        return "classifier"
    return "regressor" if is_regressor(estimator) else None


def _final(estimator: Any) -> Any:
    steps = getattr(estimator, "steps", None)
    return steps[-1][1] if isinstance(steps, list) else estimator


def _check_fitted(estimator: Any) -> None:
    from sklearn.base import BaseEstimator
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import check_is_fitted

    if not isinstance(estimator, BaseEstimator):
        return
    try:
        check_is_fitted(estimator)
    except NotFittedError as error:
        raise InputError(f"fit the {type(estimator).__name__} before wrapping it") from error


def _known(estimator: Any, names: set[str]) -> bool:
    """Tell scikit-learn's own class of that name: a subclass may compute something else."""
    kind = type(estimator)
    return kind.__name__ in names and kind.__module__.split(".")[0] == "sklearn"


def _twin(estimator: Any) -> nn.Sequential:
    steps = getattr(estimator, "steps", None)
    if _known(estimator, {"Pipeline"}) and steps is not None:
        before = [layer for _, step in steps[:-1] for layer in _transformer(step)]
        return nn.Sequential(Rows(), *before, *_predictor(steps[-1][1]))
    return nn.Sequential(Rows(), *_predictor(estimator))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """x ↦ weight·x + bias in float64."""
    weight = weight.toarray() if hasattr(weight, "toarray") else np.asarray(weight)
    weight = torch.as_tensor(np.atleast_2d(weight), dtype=torch.float64)
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), dtype=torch.float64)
    bias = np.broadcast_to(np.asarray(bias, dtype=float).reshape(-1), len(weight))
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(torch.from_numpy(bias.copy()))
    return layer


def _predictor(estimator: Any) -> list[nn.Module]:
    if isinstance(getattr(estimator, "classes_", None), list):
        raise InputError("estimators with several outputs at once are not supported")
    if _known(estimator, LINEAR_CLASSIFIERS | LINEAR_REGRESSORS):
        weight = np.atleast_2d(estimator.coef_)
        rows = 1 if _known(estimator, LINEAR_REGRESSORS) else max(1, len(weight))
        if len(weight) != rows or (len(weight) == 1) != (_outputs(estimator) == 1):
            raise InputError("estimators with several outputs at once are not supported")
        return [_linear(estimator.coef_, estimator.intercept_)]
    if _known(estimator, {"MLPClassifier", "MLPRegressor"}):
        return _perceptron(estimator)
    raise NoTwinError


def _outputs(estimator: Any) -> int:
    """How many columns the decision function has by right."""
    classes = getattr(estimator, "classes_", None)
    return 1 if classes is None or len(classes) == 2 else len(classes)


def _perceptron(estimator: Any) -> list[nn.Module]:
    if estimator.n_outputs_ != _outputs(estimator):
        raise InputError("estimators with several outputs at once are not supported")
    if estimator.out_activation_ not in ("identity", "logistic", "softmax"):
        raise NoTwinError
    layers: list[nn.Module] = []
    for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
        layers += [_linear(weight.T, bias), ACTIVATIONS[estimator.activation]()]
    return layers[:-1]  # the output activation keeps the order: decision values come before it


def _transformer(step: Any) -> list[nn.Module]:
    """Return the layers of a fitted transformer that is affine (or a clipped affine one)."""
    if step is None or step == "passthrough":
        return []
    if _known(step, {"StandardScaler"}):
        shift = step.mean_ if step.with_mean else None
        return [_standardize(step.n_features_in_, shift=shift, divisor=step.scale_)]
    if _known(step, {"RobustScaler"}):
        center, scale = getattr(step, "center_", None), getattr(step, "scale_", None)
        return [_standardize(step.n_features_in_, shift=center, divisor=scale)]
    if _known(step, {"MaxAbsScaler"}):
        clamp = [Clamp(-1.0, 1.0)] if getattr(step, "clip", False) else []
        return [_standardize(step.n_features_in_, divisor=step.scale_), *clamp]
    if _known(step, {"MinMaxScaler"}):
        clamp = [Clamp(*map(float, step.feature_range))] if step.clip else []
        scale = _standardize(step.n_features_in_, divisor=1 / step.scale_, offset=step.min_)
        return [scale, *clamp]
    if _known(step, {"PCA", "IncrementalPCA"}):
        return _principal_components(step)
    if _known(step, {"TruncatedSVD", "GaussianRandomProjection", "SparseRandomProjection"}):
        return [_linear(step.components_, 0.0)]
    if _known(step, {"FastICA"}):
        center = _standardize(step.n_features_in_, shift=getattr(step, "mean_", None))
        return [center, _linear(step.components_, 0.0)]
    if type(step).__module__.startswith("sklearn.feature_selection"):
        return [_linear(np.eye(step.n_features_in_)[step.get_support()], 0.0)]
    raise NoTwinError


def _standardize(
    features: int, *, shift: Any = None, divisor: Any = None, offset: Any = None
) -> Standardize:
    return Standardize(
        np.zeros(features) if shift is None else shift,
        np.ones(features) if divisor is None else divisor,
        np.zeros(features) if offset is None else offset,
    )


def _principal_components(step: Any) -> list[nn.Module]:
    center = _standardize(step.n_features_in_, shift=step.mean_)
    rotate = _linear(step.components_, 0.0)
    if not step.whiten:
        return [center, rotate]
    spread = np.sqrt(step.explained_variance_)
    spread = np.maximum(spread, np.finfo(spread.dtype).eps)
    return [center, rotate, _standardize(len(spread), divisor=spread)]


def _agrees(model: TorchModel, estimator: Any) -> bool:
    """Compare the twin with the estimator on a few random rows."""
    features = getattr(estimator, "n_features_in_", None)
    if features is None:
        features = _final(estimator).n_features_in_
    rows = np.random.default_rng(0).standard_normal((16, int(features)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = model(torch.from_numpy(rows)).numpy()
        rows = as_trained(estimator, rows)
        if model.task == "regression":
            return _same(output, estimator.predict(rows))
        if hasattr(estimator, "decision_function"):
            expected = np.asarray(estimator.decision_function(rows))
            return _same(output[:, 1] if expected.ndim == 1 else output, expected)
        expected = estimator.predict_proba(rows)
        return _same(torch.from_numpy(output).softmax(1).numpy(), expected)


def _same(output: np.ndarray, expected: np.ndarray) -> bool:
    expected = np.asarray(expected).reshape(output.shape)
    return bool(np.allclose(output, expected, rtol=1e-8, atol=1e-8 * (1 + np.abs(expected).max())))
