"""Trees: leaves that are the library's own, and worst cases against enumeration and MILP."""

import itertools
import math
import sys
import types

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn import ensemble, tree
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.linear_model import LogisticRegression

import robustlearn as rl
from robustlearn import _leaves, losses
from robustlearn.attacks import tree_exact
from robustlearn.certify import certified_radius
from robustlearn.errors import InputError
from robustlearn.models import EstimatorModel, TreeModel
from robustlearn.models.trees import float32_cut, read

CANCER, WINE, DIABETES = (
    load(return_X_y=True) for load in (load_breast_cancer, load_wine, load_diabetes)
)


def made(kind, **options):
    """An estimator by name; skip where its library is not installed."""
    home = {"XGB": "xgboost", "LGBM": "lightgbm"}.get(kind[: 3 + (kind[0] == "L")], None)
    if home is None:
        options.setdefault("random_state", 0)
        return getattr(tree if kind.startswith(("DecisionTree", "ExtraTreeC")) else ensemble, kind)(
            **options
        )
    library = pytest.importorskip(home)
    quiet = {"verbose": -1} if home == "lightgbm" else {}
    return getattr(library, kind)(n_jobs=1, **quiet, **options)


KINDS = {
    "DecisionTree": {},
    "RandomForest": {"n_estimators": 12},
    "ExtraTrees": {"n_estimators": 12},
    "GradientBoosting": {"n_estimators": 12},
    "HistGradientBoosting": {"max_iter": 12},
    "XGB": {"n_estimators": 12},
    "LGBM": {"n_estimators": 12},
}
CASES = [(kind, data) for kind in KINDS for data in ("two", "three", "numbers")]


@pytest.mark.parametrize(("kind", "data"), CASES)
def test_the_leaves_add_up_to_the_library_bit_for_bit(kind, data):
    """On the samples, and on the cuts, where < and ≤ in float32 and float64 part."""
    x, y = {"two": CANCER, "three": WINE, "numbers": DIABETES}[data]
    suffix = "Regressor" if data == "numbers" else "Classifier"
    model = rl.wrap(made(kind + suffix, **KINDS[kind]).fit(x, y))
    assert isinstance(model, TreeModel)
    points = np.concatenate([x, model.trees.probes(300, x.shape[1])])
    assert (model.trees.holds(points).sum(1) == model.trees.tree[-1] + 1).all()
    expected = model.scores(points).reshape(len(points), -1)
    np.testing.assert_array_equal(model.trees.scores(points), expected.astype(float))


@given(st.floats(-1024, 1024, width=32))
def test_the_last_number_that_rounds_to_a_float32(last):
    cut = float(float32_cut(np.float32(last)))
    assert np.float32(cut) <= np.float32(last) < np.float32(np.nextafter(cut, np.inf))


# ---------------------------------------------------------------------- enumeration


def cells(trees, x, threat):
    """The nearest point to x of every cell that all the cuts make, and its distance."""
    d = len(x)
    ends = [np.unique(trees.low[(trees.feature == f) & np.isfinite(trees.low)]) for f in range(d)]
    nearest = []
    for f in range(d):
        low = np.r_[-np.inf, ends[f]]
        high = np.r_[np.nextafter(ends[f], -np.inf), np.inf]
        nearest.append(np.clip(x[f], low, high))
    points = torch.from_numpy(np.array(list(itertools.product(*nearest))))
    delta = points - torch.from_numpy(x)
    inside = torch.ones(len(points), dtype=torch.bool)
    for wall, side in ((threat.lower, 1), (threat.upper, -1)):
        if wall is not None:
            inside &= (side * (points - wall) >= 0).all(1)
    return points, torch.where(inside, threat.norm(delta), torch.inf)


def small(kind, classes, seed=0, **options):
    """A small ensemble on three features in [0, 1]."""
    rng = np.random.default_rng(seed)
    x = rng.random((150, 3)).round(2)
    if classes:
        y = ((x @ [1.0, 2.0, 3.0] + 0.3 * rng.standard_normal(150)) / 6 * classes).astype(int)
        y = y.clip(0, classes - 1)
    else:
        y = np.sin(5 * x[:, 0]) + x[:, 1] * x[:, 2]
    model = rl.wrap(made(kind, **options).fit(x, y))
    return model, torch.from_numpy(rng.random((12, 3)))


THREATS = {
    "ball": {},
    "box": {"lower": 0.1, "upper": 0.8},
    "mask and units": {"mask": [True, False, True], "scale": [1.0, 1.0, 0.5]},
}
FEW = {"max_depth": 2}
SMALL = [
    ("RandomForestClassifier", 3, {"n_estimators": 5, **FEW}),
    ("GradientBoostingClassifier", 2, {"n_estimators": 6, **FEW}),
    ("DecisionTreeClassifier", 4, {"max_depth": 4}),
    ("XGBClassifier", 3, {"n_estimators": 2, **FEW}),
    ("HistGradientBoostingClassifier", 2, {"max_iter": 5, **FEW}),
]


@pytest.mark.parametrize("shape", THREATS)
@pytest.mark.parametrize(("p", "eps"), [(math.inf, 0.15), (2, 0.2), (1, 0.25), (3, 0.2), (0, 1)])
@pytest.mark.parametrize(("kind", "classes", "options"), SMALL)
def test_worst_margin_and_radius_are_those_of_enumeration(kind, classes, options, p, eps, shape):
    model, x = small(kind, classes, **options)
    threat = rl.LpBall(p, eps, **THREATS[shape])
    if shape == "box":
        x = x.clamp(0.1, 0.8)
    label = model(x).argmax(1)
    certificate = rl.certify(model, x.numpy(), threat, method="trees")
    bound = rl.certify(model, x.numpy(), threat, method="leaves")
    attacked = tree_exact(model, x, label, threat)
    assert threat.contains(x, attacked).all()
    reached = losses.margin(model(attacked), label).numpy()
    for row in range(len(x)):
        points, distance = cells(model.trees, x[row].numpy(), threat)
        margin = losses.margin(model(points), label[row].expand(len(points)))
        worst = float(margin[distance <= eps * (1 + 1e-12)].min())
        lost = distance[margin <= 1e-12]
        radius = float(lost.min()) if len(lost) else math.inf
        assert certificate.margin[row] == pytest.approx(worst, abs=1e-6)
        assert reached[row] == pytest.approx(worst, abs=1e-6)
        assert bound.margin[row] <= worst + 1e-6
        assert certificate.radius[row] == pytest.approx(radius, rel=2e-3)
        assert bound.radius[row] <= certificate.radius[row] <= radius * (1 + 1e-12)
    assert certificate.exact
    assert (bound.certified <= certificate.certified).all()


@pytest.mark.parametrize("method", ["trees", "leaves"])
def test_a_tie_of_pure_trees_is_not_safe(method):
    """Six votes, three against three: the sum rounds to more than 0, argmax takes the first."""
    rng = np.random.default_rng(9)
    forest = ensemble.RandomForestClassifier(6, random_state=9)
    forest.fit(rng.random((12, 2)), rng.integers(0, 2, 12))
    model, x = rl.wrap(forest), rng.random((20, 2))
    lost = np.empty(len(x))
    for row, label in enumerate(forest.predict(x)):
        points, distance = cells(model.trees, x[row], rl.LpBall(math.inf, 1))
        lost[row] = distance[forest.predict(points.numpy()) != label].min()
    found = rl.certify(
        model, x, rl.LpBall(math.inf, torch.from_numpy(lost * (1 + 1e-9))), method=method
    )
    assert (found.radius <= lost).all()
    assert not found.certified.any()


@pytest.mark.parametrize(("p", "truth"), [(math.inf, 0.4), (2, 0.4 * 2**0.5), (1, 0.8), (0, 2)])
def test_the_radius_where_no_leaf_is_far_but_both_together_are(p, truth):
    """Class 1 needs both features beyond 0.5; each stump is reached by moving one of them."""
    side = np.linspace(0, 1, 21)[np.arange(21) != 10]
    x = np.array(list(itertools.product(side, side)))
    boosted = ensemble.GradientBoostingClassifier(n_estimators=40, max_depth=1, random_state=0)
    boosted.fit(x, (x > 0.5).all(1).astype(int))
    threat = rl.LpBall(p, 0.41 if p else 1)
    certificate = rl.certify(boosted, [[0.1, 0.1]], threat, y=[0])
    assert certificate.radius[0] == pytest.approx(truth, rel=2e-3)


@pytest.mark.parametrize("p", [math.inf, 2, 0])
@pytest.mark.parametrize("kind", ["RandomForestRegressor", "GradientBoostingRegressor"])
def test_the_interval_of_a_regressor_is_that_of_enumeration(kind, p):
    model, x = small(kind, 0, n_estimators=5, **FEW)
    threat, y = rl.LpBall(p, 1 if p == 0 else 0.2), torch.zeros(len(x), dtype=torch.float64) + 0.7
    certificate = rl.certify(model, x.numpy(), threat, y=y.numpy())
    attacked = losses.squared_error(model(tree_exact(model, x, y, threat)), y)
    for row in range(len(x)):
        points, distance = cells(model.trees, x[row].numpy(), threat)
        values = model(points)[distance <= threat.eps * (1 + 1e-12)]
        assert certificate.lower[row] == pytest.approx(float(values.min()), abs=1e-9)
        assert certificate.upper[row] == pytest.approx(float(values.max()), abs=1e-9)
    np.testing.assert_allclose(attacked, certificate.loss, atol=1e-9)


@pytest.mark.parametrize("p", [0, 1, 2, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_attack_keeps_the_contract_of_every_attack(p, dtype):
    """As tests/test_attacks.py has it for networks."""
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(9, 1, 2, 3, generator=generator, dtype=torch.float64).to(dtype)
    rows = torch.rand(200, 6, generator=generator, dtype=torch.float64).numpy()
    forest = ensemble.RandomForestClassifier(8, max_depth=4, random_state=0)
    model = rl.wrap(forest.fit(rows, (3 * rows.mean(1)).astype(int)))
    y = model(x).argmax(1)
    eps = torch.linspace(0, {0: 3, 1: 1.0}.get(p, 0.4), len(x), dtype=torch.float64)
    threat = rl.LpBall(p, eps, lower=0.0, upper=1.0, mask=torch.rand(1, 2, 3) < 0.8)
    kept = x.clone()
    x_adv = tree_exact(model, x, y, threat)
    assert (x_adv.shape, x_adv.dtype) == (x.shape, dtype)
    assert threat.contains(x, x_adv).all()
    assert torch.equal(x_adv[0], x[0])
    assert torch.equal(x, kept)
    order = torch.tensor([4, 1, 8, 0, 2, 6, 3, 7, 5])
    again = tree_exact(model, x[order], y[order], threat.select(order))
    assert torch.equal(again, x_adv[order])
    assert tree_exact(model, x[:0], y[:0], threat).shape == (0, 1, 2, 3)
    assert losses.margin(model(x_adv), y).mean() < losses.margin(model(x), y).mean() - 0.01


# ---------------------------------------------------------------------- MILP


def least_by_milp(trees, weight, x, p, eps):
    """Kantchelian, Tygar and Joseph (2016): one binary per cut, and a budget for finite p.

    z = 1 where x + δ is below the cut; leaves are continuous, their cost the price of the cuts.
    """
    cuts = sorted(
        {
            (f, h)
            for f, h in zip(trees.feature.ravel(), trees.high.ravel(), strict=True)
            if h < 1e300
        }
    )
    place = {cut: number for number, cut in enumerate(cuts)}
    b, m = len(cuts), len(weight)
    rows, columns, entries, low, high = [], [], [], [], []

    def add(terms, least, most):
        rows.extend([len(low)] * len(terms))
        columns.extend(column for column, _ in terms)
        entries.extend(entry for _, entry in terms)
        low.append(least)
        high.append(most)

    for first, second in itertools.pairwise(cuts):
        if first[0] == second[0]:
            add([(place[first], 1), (place[second], -1)], -np.inf, 0)
    for number in range(trees.tree[-1] + 1):
        add([(b + leaf, 1) for leaf in np.flatnonzero(trees.tree == number)], 1, 1)
    for leaf in range(m):
        for f, least, most in zip(
            trees.feature[leaf], trees.low[leaf], trees.high[leaf], strict=True
        ):
            if most < 1e300:
                add([(b + leaf, 1), (place[f, most], -1)], -np.inf, 0)
            if least > -1e300:
                add([(b + leaf, 1), (place[f, np.nextafter(least, -np.inf)], 1)], -np.inf, 1)
    below, above = np.zeros(b + m), np.ones(b + m)
    budget, constant = [], 0.0
    for (f, cut), number in place.items():
        distance = max(x[f] - cut, cut - x[f]) / eps
        if x[f] <= cut:
            below[number] = 1.0 if distance >= 1 else 0.0
        elif distance > 1:
            above[number] = 0.0
    if not math.isinf(p):
        for f in range(len(x)):
            mine = [c for c in cuts if c[0] == f]
            up = [c for c in mine if x[f] <= c[1]]
            down = [c for c in mine if x[f] > c[1]][::-1]
            for side, sign in ((up, -1), (down, 1)):
                before = 0.0
                for cut in side:
                    price = min((abs(cut[1] - x[f]) / eps) ** p, 4.0)
                    budget.append((place[cut], sign * (price - before)))
                    constant += (price - before) if sign < 0 else 0.0
                    before = price
        add(budget, -np.inf, 1 - constant)
    matrix = scipy.sparse.csr_array((entries, (rows, columns)), shape=(len(low), b + m))
    found = milp(
        np.r_[np.zeros(b), weight],
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.r_[np.ones(b), np.zeros(m)],
        bounds=Bounds(below, above),
        options={"mip_rel_gap": 0, "time_limit": 60},
    )
    assert found.status == 0
    return found.fun


@pytest.mark.parametrize(("p", "eps"), [(math.inf, 0.04), (2, 0.06), (1, 0.1)])
@pytest.mark.parametrize("kind", ["GradientBoosting", "HistGradientBoosting", "XGB", "LGBM"])
def test_the_search_agrees_with_milp_on_data(kind, p, eps):
    x, y = CANCER
    x = (x - x.min(0)) / np.ptp(x, axis=0)
    options = {"max_iter" if kind.startswith("Hist") else "n_estimators": 30, "max_depth": 3}
    model = rl.wrap(made(kind + "Classifier", **options).fit(x, y))
    some = np.arange(0, 500, 125)
    certificate = rl.certify(model, x[some], rl.LpBall(p, eps), y=y[some])
    for row, number in enumerate(some):
        weight, offset = _leaves.gap(model.trees, int(y[number]), 1 - int(y[number]))
        least = least_by_milp(model.trees, weight, x[number], p, eps) + offset
        assert certificate.margin[row] == pytest.approx(least, abs=1e-6)


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("method", ["trees", "linear"])
def test_the_certified_radius_by_bisection_is_that_of_the_method(method):
    x, y = WINE
    estimator = LogisticRegression() if method == "linear" else tree.DecisionTreeClassifier()
    model, x = rl.wrap(estimator.fit(x[:, :3], y)), x[::20, :3]
    threat = rl.LpBall(2, 0.5)
    truth = rl.certify(model, x, threat, method=method).radius.clip(max=0.5)
    found = certified_radius(model, x, threat, method=method, halvings=6)
    assert (found <= truth).all()
    assert (found >= truth * (1 - 2e-3) - 0.5 / 2**6).all()
    with pytest.raises(InputError, match="certify bounds a regressor"):
        certified_radius(small("DecisionTreeRegressor", 0, **FEW)[0], np.zeros((1, 3)), threat)


def test_what_evaluate_proves_does_not_depend_on_a_clock(monkeypatch):
    """One that is so slow that every search ends at its first look."""
    model, x = small("RandomForestClassifier", 3, n_estimators=15, max_depth=4)
    threat, ticks = rl.LpBall(math.inf, 0.1), itertools.count(0, 10)
    whole = rl.certify(model, x.numpy(), threat)
    slow = types.SimpleNamespace(monotonic=lambda: next(ticks))
    for module in (_leaves, sys.modules["robustlearn.certify.trees"]):
        monkeypatch.setattr(module, "time", slow)
    assert not rl.certify(model, x.numpy(), threat).exact
    budgeted = rl.certify(model, x.numpy(), threat, passes=1)
    assert budgeted.exact
    np.testing.assert_array_equal(budgeted.radius, whole.radius)
    report = rl.evaluate(model, x.numpy(), model(x).argmax(1).numpy(), threat, attacks="quick")
    assert report.certificate["exact"]


# ---------------------------------------------------------------------- the bracket


def test_the_bracket_of_a_boosted_model_closes():
    x, y = CANCER
    x = (x - x.min(0)) / np.ptp(x, axis=0)
    model = made("GradientBoostingClassifier", n_estimators=20).fit(x[:300], y[:300])
    threat = rl.LpBall(math.inf, 0.05, lower=0.0, upper=1.0)
    report = rl.evaluate(model, x[300:340].clip(0, 1), y[300:340], threat, attacks="quick")
    assert report.certificate["method"] == "trees"
    assert report.certificate["exact"]
    assert report.certified.value == report.attacked.value < report.clean.value


@pytest.mark.parametrize("boxes", [0, 1, 3])
def test_a_search_that_is_cut_short_is_sound(boxes):
    from robustlearn.certify.trees import trees

    model, x = small("RandomForestClassifier", 3, n_estimators=15, max_depth=4)
    threat = rl.LpBall(math.inf, 0.1)
    whole = rl.certify(model, x.numpy(), threat)
    short = trees(model, x, threat, None, boxes=boxes)
    assert not short.exact
    assert whole.exact
    assert (short.margin <= whole.margin + 1e-12).all()
    assert (short.radius <= whole.radius + 1e-12).all()
    assert (short.certified <= whole.certified).all()


def test_what_is_not_known_is_a_black_box():
    x, y = CANCER

    class Odd(tree.DecisionTreeClassifier):
        def predict_proba(self, x):
            return 1 - super().predict_proba(x)

        def predict(self, x):
            return self.classes_[self.predict_proba(x).argmax(1)]

    several = tree.DecisionTreeRegressor().fit(x, np.column_stack([y, y]))
    assert read(several) is None
    categories = ensemble.HistGradientBoostingClassifier(max_iter=2, categorical_features=[0])
    assert read(categories.fit(np.c_[y % 3, x], y)) is None
    model = rl.wrap(Odd(max_depth=2).fit(x, y))
    assert type(model) is EstimatorModel
    with pytest.raises(InputError, match="needs trees whose leaves are known"):
        tree_exact(model, torch.from_numpy(x[:2]), torch.tensor([0, 1]), rl.LpBall(2, 1.0))
    with pytest.raises(InputError, match="no certificate applies"):
        rl.certify(model, x[:2], rl.LpBall(2, 1.0))


def test_zero_that_stands_for_a_missing_value_is_refused():
    x, y = CANCER
    assert read(made("XGBClassifier", n_estimators=2, missing=0.0).fit(x, y)) is None
    assert read(made("LGBMClassifier", n_estimators=2, zero_as_missing=True).fit(x, y)) is None


@pytest.mark.parametrize("objective", ["count:poisson", "reg:gamma", "reg:logistic"])
def test_a_function_of_the_sum_is_refused_without_a_complaint(objective):
    """Warnings are errors here: the leaves did reproduce what they add up to."""
    x, y = CANCER
    estimator = made("XGBRegressor", n_estimators=2, objective=objective).fit(x, y + 0.1 * (y < 1))
    assert type(rl.wrap(estimator)) is EstimatorModel
    poisson = made("LGBMRegressor", n_estimators=2, objective="poisson").fit(x, y)
    assert type(rl.wrap(poisson)) is EstimatorModel


@pytest.mark.parametrize(
    ("options", "message"),
    [({"missing": None}, "set_params"), ({"objective": "binary:logitraw"}, "wrap the labels")],
)
def test_what_xgboost_itself_cannot_predict_is_refused_by_name(options, message):
    estimator = made("XGBClassifier", n_estimators=2, **options).fit(*CANCER)
    with pytest.raises(InputError, match=message):
        rl.wrap(estimator)


def test_a_threat_that_is_less_than_its_ball_is_bounded_not_exact():
    model, x = small("RandomForestClassifier", 2, n_estimators=5, **FEW)
    threat = rl.Tabular(math.inf, 0.3, integer=[True, False, False])
    found = rl.certify(model, x.round().numpy(), threat, method="trees")
    assert not found.exact


def test_rounding_of_the_sums_is_left_room_for():
    """Sums in float32 differ from those in real numbers by less than is left."""
    x, y = DIABETES
    for kind in ("XGB", "GradientBoosting"):
        trees = rl.wrap(made(kind + "Regressor", n_estimators=40).fit(x, y)).trees
        leaf = trees.holds(x).nonzero()[1].reshape(len(x), -1)
        real = [math.fsum([*row, trees.base[0]]) for row in trees.value[leaf, 0]]
        off = np.abs(trees.scores(x)[:, 0] - real)
        assert (0 if kind == "XGB" else -1) < off.max() <= trees.slack
