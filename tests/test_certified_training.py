"""Objectives on certified bounds: their derivatives, what they bound, and that they train."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import robustlearn as rl
from robustlearn.certify.bounds import interval_bounds
from robustlearn.certify.relax import Region
from robustlearn.models.trace import trace
from robustlearn.train import OBJECTIVES, fit, interval_init_

NAMES = ("ibp", "crown_ibp", "mtl_ibp")
THREAT = rl.LpBall(math.inf, 0.05, lower=0.0, upper=1.0)


@pytest.fixture
def played():
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(32, 5), nn.ReLU(), nn.Linear(5, 3)),
    ).double()
    net(torch.rand(50, 1, 6, 6, dtype=torch.float64))
    x = torch.rand(6, 1, 6, 6, dtype=torch.float64)
    return net.eval(), x, torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("name", ["ibp", "crown_ibp"])
def test_weights_feel_the_bound(played, name):
    net, x, y = played

    def loss():
        return OBJECTIVES[name].function(net, x, y, THREAT).loss.mean()

    loss().backward()
    for parameter in net.parameters():
        flat, step = parameter.data.view(-1), 1e-6
        flat[0] += step
        above = loss().item()
        flat[0] -= 2 * step
        below = loss().item()
        flat[0] += step
        expected = (above - below) / (2 * step)
        assert parameter.grad.flatten()[0].item() == pytest.approx(expected, rel=1e-4, abs=1e-8)


def test_intervals_keep_their_width_at_the_start():
    def grown(net):
        x = torch.rand(20, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        spans = interval_bounds(trace(net, x[:1]), Region(x.double(), THREAT)).values()
        widths = [float((high - low).mean().detach()) for low, high in spans]
        return widths[-1] / widths[0]

    torch.manual_seed(0)
    deep = [layer for _ in range(4) for layer in (nn.Linear(200, 200), nn.ReLU())]
    net = nn.Sequential(nn.Conv2d(1, 8, 8), nn.ReLU(), nn.Flatten(), *deep, nn.Linear(200, 10))
    assert grown(net) > 10
    assert 0.5 < grown(interval_init_(net)) < 2


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_bounds_every_attack(played, name):
    net, x, y = played
    bound = OBJECTIVES[name].function(net, x, y, THREAT, weight=1.0).loss
    for seed in range(50):
        output = net(x + THREAT.sample(x, seed))
        assert (functional.cross_entropy(output, y, reduction="none") <= bound).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_what_can_be_certified(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(600, 2, generator=generator)
    x = x[(x[:, 0] - 0.5).abs() > 0.12]
    y = (x[:, 0] > 0.5).long()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 2))
    threat = rl.LpBall(math.inf, 0.05)
    before = rl.certify(net, x, threat, y=y, method="ibp").certified.mean()
    fit(net, (x, y), threat, objective=f"{name}:weight=0.5", epochs=8, lr=0.02, validation=None)
    after = rl.certify(net, x, threat, y=y, method="ibp").certified.mean()
    assert after > max(0.9, before + 0.2)


class Centred(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [1, 4])
def test_a_network_that_mixes_its_batch_is_refused(name, n):
    torch.manual_seed(0)
    x, y = torch.rand(n, 3), torch.arange(n) % 2
    with pytest.raises(rl.InputError, match="something else on a batch"):
        OBJECTIVES[name].function(Centred(3, 2), x, y, THREAT)
