"""The five operations against cvxpy, algebra and exact feasibility."""

import dataclasses
import itertools
import math

import cvxpy as cp
import numpy as np
import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlearn import _geometry, _tensor
from robustlearn.errors import InputError
from robustlearn.threats import LpBall, parse_norm

NORMS = [1, 2, math.inf]
KINDS = ["plain", "box", "box mask", "scale", "box mask scale", "frozen scale"]


def problem(p, kind, seed, d=7, n=1, eps=None, dtype=torch.float64):
    """A random threat of a kind, points in its box, and directions with zeros and ties."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, d))
    x[rng.random((n, d)) < 0.2] = 0.0  # on the wall
    g = rng.standard_normal((n, d)) * (rng.random((n, d)) < 0.85)
    if seed % 3 == 0:
        g = np.round(g, 0)  # ties
    options = {}
    if "box" in kind:
        options |= {"lower": 0.0, "upper": rng.uniform(1.0, 1.5, d)}
    if "mask" in kind:
        options["mask"] = rng.random(d) < 0.7
    if "scale" in kind:
        options["scale"] = rng.uniform(0.2, 3.0, d)
    if "frozen" in kind:
        options["scale"][rng.random(d) < 0.3] = 0.0
    eps = rng.uniform(0.05, 1.5) if eps is None else eps
    return LpBall(p, eps, **options), *(torch.as_tensor(v, dtype=dtype) for v in (x, g))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1, 1.5, 2, 3, math.inf])
@pytest.mark.parametrize("seed", range(4))
def test_support_and_argmax_solve_the_linear_problem(p, kind, seed):
    threat, x, g = problem(p, kind, seed)
    delta = threat.argmax(g, x)
    reference = oracles.support(threat, g[0].numpy(), x[0].numpy())
    assert threat.support(g, x).item() == pytest.approx(reference, rel=1e-6, abs=1e-7)
    assert (g * delta).sum().item() == pytest.approx(threat.support(g, x).item(), rel=1e-12)
    assert threat.norm(delta).item() <= threat.eps * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("seed", range(4))
def test_project_is_the_nearest_member(p, kind, seed):
    threat, x, g = problem(p, kind, seed + 10)
    wish = 2 * g
    reference = oracles.project(threat, wish[0].numpy(), x[0].numpy())
    projected = threat.project(wish, x)[0]
    np.testing.assert_allclose(projected, reference, atol=3e-4)  # the oracle's own tolerance
    # the nearest point of a convex set is the one with ⟨wish − point, member − point⟩ ≤ 0
    outward = wish - projected
    assert threat.support(outward, x) <= (outward * projected).sum() + 1e-10
    assert threat.norm(torch.as_tensor(projected)[None]) <= threat.eps * (1 + 1e-12)


def subsets(d, k):
    """Every choice of at most k of d features."""
    return [set(s) for size in range(k + 1) for s in itertools.combinations(range(d), size)]


@pytest.mark.parametrize("kind", ["box", "box mask", "box mask scale", "box frozen scale"])
@pytest.mark.parametrize("k", [0, 1, 3, 7])
@pytest.mark.parametrize("seed", range(3))
def test_at_most_k_features_against_all_subsets(kind, k, seed):
    """p = 0: support, argmax and projection over every subset of the features."""
    threat, x, g = problem(0, kind, seed, n=3, eps=k + 0.5)
    low, high = (wall - x for wall in dataclasses.replace(threat, eps=7.0).span(x))
    wish = 2 * g
    best = torch.full((3,), -torch.inf, dtype=torch.float64)
    nearest = torch.full((3,), torch.inf, dtype=torch.float64)
    for chosen in subsets(7, k):
        free = torch.tensor([j in chosen for j in range(7)])
        corner = torch.where(free, torch.where(g > 0, high, low), 0)
        inside = torch.where(free, wish.clamp(low, high), 0)
        best = torch.maximum(best, (corner * g).sum(1))
        nearest = torch.minimum(nearest, (inside - wish).norm(dim=1))
    step, projected = threat.argmax(g, x), threat.project(wish, x)
    torch.testing.assert_close(threat.support(g, x), best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((step * g).sum(1), best, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((projected - wish).norm(dim=1), nearest, rtol=1e-12, atol=1e-12)
    for delta in (step, projected, threat.sample(x, torch.arange(3))):
        assert (threat.norm(delta) <= k).all()
        assert threat.contains(x, threat.restrict(x, delta)).all()
    frozen = ((wish != 0) & ~(high > low)).any(1)
    if "mask" in kind or "frozen" in kind:
        assert threat.norm(wish)[frozen].isinf().all()
    assert torch.equal(threat.norm(step), (step != 0).sum(1).double())


def test_features_without_walls_need_no_box_unless_they_go_to_it():
    threat, g = LpBall(0, 2), torch.tensor([[3.0, -1.0, 2.0, 0.0]])
    assert threat.project(g).tolist() == [[3, 0, 2, 0]]
    assert threat.restrict(torch.ones_like(g), g).tolist() == [[4, 1, 3, 1]]
    assert threat.support(g).item() == math.inf
    assert LpBall(0, [0.0]).support(g).item() == 0
    with pytest.raises(InputError, match="p = 0 bounds no change by itself"):
        threat.argmax(g)
    with pytest.raises(InputError, match="p = 0 bounds no change by itself"):
        threat.sample(g)
    each = LpBall(0, [1, 3, 0.9], lower=0.0, upper=1.0)
    moved = each.restrict(torch.full((3, 4), 0.5), torch.ones(3, 4)) != 0.5
    assert moved.sum(1).tolist() == [1, 3, 0]
    assert each.span(torch.full((3, 1), 0.5))[1].flatten().tolist() == [1, 1, 0.5]


@pytest.mark.parametrize("walled", [False, True])
@pytest.mark.parametrize("p", [0, 1, 1.5, 2, math.inf])
@pytest.mark.parametrize("seed", range(4))
def test_crossing_is_the_nearest_point_of_a_halfspace(p, walled, seed):
    rng = np.random.default_rng(seed)
    gain = rng.random(6) * (rng.random(6) < 0.8) + np.eye(6)[0]
    room = rng.random(6) if walled else np.full(6, np.inf)
    gap = 0.7 * (gain * room).sum() if walled else 1.3
    row = [torch.as_tensor(part)[None] for part in (gain, room)]
    u, within = _geometry.crossing(*row, torch.tensor([gap], dtype=torch.float64), p)
    assert within.all()
    assert (u[0].numpy() * gain).sum() == pytest.approx(gap, rel=1e-12)
    assert (u >= 0).all()
    assert (u <= row[1]).all()
    if p == 0:
        gained = {frozenset(s): sum(gain[j] * room[j] for j in s if gain[j]) for s in subsets(6, 6)}
        least = min(len(s) for s, value in gained.items() if value >= gap)
    else:
        v = cp.Variable(6, nonneg=True)
        walls = [v <= room] if walled else []
        size = cp.pnorm(v, p) if p == 1.5 else cp.norm(v, "inf" if math.isinf(p) else p)
        least = cp.Problem(cp.Minimize(size), [gain @ v >= gap, *walls]).solve(solver="CLARABEL")
    assert _geometry.row_norm(u, p).item() == pytest.approx(least, rel=1e-5)
    u, within = _geometry.crossing(*row, torch.tensor([1e3], dtype=torch.float64), p)
    assert within.item() is not walled
    if walled:  # out of reach: as far as the walls let it
        assert torch.equal(u, torch.where(row[0] > 0, row[1], 0))


@settings(max_examples=150, deadline=None)
@given(
    p=st.sampled_from(NORMS),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    size=st.floats(0, 50),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_projection_algebra(p, kind, seed, size, dtype):
    threat, x, g = problem(p, kind, seed, d=11, n=5, dtype=dtype)
    other = g.flip(1) * size
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    a, b = threat.project(g * size, x), threat.project(other, x)
    assert a.dtype == dtype
    assert (threat.norm(a) <= threat.eps + tolerance).all()
    torch.testing.assert_close(threat.project(a, x), a, atol=tolerance, rtol=0)  # idempotent
    apart = (a - b).flatten(1).norm(dim=1)
    assert (apart <= (g * size - other).flatten(1).norm(dim=1) + tolerance * (1 + size)).all()


@settings(max_examples=150, deadline=None)
@given(
    p=st.sampled_from([0, 1, 1.7, 2, 4, math.inf]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10_000),
    size=st.floats(0, 1e6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_restrict_is_feasible_without_tolerance(p, kind, seed, size, dtype):
    threat, x, g = problem(p, kind, seed, d=9, n=4, dtype=dtype)
    if threat.upper is not None:
        x = torch.minimum(x, threat.upper.to(dtype))
    point = threat.restrict(x, g * size)
    assert point.dtype == dtype
    assert threat.contains(x, point).all()
    moved = (point.double() - x.double()).numpy()  # the same check, by other means
    scale = np.ones(9) if threat.scale is None else threat.scale.numpy()
    moving = scale > 0
    assert (moved[:, ~moving] == 0).all()
    lengths = np.linalg.norm(moved[:, moving] / scale[moving], ord=p, axis=1)
    assert (lengths <= threat.eps).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_restrict_keeps_what_is_inside_and_reaches_the_boundary(p):
    x = torch.rand(8, 3, 5, generator=torch.Generator().manual_seed(0))
    threat = LpBall(p, 0.1, lower=0.0, upper=1.0)
    inside = threat.sample(x, 0) * 0.5
    torch.testing.assert_close(threat.restrict(x, inside), x + inside, atol=1e-7, rtol=0)
    far = LpBall(p, 0.1).restrict(x, torch.ones_like(x))
    torch.testing.assert_close(
        LpBall(p, 0.1).norm(far - x), torch.full((8,), 0.1), rtol=2e-5, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", NORMS)
def test_samples_are_members_spread_over_the_set(p, kind):
    threat, x, _ = problem(p, kind, 3, d=6, n=400, eps=0.3)
    x = x[:1].expand(400, 6)
    delta = threat.sample(x, torch.Generator().manual_seed(1))
    assert (threat.norm(delta) <= 0.3 * (1 + 1e-12)).all()
    assert threat.contains(x, threat.restrict(x, delta)).all()
    assert len(delta.unique(dim=0)) == 400
    if kind == "plain":
        np.testing.assert_allclose(delta.mean(0), np.zeros(6), atol=0.03)
        # a uniform draw from a d-ball: the share within radius t is t^d
        share = (threat.norm(delta) < 0.3 * 0.5 ** (1 / 6)).double().mean()
        assert share.item() == pytest.approx(0.5, abs=0.1)


def test_samples_do_not_depend_on_the_batch():
    x = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(6)
    threat = LpBall(2, 0.5)
    whole = threat.sample(x, keys)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.equal(threat.sample(x[order], keys[order]), whole[order])
    assert torch.equal(threat.sample(x[2:3], keys[2:3]), whole[2:3])
    assert not torch.equal(whole[0], whole[1])


def test_random_numbers_are_uniform_and_unrelated():
    key = _tensor.keys(torch.Generator().manual_seed(0), torch.empty(200))
    u = _tensor.uniform(key, (500,), torch.float64)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # χ² with 49 degrees: 99.9% is 85.4
    assert abs(torch.corrcoef(u[:2])[0, 1]) < 0.2
    assert abs(torch.corrcoef(torch.stack([u.ravel()[:-1], u.ravel()[1:]]))[0, 1]) < 0.015
    z = _tensor.normal(key, (500,), torch.float32)
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert not torch.equal(_tensor.fold(key, 0), _tensor.fold(key, 1))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([0, 1, 12]))
def test_level_by_sweeps_and_by_sorting(seed, d, sweeps):
    rng = np.random.default_rng(seed)
    weight = torch.as_tensor(rng.random((4, d)) * (rng.random((4, d)) < 0.9))
    cap = torch.as_tensor(np.exp(rng.normal(0, 6, (4, d))))
    cap[torch.as_tensor(rng.random((4, d)) < 0.1)] = torch.inf
    cap[torch.as_tensor(rng.random((4, d)) < 0.1)] = 0.0
    truth = torch.as_tensor(np.exp(rng.normal(0, 4, 4)))
    target = (weight * torch.minimum(truth[:, None], cap)).sum(1)
    t = _geometry.level(weight, cap, target, sweeps)
    reached = (weight * torch.minimum(t[:, None], cap).nan_to_num(0)).sum(1)
    finite = t.isfinite()
    torch.testing.assert_close(reached[finite], target[finite], rtol=1e-9, atol=0)
    total = torch.where(weight > 0, weight * cap, 0).sum(1)
    assert (total[~finite] <= target[~finite] * (1 + 1e-9)).all()


def test_one_budget_per_sample():
    x = torch.zeros(3, 4)
    threat = LpBall(2, [0.0, 0.5, 2.0])
    g = torch.ones(3, 4)
    torch.testing.assert_close(threat.support(g), torch.tensor([0.0, 1.0, 4.0]))
    torch.testing.assert_close(threat.norm(threat.project(9 * g)), torch.tensor([0.0, 0.5, 2.0]))
    assert threat.select(torch.tensor([2])).eps.tolist() == [2.0]
    with pytest.raises(InputError, match="3 budgets eps for 2 samples"):
        threat.check(x[:2])


def test_extreme_numbers_stay_finite():
    x = torch.full((1, 3), 0.5)
    g = torch.tensor([[1e30, 1e-30, -1e20]])
    for p in (1, 1.01, 2, 60, math.inf):
        for options in ({}, {"lower": 0.0, "upper": 1.0}):
            threat = LpBall(p, 10.0, **options)
            assert threat.argmax(g, x).isfinite().all()
            assert threat.support(g, x).isfinite().all()
            assert torch.equal(threat.argmax(torch.zeros_like(g), x), torch.zeros_like(g))


def test_eps_zero_is_a_point():
    x, g = torch.rand(4, 5), torch.randn(4, 5)
    for p in (1, 1.5, 2, math.inf):
        for options in ({}, {"lower": 0.0, "upper": 1.0}, {"scale": torch.rand(5)}):
            threat = LpBall(p, 0.0, **options)
            assert torch.equal(threat.restrict(x, g), x)
            assert threat.support(g, x).abs().max() == 0
            assert threat.argmax(g, x).abs().max() == 0
    walled = LpBall(2, 0.0, lower=0.0, upper=1.0)
    assert walled.argmax(torch.ones(1, 2), torch.ones(1, 2)).tolist() == [[0, 0]]
    frozen = LpBall(2, 0.0, mask=[False, False])
    assert frozen.argmax(torch.ones(1, 2)).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LpBall(0.5, 1.0), "p must be a number from 1"),
        (lambda: LpBall("2", 1.0), "p must be a number from 1"),
        (lambda: LpBall(2, -1.0), "eps must be finite and not negative"),
        (lambda: LpBall(2, math.nan), "eps must be finite"),
        (lambda: LpBall(2, "big"), "eps must be a number"),
        (lambda: LpBall(2, [[1.0]]), "eps must be a number or one per sample"),
        (lambda: LpBall(2, 1.0, lower=1.0, upper=0.0), "are they swapped"),
        (lambda: LpBall(2, 1.0, lower=[0.0, 0.0], upper=[1.0]), "different shapes"),
        (lambda: LpBall(2, 1.0, scale=-1.0), "scale must not be negative"),
        (lambda: LpBall(2, 1.0, mask=[0.5, 1.0]), "mask must be boolean"),
        (lambda: LpBall(2, 1.0, lower=math.nan), "lower holds NaN"),
        (lambda: LpBall(2, 1.0, lower=0.0).support(torch.ones(1, 2)), "needs the points x"),
        (lambda: LpBall(3, 1.0).project(torch.ones(1, 2)), "project knows p = 0, 1, 2 and inf"),
        (lambda: LpBall(3, 1.0).sample(torch.ones(1, 2)), "sample knows p = 0, 1, 2 and inf"),
        (
            lambda: LpBall(2, 1.0, upper=1.0).check(torch.full((2, 2), 255.0)),
            r"data outside the box: x spans \[255, 255\].*scale x",
        ),
        (lambda: LpBall(2, 1.0, mask=[True]).check(torch.ones(2, 2)), "mask has shape"),
        (lambda: parse_norm("chebyshev"), "norm must be linf, l2, l1"),
    ],
)
def test_errors_say_what_to_do(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_norm_names():
    parsed = [parse_norm(text) for text in ("linf", "L2", "1", "inf", "l1.5", "l0")]
    assert parsed == [math.inf, 2, 1, math.inf, 1.5, 0]


def test_the_budget_keeps_its_digits():
    assert LpBall(2, 8 / 255).eps == 8 / 255  # not its float32 rounding
