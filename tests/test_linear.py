"""The theorems of linear models under attack, and the functions that state them."""

import itertools
import math

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import robustlearn as rl
from robustlearn.attacks import linear_exact, pgd
from robustlearn.errors import InputError
from robustlearn.linear import (
    AdversarialClassifier,
    AdversarialRegressor,
    certified_radius,
    eps_max,
    interpolation_threshold,
    worst_case_input,
    worst_case_loss,
)

NORMS = [1, 2, math.inf]
DUAL = {1: math.inf, 2: 2, math.inf: 1}
THRESHOLD = 1.35
GOLDEN = (1 + math.sqrt(5)) / 2
REGRESSION = {
    "squared": lambda r: r**2,
    "absolute": lambda r: np.abs(r),
    "huber": lambda r: huber(r, THRESHOLD),
}
CLASSIFICATION = {
    "logistic": lambda m: np.log1p(np.exp(-m)),
    "hinge": lambda m: np.maximum(0, 1 - m),
    "squared_hinge": lambda m: np.maximum(0, 1 - m) ** 2,
}
LOSSES = [*REGRESSION, *CLASSIFICATION]
seeds = st.integers(0, 10_000)
norms = st.sampled_from(NORMS)
finite = st.floats(-20, 20)
positive = st.floats(0.01, 10)


def huber(r, k):
    return np.where(np.abs(r) <= k, r**2 / 2, k * np.abs(r) - k**2 / 2)


def clean_loss(loss, z, y):
    """The loss of predictions z, without an attack."""
    if loss in REGRESSION:
        return REGRESSION[loss](z - y)
    return CLASSIFICATION[loss](y * z)


def problem(seed, loss, n=6, d=5):
    """A model with zeros and ties, samples of which one is fitted exactly, units with a zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(d) * (rng.random(d) < 0.8)
    w = np.round(w) if seed % 3 == 0 else w
    b, x = rng.standard_normal(), rng.standard_normal((n, d))
    y = x @ w + b + 2 * rng.standard_normal(n)
    y[0] = x[0] @ w + b
    y = y if loss in REGRESSION else np.where(y > 0, 1.0, -1.0)
    scale = rng.uniform(0.1, 3, d) * (rng.random(d) < 0.7)
    return w, b, x, y, rng.uniform(0, 2), scale


def extremes(norm, w, d):
    """Changes of norm 1 of which one is worst: the corners of the ball, or its points at ±w."""
    if norm == 1:
        return np.concatenate([np.eye(d), -np.eye(d)])
    if norm == math.inf:
        return np.array(list(itertools.product([-1.0, 1.0], repeat=d)))
    direction = w / (np.linalg.norm(w) or 1.0)
    return np.stack([direction, -direction])


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, norm=norms, units=st.booleans())
def test_the_closed_form_is_the_maximum_over_the_ball(loss, seed, norm, units):
    w, b, x, y, eps, scale = problem(seed, loss)
    d = len(w)
    options = {"feature_scale": scale} if units else {}
    scale = scale if units else np.ones(d)
    worst = worst_case_loss(w, b, x, y, eps, norm, loss, huber_threshold=THRESHOLD, **options)
    assert worst.shape == (len(y),)
    corners = eps * scale * extremes(norm, scale * w, d)
    reached = [clean_loss(loss, (x + delta) @ w + b, y) for delta in corners]
    np.testing.assert_allclose(worst, np.max(reached, axis=0), rtol=1e-10, atol=1e-12)
    rng = np.random.default_rng(seed)
    for _ in range(20):
        delta = rng.standard_normal(x.shape)
        delta *= eps * rng.random() / np.linalg.norm(delta, norm, axis=1, keepdims=True)
        value = clean_loss(loss, (x + scale * delta) @ w + b, y)
        assert (value <= worst * (1 + 1e-10) + 1e-12).all()


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds, norm=norms, units=st.booleans())
def test_the_worst_input_is_feasible_and_attains_the_worst_loss(loss, seed, norm, units):
    w, b, x, y, eps, scale = problem(seed, loss)
    scale = scale if units else np.ones(len(w))
    options = {"feature_scale": scale} if units else {}
    point = worst_case_input(
        w, b, x, y, eps, norm, classification=loss in CLASSIFICATION, **options
    )
    assert (point[:, scale == 0] == x[:, scale == 0]).all()
    moved = (point - x)[:, scale > 0] / scale[scale > 0]
    lengths = np.linalg.norm(moved, norm, axis=1) if moved.size else np.zeros(len(x))
    assert (lengths <= eps * (1 + 1e-12) + 1e-13).all()
    worst = worst_case_loss(w, b, x, y, eps, norm, loss, huber_threshold=THRESHOLD, **options)
    value = clean_loss(loss, point @ w + b, y)
    np.testing.assert_allclose(value, worst, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_without_budget_or_reach_the_worst_is_the_clean_loss(loss, norm):
    w, b, x, y, eps, _ = problem(4, loss)
    clean = clean_loss(loss, x @ w + b, y)
    classification = loss in CLASSIFICATION
    frozen = {"feature_scale": np.zeros(len(w))}
    for budget, options in ((0.0, {}), (eps, frozen)):
        value = worst_case_loss(w, b, x, y, budget, norm, loss, **options)
        np.testing.assert_allclose(value, clean, rtol=1e-12)
        point = worst_case_input(w, b, x, y, budget, norm, classification=classification, **options)
        assert (point == x).all()
    still = worst_case_input(0 * w, b, x, y, eps, norm, classification=classification)
    assert np.linalg.norm(still - x, norm, axis=1).max() <= eps


@settings(max_examples=30, deadline=None)
@given(seeds, norms, st.sampled_from([*REGRESSION]))
def test_a_joint_budget_on_x_and_y_counts_y_as_a_feature(seed, norm, loss):
    w, b, x, y, eps, _ = problem(seed, loss)
    joint, wide = np.append(w, -1.0), np.column_stack([x, y])
    worst = worst_case_loss(joint, b, wide, np.zeros(len(y)), eps, norm, loss)
    height = np.abs(x @ w + b - y) + eps * np.linalg.norm(joint, DUAL[norm])
    np.testing.assert_allclose(worst, REGRESSION[loss](height), rtol=1e-10)
    corners = eps * extremes(norm, joint, len(joint))
    reached = [clean_loss(loss, (x + c[:-1]) @ w + b, y + c[-1]) for c in corners]
    np.testing.assert_allclose(worst, np.max(reached, axis=0), rtol=1e-10)


@settings(max_examples=30, deadline=None)
@given(seeds, norms, st.sampled_from([*REGRESSION]), positive)
def test_a_label_budget_is_added_to_the_residual(seed, norm, loss, kappa):
    w, b, x, y, eps, _ = problem(seed, loss)
    shifts = np.linspace(-kappa, kappa, 21)
    reached = [worst_case_loss(w, b, x, y + shift, eps, norm, loss) for shift in shifts]
    height = np.abs(x @ w + b - y) + kappa + eps * np.linalg.norm(w, DUAL[norm])
    np.testing.assert_allclose(np.max(reached, axis=0), REGRESSION[loss](height), rtol=1e-10)


@settings(max_examples=50, deadline=None)
@given(r=finite, c=positive)
def test_the_adversarial_square_is_berhu_up_to_the_golden_ratio(r, c):
    square = worst_case_loss([c], 0.0, [[0.0]], [-r], 1.0)[0] - c**2
    berhu = abs(r) if abs(r) <= c else (r**2 + c**2) / (2 * c)
    assert 2 * c * berhu * (1 - 1e-9) - 1e-9 <= square <= GOLDEN * 2 * c * berhu + 1e-9
    worst = c * GOLDEN  # where the ratio is attained
    square = worst_case_loss([c], 0.0, [[0.0]], [worst], 1.0)[0] - c**2
    assert square == pytest.approx(GOLDEN * (worst**2 + c**2), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(r=finite, k=positive, c=positive)
def test_huber_is_the_benign_shift_and_the_adversary_the_worst(r, k, c):
    found = minimize_scalar(
        lambda z: (r - z) ** 2 / 2 + k * abs(z), bounds=(-21, 21), options={"xatol": 1e-10}
    )
    value = worst_case_loss([1.0], 0.0, [[r]], [0.0], 0.0, loss="huber", huber_threshold=k)[0]
    assert value == pytest.approx(min(found.fun, r**2 / 2), abs=1e-7)
    shifts = np.linspace(-c, c, 101)
    value = worst_case_loss([c], 0.0, [[0.0]], [-r], 1.0)[0]
    assert value / 2 == pytest.approx(((r + shifts) ** 2 / 2).max(), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(s=st.floats(-3, 3), c=st.floats(0.01, 3))
def test_conjugates_of_the_adversarial_square_and_of_huber(s, c):
    r = np.linspace(-8, 8, 16_001)
    zero = np.zeros((len(r), 1))
    square = worst_case_loss([c], 0.0, zero, r, 1.0) / 2 - c**2 / 2  # r²/2 + c|r|
    assert (s * r - square).max() == pytest.approx(max(abs(s) - c, 0) ** 2 / 2, abs=1e-6)
    value = worst_case_loss([0.0], 0.0, zero, r, 0.0, loss="huber", huber_threshold=c)
    conjugate = (s * r - value).max()
    if abs(s) <= c:
        assert conjugate == pytest.approx(s**2 / 2, abs=1e-6)
    else:  # infinite: it grows with the grid
        assert conjugate >= (abs(s) - c) * 8


@settings(max_examples=50, deadline=None)
@given(seeds, norms)
def test_a_budget_per_sample_costs_less_than_the_coupled_bound(seed, norm):
    w, b, x, y, eps, _ = problem(seed, "squared")
    worst = math.sqrt(worst_case_loss(w, b, x, y, eps, norm).mean())
    c = eps * np.linalg.norm(w, DUAL[norm])
    rms = math.sqrt(np.mean((x @ w + b - y) ** 2))
    assert worst <= (rms + c) * (1 + 1e-12)
    level = x @ w + b - rms  # residuals of one size: equality
    assert math.sqrt(worst_case_loss(w, b, x, level, eps, norm).mean()) == pytest.approx(rms + c)


@settings(max_examples=30, deadline=None)
@given(seeds, norms, st.floats(0.01, 2), st.floats(0.1, 3))
def test_huber_plus_a_norm_is_the_budget_shared_by_all_samples(seed, norm, rho, k):
    w, b, x, y, _, _ = problem(seed, "huber")
    n, size = len(y), np.linalg.norm(w, DUAL[norm])

    def mean_loss(points):
        return worst_case_loss(w, b, points, y, 0.0, norm, "huber", huber_threshold=k).mean()

    far = np.abs(x @ w + b - y).argmax()
    bound = mean_loss(x) + rho * k * size
    # a convex function of the budgets is largest where one sample has all of it
    spent = []
    for i in range(n):
        point = x.copy()
        point[i] = worst_case_input(w, b, x[[i]], y[[i]], n * rho, norm)
        spent.append(mean_loss(point))
    assert max(spent) <= bound * (1 + 1e-10) + 1e-12
    if abs(x[far] @ w + b - y[far]) >= k:
        assert max(spent) == pytest.approx(bound, rel=1e-10)
    rng = np.random.default_rng(seed)
    for _ in range(10):
        shares = n * rho * rng.dirichlet(np.full(n, 0.3))
        delta = rng.standard_normal(x.shape)
        delta *= (shares / np.linalg.norm(delta, norm, axis=1))[:, None]
        assert mean_loss(x + delta) <= bound * (1 + 1e-10) + 1e-12
    alone = worst_case_loss(w, b, x, y, rho, norm, "huber", huber_threshold=k)
    np.testing.assert_allclose(alone, huber(np.abs(x @ w + b - y) + rho * size, k), rtol=1e-10)
    assert alone.mean() <= bound * (1 + 1e-10) + 1e-12


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(40, 6), (12, 25)])
@pytest.mark.parametrize("units", [False, True])
def test_eps_max_is_where_the_features_stop_to_help(shape, norm, intercept, units):
    rng = np.random.default_rng(shape[0])
    x, y = rng.standard_normal(shape) + 0.5, rng.standard_normal(shape[0]) + 1
    scale = rng.uniform(0.5, 2, shape[1]) if units else None
    options = {"fit_intercept": intercept, "feature_scale": scale}
    edge = eps_max(x, y, norm, **options)
    constant = ((y - y.mean()) ** 2).mean() if intercept else (y**2).mean()
    above = AdversarialRegressor(edge * (1 + 1e-9), norm=norm, **options).fit(x, y)
    assert (above.coef_ == 0).all()
    assert above.eps_max_ == pytest.approx(edge, rel=1e-12)
    assert above.objective_ == pytest.approx(constant, rel=1e-12)
    assert above.dual_gap_ <= 1e-8 * constant  # w = 0 is proven best
    for factor, helps in ((1 - 1e-2, True), (1 + 1e-2, False)):
        _, _, value = oracles.linear_model(
            x, y, edge * factor, norm, "squared", intercept=intercept, scale=scale
        )
        assert (value < constant * (1 - 1e-6)) == helps


def test_eps_max_of_a_constant_is_zero():
    x = np.arange(6.0).reshape(3, 2)
    assert eps_max(x, [2.0, 2.0, 2.0]) == 0
    assert eps_max(x, [0.0, 0.0, 0.0], fit_intercept=False) == 0
    assert eps_max(x, [2.0, 2.0, 2.0], fit_intercept=False) > 0
    assert eps_max(0 * x, [1.0, 2.0, 4.0]) == 0


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_the_interpolation_threshold_from_both_sides(seed, norm, intercept):
    rng = np.random.default_rng(seed)
    n, d = 8, 14
    x, y = rng.standard_normal((n, d)), rng.standard_normal(n) + 1
    edge = interpolation_threshold(x, y, norm, fit_intercept=intercept)
    size, peak = oracles.interpolator(x, y, norm, intercept=intercept)
    assert edge == pytest.approx(1 / (n * peak), rel=2e-3)  # the oracle has room
    for factor, best in ((1 - 1e-2, True), (1.1, False)):
        eps = edge * factor
        w, b, value = oracles.linear_model(x, y, eps, norm, "squared", intercept=intercept)
        interpolating = (eps * size) ** 2
        assert (value >= interpolating * (1 - 1e-7)) == best
        assert (np.abs(x @ w + b - y).max() < 1e-4) == best


@pytest.mark.parametrize("norm", NORMS)
def test_below_the_interpolation_threshold_the_estimator_interpolates(norm):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((8, 14)), rng.standard_normal(8)
    edge = interpolation_threshold(x, y, norm)
    below = AdversarialRegressor(0.5 * edge, norm=norm).fit(x, y)
    np.testing.assert_allclose(below.predict(x), y, atol=1e-6)
    above = AdversarialRegressor(2 * edge, norm=norm, tol=1e-4).fit(x, y)
    assert np.abs(above.predict(x) - y).max() > 1e-2


def test_interpolation_thresholds_without_a_minimum():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((12, 4)), rng.standard_normal(12)
    wide = rng.standard_normal((4, 12))
    for norm in NORMS:
        assert interpolation_threshold(x, y, norm) == 0  # nothing interpolates
        assert interpolation_threshold(wide, np.ones(4), norm) == math.inf  # w = 0 does
        assert interpolation_threshold(wide, np.ones(4), norm, fit_intercept=False) < math.inf
        assert interpolation_threshold(x, x @ np.ones(4), norm) > 0
        once, twice = np.vstack([wide, wide]), np.tile(y[:4], 2)  # rows twice: two shares each
        assert interpolation_threshold(once, twice, norm) == pytest.approx(
            interpolation_threshold(wide, y[:4], norm), rel=1e-6
        )


# x·a + b, y·c + f: what happens to the threshold is known
UNITS = {
    "small": (1e-6, 0.0, 1.0, 0.0),
    "large": (1e6, 0.0, 1.0, 0.0),
    "far": (1.0, 1e3, 1.0, 0.0),
    "small targets": (1.0, 0.0, 1e-6, 0.0),
    "large targets": (1.0, 0.0, 1e6, 0.0),
    "not so far": (1.0, 10.0, 1.0, 0.0),
    "far targets": (1.0, 0.0, 1.0, 1e3),
    "very far targets": (1.0, 0.0, 1.0, 1e9),
}


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("norm", NORMS)
def test_thresholds_follow_the_units_of_the_data(norm, units):
    rng = np.random.default_rng(20)
    x, y = rng.standard_normal((20, 40)), rng.standard_normal(20)
    factor, shift, y_factor, y_shift = UNITS[units]
    moved = factor * x + shift, y_factor * y + y_shift
    close = 1e-6 if y_shift == 1e9 else 1e-9  # digits that y has lost
    assert eps_max(*moved, norm) == pytest.approx(factor * eps_max(x, y, norm), rel=close)
    edge = interpolation_threshold(x, y, norm)
    assert interpolation_threshold(*moved, norm) == pytest.approx(factor * edge, rel=1e-5)


def wrapped(w, b):
    """A linear network in float64."""
    net = torch.nn.Linear(len(w), 1).double()
    with torch.no_grad():
        net.weight.copy_(torch.as_tensor(w)[None])
        net.bias.fill_(b)
    return rl.wrap(net, task="regression")


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_attacks_on_a_network_reach_the_closed_form(norm, units):
    w, b, x, y, _, scale = problem(1, "squared", n=30, d=8)
    eps, scale = 0.3, (scale if units else np.ones(len(w)))
    worst = worst_case_loss(w, b, x, y, eps, norm, feature_scale=scale)
    model, threat = wrapped(w, b), rl.LpBall(norm, eps, scale=scale)
    points, target = torch.as_tensor(x), torch.as_tensor(y)
    exact = linear_exact(model, points, target, threat).numpy()
    np.testing.assert_allclose((exact @ w + b - y) ** 2, worst, rtol=1e-9, atol=1e-12)
    steps = pgd(model, points, target, threat, restarts=2).numpy()
    reached = (steps @ w + b - y) ** 2
    assert (reached <= worst * (1 + 1e-9)).all()
    assert (reached >= 0.99 * worst).all()


def test_classes_against_the_attack_on_a_network():
    """The logit of two classes: z = wᵀx + b against 0."""
    w, b, x, y, eps, _ = problem(1, "hinge", n=20)
    net = torch.nn.Linear(len(w), 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.as_tensor(np.stack([0 * w, w])))
        net.bias.copy_(torch.as_tensor([0.0, b]))
    for norm in NORMS:
        label = torch.as_tensor((y > 0).astype(int))
        found = linear_exact(rl.wrap(net), torch.as_tensor(x), label, rl.LpBall(norm, eps))
        margin = y * (found.numpy() @ w + b)
        worst = worst_case_loss(w, b, x, y, eps, norm, "logistic")
        np.testing.assert_allclose(CLASSIFICATION["logistic"](margin), worst, rtol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", NORMS)
def test_the_worst_loss_is_convex_in_the_model(loss, norm):
    w, b, x, y, eps, _ = problem(7, loss)
    rng = np.random.default_rng(0)
    for _ in range(30):
        v, a, t = rng.standard_normal(len(w)), rng.standard_normal(), rng.random()
        ends = [worst_case_loss(*end, x, y, eps, norm, loss) for end in ((w, b), (v, a))]
        middle = t * w + (1 - t) * v, t * b + (1 - t) * a
        between = worst_case_loss(*middle, x, y, eps, norm, loss)
        assert (between <= t * ends[0] + (1 - t) * ends[1] + 1e-10).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and not negative"),
        ({"eps": math.nan}, "eps must be finite"),
        ({"eps": math.inf}, "eps must be finite"),
        ({"norm": 3}, "norm must be 1, 2 or inf"),
        ({"norm": "two"}, "norm must be 1, 2 or inf"),
        ({"norm": [1]}, "norm must be 1, 2 or inf"),
        ({"loss": "cubic"}, "loss must be one of squared, absolute"),
        ({"loss": "hinge"}, "labels of the hinge loss are −1 and 1"),
        ({"loss": "huber", "huber_threshold": 0.0}, "threshold of the Huber loss must be positive"),
        ({"w": [1.0, 2.0]}, "X has 1 features; w has shape"),
        ({"feature_scale": [1.0, 2.0]}, "one number ≥ 0 for each of the 1 features"),
        ({"feature_scale": [-1.0]}, "one number ≥ 0"),
        ({"feature_scale": [math.nan]}, "one number ≥ 0"),
        ({"X": [[math.nan]]}, "NaN"),
        ({"y": [1.0, 2.0]}, "inconsistent numbers of samples"),
    ],
)
def test_errors_of_the_closed_form_say_what_to_do(change, message):
    arguments = {"w": [1.0], "b": 0.0, "X": [[1.0]], "y": [2.0], "eps": 0.1} | change
    with pytest.raises(ValueError, match=message):
        worst_case_loss(**arguments)
    if not {"loss", "y"} & set(change):
        with pytest.raises(ValueError, match=message):
            worst_case_input(**arguments)


def test_errors_of_the_thresholds_say_what_to_do():
    x, y = np.eye(3), np.arange(3.0)
    with pytest.raises(InputError, match="feature_scale holds zeros"):
        eps_max(x, y, feature_scale=[0.0, 1.0, 1.0])
    for function in (eps_max, interpolation_threshold):
        with pytest.raises(InputError, match="norm must be 1, 2 or inf"):
            function(x, y, 3)
        with pytest.raises(ValueError, match="NaN"):
            function(x, [0.0, math.nan, 1.0])


def test_a_linear_program_that_fails_is_told(monkeypatch):
    from robustlearn.linear import closed_form

    failed = closed_form.linprog([1.0], A_eq=[[1.0]], b_eq=[-1.0])  # of no solution
    assert failed.status != 0
    monkeypatch.setattr(closed_form, "linprog", lambda *args, **options: failed)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 9)), rng.standard_normal(5)
    x, y = np.vstack([x, x]), np.tile(y, 2)  # rows twice: the dual has freedom
    for norm in NORMS:
        with pytest.raises(RuntimeError, match="a linear program of the interpolation threshold"):
            interpolation_threshold(x, y, norm)


def test_a_radius_wants_the_columns_of_the_fit():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    x = pandas.DataFrame(rng.standard_normal((20, 3)) * [1, 5, 9], columns=list("abc"))
    y = (x["a"] + rng.standard_normal(20) > 0).astype(int)
    for model in (LogisticRegression(), make_pipeline(StandardScaler(), AdversarialClassifier())):
        model.fit(x, y)
        radius = certified_radius(model, x)
        np.testing.assert_array_equal(certified_radius(model, x.to_numpy()), radius)
        for wrong in (x[["b", "a", "c"]], x.rename(columns={"a": "z"})):
            with pytest.raises(InputError, match="fitted with a, b, c, in this order"):
                certified_radius(model, wrong)
