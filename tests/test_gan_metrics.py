"""Distances between samples against scipy, closed forms and known dimensions."""

import doctest
import math

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from robustlearn.errors import InputError
from robustlearn.gan import kernels, metrics


def normal(*shape, seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=source, dtype=torch.float64)


def test_mmd_has_no_bias_and_finds_two_normals():
    found = {0.0: [], 1.0: []}
    for seed in range(60):
        x, y = normal(120, 1, seed=seed), normal(80, 1, seed=1000 + seed)
        for shift, values in found.items():
            values.append(metrics.mmd(x, y + shift, sigma=1.0))
    for shift, truth in ((0.0, 0.0), (1.0, 0.17727)):
        values = torch.tensor(found[shift])
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean()) - truth) < 3 * error
    assert min(found[0.0]) < 0 < max(found[0.0])
    assert error < 0.01


def test_mmd_of_single_precision_far_from_the_origin():
    x, y = normal(200, 3), normal(200, 3, seed=1) + 0.5
    near = metrics.mmd(x, y, sigma=1.0)
    far = metrics.mmd(x.float() + 1000, y.float() + 1000, sigma=1.0)
    assert far == pytest.approx(near, abs=1e-4)


def test_the_bandwidth_is_the_median_of_the_distances():
    x, y = normal(30, 2), normal(20, 2, seed=1)
    both = torch.cat([x, y])
    wanted = torch.pdist(both).median()
    assert kernels.median_bandwidth(x, y) == pytest.approx(float(wanted))
    assert metrics.mmd(x, y) == pytest.approx(metrics.mmd(x, y, sigma=float(wanted)))
    rare = torch.zeros(40, 2)
    rare[:4] = torch.tensor([0.0, 3.0])
    assert kernels.median_bandwidth(rare, rare[:0]) == 3.0  # of the pairs that differ
    gaps = x.index_fill(0, torch.tensor([4]), math.nan)
    assert kernels.median_bandwidth(gaps, y) == pytest.approx(float(wanted), rel=0.1)
    with pytest.raises(InputError, match="no two points are a finite distance apart"):
        kernels.median_bandwidth(gaps * math.nan, y[:0])


@pytest.mark.parametrize("sizes", [(50, 50), (31, 70), (1, 9)])
def test_wasserstein_is_that_of_scipy(sizes):
    x, y = normal(sizes[0], 3), 2 * normal(sizes[1], 3, seed=1) + 0.3
    wanted = [wasserstein_distance(x[:, j], y[:, j]) for j in range(3)]
    assert metrics.wasserstein(x, y).tolist() == pytest.approx(wanted)


def test_sliced_wasserstein_of_a_shift():
    x, move = normal(60, 3), torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64)
    found = metrics.sliced_wasserstein(x, x + move, projections=4000)
    assert found == pytest.approx(1.0, abs=0.03)  # E|θ₁| = 1/2 on the sphere
    assert metrics.sliced_wasserstein(x, x) == 0.0
    whole = torch.arange(4)[:, None]
    assert metrics.sliced_wasserstein(whole, whole + 2) == pytest.approx(2.0)
    assert metrics.sliced_wasserstein(x, x + move, seed=1) != found


def test_modes_need_their_share():
    """One lucky sample makes no mode; samples between modes are of no quality."""
    angle = torch.arange(8) * math.pi / 4
    ring = torch.stack([angle.cos(), angle.sin()], 1)
    even = ring.repeat(100, 1) + 0.01 * torch.randn(800, 2, generator=torch.Generator())
    whole = metrics.mode_coverage(even, ring, 0.02)
    assert whole.modes == 8
    assert whole.reverse_kl == pytest.approx(0.0, abs=1e-12)
    assert whole.high_quality > 0.99
    lucky = torch.cat([ring[:1].repeat(993, 1), ring[1:]])
    found = metrics.mode_coverage(lucky, ring, 0.02)
    assert (found.modes, found.high_quality) == (1, 1.0)
    shares = np.array([0.993] + [0.001] * 7)
    assert found.reverse_kl == pytest.approx((shares * np.log(8 * shares)).sum())
    assert metrics.mode_coverage(lucky, ring, 0.02, least=0.0).modes == 8
    halves = metrics.mode_coverage((ring + ring.roll(1, 0)) / 2, ring, 0.02)
    assert (halves.modes, halves.high_quality) == (0, 0.0)


def test_a_mode_ends_at_three_standard_deviations_and_needs_a_sample():
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    found = metrics.mode_coverage(torch.tensor([[0.29, 0.0], [8.69, 0.0]]), centres, 0.1, least=0.0)
    assert (found.modes, found.high_quality) == (1, 0.5)


def test_precision_and_recall_tell_invention_from_omission():
    left, right = normal(300, 2), normal(300, 2, seed=1) + 20
    again = normal(300, 2, seed=2)
    both = torch.cat([left, right])
    precision, recall = metrics.precision_recall(both, again)
    assert precision > 0.9
    assert 0.4 < recall < 0.55
    assert metrics.precision_recall(again, both)[::-1] == (precision, recall)


def test_the_curve_of_two_histograms():
    """q = p with a mode left out: full precision; the recall is the rest's share."""
    p = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    q = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    precision, recall = metrics.precision_recall_curve(p, q)
    assert float(precision.max()) == pytest.approx(1.0)
    assert float(recall.max()) == pytest.approx(0.6)
    same = metrics.precision_recall_curve(p, p)
    assert float(torch.minimum(*same).max()) == pytest.approx(1.0, abs=1e-6)


def lorenz(points, every=20, step=0.01):
    """A trajectory of the Lorenz equations by Runge and Kutta's method."""

    def flow(v):
        x, y, z = v
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z])

    v, path = np.array([1.0, 1.0, 20.0]), []
    for count in range(points * every + 1000):
        a = flow(v)
        b = flow(v + step / 2 * a)
        c = flow(v + step / 2 * b)
        d = flow(v + step * c)
        v = v + step / 6 * (a + 2 * b + 2 * c + d)
        if count >= 1000 and count % every == 0:
            path.append(v)
    return torch.tensor(np.array(path))


def test_the_correlation_dimension_of_the_lorenz_attractor():
    assert metrics.correlation_dimension(lorenz(4000), window=5) == pytest.approx(2.05, abs=0.03)


def test_pairs_that_are_close_in_time_are_left_out():
    """Each point of a circle eight times over, one after the other: clusters, of dimension 0."""
    angles = 2 * math.pi * torch.rand(500, generator=torch.Generator().manual_seed(0))
    points = torch.stack([angles.cos(), angles.sin()], 1).double().repeat_interleave(8, 0)
    points += 1e-9 * normal(4000, 2)
    assert metrics.correlation_dimension(points, window=7) == pytest.approx(1.0, abs=0.1)
    assert metrics.correlation_dimension(points) < 0.5


@pytest.mark.parametrize("dimension", [1, 2])
def test_the_correlation_dimension_of_a_torus(dimension):
    """Angles on circles, in a space of twice the dimension: no boundary."""
    angles = torch.rand(2500, dimension, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    points = torch.cat([angles.cos(), angles.sin()], 1)
    found = metrics.correlation_dimension(points)
    assert found == pytest.approx(dimension, abs=0.05)


def test_what_cannot_be_compared_is_refused():
    x = torch.zeros(5, 2)
    for call in (
        lambda: metrics.mmd(x, torch.zeros(5, 3), sigma=1.0),
        lambda: metrics.mmd(x[:1], x, sigma=1.0),
        lambda: metrics.mmd(x, x),
        lambda: metrics.mmd(x, x, sigma=0.0),
        lambda: metrics.precision_recall(x[:3], x),
        lambda: metrics.precision_recall_curve(torch.ones(2), torch.ones(3)),
        lambda: metrics.correlation_dimension(x),
        lambda: metrics.correlation_dimension(normal(500, 2).round()),
    ):
        with pytest.raises(InputError):
            call()


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(metrics, raise_on_error=True).attempted
