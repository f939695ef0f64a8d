"""Estimators: exact differentiable twins of the affine ones, trees that are known, black boxes."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustlearn import _affine
from robustlearn._affine import final_step, known, pieces
from robustlearn.errors import InputError
from robustlearn.models.base import Model
from robustlearn.models.network import Rows, Standardize, TorchModel
from robustlearn.models.trees import Trees, read

PERCEPTRONS = {"MLPClassifier", "MLPRegressor"}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "logistic": nn.Sigmoid,
}


class Clamp(nn.Module):
    """min(max(x, low), high)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Cut a batch."""
        return x.clamp(self.low, self.high)


def wrap_estimator(estimator: Any, **options: Any) -> Model:
    """Return an exact float64 twin where there is one, else a black box, of known trees or not."""
    _check_fitted(estimator)
    twin = _twin(estimator)
    if twin is None:
        trees = read(estimator)
        if trees is None:
            return EstimatorModel(estimator, **options)
        grown = TreeModel(estimator, trees)
        if grown.agrees():
            return grown
        plain = EstimatorModel(estimator, **options)
        plain.note(
            f"the leaves of {plain.name} did not reproduce its outputs, so it is treated as a "
            "black box; please report this with the version of its library"
        )
        return plain
    final = final_step(estimator)
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
        final = final_step(estimator)
        classes = getattr(final, "classes_", None)
        kind = _estimator_type(estimator)
        if kind == "outlier_detector":
            kind, classes, options["output"] = "classifier", np.array([-1, 1]), "logits"
        if kind not in ("classifier", "regressor"):
            raise InputError(
                f"{type(estimator).__name__} neither classifies nor predicts nor detects; wrap a "
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
        scores = self.scores(rows)
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

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Ask the estimator, (n, d) -> (n,) or (n, K)."""
        return np.asarray(getattr(self.source, self.method)(as_trained(self.source, rows)))

    def _forward(self, x: Tensor) -> Any:
        rows = x.detach().reshape(len(x), -1).cpu().double().numpy()
        output = self.scores(rows)
        if self.method == "predict" and self.task == "classification":
            output = (output.reshape(-1, 1) == np.asarray(self.classes)).astype(float)
        return torch.as_tensor(output.astype(float), device=x.device)


class TreeModel(EstimatorModel):
    """An ensemble of trees whose leaves are known: its outputs are the sums of their values.

    Logits are decision values before any link: the mean class probabilities of a forest, the
    raw scores of boosting. They come from the library itself; `trees` says what they add up to.
    """

    def __init__(self, estimator: Any, trees: Trees) -> None:
        super().__init__(estimator, output="logits")
        self._trees = trees

    @property
    def trees(self) -> Trees | None:
        """The leaves; None where labels are asked for instead of scores (see `settle`)."""
        labels = self.task == "classification" and self.method == "predict"
        return None if labels else self._trees

    def scores(self, rows: np.ndarray) -> np.ndarray:
        """Ask for raw scores, by the word that the library has for them."""
        raw = {"xgboost": {"output_margin": True}, "lightgbm": {"raw_score": True}}
        words = raw.get(type(self.source).__module__.split(".")[0], {})
        if self.task == "regression" or self.method == "predict" or not words:
            return super().scores(rows)
        return np.asarray(self.source.predict(as_trained(self.source, rows), **words))

    def agrees(self) -> bool:
        """Tell whether the leaves give what the library does, on points that lie on the cuts."""
        rows = self._trees.probes(32, self.source.n_features_in_)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = self.scores(rows).reshape(len(rows), -1).astype(float)
        found = self._trees.scores(rows)
        near = found.shape == expected.shape and np.abs(found - expected) <= self._trees.slack
        return bool(np.all(near))


def as_trained(estimator: Any, rows: np.ndarray) -> Any:
    """Give the rows the column names that the estimator was fitted with, if any."""
    names = getattr(estimator, "feature_names_in_", None)
    if names is None:
        return rows
    import pandas

    return pandas.DataFrame(rows, columns=names)


def detects(source: Any) -> bool:
    """Tell whether a wrapped object is a detector of anomalies as scikit-learn knows them."""
    return hasattr(source, "fit") and _estimator_type(source) == "outlier_detector"


def _estimator_type(estimator: Any) -> str | None:
    from sklearn.base import BaseEstimator, is_classifier, is_outlier_detector, is_regressor

    if not isinstance(estimator, BaseEstimator):  # something with the same methods
        classifies = hasattr(estimator, "classes_") or hasattr(estimator, "predict_proba")
        return "classifier" if classifies else "regressor"
    if is_classifier(estimator):
        return "classifier"
    if is_outlier_detector(estimator):
        return "outlier_detector"
    return "regressor" if is_regressor(estimator) else None


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


def _twin(estimator: Any) -> nn.Sequential | None:
    """Return the layers of an estimator that is known, None for another."""
    steps = pieces(estimator)
    before = [_affine.transformer(step) for step in steps[:-1]]
    if known(steps[-1], PERCEPTRONS):
        last = _perceptron(steps[-1])
    else:
        weight = _affine.predictor(steps[-1])
        last = None if weight is None else [_layer(weight)]
    if last is None or None in before:
        return None
    maps = [piece for step in before for piece in step or ()]
    return nn.Sequential(Rows(), *map(_layer, maps), *last)


def _layer(piece: _affine.Map) -> nn.Module:
    if isinstance(piece, _affine.Scale):
        return Standardize(piece.shift, piece.divisor, piece.offset)
    if isinstance(piece, _affine.Clip):
        return Clamp(piece.low, piece.high)
    return _linear(piece.weight, piece.bias)


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """x ↦ weight·x + bias in float64."""
    weight, bias = (torch.as_tensor(part, dtype=torch.float64) for part in (weight, bias))
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight), dtype=torch.float64)
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    return layer


def _perceptron(estimator: Any) -> list[nn.Module] | None:
    if estimator.n_outputs_ != _affine.outputs(estimator):
        raise InputError("estimators with several outputs at once are not supported")
    if estimator.out_activation_ not in ("identity", "logistic", "softmax"):
        return None
    layers: list[nn.Module] = []
    for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
        layers += [_linear(weight.T, bias), ACTIVATIONS[estimator.activation]()]
    return layers[:-1]  # the output activation keeps the order: decision values come before it


def _agrees(model: TorchModel, estimator: Any) -> bool:
    """Compare the twin with the estimator on a few random rows."""
    features = getattr(estimator, "n_features_in_", None)
    if features is None:
        features = final_step(estimator).n_features_in_
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
