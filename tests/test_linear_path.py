"""Paths over eps and searches: each model is the one that a fit by itself gives."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_iris
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
