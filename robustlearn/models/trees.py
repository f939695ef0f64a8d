"""Ensembles of trees as boxes: every leaf is an axis-parallel box with one number per output."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustlearn.errors import InputError

Array = NDArray[np.float64]
Grown = tuple[NDArray[Any], NDArray[Any], NDArray[Any], Array, Array]
LINKED = {  # objectives of regressors that predict another number than the sum of their leaves
    *("count:poisson", "reg:gamma", "reg:tweedie", "reg:logistic"),
    *("poisson", "gamma", "tweedie", "cross_entropy"),
}
CHUNK = 2**22  # numbers in a working array


@dataclass(frozen=True, eq=False)
class Trees:
    """F(x) = (base + Σ_t value[the leaf of tree t that holds x]) / divisor, x in float64.

    A leaf holds x where low ≤ x[feature] ≤ high in each of its K places. Whatever the library
    compares, by ``<`` or ``≤`` and in float32 or float64, the bounds are the first and the last
    float64 that it lets through, so that the boxes of a tree part the finite numbers exactly.

    Attributes
    ----------
    tree : (M,) number of the tree of each leaf, ascending from 0.
    feature, low, high : (M, K); places that are not used hold (0, −∞, ∞).
    value : (M, C); base : (C,). C is 1 for regressors and for two classes with one score.
    divisor : number of trees where the library takes a mean, else 1.
    dtype : in which the library adds the values up, in the order of the trees.
    """

    tree: NDArray[np.int64]
    feature: NDArray[np.int64]
    low: Array
    high: Array
    value: Array
    base: Array
    divisor: float
    dtype: Any

    def holds(self, x: Array) -> NDArray[np.bool_]:
        """Tell which leaves hold each point, (n, d) -> (n, M), one in every tree."""
        step = max(1, CHUNK // self.feature.size)
        parts = []
        for start in range(0, len(x), step):
            point = x[start : start + step][:, self.feature]
            parts.append(((self.low <= point) & (point <= self.high)).all(2))
        return np.concatenate(parts)

    def scores(self, x: Array) -> Array:
        """F(x), (n, d) -> (n, C), rounded after every tree as the library does."""
        leaf = self.holds(x).nonzero()[1]
        value = self.value.astype(self.dtype)[leaf].reshape(len(x), -1, self.value.shape[1])
        total = np.repeat(self.base.astype(self.dtype)[None], len(x), 0)
        for number in range(value.shape[1]):
            total = total + value[:, number]
        return (total / self.dtype(self.divisor)).astype(np.float64)

    @property
    def slack(self) -> float:
        """Bound on how far two ways to add up a score are apart: in ``dtype``, and in float64.

        T·u·Σ_t max|value|, and base, for each of the two; u is half the distance of 1 to the
        next number. Source: Higham (2002), section 4.2.
        """
        starts = np.flatnonzero(np.diff(self.tree, prepend=-1))
        largest = np.maximum.reduceat(np.abs(self.value), starts).sum(0) + np.abs(self.base)
        if len(starts) == 1 and not self.base.any():
            return 0.0
        units = (np.finfo(self.dtype).eps + np.finfo(np.float64).eps) / 2
        return float(largest.max() / self.divisor * units * (len(starts) + 4))

    def probes(self, n: int, d: int) -> Array:
        """Return points (n, d) on the cuts themselves, where ``<`` and ``≤`` part."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((n, d))
        for feature in np.unique(self.feature):
            used = self.feature == feature
            ends = np.r_[self.low[used], self.high[used]]
            ends = ends[np.isfinite(ends)]
            if len(ends):
                x[:, feature] = rng.choice(ends, n)
        return x


def read(estimator: Any) -> Trees | None:
    """Return the trees of a fitted estimator of a kind that is known, None for another.

    Known are scikit-learn's decision trees, random forests, extra trees and both kinds of
    gradient boosting, and the estimators of XGBoost and LightGBM; not their categorical
    splits, linear leaves, dropped trees, numbers that stand for a missing value, and regressors
    that predict a function of their sum (Poisson, gamma, Tweedie, logistic).

    Raises
    ------
    InputError for estimators of XGBoost that cannot predict (``missing=None``), or whose labels
    are not those of their scores (``binary:logitraw``).
    """
    home, name = type(estimator).__module__.split(".")[0], type(estimator).__name__
    reader = READERS.get((home, name))
    if reader is None or not getattr(estimator, "n_features_in_", 0):
        return None
    return reader(estimator)


# ---------------------------------------------------------------------- cuts and boxes


def float32_cut(last: NDArray[Any]) -> Array:
    """Return the last float64 that rounds to a float32 of at most ``last``.

    Rounding is to nearest, ties to even: the midpoint of ``last`` and its successor, or the
    number before that.
    """
    last = np.asarray(last, np.float32)
    with np.errstate(over="ignore"):  # the successor of the largest number is infinite
        after = np.nextafter(last, np.float32(np.inf))
        middle = last / np.float64(2) + after / np.float64(2)
        return np.where(middle.astype(np.float32) <= last, middle, np.nextafter(middle, -np.inf))


def _at_most(threshold: NDArray[Any]) -> Array:
    """Return the cut of float32(x) ≤ threshold, a threshold in float64."""
    near = threshold.astype(np.float32)
    return float32_cut(np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near))


def _below(threshold: NDArray[Any]) -> Array:
    """Return the cut of float32(x) < threshold, a threshold in float32."""
    return float32_cut(np.nextafter(threshold.astype(np.float32), np.float32(-np.inf)))


def _leaves(grown: Grown) -> Iterator[tuple[dict[int, tuple[float, float]], Array]]:
    """Yield the box and the value of each leaf; x[feature] ≤ cut goes to the left."""
    left, right, feature, cut, value = grown
    stack: list[tuple[int, dict[int, tuple[float, float]]]] = [(0, {})]
    while stack:
        node, box = stack.pop()
        if left[node] < 0:
            yield box, value[node]
            continue
        column, last = int(feature[node]), float(cut[node])
        low, high = box.get(column, (-np.inf, np.inf))
        after = float(np.nextafter(last, np.inf))
        stack.append((int(right[node]), {**box, column: (max(low, after), high)}))
        stack.append((int(left[node]), {**box, column: (low, min(high, last))}))


def _ensemble(
    trees: list[Grown], base: Any, *, divisor: float = 1.0, dtype: Any = np.float64
) -> Trees:
    grown = [(t, box, value) for t, tree in enumerate(trees) for box, value in _leaves(tree)]
    places = max(1, max(len(box) for _, box, _ in grown))
    shape = (len(grown), places)
    feature = np.zeros(shape, np.int64)
    low, high = np.full(shape, -np.inf), np.full(shape, np.inf)
    for row, (_, box, _) in enumerate(grown):
        for place, (column, ends) in enumerate(box.items()):
            feature[row, place] = column
            low[row, place], high[row, place] = ends
    return Trees(
        np.array([t for t, _, _ in grown]),
        feature,
        low,
        high,
        np.array([value for _, _, value in grown], np.float64),
        np.atleast_1d(np.asarray(base, np.float64)).reshape(-1),
        divisor,
        dtype,
    )


def _column(values: Any, column: int, columns: int) -> Array:
    """Return (nodes, columns) with the values in one column: a tree that serves one class."""
    wide = np.zeros((len(values), columns))
    wide[:, column] = values
    return wide


# ---------------------------------------------------------------------- scikit-learn


def _nodes(tree: Any, value: Array) -> Grown:
    return (
        tree.children_left,
        tree.children_right,
        tree.feature,
        _at_most(tree.threshold),
        value,
    )


def _single(estimator: Any) -> Trees | None:
    tree = estimator.tree_
    if tree.n_outputs != 1:
        return None
    value = tree.value[:, 0, :]
    return _ensemble([_nodes(tree, value)], np.zeros(value.shape[1]))


def _forest(estimator: Any) -> Trees | None:
    trees = [member.tree_ for member in estimator.estimators_]
    if trees[0].n_outputs != 1:
        return None
    grown = [_nodes(tree, tree.value[:, 0, :]) for tree in trees]
    return _ensemble(grown, np.zeros(grown[0][4].shape[1]), divisor=float(len(trees)))


def _boosted(estimator: Any) -> Trees | None:
    start = estimator.init_
    if start != "zero" and type(start).__name__ not in ("DummyClassifier", "DummyRegressor"):
        return None
    base = estimator._raw_predict_init(np.zeros((1, estimator.n_features_in_), np.float32))[0]
    columns, rate = estimator.estimators_.shape[1], estimator.learning_rate
    grown = [
        _nodes(member.tree_, _column(rate * member.tree_.value[:, 0, 0], k, columns))
        for stage in estimator.estimators_
        for k, member in enumerate(stage)
    ]
    return _ensemble(grown, base)


def _histogram(estimator: Any) -> Trees | None:
    stages = [[p.nodes for p in stage] for stage in estimator._predictors]
    if estimator._preprocessor is not None or any(
        nodes["is_categorical"].any() for stage in stages for nodes in stage
    ):
        return None
    if getattr(estimator, "loss", "") in ("poisson", "gamma"):
        return None
    base = np.ravel(estimator._baseline_prediction)
    grown: list[Grown] = [
        (
            np.where(nodes["is_leaf"], -1, nodes["left"].astype(np.int64)),
            nodes["right"].astype(np.int64),
            nodes["feature_idx"],
            nodes["num_threshold"],
            _column(nodes["value"], k, len(base)),
        )
        for stage in stages
        for k, nodes in enumerate(stage)
    ]
    return _ensemble(grown, base)


# ---------------------------------------------------------------------- XGBoost and LightGBM


def _xgboost(estimator: Any) -> Trees | None:
    if estimator.missing is None:
        raise InputError(
            f"{type(estimator).__name__} has missing=None, with which XGBoost does not predict: "
            "say set_params(missing=numpy.nan)"
        )
    booster = estimator.get_booster()
    learner = json.loads(bytes(booster.save_raw("json")))["learner"]
    model, objective = learner["gradient_booster"], learner["objective"]["name"]
    if objective == "binary:logitraw":
        raise InputError(
            "XGBoost compares the raw scores of binary:logitraw with 0.5 as if they were "
            "probabilities: fit with binary:logistic, or wrap the labels, "
            "wrap(estimator.predict, num_classes=2)"
        )
    linked = objective in LINKED and not hasattr(estimator, "classes_")
    if model["name"] != "gbtree" or not np.isnan(estimator.missing) or linked:
        return None
    trees, column = model["model"]["trees"], model["model"]["tree_info"]
    if any(any(t["split_type"]) or t["tree_param"]["size_leaf_vector"] != "1" for t in trees):
        return None
    best = booster.attr("best_iteration")
    if best is not None:
        trees = trees[: model["model"]["iteration_indptr"][int(best) + 1]]
    columns = max(1, int(learner["learner_model_param"]["num_class"]))
    grown = []
    for tree, k in zip(trees, column, strict=False):
        condition = np.array(tree["split_conditions"], np.float32)
        left, right = np.array(tree["left_children"]), np.array(tree["right_children"])
        feature, value = np.array(tree["split_indices"]), _column(condition, k, columns)
        grown.append((left, right, feature, _below(condition), value))
    start = np.atleast_1d(json.loads(learner["learner_model_param"]["base_score"]))
    base = np.broadcast_to(start.astype(np.float32), (columns,))
    if objective.endswith("logistic"):
        odds = np.float32(1) / base - np.float32(1)
        base = -np.log(odds.astype(np.float64)).astype(np.float32)  # rounded once, as logf does
    return _ensemble(grown, base, dtype=np.float32)


def _lightgbm(estimator: Any) -> Trees | None:
    if str(estimator.objective_) in LINKED:
        return None
    model = estimator.booster_.dump_model()
    columns = model["num_tree_per_iteration"]
    grown = []
    for number, tree in enumerate(model["tree_info"]):
        nodes = list(_unrolled(tree["tree_structure"]))
        if tree["num_cat"] or any(map(_is_odd, nodes)):
            return None
        place = {id(node): row for row, node in enumerate(nodes)}

        def children(side: str, nodes: Any = nodes, place: Any = place) -> NDArray[Any]:
            return np.array([place[id(n[side])] if side in n else -1 for n in nodes])

        def numbers(name: str, nodes: Any = nodes) -> NDArray[Any]:
            return np.array([n.get(name, 0) for n in nodes])

        value = _column(numbers("leaf_value"), number % columns, columns)
        cut = numbers("threshold").astype(np.float64)
        left, right = children("left_child"), children("right_child")
        grown.append((left, right, numbers("split_feature"), cut, value))
    averaged = model["average_output"] and not hasattr(estimator, "classes_")  # raw scores are sums
    divisor = len(grown) / columns if averaged else 1.0
    return _ensemble(grown, np.zeros(columns), divisor=divisor)


def _is_odd(node: dict[str, Any]) -> bool:
    """Tell linear leaves, and cuts that take zero for a missing value."""
    return "leaf_coeff" in node or node.get("missing_type") == "Zero"


def _unrolled(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for side in ("left_child", "right_child"):
        if side in node:
            yield from _unrolled(node[side])


def _kinds(home: str, reader: Callable[[Any], Trees | None], *names: str) -> Any:
    return {(home, name + task): reader for name in names for task in ("Classifier", "Regressor")}


READERS: dict[tuple[str, str], Callable[[Any], Trees | None]] = {
    **_kinds("sklearn", _single, "DecisionTree", "ExtraTree"),
    **_kinds("sklearn", _forest, "RandomForest", "ExtraTrees"),
    **_kinds("sklearn", _boosted, "GradientBoosting"),
    **_kinds("sklearn", _histogram, "HistGradientBoosting"),
    **_kinds("xgboost", _xgboost, "XGB", "XGBRF"),
    **_kinds("lightgbm", _lightgbm, "LGBM"),
}
