"""The comparison says what its rows say, and its rows are what the closed form says."""

import itertools
import math
import sys

import matplotlib as mpl
import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_diabetes
from sklearn.ensemble import RandomForestRegressor
from sklearn.linear_model import LinearRegression, Ridge
from threadpoolctl import threadpool_limits

from robustlearn.errors import InputError
from robustlearn.linear import _results, comparison
from robustlearn.linear.comparison import Comparison, Row, Tukey, robust_comparison

mpl.use("Agg")
X, Y = load_diabetes(return_X_y=True)
SEEDS = 10
OURS = ("adversarial square", "adversarial Huber")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    with threadpool_limits(1):  # small matrices
        yield


@pytest.fixture(scope="module")
def found():
    return robust_comparison(X, Y, seeds=SEEDS)


def made(**errors):
    """A comparison of hand-made numbers, the worst case twice the error."""
    rows = [
        Row(seed, "clean", method, value, 2 * value)
        for method, values in errors.items()
        for seed, value in enumerate(values)
    ]
    return Comparison(tuple(rows), 0.3, 2.0, ratio=3 / 7, ours=("ours",))


# rows


def test_one_row_a_seed_setting_and_method(found):
    keys = [(row.seed, row.setting, row.method) for row in found.rows]
    assert keys == list(itertools.product(range(SEEDS), found.settings, found.methods))
    assert found.settings == tuple(comparison.CORRUPTIONS)
    assert set(found.methods) >= {"least squares", "RidgeCV", "Huber", *OURS}
    assert found.ours == OURS
    assert all(0 < row.error <= row.worst_case * (1 + 1e-12) < 100 for row in found.rows)


def test_the_attack_carried_out_reaches_the_closed_form(found):
    for method in found.methods:
        formula = found.values("input attack", method)
        carried_out = found.values("input attack", method, "error")
        np.testing.assert_allclose(carried_out, formula, rtol=1e-12)
        np.testing.assert_array_equal(formula, found.values("clean", method))


def test_one_seed_one_result(found, untouched):
    few = {"seeds": 2, "settings": ["input noise", "bad leverage"], "methods": ["least squares"]}
    again = robust_comparison(X, Y, **few)
    assert set(again.rows) <= set(found.rows)  # whatever else is asked for
    other = robust_comparison(X, Y, **few, random_state=1)
    assert not set(other.rows) & set(again.rows)


def test_without_a_budget_the_worst_case_is_the_error_and_ours_is_least_squares():
    methods = ["least squares", "adversarial square"]
    none = robust_comparison(X, Y, eps=0, seeds=3, settings=["clean"], methods=methods)
    assert all(row.error == pytest.approx(row.worst_case, rel=1e-12) for row in none.rows)
    assert not none.difference("clean", *methods).clear


@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_every_norm(norm):
    few = {"seeds": 2, "settings": ["clean", "input attack"], "eps": 0.1}
    methods = ["least squares", "adversarial square"]
    found = robust_comparison(X, Y, norm=norm, methods=methods, **few)
    attacked = [row for row in found.rows if row.setting == "input attack"]
    assert all(row.error == pytest.approx(row.worst_case, rel=1e-12) for row in attacked)
    assert found.difference("clean", "adversarial square", "least squares").mean < 0


def test_corruptions_have_their_sizes():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(200, 3)), rng.normal(size=200)
    same_x, shifted = comparison._label_outliers(x.copy(), y.copy(), rng)
    np.testing.assert_array_equal(same_x, x)
    moved = shifted != y
    assert moved.sum() == 20
    np.testing.assert_allclose((shifted - y)[moved], comparison.LABEL_SHIFT)
    far, lifted = comparison._bad_leverage(x.copy(), y.copy(), rng)
    moved = (far != x).any(1)
    assert moved.sum() == 10
    np.testing.assert_allclose(far[moved], comparison.LEVERAGE_FACTOR * x[moved])
    np.testing.assert_allclose(lifted - y, comparison.LEVERAGE_SHIFT * moved)


def test_units_do_not_matter():
    few = {"seeds": 2, "settings": ["label outliers"], "methods": ["least squares", OURS[1]]}
    plain = robust_comparison(X, Y, **few)
    other = robust_comparison(X * 1000 + 5, 1e-3 * Y - 7, **few)
    for one, two in zip(plain.rows, other.rows, strict=True):
        assert one.error == pytest.approx(two.error, rel=1e-5)
        assert one.worst_case == pytest.approx(two.worst_case, rel=1e-5)


# standard errors and claims


def test_standard_errors(found):
    for method in found.methods:
        values = found.values("label outliers", method)
        cell = found.table().loc[("label outliers", "worst case"), method]
        assert cell == f"{values.mean():.3f} ± {stats.sem(values):.3f}"
    one, two = (found.values("clean", m, "error") for m in ("Huber", "RidgeCV"))
    gap = found.difference("clean", "Huber", "RidgeCV", "error")
    assert gap.mean == pytest.approx((one - two).mean())
    assert gap.mean / gap.standard_error == pytest.approx(stats.ttest_rel(one, two).statistic)
    assert found.ratio == 133 / 309
    widening = math.sqrt(1 + SEEDS * found.ratio)
    assert gap.wide_error == pytest.approx(widening * gap.standard_error)


@pytest.mark.parametrize(("errors_apart", "claimed"), [(1.9, False), (2.1, True)])
def test_nothing_within_two_standard_errors_is_claimed(errors_apart, claimed):
    noise = np.array([-1.0, 0.0, 1.0]) / 100
    lead = errors_apart * stats.sem(noise)
    found = made(good=[0.5] * 3, ours=0.5 + lead + noise)
    text = found.conclusion()
    assert found.difference("clean", "ours", "good", "error").clear is claimed
    assert ("clearly below ours" in text) is claimed
    assert ("ours loses to good" in text) is claimed
    assert ("level with ours" in text) is not claimed


def test_a_claim_that_the_overlap_takes_away_has_a_star():
    noise = np.array([-1.0, 0.0, 1.0]) / 100
    near = made(good=[0.5] * 3, ours=0.5 + 2.1 * stats.sem(noise) + noise)
    far = made(good=[0.5] * 3, ours=0.6 + noise)
    assert "ours (by 0.012 ± 0.006*)" in near.conclusion()
    assert "ours (by 0.100 ± 0.006)" in far.conclusion()


def test_wins_and_losses_are_counted():
    found = made(a=[0.5, 0.5], b=[0.7, 0.7], c=[0.9, 0.9], d=[0.6, 0.6], ours=[0.6, 0.6])
    total = "In all, error: ours wins 2 of 4 comparisons with the other methods, loses 1, and 1 are"
    assert total in found.conclusion()


def test_what_cannot_be_seen_is_not_claimed():
    found = made(one=[0.5, 0.5, 0.5], ours=[0.5004, 0.5004, 0.5004])
    assert "clearly" not in found.conclusion()


def test_one_split_claims_nothing():
    found = robust_comparison(X, Y, seeds=1, settings=["label outliers"])
    text = found.conclusion()
    assert "clearly" not in text
    assert "loses to" not in text
    assert "nothing is claimed" in text
    assert "±" not in found.table().to_string()


def test_every_claim_in_the_conclusion_is_in_the_rows(found):
    text = found.conclusion()
    for setting in ("clean", "label outliers", "bad leverage", "input noise"):
        for measure in _results.MEASURES:
            means = {m: found.values(setting, m, measure).mean() for m in found.methods}
            best = min(means, key=means.get)
            heading = f"{setting}, {_results.SPOKEN[measure]}: {best} has the lowest mean"
            assert f"{heading}, {means[best]:.3f}" in text
    assert text.count("the same numbers as “clean, worst case”") == 2


# the pattern on diabetes


def lowest(found, setting, measure):
    return min(found.methods, key=lambda m: found.values(setting, m, measure).mean())


def test_adversarial_training_defends_against_input_attacks(found):
    for method, rival in itertools.product(OURS, set(found.methods) - set(OURS)):
        for setting in ("clean", "input noise"):
            gap = found.difference(setting, method, rival)
            assert gap.clear
            assert gap.mean < 0
    assert abs(found.difference("clean", *OURS).mean) < 0.01


def test_it_costs_little_on_clean_data(found):
    errors = [found.values("clean", m, "error").mean() for m in found.methods]
    assert max(errors) < 1.1 * min(errors)


def test_the_square_is_no_defence_against_label_outliers_but_huber_is(found):
    for measure in _results.MEASURES:
        for robust in ("Huber", "adversarial Huber"):
            for fragile in ("least squares", "RidgeCV", "adversarial square"):
                gap = found.difference("label outliers", robust, fragile, measure)
                assert gap.mean < 0
    assert lowest(found, "label outliers", "worst_case") == "adversarial Huber"


def test_leverage(found):
    assert lowest(found, "bad leverage", "worst_case") == "adversarial Huber"
    assert found.difference("bad leverage", "Huber", "least squares", "error").mean < 0
    assert found.difference("bad leverage", "adversarial Huber", "Huber", "error").mean > 0


def test_tukey_has_the_lowest_error_under_corruption(found):
    pytest.importorskip("statsmodels")
    for setting in ("label outliers", "bad leverage"):
        assert lowest(found, setting, "error") == "Tukey"


# methods


def test_tukey_ignores_far_labels():
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 2))
    y = x @ [1.0, -2.0] + 3 + 0.1 * rng.normal(size=100)
    y[:10] += 50
    model = Tukey().fit(x, y)
    np.testing.assert_allclose([*model.coef_, model.intercept_], [1, -2, 3], atol=0.05)
    np.testing.assert_allclose(model.predict(x), x @ model.coef_ + model.intercept_)


def test_without_statsmodels_tukey_is_left_out_with_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels", None)
    found = robust_comparison(X, Y, seeds=2, settings=["clean"])
    assert "Tukey" not in found.methods
    assert len(found.methods) == 5
    assert found.notes == ("Tukey's bisquare was left out: it needs statsmodels.",)
    assert found.conclusion().endswith(found.notes[0])
    with pytest.raises(InputError, match="pip install statsmodels"):
        robust_comparison(X, Y, methods=["Tukey"])


def test_your_own_methods():
    mine = {"plain": LinearRegression(), "ridge": Ridge(30.0)}
    found = robust_comparison(X, Y, seeds=2, settings=["clean"], methods=mine)
    assert found.methods == ("plain", "ridge")
    assert found.ours == ()
    assert "plain" in found.conclusion()
    assert not hasattr(mine["plain"], "coef_")


# figure and errors


def test_the_figure_draws_into_given_axes(found):
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots()
    assert found.plot(ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found.settings)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(found.methods)
    own = found.plot()
    own.figure.draw_without_rendering()
    assert own is not ax
    plt.close(own.figure)
    plt.close(figure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["dirty"]}, "settings are clean, .*; got 'dirty'"),
        ({"settings": []}, "settings are clean"),
        ({"methods": ["Lasso"]}, "methods are least squares, .*; got 'Lasso'"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"test_size": 1.0}, "test_size a share"),
        ({"eps": -1.0}, "eps must be finite and not negative"),
        ({"norm": 3}, "norm must be 1, 2 or inf"),
        ({"methods": {"forest": RandomForestRegressor(2)}}, "'forest' is not linear"),
    ],
)
def test_errors_say_what_to_do(options, message):
    with pytest.raises(InputError, match=message):
        robust_comparison(X, Y, **{"seeds": 1, **options})


def test_an_unknown_name_lists_the_known_ones(found):
    with pytest.raises(InputError, match="there are the settings clean"):
        found.values("clean", "Lasso")
