"""The solver of worst-case training against cvxpy, its proof against every model, its parts."""

import itertools
import math
from dataclasses import replace

import numpy as np
import oracles
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlearn.linear import _design, _interior, _losses, _rows
from robustlearn.linear._cones import cone
from robustlearn.linear._design import Design
from robustlearn.linear._problem import Problem
from robustlearn.linear._solve import solve

NORMS = [1, 2, math.inf]
DUAL = {1: math.inf, 2: 2.0, math.inf: 1.0}
REGRESSION = ["squared", "absolute", "huber"]
CLASSIFICATION = ["logistic", "hinge", "squared_hinge"]
LOSSES = REGRESSION + CLASSIFICATION
SHAPES = [(40, 6), (12, 40)]
KINDS = {  # relative eps, whether weighted, number of features that cannot change
    "plain": (0.1, False, 0),
    "weighted": (0.3, True, 0),
    "one frozen": (0.3, False, 1),
    "three frozen": (0.5, True, 3),
    "no attack": (0.0, False, 0),
}


GIVEN_UP, MOST_GIVEN_UP = [], 3  # cases in which cvxpy finds no optimum


def data(loss, shape, seed=0):
    """Samples; for classes two that contradict each other, so that no budget separates them."""
    rng = np.random.default_rng(seed)
    n, d = shape
    x = rng.standard_normal(shape)
    y = x @ rng.standard_normal(d) / np.sqrt(d) + 1.5 * rng.standard_normal(n) + 0.3
    if loss in CLASSIFICATION:
        y = np.where(y > 0, 1.0, -1.0)
        x[1], y[1] = x[0], -y[0]
    return x, y


def problem(x, y, eps, norm, loss, *, intercept=True, weight=None, scale=None, relative=False):
    """The problem of the solver, from what cvxpy is given."""
    scale = np.ones(x.shape[1]) if scale is None else scale
    scale = np.append(scale, 0.0) if intercept else scale
    weight = np.ones(len(y)) if weight is None else weight
    design = Design(x, intercept=intercept)
    chosen = _losses.get(loss)
    return Problem(design, y, weight, scale, eps, DUAL[norm], chosen, relative=relative)


def columns(task, w, b):
    """The model (w, b) in the columns of its design."""
    return np.append(w, b + task.design.shift @ w) if task.design.intercept else np.asarray(w)


def options(kind, shape, seed=0):
    rng = np.random.default_rng(seed + 100)
    _, weighted, frozen = KINDS[kind]
    scale = rng.uniform(0.5, 2, shape[1])
    scale[:frozen] = 0
    weight = rng.uniform(0.2, 3, shape[0])
    return {"weight": weight if weighted else None, "scale": scale if frozen else None}


@pytest.mark.parametrize(
    ("loss", "norm", "intercept", "shape", "kind"),
    list(itertools.product(LOSSES, NORMS, [True, False], SHAPES, KINDS)),
)
def test_the_minimum_is_that_of_cvxpy_and_is_proven(loss, norm, intercept, shape, kind):
    x, y = data(loss, shape, seed=1)
    more = {"intercept": intercept, **options(kind, shape)}
    solution = solve(problem(x, y, KINDS[kind][0], norm, loss, relative=True, **more))
    found = oracles.linear_model(x, y, solution.eps, norm, loss, **more)
    if found is None:
        GIVEN_UP.append((loss, norm, intercept, shape, kind))
        pytest.skip("cvxpy fails")
    size = 1e-6 * max(found[2], 1e-2 * solution.start)
    assert solution.objective == pytest.approx(found[2], abs=size)
    assert solution.bound <= found[2] + 1e-9
    assert solution.gap <= max(1e-8 * solution.objective, 1e-12 * solution.start)


def test_cvxpy_gives_an_answer_nearly_everywhere():
    """Of the cases above; run after them."""
    assert len(GIVEN_UP) <= MOST_GIVEN_UP, GIVEN_UP


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    intercept=st.booleans(),
    shape=st.sampled_from([(15, 4), (6, 9)]),
    frozen=st.integers(0, 2),
    relative=st.sampled_from([0.1, 0.5, 0.95, 1.5]),
)
def test_no_guess_of_multipliers_proves_too_much(
    loss, norm, seed, intercept, shape, frozen, relative
):
    rng = np.random.default_rng(seed)
    x, y = data(loss, shape, seed)
    scale, weight = rng.uniform(0.5, 2, shape[1]), rng.uniform(0.2, 3, shape[0])
    scale[:frozen] = 0
    more = {"intercept": intercept, "weight": weight, "scale": scale}
    height = 0.3 * np.abs(x).sum() / len(x) * relative  # about eps_max
    task = problem(x, y, height / shape[1], norm, loss, **more)
    found = oracles.linear_model(x, y, task.eps, norm, loss, **more)
    if found is None:
        return
    v = columns(task, *found[:2])
    least = task.objective(v)
    z, c = task.design.dot(v), task.size(v)
    step = 1e-6
    slope = [task.loss.value(task.loss.height(z + t, c, y)) for t in (step, -step)]
    truth = weight * (slope[0] - slope[1]) / (2 * step)  # about the multipliers
    guesses = [0 * truth, 1e6 * truth, rng.standard_normal(len(y))]
    for size in (1e-9, 1e-5, 1e-2, 0.3, 3.0):
        noise = rng.standard_normal(len(y)) * rng.choice([1.0, np.abs(truth).max()])
        guesses += [truth + size * noise, truth * (1 + size * rng.standard_normal(len(y)))]
    for guess in guesses:
        guess = -guess if guess @ y > 0 else guess  # the other sign: next test
        for near in (v, v + 0.1 * rng.standard_normal(len(v)), 0 * v):
            bound = task.bound(near, guess)
            assert 0 <= bound <= least * (1 + 1e-10) + 1e-9


@pytest.mark.parametrize("loss", LOSSES)
def test_multipliers_of_the_wrong_sign_prove_nothing(loss):
    x, y = np.zeros((2, 1)), np.array([1.0, -1.0])
    y = 10 * y if loss in REGRESSION else y
    task = problem(x, y, 1.0, 2, loss)
    least = task.objective(np.zeros(2))
    for size in (0.01, 0.5, 1.0, 2.0, 100.0):
        for guess in (size * y, -size * y, size * np.ones(2)):
            assert 0 <= task.bound(np.zeros(2), guess) <= least * (1 + 1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("loss", LOSSES)
def test_where_all_samples_can_be_fitted_nothing_is_proven(loss, intercept, frozen):
    """No attack and d ≥ n: the infimum is 0, and rounding must not speak against it."""
    for seed, shape in itertools.product(range(4), [(6, 9), (12, 25)]):
        rng = np.random.default_rng(seed)
        x, y = rng.standard_normal(shape), 3 * rng.standard_normal(shape[0])
        y = y if loss in REGRESSION else np.sign(y)
        scale = np.zeros(shape[1]) if frozen else None
        task = problem(x, y, 0.5 * frozen, 2, loss, intercept=intercept, scale=scale)
        w = np.linalg.lstsq(x, y, rcond=None)[0]
        v = np.append(w, 0.0) if intercept else w
        for size in (1e-20, 1e-16, 1e-8, 1.0):
            for guess in (size * y, -size * y, size * rng.standard_normal(len(y))):
                assert task.bound(v, guess) <= 1e-9
                assert task.bound(0 * v, guess) <= 1e-9


@pytest.mark.parametrize("loss", REGRESSION)
@pytest.mark.parametrize("frozen", [False, True])
def test_an_interpolation_without_an_attack_costs_nothing(loss, frozen):
    for seed, intercept in itertools.product(range(4), [True, False]):
        x, y = data(loss, (12, 25), seed)
        scale = np.zeros(25) if frozen else None
        task = problem(x, y, 0.5 * frozen, 2, loss, intercept=intercept, scale=scale)
        solution = solve(task)
        assert solution.objective <= 1e-12
        assert solution.bound <= 1e-12
        np.testing.assert_allclose(x @ solution.coef + solution.intercept, y, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=["tall", "wide"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_multipliers_meet_the_conditions_of_optimality(loss, norm, shape):
    """Xᵀs = 0 for b, ‖D⁻¹Xᵀs‖_p ≤ ε·Σa, and there vᵀXᵀs = −c·Σa: s turns, w holds."""
    x, y = data(loss, shape)
    scale = np.random.default_rng(1).uniform(0.5, 2, shape[1])
    task = problem(x, y, 0.3, norm, loss, scale=scale, relative=True)
    solution = solve(task, tol=1e-10)
    eps, s = solution.eps, solution.found.multipliers
    v = columns(task, solution.coef, solution.intercept)
    c = eps * np.linalg.norm(scale * solution.coef, DUAL[norm])
    height = task.loss.height(x @ solution.coef + solution.intercept, c, y)
    a = -y * s if task.loss.classifies else np.maximum(np.abs(s), task.loss.slope(height))
    pull = task.design.tdot(s)
    assert abs(pull[-1]) <= 1e-6 * a.sum()
    assert np.linalg.norm(pull[:-1] / scale, norm) <= eps * a.sum() * (1 + 1e-5)
    assert pull @ v == pytest.approx(-c * a.sum(), rel=1e-5)
    assert (a >= -1e-9).all()
    assert (a <= task.loss.limit * (1 + 1e-9)).all()
    if loss in ("squared", "logistic", "squared_hinge"):
        np.testing.assert_allclose(a, task.loss.slope(height), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_the_objective_by_finite_differences(loss, norm):
    x, y = data(loss, (20, 5))
    rng = np.random.default_rng(3)
    weight = rng.uniform(0.2, 3, 20)
    task = problem(x, y, 0.2, norm, loss, weight=weight, scale=rng.uniform(0.5, 2, 5))
    v = 0.5 * rng.standard_normal(6)
    u = task.scale * v  # the gradient of its norm is the point of the dual ball that touches it
    touch = {
        1: np.sign(u) * (np.abs(u) == np.abs(u).max()),
        2: u / np.linalg.norm(u),
        math.inf: np.sign(u),
    }[norm]
    z = task.design.dot(v)
    height = task.loss.height(z, task.size(v), y)
    slope = weight * np.where((height > 0) | task.loss.smooth, task.loss.slope(height), 0)
    sign = -y if task.loss.classifies else np.sign(z - y)
    gradient = task.design.tdot(sign * slope) + slope.sum() * task.eps * task.scale * touch
    for j in range(6):
        step = 1e-6 * np.eye(6)[j]
        rise = (task.objective(v + step) - task.objective(v - step)) / 2e-6
        assert rise == pytest.approx(gradient[j], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_derivatives_and_conjugates_of_the_losses(loss):
    chosen = _losses.get(loss, 1.35)
    e = np.linspace(0.05, 4, 80)  # heights of regression are not negative
    e = np.concatenate([-e, e]) if loss == "logistic" else e
    e = e[np.abs(e - chosen.knee) > 1e-3]
    step = 1e-5
    rise = (chosen.value(e + step) - chosen.value(e - step)) / (2 * step)
    np.testing.assert_allclose(chosen.slope(e), rise, rtol=1e-6, atol=1e-8)
    if loss != "huber":  # there the knee has a variable of its own
        bend = (chosen.slope(e + step) - chosen.slope(e - step)) / (2 * step)
        np.testing.assert_allclose(chosen.curvature(e), bend, rtol=1e-6, atol=1e-8)
    margin = np.linspace(-30, 30, 600_001)  # of t = c − y·z where it classifies, else of e ≥ 0
    z = -margin if chosen.classifies else margin[margin >= 0]
    t = margin if chosen.classifies else z
    value = chosen.value(chosen.height(z, 0.0, np.ones_like(z) if chosen.classifies else 0 * z))
    for a in np.linspace(0, min(chosen.limit, 4), 9):
        expected = (a * t - value).max()
        assert chosen.conjugate(np.array([a]))[0] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_the_best_constant_and_its_multipliers(loss, seed, ties):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 9))
    chosen = _losses.get(loss)
    weight, y = rng.uniform(0.2, 3, n), rng.standard_normal(n) * 3
    y = np.round(y) if ties else y
    weight = np.ones(n) if ties else weight
    if chosen.classifies:
        y = np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    z, s = chosen.constant(y, weight)

    grid = np.concatenate([[z], np.linspace(-9, 9, 2001), y])[:, None]
    total = chosen.value(chosen.height(grid, 0.0, np.broadcast_to(y, (len(grid), n)))) @ weight
    assert total[0] <= total.min() * (1 + 1e-9) + 1e-12
    assert abs(s.sum()) <= 1e-9 * np.abs(s).sum() + 1e-12
    for i in range(n):  # each is a slope of its own sample there
        one, at = np.array([y[i]]), np.array([z])
        here = chosen.value(chosen.height(at, 0.0, one))
        for other in (z - 1.0, z + 1.0, z - 0.01, z + 0.01):
            there = chosen.value(chosen.height(np.array([other]), 0.0, one))
            rise = weight[i] * (there - here)[0]
            assert rise >= s[i] * (other - z) - 1e-9


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("norm", [1, math.inf])
@pytest.mark.parametrize("free", [0, 1, 2])
def test_both_ways_to_a_newton_step_agree(loss, norm, free, monkeypatch):
    """The matrix of the columns and that of the rows are of one system."""
    monkeypatch.setattr(_rows, "PROX", 0.0)  # of which they add different parts
    rng = np.random.default_rng(5)
    n, d = 8, 12
    x, y = data(loss, (n, d))
    task = problem(x, y, 0.2, norm, loss, intercept=False, scale=np.arange(d) >= free)
    rows = task.rows()
    ball = cone(rows.q, rows.units)
    heights = _rows.Heights(rows.loss, rows.y, rows.weight, reached=True)
    v = rng.standard_normal(d)
    size = ball.size(v[rows.penalised])
    heights.start(x @ v, size + 0.5, 0.3)
    ball.start(v[rows.penalised], 0.5, 2.0)
    zz, lean, corner = heights.block()
    block = ball.block()
    tilt, lift = np.zeros(d), np.zeros(d)
    tilt[rows.penalised], lift[rows.penalised] = block.tilt, block.lift
    right = rng.standard_normal(d + 1)
    steps = [
        way(rows, zz, lean, tilt, lift, corner, block)(right.copy())
        for way in (_interior._dense, _interior._twin)
    ]
    np.testing.assert_allclose(steps[1], steps[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(3))
def test_many_rows_are_solved_in_rounds(norm, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 5)) * rng.uniform(0.1, 5, 5) + 3
    y = x @ rng.standard_normal(5) + rng.standard_t(2, 400)
    weight = rng.uniform(0.2, 3, 400) if seed else np.ones(400)
    scale = np.array([0.0, 1, 2, 1, 0.5]) if seed == 2 else np.ones(5)
    more = {"weight": weight, "scale": scale}
    for relative in (0.01, 0.3, 0.95):
        solution = solve(problem(x, y, relative, norm, "squared", relative=True, **more))
        _, _, value = oracles.linear_model(x, y, solution.eps, norm, "squared", **more)
        assert solution.objective == pytest.approx(value, rel=1e-6)
        assert solution.gap <= 1e-8 * solution.objective


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_solver_that_is_stopped_tells_a_true_gap(loss, norm):
    x, y = data(loss, (30, 6))
    final = solve(problem(x, y, 0.3, norm, loss, relative=True))
    gaps = []
    for steps in range(1, 12, 2):
        early = solve(problem(x, y, 0.3, norm, loss, relative=True), max_iter=steps)
        assert early.bound <= final.objective * (1 + 1e-9)
        assert early.objective >= final.objective - final.gap - 1e-12
        gaps.append(early.gap)
    assert gaps[-1] <= 1e-2 * gaps[0] + 1e-12


HARD = {
    "far": lambda x: x + 1e4,
    "columns of many sizes": lambda x: x * 10.0 ** np.linspace(-3, 3, x.shape[1]),
    "a column twice": lambda x: np.column_stack([x, x[:, 0]]),
    "a row many times": lambda x: np.vstack([x[:20], np.tile(x[20], (len(x) - 20, 1))]),
    "a constant column": lambda x: np.column_stack([x, np.full(len(x), 2.0)]),
    "a zero column": lambda x: np.column_stack([x, np.zeros(len(x))]),
    "rank two": lambda x: x[:, :2] @ np.random.default_rng(0).standard_normal((2, 7)),
    "whole numbers": np.round,
    "tiny": lambda x: 1e-9 * x,
    "huge": lambda x: 1e9 * x,
}


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_hard_data_are_solved_and_proven(loss, norm, kind):
    x, y = data(loss, (30, 6))
    x = HARD[kind](x)
    for relative, tol in ((0.1, 1e-8), (0.7, 1e-8), (0.1, 1e-10), (0.7, 1e-10)):
        solution = solve(problem(x, y, relative, norm, loss, relative=True), tol=tol)
        assert solution.objective <= solution.start * (1 + 1e-9)
        assert solution.gap <= tol * solution.objective


@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("loss", LOSSES)
def test_hard_data_without_an_attack(loss, kind):
    x, y = data(loss, (30, 6))
    x = HARD[kind](x)
    for norm, scale in ((2, None), (2, np.zeros(x.shape[1])), (1, np.arange(x.shape[1]) < 2)):
        eps = 0.0 if scale is None else 0.1 * x.std()
        solution = solve(problem(x, y, eps, norm, loss, scale=scale))
        assert solution.objective <= solution.start * (1 + 1e-9)
        assert solution.gap <= 1e-8 * solution.objective


def far_off(case):
    loss, relative = case
    slow = relative == 0 and loss != "squared"
    return "PROX is 1e-8 of a column's square, more than the columns' differences" if slow else None


@pytest.mark.parametrize(
    ("loss", "relative"), oracles.cases(LOSSES, [0.0, 0.1, 0.7], broken=far_off)
)
def test_columns_far_from_zero_without_an_intercept(loss, relative):
    x, y = data(loss, (30, 6))
    x += 1e4 * np.arange(1, 7)
    for norm in NORMS:
        solution = solve(problem(x, y, relative, norm, loss, relative=True, intercept=False))
        assert solution.gap <= 1e-8 * solution.objective


@pytest.mark.parametrize("factor", [1e-9, 1e-6, 1e6, 1e9])
@pytest.mark.parametrize("loss", ["squared", "absolute"])
def test_targets_of_any_size(loss, factor):
    x, y = data(loss, (30, 6))
    for norm in NORMS:
        base = solve(problem(x, y, 0.3, norm, loss, relative=True))
        solution = solve(problem(x, factor * y, 0.3, norm, loss, relative=True))
        assert solution.gap <= 1e-8 * solution.objective
        size = factor ** (2 if loss == "squared" else 1)
        assert solution.objective == pytest.approx(size * base.objective, rel=1e-8)


def test_a_zero_column_that_costs_nothing_beside_many_that_do():
    x = np.zeros((3, 9))  # two of its columns cost nothing, one of those is zero
    x[:, [0, 3, 5, 6]] = [[0.7, 0.0, 0.5, 0.1], [-0.8, 0.6, 1.1, 1.2], [0.7, -0.2, 0.6, -1.3]]
    y, scale = np.array([0.0, 0.0, 1.0]), np.ones(9)
    scale[[6, 8]] = 0
    found = oracles.linear_model(x, y, 0.4, 1, "absolute", scale=scale)
    solution = solve(problem(x, y, 0.4, 1, "absolute", scale=scale))
    assert solution.objective == pytest.approx(found[2], rel=1e-6)


def test_a_tiny_budget_lets_huber_interpolate():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 10)), np.array([100.4, 100.8])
    solution = solve(problem(x, y, 2.5e-6, 2, "huber"))
    assert solution.objective <= 1e-8


@pytest.mark.parametrize(("loss", "norm", "seed"), list(itertools.product(LOSSES, NORMS, [0, 2])))
def test_nothing_is_worse_than_no_feature(loss, norm, seed):
    """Even where w = 0 is best, below an eps_max that is an upper bound only."""
    shape = (12, 40)
    x, y = data(loss, shape, seed)
    # three features that cost nothing may separate the classes: no minimum of the logistic loss
    more = options("one frozen" if loss == "logistic" else "three frozen", shape)
    for relative in (0.5, 0.9, 1.0):
        solution = solve(problem(x, y, relative, norm, loss, relative=True, **more))
        assert solution.objective <= solution.start * (1 + 1e-9)
        assert solution.gap <= 1e-8 * solution.start


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_the_proof_in_classification_needs_no_more_rows_than_columns(loss, norm):
    for seed, shape, intercept, relative in itertools.product(
        range(2), [(12, 25), (20, 20)], [True, False], [0.8]
    ):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(shape)
        y = x @ rng.standard_normal(shape[1]) / np.sqrt(shape[1]) + rng.standard_normal(shape[0])
        task = problem(
            x, np.where(y > 0, 1.0, -1.0), relative, norm, loss, intercept=intercept, relative=True
        )
        hinge = solve(replace(task, loss=_losses.get("hinge"), known={}))
        if hinge.objective > 1e-6:  # not separable
            solution = solve(task)
            assert solution.gap <= 1e-8 * solution.objective


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_solution_whatever_the_units(loss, norm):
    x, y = data(loss, (30, 6))
    base = solve(problem(x, y, 0.2, norm, loss))
    for factor in (1e-3, 1e3):
        other = solve(problem(factor * x, y, factor * 0.2, norm, loss))
        np.testing.assert_allclose(factor * other.coef, base.coef, rtol=1e-6, atol=1e-6)
        assert other.objective == pytest.approx(base.objective, rel=1e-8)
        assert other.eps_max == pytest.approx(factor * base.eps_max, rel=1e-7)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("kind", ["array", "float32", "memmap", "sparse", "in blocks"])
def test_designs_multiply_as_their_matrix(kind, intercept, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    x = np.round(rng.standard_normal((11, 4)) * (rng.random((11, 4)) < 0.7), 2)
    x[:, 2] += 500  # centred
    held = x
    if kind == "float32":
        held = x = x.astype(np.float32)
    elif kind == "sparse":
        held = sp.csr_array(x)
    elif kind == "memmap":
        held = np.memmap(tmp_path / "x", dtype=np.float64, mode="w+", shape=x.shape)
        held[:] = x
    elif kind == "in blocks":
        monkeypatch.setattr(_design, "BLOCK", 12)
    design = Design(held, intercept=intercept)
    matrix = x - design.shift
    assert (design.shift != 0).tolist() == [False, False, intercept, False]
    matrix = np.column_stack([matrix, np.ones(11)]) if intercept else matrix
    v, s, weight, y = (rng.standard_normal(k) for k in (matrix.shape[1], 11, 11, 11))
    weight = weight**2
    np.testing.assert_allclose(design.dot(v), matrix @ v, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(design.tdot(s), matrix.T @ s, rtol=1e-10, atol=1e-9)
    gram, moment = design.gram(weight, y)
    np.testing.assert_allclose(gram, (matrix.T * weight) @ matrix, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(moment, matrix.T @ (weight * y), rtol=1e-9, atol=1e-9)
    rows = np.array([7, 2, 5])
    np.testing.assert_allclose(design.take(rows), matrix[rows], atol=1e-12)
    np.testing.assert_allclose(design.take(), matrix, atol=1e-12)
    coef, b = design.split(v)
    np.testing.assert_allclose(x @ coef + b, design.dot(v), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", CLASSIFICATION)
def test_the_proof_with_units_of_many_sizes_and_a_tiny_budget(loss, norm):
    """Too many conditions nearly bind for least squares to meet them."""
    for seed in (0, 4, 5, 6, 7, 14, 16, 26, 28, 51):
        rng = np.random.default_rng(seed)
        n, d = int(rng.integers(15, 60)), int(rng.integers(2, 12))
        x, y = data(loss, (n, d), seed)
        scale = 10 ** rng.uniform(-4, 4, d)
        task = problem(x, y, 10 ** rng.uniform(-5, -3), norm, loss, scale=scale, relative=True)
        solution = solve(task)
        assert solution.gap <= 1e-8 * solution.objective


def test_the_gram_matrix_in_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((50, 4)), rng.uniform(0, 2, 50)
    monkeypatch.setattr(_rows, "BLOCK", 4 * 7)
    np.testing.assert_allclose(_rows.weighted_gram(x, weight), (x.T * weight) @ x, rtol=1e-12)
    assert (_rows.weighted_gram(x[:0], weight[:0]) == 0).all()
