"""Penalties on critics whose gradients are known, and parts of networks against their oracles."""

import doctest
import math
import pickle

import pytest
import torch
from gans import fitted, networks
from torch import nn

from robustlearn.errors import InputError
from robustlearn.gan import losses, regularizers
from robustlearn.gan.mixtures import perceptron
from robustlearn.gan.regularizers import (
    PENALTIES,
    MinibatchDiscrimination,
    clipped,
    packed,
    spectral,
)

KEYS = torch.arange(64)


def bowl(x):
    """D(x) = ½‖x‖², whose gradient is x."""
    return x.square().sum(1) / 2


def plane(x):
    """A linear critic with Lipschitz constant 1."""
    return x @ torch.tensor([0.6, 0.8], dtype=x.dtype)


def clouds(seed=0):
    source = torch.Generator().manual_seed(seed)
    real = torch.randn(64, 2, generator=source, dtype=torch.float64)
    return real, torch.randn(64, 2, generator=source, dtype=torch.float64) + 3


@pytest.mark.parametrize("name", PENALTIES)
def test_a_linear_critic_of_slope_one(name):
    """Norms are of each sample: over the whole batch it would be 8 here, and the penalty 490."""
    found = regularizers.penalties(name)[0](plane, *clouds(), KEYS)
    assert found.shape == (64,)
    wanted = 0.5 if name in ("r1", "r2") else 0.0
    torch.testing.assert_close(found, torch.full_like(found, wanted))


def test_r1_is_of_real_and_r2_of_generated_samples():
    real, fake = clouds()
    for name, points in (("r1", real), ("r2", fake)):
        found = regularizers.penalties(f"{name}:weight=3")[0](bowl, real, fake, KEYS)
        torch.testing.assert_close(found, 1.5 * points.square().sum(1))


def test_points_between_are_even_and_on_the_lines():
    """With D(x) = ½x² between 0 and 1 the norm is u itself."""
    real, fake = torch.ones(4000, 1), torch.zeros(4000, 1)
    keys = torch.arange(4000)
    (penalty,) = regularizers.penalties("gradient_penalty:weight=1:centre=0")
    share = penalty(bowl, real, fake, keys).detach().sqrt()
    assert 0 <= float(share.min()) < 0.01
    assert 0.99 < float(share.max()) < 1
    assert float(share.mean()) == pytest.approx(0.5, abs=0.02)
    (other,) = regularizers.penalties("gradient_penalty:weight=1:centre=0.5")
    torch.testing.assert_close(other(bowl, real, fake, keys).detach(), (share - 0.5).square())


def test_dragan_stays_near_real_samples():
    real = clouds()[0]
    seen = []

    def critic(x):
        seen.append(x.detach())
        return plane(x)

    regularizers.penalties("dragan:spread=0.5")[0](critic, real, real + 100, KEYS)
    moved = (seen[0] - real) / real.std()
    assert 0 <= float(moved.min())
    assert 0.3 < float(moved.max()) < 0.5


def test_dragan_moves_by_the_deviation_over_all_features_and_asks_for_slope_one():
    """u·c·std(x)·v of independent u and v has the mean c·std(x)/4 in every feature."""
    real = torch.tensor([0.0, 1.0, 5.0]) * torch.randn(4000, 3, generator=torch.Generator())
    seen = []

    def flat(x):
        seen.append(x.detach())
        return 0.5 * x[:, 0]

    (penalty,) = regularizers.penalties("dragan:weight=4:spread=1")
    assert penalty(flat, real, real, torch.arange(4000)).tolist() == pytest.approx([1.0] * 4000)
    moved = (seen[0] - real).mean(0) / real.std()
    assert moved.tolist() == pytest.approx([0.25] * 3, rel=0.05)


def test_penalties_have_the_derivative_of_finite_differences():
    real, fake = clouds()
    weight = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    for name in PENALTIES:
        (penalty,) = regularizers.penalties(name)
        assert torch.autograd.gradcheck(
            lambda w, penalty=penalty: penalty(lambda x: torch.tanh(x @ w), real, fake, KEYS),
            weight,
        )


@pytest.mark.parametrize("name", PENALTIES)
def test_a_flat_critic_has_a_finite_derivative(name):
    """At first a critic may be constant: 0 has no square root with a slope."""
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = regularizers.penalties(name)[0](lambda x: x @ weight, *clouds(), KEYS)
    (slope,) = torch.autograd.grad(found.sum(), weight)
    assert bool(slope.isfinite().all())


def test_spectral_normalisation_is_that_of_the_svd():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 1))
    wanted = [float(torch.linalg.svdvals(net[i].weight.detach())[0]) for i in (0, 2)]
    before = [net[i].weight.detach().clone() for i in (0, 2)]
    spectral(net)
    for _ in range(60):
        net(torch.zeros(1, 20))
    for i, sigma, weight in zip((0, 2), wanted, before, strict=True):
        torch.testing.assert_close(net[i].weight, weight / sigma, rtol=1e-3, atol=1e-4)
    x = torch.randn(500, 20)
    slopes = (net(x[:250]) - net(x[250:])).detach().abs()[:, 0] / (x[:250] - x[250:]).norm(dim=1)
    assert float(slopes.max()) <= 1.001


def test_clipped_weights_are_held_and_can_leave_the_edge():
    """The critic of 0 against 5 runs to the edge −c, and back to c when they swap."""
    torch.manual_seed(0)
    critic = clipped(nn.Linear(1, 1), 0.1)
    optimizer = torch.optim.SGD(critic.parameters(), 0.02)
    slopes = []
    for real, fake in [(0.0, 5.0)] * 5 + [(5.0, 0.0)] * 5:
        optimizer.zero_grad()
        r, q = (critic(torch.full((4, 1), at))[:, 0] for at in (real, fake))
        slopes.append(float(critic.weight.detach()))
        losses.get("wasserstein").critic(r, q).mean().backward()
        optimizer.step()
    critic(torch.zeros(1, 1))
    assert slopes[4] == pytest.approx(-0.1)
    assert float(critic.weight.detach()) == pytest.approx(0.1)
    assert max(abs(slope) for slope in slopes[1:]) <= 0.1 + 1e-6


def test_a_wasserstein_critic_that_is_clipped_is_played_and_kept():
    critic = clipped(perceptron(2, 1, width=8), 0.05)
    result = fitted(networks()[0], critic, loss="wasserstein", penalty="", unroll=1, lr=1e-2)
    assert math.isfinite(result.figures["sliced_wasserstein"])
    again = pickle.loads(pickle.dumps(result.critic))
    again(torch.zeros(1, 2))
    assert max(float(w.detach().abs().max()) for w in again.parameters()) <= 0.05 + 1e-6


def test_minibatch_discrimination_counts_who_is_close():
    layer, close = MinibatchDiscrimination(1, tables=1, width=1), math.exp(-2)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    found = layer(torch.tensor([[0.0], [1.0], [1.0]]))
    assert found[:, 1].tolist() == pytest.approx([2 * close, 1 + close, 1 + close])
    table = MinibatchDiscrimination(1, tables=1, width=2)  # the distance is that of ‖·‖₁
    with torch.no_grad():
        table.weight.fill_(1.0)
    assert table(torch.tensor([[0.0], [1.0]]))[:, 1].tolist() == pytest.approx([close, close])


def test_packs_are_of_neighbours():
    x = torch.arange(12.0).reshape(4, 3, 1)
    pack = packed(x, 4)
    assert pack.shape == (4, 12, 1)
    for row in range(4):
        wanted = torch.cat([x[(row + shift) % 4] for shift in range(4)])
        assert torch.equal(pack[row], wanted)
    assert packed(x, 1).equal(x)


def test_what_cannot_be_is_refused():
    for call, said in (
        (lambda: regularizers.penalties("r3"), "no penalty named"),
        (lambda: regularizers.penalties("r1:centre=1"), "no option centre"),
        (lambda: regularizers.penalties("r1:weight=abc"), "weight must be a number"),
        (lambda: regularizers.penalties("dragan:weight=-1"), "weight must be a number"),
        (lambda: spectral(nn.ReLU()), "no linear"),
        (lambda: clipped(nn.Linear(1, 1), 0.0), "positive bound"),
        (lambda: spectral(perceptron(2, 1, zero=True)), "starts at 0"),
        (lambda: packed(torch.zeros(3, 1), 4), "1 to 3"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_the_examples_of_the_docstrings():
    assert doctest.testmod(regularizers, raise_on_error=True).attempted
