"""The estimators of worst-case training: scikit-learn's contract, invariances, errors."""

import copy
import itertools
import linecache
import math
import pickle
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from robustlearn.linear import (
    AdversarialClassifier,
    AdversarialClassifierCV,
    AdversarialRegressor,
    AdversarialRegressorCV,
    eps_max,
    worst_case_loss,
)

NORMS = [1, 2, math.inf]
REGRESSION = ["squared", "absolute", "huber"]
CLASSIFICATION = ["logistic", "hinge", "squared_hinge"]
LOSSES = REGRESSION + CLASSIFICATION


def data(loss, n=40, d=6, seed=0):
    """Samples; for classes two that contradict each other, so that no budget separates them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    y = x @ rng.standard_normal(d) / np.sqrt(d) + 1.5 * rng.standard_normal(n) + 0.3
    if loss in CLASSIFICATION:
        y = np.where(y > 0, 1.0, -1.0)
        x[1], y[1] = x[0], -y[0]
    return x, y


def made(loss, **options):
    """An estimator for a loss."""
    kind = AdversarialClassifier if loss in CLASSIFICATION else AdversarialRegressor
    return kind(loss=loss, **options)


def scores(model, x):
    """The predictions before they are labels."""
    return model.decision_function(x) if hasattr(model, "classes_") else model.predict(x)


def worst(model, x, y, weight=None):
    """The mean worst-case loss of a fitted model, from the closed form."""
    return np.average(
        worst_case_loss(
            np.ravel(model.coef_),
            np.ravel(model.intercept_)[0],
            x,
            y,
            model.eps_,
            model.norm,
            model.loss,
            feature_scale=model.feature_scale,
        ),
        weights=weight,
    )


@parametrize_with_checks(
    [
        AdversarialRegressor(),
        AdversarialRegressor(loss="huber"),
        AdversarialRegressor(norm=math.inf),
        AdversarialClassifier(),
        AdversarialClassifier(loss="hinge", norm=1),
        AdversarialRegressorCV(n_eps=3),
        AdversarialClassifierCV(n_eps=3),
    ]
)
def test_the_contract_of_scikit_learn(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # some of its data are separable
        check(estimator)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_objective_is_the_mean_worst_case_loss(loss, norm):
    x, y = data(loss)
    weight = np.random.default_rng(1).uniform(0.2, 3, len(y))
    for scale in (None, [0.5, 1.0, 2.0, 1.0, 3.0, 0.7]):
        model = made(loss, eps=0.3, relative=True, norm=norm, feature_scale=scale)
        assert model.fit(x, y) is model
        assert model.objective_ == pytest.approx(worst(model, x, y), rel=1e-9)
        assert 0 <= model.dual_gap_ <= 1e-8 * model.objective_
        model.fit(x, y, sample_weight=weight)
        assert model.objective_ == pytest.approx(worst(model, x, y, weight), rel=1e-9)
        assert model.eps_ == pytest.approx(0.3 * model.eps_max_, rel=1e-12)
        rng = np.random.default_rng(2)
        for size in (1e-4, 1e-2, 1.0):  # no neighbour is better
            other = copy.deepcopy(model)
            other.coef_ = model.coef_ + size * rng.standard_normal(model.coef_.shape)
            other.intercept_ = model.intercept_ + size * rng.standard_normal()
            assert worst(other, x, y, weight) >= model.objective_ - model.dual_gap_ - 1e-12


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_weights_count_samples(loss, norm):
    x, y = data(loss)
    count = np.random.default_rng(3).integers(0, 4, len(y))
    count[:2] = 1
    options = {"eps": 0.3, "relative": True, "norm": norm, "tol": 1e-10}
    weighted = made(loss, **options).fit(x, y, sample_weight=count)
    repeated = made(loss, **options).fit(x.repeat(count, axis=0), y.repeat(count))
    dropped = made(loss, **options).fit(x[count > 0], y[count > 0], count[count > 0] * 7.0)
    for other in (repeated, dropped):
        assert other.objective_ == pytest.approx(weighted.objective_, rel=1e-8)
        assert other.eps_max_ == pytest.approx(weighted.eps_max_, rel=1e-9)
        np.testing.assert_allclose(scores(other, x), scores(weighted, x), rtol=1e-6, atol=1e-6)
    plain, ones = made(loss, **options).fit(x, y), made(loss, **options).fit(x, y, 1.0)
    np.testing.assert_array_equal(plain.coef_, ones.coef_)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_other_units_of_x_and_eps_change_nothing(factor, loss, norm):
    x, y = data(loss)
    base = made(loss, eps=0.1, norm=norm, tol=1e-10).fit(x, y)
    other = made(loss, eps=0.1 * factor, norm=norm, tol=1e-10).fit(factor * x, y)
    assert other.objective_ == pytest.approx(base.objective_, rel=1e-8)
    np.testing.assert_allclose(scores(other, factor * x), scores(base, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "absolute"])
def test_other_units_of_y_scale_the_predictions(loss):
    x, y = data(loss)
    base = made(loss, eps=0.1, tol=1e-10).fit(x, y)
    for factor in (1e-3, 1e3):
        other = made(loss, eps=0.1, tol=1e-10).fit(x, factor * y + 5)
        np.testing.assert_allclose(other.predict(x), factor * base.predict(x) + 5, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_units_of_features_are_columns_scaled(loss, norm):
    """Budget D for x is budget 1 for x/D."""
    x, y = data(loss)
    scale = np.array([0.5, 1.0, 2.0, 1.0, 3.0, 0.7])
    units = made(loss, eps=0.1, norm=norm, feature_scale=scale, tol=1e-10).fit(x, y)
    plain = made(loss, eps=0.1, norm=norm, tol=1e-10).fit(x / scale, y)
    assert units.objective_ == pytest.approx(plain.objective_, rel=1e-8)
    np.testing.assert_allclose(scores(units, x), scores(plain, x / scale), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_order_and_form_of_the_samples_do_not_matter(loss):
    x, y = data(loss)
    base = made(loss, tol=1e-10).fit(x, y)
    order = np.random.default_rng(4).permutation(len(y))
    columns = np.random.default_rng(5).permutation(6)
    turned = made(loss, tol=1e-10).fit(x[:, columns], y)
    np.testing.assert_allclose(turned.coef_, base.coef_[..., columns], rtol=1e-6, atol=1e-6)
    names = [f"feature {j}" for j in range(6)]
    frame = made(loss, tol=1e-10).fit(pd.DataFrame(x, columns=names), pd.Series(y))
    assert frame.feature_names_in_.tolist() == names
    assert frame.n_features_in_ == 6
    sparse = np.where(np.abs(x) > 1, x, 0.0)
    dense = made(loss, tol=1e-10).fit(sparse, y)
    assert dense.objective_ > 0
    for other, points, equal in (
        (made(loss, tol=1e-10).fit(x[order], y[order]), x, base),
        (frame, pd.DataFrame(x, columns=names), base),
        (made(loss, tol=1e-10).fit(np.asfortranarray(x), y), x, base),
        (made(loss, tol=1e-10).fit(x.tolist(), y.tolist()), x, base),
        (made(loss, tol=1e-10).fit(sp.csr_array(sparse), y), sp.csr_array(sparse), dense),
        (made(loss, tol=1e-10).fit(sp.coo_matrix(sparse), y), sp.csc_array(sparse), dense),
    ):
        assert other.objective_ == pytest.approx(equal.objective_, rel=1e-8)
        reference = x if equal is base else sparse
        close = {"rtol": 1e-6, "atol": 1e-6}
        np.testing.assert_allclose(scores(other, points), scores(equal, reference), **close)
    single = made(loss, tol=1e-6).fit(x.astype(np.float32), y)
    np.testing.assert_allclose(scores(single, x), scores(base, x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("loss", LOSSES)
def test_arguments_are_left_alone_and_fits_repeat(loss):
    x, y = data(loss)
    weight = np.ones(len(y))
    before = x.copy(), y.copy(), weight.copy()
    for part in (x, y, weight):
        part.setflags(write=False)
    model = made(loss, feature_scale=np.ones(6))
    parameters = copy.deepcopy(model.get_params())
    first = model.fit(x, y, weight).coef_
    np.testing.assert_array_equal(model.fit(x, y, weight).coef_, first)
    for part, was in zip((x, y, weight), before, strict=True):
        np.testing.assert_array_equal(part, was)
    after = model.get_params()
    assert {k: repr(v) for k, v in after.items()} == {k: repr(v) for k, v in parameters.items()}
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(scores(again, x), scores(model, x))
    fresh = clone(model).set_params(feature_scale=None)
    assert not hasattr(fresh, "coef_")
    np.testing.assert_allclose(fresh.fit(x, y).coef_, first, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_in_pipelines_and_searches(loss):
    x, y = data(loss)
    pipeline = make_pipeline(StandardScaler(), made(loss, relative=True))
    name = f"{type(pipeline[-1]).__name__.lower()}__"
    search = GridSearchCV(pipeline, {f"{name}eps": [0.01, 0.3], f"{name}norm": [2, math.inf]}, cv=3)
    search.fit(x, y)
    best = search.best_params_
    scaled = StandardScaler().fit_transform(x)
    alone = made(loss, relative=True, eps=best[f"{name}eps"], norm=best[f"{name}norm"])
    np.testing.assert_array_equal(search.best_estimator_[-1].coef_, alone.fit(scaled, y).coef_)
    folds = StratifiedKFold(3) if loss in CLASSIFICATION else KFold(3)
    by_hand = [
        clone(pipeline).fit(x[train], y[train]).score(x[test], y[test])
        for train, test in folds.split(x, y)
    ]
    np.testing.assert_allclose(cross_val_score(pipeline, x, y, cv=3), by_hand, rtol=1e-12)
    assert search.score(x, y) > (0.6 if loss in CLASSIFICATION else 0.05)


@pytest.mark.parametrize("intercept", [True, False])
def test_no_budget_is_least_squares(intercept):
    x, y = data("squared")
    weight = np.random.default_rng(1).uniform(0.2, 3, len(y))
    ours = AdversarialRegressor(0.0, fit_intercept=intercept).fit(x, y, weight)
    theirs = LinearRegression(fit_intercept=intercept).fit(x, y, weight)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-9)
    assert ours.intercept_ == pytest.approx(theirs.intercept_, rel=1e-9)
    assert ours.dual_gap_ <= 1e-12


@pytest.mark.parametrize("intercept", [True, False])
def test_no_budget_is_logistic_regression(intercept):
    """The gradient of the mean of log(1 + exp(−y·z)) is zero."""
    x, y = data("logistic")
    model = AdversarialClassifier(0.0, fit_intercept=intercept, tol=1e-12).fit(x, y)
    slope = -y / (1 + np.exp(y * model.decision_function(x)))
    assert np.abs(x.T @ slope).max() <= 1e-5
    assert abs(slope.sum()) <= (1e-5 if intercept else math.inf)
    assert (model.intercept_ == 0).all() == (not intercept)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_relative_budgets_and_the_edge(loss, norm):
    x, y = data(loss)
    half = made(loss, eps=0.5, relative=True, norm=norm).fit(x, y)
    same = made(loss, eps=0.5 * half.eps_max_, norm=norm).fit(x, y)
    np.testing.assert_allclose(same.coef_, half.coef_, rtol=1e-6, atol=1e-9)
    assert same.eps_max_ == half.eps_max_
    for eps in (1.0, 1 + 1e-9, 5.0):
        beyond = made(loss, eps=eps, relative=True, norm=norm).fit(x, y)
        assert (beyond.coef_ == 0).all()
        assert beyond.dual_gap_ <= 1e-8 * beyond.objective_
    constant = beyond.objective_
    assert half.objective_ <= constant * (1 + 1e-9)
    if loss == "squared":
        assert half.eps_max_ == pytest.approx(eps_max(x, y, norm), rel=1e-12)
    if loss in ("squared", "huber", "logistic", "squared_hinge"):  # there eps_max is exact
        inside = made(loss, eps=0.99, relative=True, norm=norm).fit(x, y)
        assert np.abs(inside.coef_).max() > 1e-6
        assert inside.objective_ < constant


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_many_classes_are_one_model_a_class(loss, norm):
    x, label = load_iris(return_X_y=True)
    x, y = x[:, :2], np.array(["a", "b", "c"])[label]  # the first two features do not separate
    options = {"eps": 0.3, "norm": norm, "relative": False}
    model = AdversarialClassifier(loss=loss, **options).fit(x, y)
    assert model.coef_.shape == (3, 2)
    assert model.intercept_.shape == (3,)
    assert model.classes_.tolist() == ["a", "b", "c"]
    total = 0.0
    for k, name in enumerate(model.classes_):
        one = AdversarialClassifier(loss=loss, **options).fit(x, np.where(y == name, 1, -1))
        np.testing.assert_allclose(one.coef_[0], model.coef_[k], rtol=1e-6, atol=1e-9)
        total += one.objective_
    assert model.objective_ == pytest.approx(total, rel=1e-9)
    assert model.dual_gap_ <= 1e-8 * model.objective_
    decision = model.decision_function(x)
    assert decision.shape == (150, 3)
    assert (model.predict(x) == model.classes_[decision.argmax(1)]).all()
    # an upper bound of the worst case of the sum
    rng = np.random.default_rng(0)
    for _ in range(20):
        delta = rng.standard_normal(x.shape)
        delta *= 0.3 / np.linalg.norm(delta, norm, axis=1, keepdims=True)
        loss_of = [
            worst_case_loss(w, b, x + delta, np.where(y == name, 1, -1), 0.0, norm, loss)
            for w, b, name in zip(model.coef_, model.intercept_, model.classes_, strict=True)
        ]
        assert np.sum(loss_of, axis=0).mean() <= model.objective_


@pytest.mark.parametrize("labels", [[-1, 1], [0, 1], ["no", "yes"], [False, True], [7, 3]])
def test_two_classes_of_any_name(labels):
    x, y = data("logistic")
    base = AdversarialClassifier().fit(x, y)
    named = np.array(sorted(labels))[(y > 0).astype(int)]
    model = AdversarialClassifier().fit(x, named)
    assert model.classes_.tolist() == sorted(labels)
    np.testing.assert_array_equal(model.coef_, base.coef_)
    assert model.coef_.shape == (1, 6)
    assert model.decision_function(x).shape == (len(y),)
    assert (model.predict(x) == np.array(sorted(labels))[(base.predict(x) > 0).astype(int)]).all()
    assert 0.5 < model.score(x, named) < 1


@pytest.mark.parametrize("shape", [(40, 4), (10, 25)], ids=["tall", "wide"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_separable_classes(loss, norm, shape):
    rng = np.random.default_rng(6)
    y = np.where(np.arange(shape[0]) % 2, 1.0, -1.0)
    x = rng.standard_normal(shape)
    x[:, 0] += 8 * y
    model = AdversarialClassifier(eps=0.1, norm=norm, loss=loss)
    if loss == "logistic":
        with pytest.warns(ConvergenceWarning, match="separable at this eps"):
            model.fit(x, y)
        assert model.objective_ <= 1e-7
    else:
        model.fit(x, y)
        assert model.objective_ == pytest.approx(0, abs=1e-12)
    assert model.dual_gap_ <= model.objective_
    w, b = model.coef_[0], model.intercept_[0]
    reach = 0.1 * np.linalg.norm(w, {1: math.inf, 2: 2, math.inf: 1}[norm])
    assert (y * (x @ w + b) >= reach).all()  # no attack turns a label
    assert model.score(x, y) == 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(20, 20), (12, 25)])
def test_classes_that_are_barely_separable(shape, norm):
    """Where the hinge is 0, the logistic loss has the infimum 0."""
    for seed, intercept in itertools.product(range(2), [True, False]):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape)
        y = x @ rng.standard_normal(shape[1]) / np.sqrt(shape[1]) + rng.standard_normal(shape[0])
        y, options = np.where(y > 0, 1, -1), {"eps": 0.5, "norm": norm, "fit_intercept": intercept}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = AdversarialClassifier(relative=True, **options).fit(x, y)
            options["eps"] = model.eps_
            hinge = AdversarialClassifier(loss="hinge", **options).fit(x, y)
        assert (model.objective_ <= 1e-7) == (hinge.objective_ <= 1e-9)


def test_separable_classes_bring_no_other_warning():
    for seed, norm, eps in itertools.product(range(14, 20), [2, math.inf], [0.0, 0.01]):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((12, 4))
        y = np.where(x @ rng.standard_normal(4) > 0, 1, -1)
        with pytest.warns(ConvergenceWarning, match="separable at this eps"):
            AdversarialClassifier(eps, norm=norm, relative=True).fit(x, y)


@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_classes_that_a_frozen_feature_separates(loss):
    x, y = np.array([[-0.2, 0.3], [0.2, 0.1]]), [1, -1]
    for eps in (0.1, 10.0):
        model = AdversarialClassifier(eps, loss=loss, feature_scale=[0.0, 1.0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y)
        assert model.objective_ <= 1e-7


@pytest.mark.parametrize(
    "loss",
    CLASSIFICATION,
)
def test_separable_classes_without_an_attack(loss):
    y = np.where(np.arange(20) % 2, 1.0, -1.0)
    x = np.random.default_rng(6).standard_normal((20, 3))
    x[:, 0] += 8 * y
    model = AdversarialClassifier(eps=0.0, loss=loss)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, y)
    assert model.score(x, y) == 1
    assert model.objective_ <= 1e-7


@pytest.mark.parametrize("loss", REGRESSION)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("eps", [0.0, 0.1, 5.0])
def test_a_constant_target_needs_no_feature(loss, norm, eps):
    x, _ = data(loss)
    model = AdversarialRegressor(eps, loss=loss, norm=norm).fit(x, np.full(len(x), 3.0))
    assert (model.coef_ == 0).all()
    assert model.intercept_ == pytest.approx(3, rel=1e-12)
    assert model.objective_ == pytest.approx(0, abs=1e-20)
    assert model.dual_gap_ == pytest.approx(0, abs=1e-20)
    zero = AdversarialRegressor(eps, loss=loss, norm=norm, fit_intercept=False)
    assert (zero.fit(x, np.zeros(len(x))).coef_ == 0).all()
    alone = AdversarialRegressor(eps, loss=loss, norm=norm).fit(x[:1], [2.0])
    assert (alone.coef_ == 0).all()
    assert alone.predict(x[:1]) == pytest.approx([2.0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("intercept", [True, False])
def test_features_of_zeros_say_nothing(loss, norm, intercept):
    x, y = data(loss)
    model = made(loss, norm=norm, fit_intercept=intercept).fit(0 * x, y)
    assert (model.coef_ == 0).all()
    assert np.isfinite(model.intercept_).all()
    assert model.dual_gap_ <= 1e-8 * model.objective_
    assert model.objective_ == pytest.approx(worst(model, 0 * x, y), rel=1e-12)
    half = made(loss, norm=norm, tol=1e-10).fit(x * [1, 1, 1, 1, 0, 0], y)
    less = made(loss, norm=norm, tol=1e-10).fit(x[:, :4], y)
    assert half.objective_ == pytest.approx(less.objective_, rel=1e-8)


@pytest.mark.parametrize("frozen", [1, 3, 6])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_features_that_cannot_change_cost_nothing(loss, norm, frozen):
    """With all frozen there is no attack; with more frozen the objective is not larger."""
    x, y = data(loss)
    scale = np.ones(6)
    scale[:frozen] = 0
    model = made(loss, eps=0.2, norm=norm, feature_scale=scale).fit(x, y)
    assert model.dual_gap_ <= 1e-8 * model.objective_
    attacked = made(loss, eps=0.2, norm=norm).fit(x, y)
    assert model.objective_ <= attacked.objective_ * (1 + 1e-9)
    if frozen == 6:
        clean = made(loss, eps=0.0, norm=norm).fit(x, y)
        assert model.objective_ == pytest.approx(clean.objective_, rel=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_that_is_cut_short_says_so(loss):
    x, y = data(loss, seed=1)
    model = made(loss, eps=0.2, relative=True, max_iter=1)
    with pytest.warns(ConvergenceWarning, match=r"proven to\s+within .* raise max_iter or tol"):
        model.fit(x, y)
    final = made(loss, eps=0.2, relative=True).fit(x, y)
    assert model.dual_gap_ > 1e-8 * model.objective_
    assert model.objective_ - model.dual_gap_ <= final.objective_


def test_the_worst_case_is_smaller_than_that_of_least_squares():
    x, y = data("squared", n=200)
    clean, ours = LinearRegression().fit(x, y), AdversarialRegressor(0.5).fit(x, y)
    of_clean = worst_case_loss(clean.coef_, clean.intercept_, x, y, 0.5).mean()
    assert ours.objective_ < of_clean
    assert np.mean((clean.predict(x) - y) ** 2) < np.mean((ours.predict(x) - y) ** 2)


def test_huber_resists_labels_that_are_wrong():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((200, 3)), np.array([1.0, -2.0, 0.5])
    y = x @ w + 0.1 * rng.standard_normal(200)
    y[:20] += 50
    errors = {
        loss: np.linalg.norm(AdversarialRegressor(0.05, loss=loss).fit(x, y).coef_ - w)
        for loss in REGRESSION
    }
    assert errors["huber"] < 0.3 * errors["squared"]
    assert errors["absolute"] < 0.3 * errors["squared"]


X, Y = data("squared", n=8, d=2)
HOLED = np.where(X == X[3, 1], np.nan, X)


@pytest.mark.parametrize("kind", [AdversarialRegressor, AdversarialClassifier])
@pytest.mark.parametrize(
    ("options", "x", "weight", "message"),
    [
        ({}, HOLED, None, "Input X contains NaN"),
        ({}, np.where(np.isnan(HOLED), np.inf, X), None, "Input X contains infinity"),
        ({}, X[:0], None, "Found array with 0 sample"),
        ({}, X[:, :0], None, r"0 feature\(s\)"),
        ({}, X[0], None, "Expected 2D array, got 1D array"),
        ({}, X[:5], None, "inconsistent numbers of samples"),
        ({}, X, np.ones(3), r"sample_weight has shape \(3,\); expected \(8,\)"),
        ({}, X, -np.ones(8), "sample_weight must not be negative"),
        ({}, X, np.zeros(8), "not zero for all samples"),
        ({}, X, np.full(8, np.nan), "sample_weight contains NaN"),
        ({}, X, -1.0, "sample_weight must not be negative"),
        ({}, X, np.nan, "sample_weight"),
        ({"eps": -0.1}, X, None, "eps must be finite and not negative; got -0.1"),
        ({"eps": math.nan}, X, None, "eps must be finite"),
        ({"eps": math.inf}, X, None, "eps must be finite"),
        ({"eps": True}, X, None, "eps must be finite"),
        ({"eps": "0.1"}, X, None, "eps must be"),
        ({"eps": None}, X, None, "eps must be"),
        ({"norm": 3}, X, None, r"norm must be 1, 2 or inf \(the norm of the attack\); got 3"),
        ({"norm": "l2"}, X, None, "norm must be 1, 2 or inf"),
        ({"norm": None}, X, None, "norm must be 1, 2 or inf"),
        ({"loss": "cubic"}, X, None, "loss must be one of squared, .*; got 'cubic'"),
        ({"loss": ["hinge"]}, X, None, "loss must be one of squared"),
        ({"feature_scale": [1.0]}, X, None, r"each of the 2 features .* its shape is \(1,\)"),
        ({"feature_scale": [1.0, -1.0]}, X, None, "one number ≥ 0"),
        ({"feature_scale": [1.0, math.inf]}, X, None, "one number ≥ 0"),
        ({"feature_scale": 1.0}, X, None, "one number ≥ 0"),
        ({"tol": 0.0}, X, None, "tol, the relative gap, lies between 0 and 1"),
        ({"tol": -1.0}, X, None, "tol, the relative gap"),
        ({"max_iter": -3}, X, None, "max_iter"),
    ],
)
def test_errors_say_what_to_do(kind, options, x, weight, message):
    y = np.arange(8) % 2
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**options).fit(x, y, sample_weight=weight)


@pytest.mark.parametrize(
    ("model", "y", "message"),
    [
        (AdversarialRegressor(), np.where(Y == Y[2], np.nan, Y), "Input y contains NaN"),
        (AdversarialRegressor(), np.where(Y == Y[2], np.inf, Y), "Input y contains infinity"),
        (AdversarialRegressor(), np.stack([Y, Y], 1), "y should be a 1d array"),
        (AdversarialRegressor(loss="hinge"), Y, "hinge loss is for AdversarialClassifier"),
        (AdversarialRegressor(loss="huber", huber_threshold=0.0), Y, "must be positive"),
        (AdversarialRegressor(loss="huber", huber_threshold=-1.0), Y, "must be positive"),
        (AdversarialRegressor(loss="huber", huber_threshold=math.nan), Y, "must be positive"),
        (AdversarialRegressor(loss="huber", huber_threshold=math.inf), Y, "Huber loss must be"),
        (AdversarialClassifier(), Y, "Unknown label type: continuous"),
        (AdversarialClassifier(), np.ones(8), "at least 2 classes; y holds only 1 class"),
        (AdversarialClassifier(loss="huber"), np.arange(8) % 2, "is for AdversarialRegressor"),
    ],
)
def test_errors_of_targets_and_losses_say_what_to_do(model, y, message):
    with pytest.raises(ValueError, match=message):
        model.fit(X, y)


def test_errors_of_classes_and_of_use():
    with pytest.raises(ValueError, match="class"):
        AdversarialClassifier().fit(X[:1], [1])
    label = np.arange(8) % 2
    with pytest.raises(ValueError, match="at least 2 classes"):  # one class has no weight
        AdversarialClassifier().fit(X, label, sample_weight=label)
    for kind in (AdversarialRegressor, AdversarialClassifier):
        with pytest.raises(NotFittedError):
            kind().predict(X)
        model = kind(eps=1.0).fit(X, label)
        with pytest.raises(ValueError, match=r"X has 1 features, but .* is expecting 2"):
            model.predict(X[:, :1])
        with pytest.raises(ValueError, match="NaN"):
            model.predict(HOLED)


@pytest.mark.parametrize("kind", ["regressor", "classifier", "several"])
def test_a_warning_points_to_the_line_that_fits(kind):
    x, y = data("squared")
    labels = {"regressor": y, "classifier": y > 0, "several": np.digitize(y, [-1, 1])}[kind]
    make = AdversarialRegressor if kind == "regressor" else AdversarialClassifier
    model = make(max_iter=1, tol=1e-13)
    with pytest.warns(ConvergenceWarning) as caught:
        model.fit(x, labels)  # here
    (told,) = caught  # one for all classes
    assert (told.filename, "# here" in linecache.getline(__file__, told.lineno)) == (__file__, True)
    with pytest.warns(ConvergenceWarning) as caught:
        make_pipeline(StandardScaler(), model).fit(x, labels)  # here
    assert (caught[0].filename, len(caught)) == (__file__, 1)
    if kind == "several":
        assert "3 of 3 solutions are not proven" in str(told.message)


def test_frames_of_a_transformer_that_gives_pandas():
    x, y = data("squared")
    frame = pd.DataFrame(x, columns=[f"feature {j}" for j in range(6)])
    for make in (
        AdversarialRegressor,
        partial(AdversarialRegressorCV, n_eps=3),
    ):
        plain = make_pipeline(StandardScaler(), make()).fit(x, y)
        told = make_pipeline(StandardScaler(), make()).set_output(transform="pandas").fit(frame, y)
        assert told[-1].feature_names_in_.tolist() == list(frame.columns)
        np.testing.assert_allclose(told[-1].coef_, plain[-1].coef_, rtol=1e-9)  # another order
        np.testing.assert_allclose(told.predict(frame), plain.predict(x), rtol=1e-9)
        with pytest.raises(ValueError, match="feature names"):
            told[-1].predict(frame.rename(columns={"feature 0": "other"}))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_relative_budgets_of_many_classes_give_the_objective_back(loss, norm):
    x, label = load_iris(return_X_y=True)
    x = x[:, :2]
    model = AdversarialClassifier(0.3, loss=loss, norm=norm, relative=True).fit(x, label)
    assert model.eps_.shape == (3,)
    assert model.eps_max_ == pytest.approx(model.eps_.max() / 0.3)
    total = sum(
        worst_case_loss(w, b, x, np.where(label == k, 1, -1), eps, norm, loss).mean()
        for k, (w, b, eps) in enumerate(zip(model.coef_, model.intercept_, model.eps_, strict=True))
    )
    assert model.objective_ == pytest.approx(total, rel=1e-9)
    absolute = AdversarialClassifier(0.3, loss=loss, norm=norm).fit(x, label)
    assert absolute.eps_ == 0.3


def test_what_is_a_flag_is_no_number():
    x, y = data("squared")
    for options in ({"relative": "yes"}, {"huber_relative": 2, "loss": "huber"}):
        with pytest.raises(ValueError, match="must be True or False"):
            AdversarialRegressor(**options).fit(x, y)
