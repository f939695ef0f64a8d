"""Paths over eps and searches: each model is the one that a fit by itself gives."""

import linecache
import warnings

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold

from robustlearn.errors import InputError
from robustlearn.linear import (
    AdversarialClassifier,
    AdversarialClassifierCV,
    AdversarialRegressor,
    AdversarialRegressorCV,
    regularization_path,
    worst_case_loss,
)

X, Y = load_diabetes(return_X_y=True)
X, Y = (X - X.mean(0)) / X.std(0), (Y - Y.mean()) / Y.std()


@pytest.mark.parametrize("norm", [1, 2, np.inf])
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_a_path_is_its_fits(loss, norm):
    path = regularization_path(X, Y, n_eps=6, norm=norm, loss=loss)
    assert path.eps[0] == path.eps_max
    assert path.eps[-1] == pytest.approx(0.01 * path.eps_max)
    assert (path.coef[0] == 0).all()
    assert (path.gap <= 1e-8 * path.objective).all()
    assert (np.diff(path.objective) < 0).all()  # less budget, less loss
    for k in (2, 5):
        one = AdversarialRegressor(path.eps[k], norm=norm, loss=loss).fit(X, Y)
        assert path.objective[k] == pytest.approx(one.objective_, rel=1e-7)
        np.testing.assert_allclose(path.coef[k], one.coef_, atol=1e-4)


def test_a_path_of_a_classifier_and_given_budgets():
    labels = np.where(Y > 0, "high", "low")
    path = regularization_path(X, labels, eps=[0.01, 0.1], loss="logistic", norm=np.inf)
    assert path.eps.tolist() == [0.1, 0.01]
    one = AdversarialClassifier(0.1, norm=np.inf).fit(X, labels)
    assert path.objective[0] == pytest.approx(one.objective_, rel=1e-7)
    np.testing.assert_allclose(path.coef[0], one.coef_[0], atol=1e-5)
    with pytest.raises(InputError, match="two classes; y holds 3"):
        regularization_path(*load_iris(return_X_y=True), loss="hinge")
    with pytest.raises(InputError, match="must not be negative"):
        regularization_path(X, Y, eps=[-1.0])


def test_a_path_can_be_drawn():
    import matplotlib

    matplotlib.use("Agg")
    path = regularization_path(X, Y, n_eps=4)
    axes = path.plot(names=[f"x{j}" for j in range(10)])
    assert len(axes.lines) == 11
    assert axes.get_xscale() == "log"


@pytest.mark.parametrize("attack_eps", [0.0, 0.2])
def test_the_search_measures_what_it_says(attack_eps):
    folds = KFold(3)
    grid = np.array([0.5, 0.1, 0.02])
    search = AdversarialRegressorCV(grid, attack_eps=attack_eps, cv=folds).fit(X, Y)
    by_hand = np.empty((3, 3))
    for j, (train, test) in enumerate(folds.split(X)):
        for i, eps in enumerate(grid):
            one = AdversarialRegressor(eps).fit(X[train], Y[train])
            given = one.coef_, one.intercept_, X[test], Y[test]
            by_hand[i, j] = worst_case_loss(*given, attack_eps).mean()
    np.testing.assert_allclose(search.loss_path_, by_hand, rtol=1e-5)
    assert search.eps_ == grid[by_hand.mean(1).argmin()]
    np.testing.assert_allclose(search.coef_, AdversarialRegressor(search.eps_).fit(X, Y).coef_)


def test_a_harder_attack_asks_for_more_budget():
    calm = AdversarialRegressorCV(n_eps=10).fit(X, Y)
    hard = AdversarialRegressorCV(n_eps=10, attack_eps=0.5).fit(X, Y)
    assert hard.eps_ > calm.eps_


def test_the_search_takes_several_classes():
    x, y = load_iris(return_X_y=True)
    search = AdversarialClassifierCV(n_eps=4, cv=3, loss="squared_hinge").fit(x, y)
    assert search.loss_path_.shape == (4, 3)
    assert search.coef_.shape == (3, 4)
    assert search.score(x, y) > 0.8
    with pytest.raises(InputError, match="for AdversarialRegressorCV"):
        AdversarialClassifierCV(loss="huber").fit(x, y)


def one_warning(fit):
    """The message and place of the one ConvergenceWarning that a call brings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit()
    (told,) = [one for one in caught if issubclass(one.category, ConvergenceWarning)]
    assert told.filename == __file__
    assert "one_warning(lambda" in linecache.getline(__file__, told.lineno)
    return str(told.message)


SHORT = {"max_iter": 1, "tol": 1e-12}
LABELS = np.where(Y > 0, 1, -1)


def test_what_is_not_proven_is_told_once():
    huber = {"loss": "huber", **SHORT, "n_eps": 5}
    told = one_warning(lambda: regularization_path(X, Y, **huber))
    assert told.startswith("regularization_path: 4 of 5 solutions are not proven")
    told = one_warning(lambda: AdversarialRegressorCV(cv=3, **huber).fit(X, Y))
    assert "of 16 solutions are not proven" in told
    told = one_warning(lambda: AdversarialClassifierCV(cv=3, n_eps=5, **SHORT).fit(X, LABELS))
    assert "of 16 solutions are not proven" in told
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularization_path(X, Y, n_eps=5, loss="huber")


KINDS = {
    "path": lambda **options: regularization_path(X, Y, **options),
    "regressor": lambda **options: AdversarialRegressorCV(**options).fit(X, Y),
    "classifier": lambda **options: AdversarialClassifierCV(**options).fit(X, LABELS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1}, "tol, the relative gap, lies between 0 and 1"),
        ({"tol": "a"}, "tol, the relative gap, lies between 0 and 1"),
        ({"max_iter": 0}, "max_iter must be a whole number"),
        ({"max_iter": 1.5}, "max_iter must be a whole number"),
        ({"shortest": -1}, "shortest, a share of eps_max"),
        ({"shortest": 0.0}, "shortest, a share of eps_max"),
        ({"shortest": np.nan}, "shortest, a share of eps_max"),
        ({"shortest": "a"}, "shortest, a share of eps_max"),
        ({"n_eps": 0}, "n_eps must be a whole number"),
        ({"n_eps": 2.5}, "n_eps must be a whole number"),
        ({"eps": []}, "at least one budget"),
        ({"eps": [0.1, np.nan]}, "all finite"),
        ({"eps": [np.inf]}, "all finite"),
        ({"eps": [-1.0]}, "must not be negative"),
        ({"eps": "a"}, "eps must hold numbers"),
    ],
)
def test_errors_of_paths_and_searches_say_what_to_do(kind, options, message):
    with pytest.raises(InputError, match=message):
        KINDS[kind](**options)


@pytest.mark.parametrize("kind", ["regressor", "classifier"])
@pytest.mark.parametrize("attack_eps", [-1, np.nan, np.inf, "a", None])
def test_errors_of_the_attack_of_a_search(kind, attack_eps):
    with pytest.raises(InputError, match="attack_eps must be finite and not negative"):
        KINDS[kind](attack_eps=attack_eps)


def test_a_constant_target_has_no_path_of_its_own():
    with pytest.raises(InputError, match="no feature is of any use"):
        regularization_path(X, np.ones(len(X)))
    assert regularization_path(X, np.ones(len(X)), eps=[0.1]).coef.tolist() == [[0.0] * 10]
    assert AdversarialRegressorCV().fit(X, np.ones(len(X))).eps_ == 0


def test_folds_without_weight_or_class_are_refused():
    folds = KFold(3)
    _, test = next(iter(folds.split(X)))
    for kind, y in ((AdversarialRegressorCV, Y), (AdversarialClassifierCV, LABELS)):
        weight = np.ones(len(Y))
        weight[test] = 0
        with pytest.raises(InputError, match="have no weight; use fewer folds"):
            kind([0.1], cv=folds).fit(X, y, weight)
    weight = np.where(LABELS > 0, 1.0, 0.0)
    weight[test] = 1.0  # the other class has weight there alone
    with pytest.raises(InputError, match="lacks a class"):
        AdversarialClassifierCV([0.1], cv=folds).fit(X, LABELS, weight)


def test_a_class_without_weight_is_none():
    x, y = load_iris(return_X_y=True)
    weight = np.where(y == 0, 0.0, 1.0)
    search = AdversarialClassifierCV([0.5, 0.1], cv=3).fit(x, y, weight)
    assert search.classes_.tolist() == [1, 2]
    assert search.coef_.shape == (1, 4)


def test_a_loss_that_is_no_number_is_an_error():
    with pytest.raises(InputError, match="not a finite number"):
        AdversarialRegressorCV([0.1], cv=3).fit(X, 1e200 * Y)


def test_a_relative_threshold_is_the_same_in_all_folds():
    options = {"loss": "huber", "huber_relative": True}
    base = AdversarialRegressorCV([0.1, 0.01], cv=3, **options).fit(X, Y)
    other = AdversarialRegressorCV([0.1, 0.01], cv=3, **options).fit(X, 1e3 * Y + 5)
    np.testing.assert_allclose(other.loss_path_, 1e6 * base.loss_path_, rtol=1e-6)
    path = regularization_path(X, 1e3 * Y, eps=[0.1], **options)
    alone = AdversarialRegressor(0.1, **options).fit(X, 1e3 * Y)
    np.testing.assert_allclose(path.coef[0], alone.coef_, rtol=1e-5)
