"""Targets far from zero or of any size: the same model, in the user's units, and proven."""

import math
import warnings

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning

from robustlearn.linear import AdversarialRegressor, regularization_path, worst_case_loss
from robustlearn.linear._solve import Solution, solve
from robustlearn.linear._units import Units, robust_scale

NORMS = [1, 2, math.inf]
REGRESSION = ["squared", "absolute", "huber"]


def data(n=120, d=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d))
    return x, x @ rng.standard_normal(d) + rng.standard_normal(n)


@pytest.mark.parametrize("shape", [(120, 5), (10, 25)])
@pytest.mark.parametrize("shift", [1e6, 1e10, -1e12])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", REGRESSION)
def test_a_far_target_moves_the_intercept_alone(loss, norm, shift, shape):
    x, y = data(*shape)
    far = y + shift
    y = far - shift  # with the digits that are left
    options = {"eps": 0.1, "relative": True, "norm": norm, "loss": loss}
    base = AdversarialRegressor(**options, tol=1e-10).fit(x, y)
    model = AdversarialRegressor(**options, tol=1e-10).fit(x, far)
    assert model.objective_ == pytest.approx(base.objective_, rel=1e-11)
    assert model.dual_gap_ <= 1e-10 * model.objective_
    assert model.eps_max_ == pytest.approx(base.eps_max_, rel=1e-9)
    np.testing.assert_allclose(model.coef_, base.coef_, rtol=0, atol=1e-5)
    assert model.intercept_ - shift == pytest.approx(base.intercept_, abs=1e-5 + 1e-15 * abs(shift))


@pytest.mark.parametrize("factor", [1e155, 1e120, 1e-120, 1e-170, 1e300])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", REGRESSION)
def test_targets_of_any_size_have_the_same_model(loss, norm, intercept, factor):
    x, y = data()
    options = {"eps": 0.1, "relative": True, "norm": norm, "loss": loss, "fit_intercept": intercept}
    base = AdversarialRegressor(**options, huber_threshold=1.35).fit(x, y)
    model = AdversarialRegressor(**options, huber_threshold=1.35 * factor)
    held = loss == "absolute" or 1e-160 < factor < 1e150  # squares that float64 can tell
    if held:
        model.fit(x, factor * y)
        size = base.objective_ * factor * (1 if loss == "absolute" else factor)
        assert model.objective_ == pytest.approx(size, rel=1e-8)
        assert model.dual_gap_ <= 1e-8 * model.objective_
    else:
        with pytest.warns(RuntimeWarning, match="beyond the range of float64"):
            model.fit(x, factor * y)
        assert model.objective_ == (math.inf if factor > 1 else 0)
    np.testing.assert_allclose(model.coef_ / factor, base.coef_, rtol=0, atol=1e-5)
    assert model.intercept_ / factor == pytest.approx(base.intercept_, abs=1e-5)
    assert model.eps_max_ == pytest.approx(base.eps_max_, rel=1e-9)


@pytest.mark.parametrize("threshold", [1e-120, 1e-9, 1e20, 1e120])
@pytest.mark.parametrize("norm", NORMS)
def test_a_threshold_of_any_size(threshold, norm):
    x, y = data()
    options = {"eps": 0.1, "norm": norm}
    model = AdversarialRegressor(**options, loss="huber", huber_threshold=threshold).fit(x, y)
    limit = "absolute" if threshold < 1 else "squared"
    factor = threshold if threshold < 1 else 0.5
    other = AdversarialRegressor(**options, loss=limit).fit(x, y)
    assert model.objective_ == pytest.approx(factor * other.objective_, rel=1e-8)
    assert model.dual_gap_ <= 1e-8 * model.objective_
    np.testing.assert_allclose(model.coef_, other.coef_, rtol=0, atol=1e-5)


def test_a_path_of_a_far_target_of_another_size():
    x, y = data()
    base = regularization_path(x, y, n_eps=4)
    path = regularization_path(x, 1e120 * y + 1e124, n_eps=4)
    np.testing.assert_allclose(path.objective / 1e120, base.objective * 1e120, rtol=1e-8)
    np.testing.assert_allclose(path.coef / 1e120, base.coef, rtol=0, atol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_relative_threshold_follows_the_units_of_y(weighted):
    x, y = data()
    weight = np.random.default_rng(1).integers(0, 3, len(y)) if weighted else np.ones(len(y))
    options = {"eps": 0.1, "loss": "huber", "huber_relative": True}
    base = AdversarialRegressor(**options).fit(x, y, weight)
    repeated = y.repeat(weight.astype(int))
    scale = 1.4826 * np.median(np.abs(repeated - np.median(repeated)))
    assert base.huber_threshold_ == pytest.approx(1.35 * scale, rel=1e-12)
    same = AdversarialRegressor(0.1, loss="huber", huber_threshold=1.35 * scale).fit(x, y, weight)
    np.testing.assert_allclose(same.coef_, base.coef_, rtol=1e-9)
    other = AdversarialRegressor(**options).fit(x, 1e3 * y + 7, weight)
    np.testing.assert_allclose(other.coef_ / 1e3, base.coef_, rtol=1e-6)
    assert not hasattr(other.set_params(loss="squared").fit(x, y), "huber_threshold_")


def test_robust_scales_where_most_targets_are_alike():
    one = np.ones(5)
    assert robust_scale(np.array([1.0, 1, 1, 1, 6]), one, intercept=True) == pytest.approx(1)
    assert robust_scale(3 * one, one, intercept=True) == 1
    assert robust_scale(3 * one, one, intercept=False) == pytest.approx(3 * 1.4826)
    assert robust_scale(0 * one, one, intercept=False) == 1


def test_a_bound_above_the_objective_is_told(monkeypatch):
    x, y = data()
    from robustlearn.linear import estimators

    def wrong(*args, **options):
        solution = solve(*args, **options)
        object.__setattr__(solution, "inner_bound", 1.01 * solution.inner_objective)
        return solution

    monkeypatch.setattr(estimators, "solve", wrong)
    with pytest.warns(ConvergenceWarning, match="the bound exceeds the objective"):
        model = AdversarialRegressor().fit(x, y)
    assert model.dual_gap_ == pytest.approx(0.01 * model.objective_)


def test_rounding_is_no_contradiction():
    parts = dict.fromkeys(("design", "columns", "found", "eps", "eps_max"))
    one = Solution(
        **parts, units=Units(), inner_objective=1.0, inner_bound=1 + 1e-13, inner_start=1.0
    )
    assert one.gap == 0
    assert one.proven(1e-12)


def test_the_objective_is_that_of_the_closed_form_at_a_far_target():
    x, y = data()
    model = AdversarialRegressor(0.1).fit(x, y + 1e8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = worst_case_loss(model.coef_, model.intercept_, x, y + 1e8, 0.1).mean()
    assert model.objective_ == pytest.approx(loss, rel=1e-6)
