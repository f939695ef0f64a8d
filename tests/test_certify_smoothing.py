"""Randomised smoothing: coverage by simulation, exact radii of linear models, staged looks."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import robustlearn as rl
from robustlearn import _tensor
from robustlearn.certify.smoothing import LOOKS, _errors, _median, _ranks, clopper_pearson
from robustlearn.certify.smoothing import smoothing as certify_smoothed
from robustlearn.errors import InputError
from robustlearn.models import Smoothed


def half_plane(d=6, seed=0):
    """A linear classifier of two classes, whose smoothed version is itself."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Linear(d, 2).double()
    with torch.no_grad():
        net.weight.copy_(torch.randn(2, d, generator=generator))
    x = torch.randn(40, d, generator=generator, dtype=torch.float64)
    weight = (net.weight[0] - net.weight[1]).detach()
    distance = (x @ weight + net.bias[0] - net.bias[1]).abs() / weight.norm()
    return rl.wrap(net), x, distance.detach().numpy()


@pytest.mark.parametrize("share", [0.02, 0.5, 0.93, 0.999])
@pytest.mark.parametrize("n", [1, 30, 400])
def test_clopper_pearson_covers_exactly(share, n):
    """The bound exceeds the truth for the draws of total probability at most α, summed up."""
    hits = np.arange(n + 1)
    bound = clopper_pearson(hits, n, 0.05)
    missed = stats.binom.pmf(hits, n, share)[bound > share].sum()
    assert missed <= 0.05
    assert stats.binom.sf(hits[1:] - 1, n, bound[1:]) == pytest.approx(0.05)  # and no smaller


def test_the_errors_of_the_looks_add_up():
    for looks in (LOOKS, (100,), (10, 20)):
        assert sum(error for _, error in _errors(looks, 0.01)) == pytest.approx(0.01)


@pytest.mark.parametrize("largest", [True, False])
def test_a_radius_exceeds_the_true_one_as_rarely_as_stated(largest):
    """P(f(x + σξ) = y) = Φ(distance/σ) for a half-plane: its radius is the distance."""
    model, x, distance = half_plane()
    smoothed = Smoothed(model, 0.5)
    label, wrong, alpha = model(x).argmax(1), 0, 0.2
    threat = rl.LpBall(2, torch.from_numpy(distance))  # at the truth itself, where errors show
    for seed in range(25):
        found = certify_smoothed(
            smoothed, x, threat, label, looks=(20, 60, 200), alpha=alpha, largest=largest, seed=seed
        )
        wrong += int((found.radius > distance).sum())
        assert (found.certified == (found.radius >= distance)).mean() > 0.99
    n = 25 * len(x)
    assert 0 < wrong <= stats.binom.ppf(1 - 1e-6, n, alpha)


def test_one_look_wrongly_at_the_whole_error_each_time_would_show():
    """The same simulation with all of α at every look: more errors than are allowed."""
    rng, alpha, truth = np.random.default_rng(0), 0.2, 0.8
    draws = rng.random((4000, 200)) < truth
    looks = (20, 60, 200)
    over = [clopper_pearson(draws[:, :n].sum(1), n, alpha) > truth for n in looks]
    assert np.any(over, 0).mean() > alpha * 1.3
    staged = [
        clopper_pearson(draws[:, :n].sum(1), n, error) > truth for n, error in _errors(looks, alpha)
    ]
    assert np.any(staged, 0).mean() <= alpha


def test_results_do_not_depend_on_the_batch():
    model, x, _ = half_plane()
    smoothed, threat = Smoothed(model, 0.5), rl.LpBall(2, 0.2)
    whole = certify_smoothed(smoothed, x, threat, None)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    parts = [certify_smoothed(smoothed, x[rows], threat, None) for rows in order.split(7)]
    np.testing.assert_array_equal(
        np.concatenate([part.radius for part in parts]), whole.radius[order]
    )
    keys = _tensor.keys(0, x[:1])
    first = smoothed.noisy(x[:1], keys, 0, 10)
    assert torch.equal(first[:, 4:], smoothed.noisy(x[:1], keys, 4, 10))


@pytest.mark.parametrize(
    ("threat", "factor"),
    [
        (rl.LpBall(1, 0.1), 1.0),
        (rl.LpBall(2, 0.1, scale=2.0), 2.0),
        (rl.LpBall(math.inf, 0.1), math.sqrt(6)),
        (rl.LpBall(math.inf, 0.1, mask=[True, False, False, True, True, True]), 2.0),
        (rl.LpBall(4, 0.1), 6**0.25),
    ],
)
def test_other_norms_are_measured_by_the_largest_euclidean_step(threat, factor):
    model, x, _ = half_plane()
    smoothed = Smoothed(model, 0.5)
    plain = certify_smoothed(smoothed, x, rl.LpBall(2, 0.1), None, largest=True)
    found = certify_smoothed(smoothed, x, threat, None, largest=True)
    np.testing.assert_allclose(found.radius, plain.radius / factor, rtol=1e-12)
    drawn = threat.sample(x, 3).norm(dim=1) if threat.p != 4 else torch.zeros(1)
    assert float(drawn.max()) <= 0.1 * factor * (1 + 1e-9)


def test_looks_in_stages_certify_as_many_with_fewer_votes():
    model, x, _ = half_plane()
    label, threat = model(x).argmax(1), rl.LpBall(2, 0.3)
    certified, votes = [], []
    for looks in ((10_000,), LOOKS):
        before = model.forwards
        found = certify_smoothed(Smoothed(model, 0.5), x, threat, label, looks=looks)
        certified.append(int(found.certified.sum()))
        votes.append(model.forwards - before)
    assert votes[1] <= 0.3 * votes[0]
    assert certified[1] >= certified[0] - 1


def test_predict_abstains_near_a_tie_and_is_right_elsewhere():
    model, x, distance = half_plane()
    smoothed = Smoothed(model, 0.5)
    found = smoothed.predict(x, 500)
    told = found != -1
    assert bool((found[told] == model(x).argmax(1)[told]).all())
    assert bool(told[torch.from_numpy(distance > 0.3)].all())
    assert not bool(told[torch.from_numpy(distance < 0.01)].any())


def test_black_boxes_are_certified_too():
    model, x, distance = half_plane()
    box = rl.wrap(lambda rows: model(torch.as_tensor(rows)).numpy())
    certificate = rl.certify(Smoothed(box, 0.5), x.numpy(), rl.LpBall(2, 0.2))
    assert certificate.method == "smoothing"
    assert not certificate.exact
    assert certificate.alpha > 0
    assert (certificate.certified <= (distance >= 0.2)).all()
    assert certificate.certified.sum() >= 0.8 * (distance >= 0.2).sum()


def test_the_median_of_a_regressor_stays_in_its_interval():
    """For f(x) = wᵀx the median is wᵀx and the interval is that ± ε‖w‖, widened by the draws."""
    net = nn.Linear(4, 1).double()
    model = Smoothed(rl.wrap(net, task="regression"), 0.4)
    x = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model.settle(x)
    certificate = rl.certify(model, x.numpy(), rl.LpBall(2, 0.3), y=np.zeros(10))
    middle = net(x).detach().numpy()[:, 0]
    width = 0.3 * float(net.weight.detach().norm())
    assert (certificate.lower <= middle - width).all()
    assert (certificate.upper >= middle + width).all()
    assert (certificate.upper - certificate.lower).max() < 2.4 * width
    far = _median(model, x[:1], np.array([9.0]), None, 100, 0.01, 0)
    assert math.isinf(far.lower[0])
    assert math.isinf(far.upper[0])


@pytest.mark.parametrize("n", [100, 400])
def test_the_order_statistics_cover_both_quantiles_as_often_as_stated(n):
    """Of uniform draws the quantiles are the probabilities themselves."""
    reach, alpha = 0.5, 0.2
    drawn = np.sort(np.random.default_rng(0).random((4000, n)), 1)
    (k,) = _ranks(np.array([reach]), n, alpha)
    missed = (drawn[:, k - 1] > stats.norm.cdf(-reach)) | (drawn[:, n - k] < stats.norm.cdf(reach))
    assert 0.5 * alpha <= missed.mean() <= alpha


def test_the_bracket_of_a_smoothed_network():
    model, x, _ = half_plane()
    y = model(x).argmax(1)
    y[:3] = 1 - y[:3]
    smoothed = Smoothed(model, 0.5, votes=200)
    report = rl.evaluate(smoothed, x.numpy(), y.numpy(), rl.LpBall(2, 0.3), attacks="pgd:steps=5")
    assert report.certificate["method"] == "smoothing"
    assert 0.2 < report.certified.value <= report.attacked.value < report.clean.value
    assert any("wrong with probability at most 0.001" in note for note in report.notes)


def test_a_probable_certificate_that_is_refuted_is_withdrawn_not_an_error(monkeypatch):
    from robustlearn.certify import CERTIFICATES

    model, x, _ = half_plane()
    entry = CERTIFICATES["smoothing"]

    def reckless(*given):
        sure = entry.function(*given)
        return dataclasses.replace(sure, certified=np.ones(len(x), bool))

    monkeypatch.setitem(
        CERTIFICATES._entries, "smoothing", dataclasses.replace(entry, function=reckless)
    )
    y = model(x).argmax(1).numpy()
    report = rl.evaluate(
        Smoothed(model, 0.5), x.numpy(), y, rl.LpBall(2, 0.5), attacks="pgd:steps=5"
    )
    assert report.certified.value == report.attacked.value < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [({"looks": (100, 10)}, "looks ascend"), ({"looks": ()}, "looks"), ({"alpha": 0.0}, "alpha")],
)
def test_options_that_make_no_sense(options, message):
    model, x, _ = half_plane()
    with pytest.raises(InputError, match=message):
        certify_smoothed(Smoothed(model, 0.5), x, rl.LpBall(2, 0.1), None, **options)


def test_what_cannot_be_smoothed():
    model, x, _ = half_plane()
    for sigma, votes in itertools.product((0.0, math.inf), (10,)):
        with pytest.raises(InputError, match="sigma must be positive"):
            Smoothed(model, sigma, votes)
    with pytest.raises(InputError, match=r"robustlearn.wrap of this Linear"):
        Smoothed(torch.nn.Linear(2, 2), 0.1)
    with pytest.raises(InputError, match="is not smoothed"):
        certify_smoothed(model, x, rl.LpBall(2, 0.1), None)
