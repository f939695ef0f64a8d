"""Games with known orbits through the same code as all others, and moves that look ahead."""

import math

import pytest
import torch
from torch import nn

from robustlearn.gan import (
    GanGame,
    losses,
    regularizers,
    updates,
)
from robustlearn.gan.updates import optimistic
from robustlearn.loop import play


class Point(nn.Module):
    """A generator of one point, whatever the noise."""

    def __init__(self, start=1.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, z):
        return self.place.expand(len(z), 1)


class Slope(nn.Module):
    """A linear critic of one number."""

    def __init__(self, start=1.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, x):
        return (x * self.slope)[:, 0]


def duel(loss, *, lr, steps, optimizer=torch.optim.SGD, penalty="", **options):
    """Play a point against a slope, the truth at 0; return the way (steps, 2) of (x, y)."""
    modules = {"generator": Point(), "critic": Slope()}
    way = []

    class Recorded(GanGame):
        def step(self, batch, turn):
            found = super().step(batch, turn)
            way.append([float(m.detach()) for m in (modules["generator"].place, slope())])
            return found

    def slope():
        return modules["critic"].slope

    played = Recorded(
        modules=modules,
        optimizers={name: optimizer(m.parameters(), lr=lr) for name, m in modules.items()},
        noise=1,
        loss=losses.get(loss),
        penalties=regularizers.penalties(penalty),
        **options,
    )
    play(played, torch.zeros(steps, 1, dtype=torch.float64), epochs=1, batch_size=1)
    return torch.tensor(way)


# ------------------------------------------------------------------ games with known orbits


@pytest.mark.parametrize(
    ("order", "optimizer", "steps", "ratio", "tolerance"),
    [
        ("simultaneous", torch.optim.SGD, 200, 1.01**100, 1e-3),
        ("alternating", torch.optim.SGD, 200, 1.0, 0.06),
        ("extragradient", torch.optim.SGD, 200, (0.99**2 + 0.01) ** 100, 1e-3),
        ("simultaneous", optimistic(torch.optim.SGD), 500, 0.080, 1e-2),
    ],
)
def test_the_bilinear_game_has_its_rates(order, optimizer, steps, ratio, tolerance):
    """min_x max_y xy: the Wasserstein loss of a point and a slope; ‖z_T‖/‖z₀‖ at η = 0.1."""
    way = duel("wasserstein", lr=0.1, steps=steps, order=order, optimizer=optimizer)
    assert float(way[-1].norm()) / math.sqrt(2) == pytest.approx(ratio, rel=tolerance)


@pytest.mark.parametrize(
    ("penalty", "converges"),
    [("", False), ("r1:weight=1", True), ("gradient_penalty:weight=0.5", False)],
)
def test_the_dirac_game_converges_with_r1_alone(penalty, converges):
    """Real at 0, generated at θ, D(x) = ψx (Mescheder et al. 2018)."""
    way = duel("non_saturating", lr=0.2, steps=250, order="simultaneous", penalty=penalty)
    if converges:
        assert float(way[-50:].norm(dim=1).max()) < 1e-5
    else:
        assert float(way[-50:, 0].abs().max()) > 0.1


def test_looking_ahead_is_clipped_as_steps_are():
    """Gradients of a thousand, clipped to 1 at a rate of 0.1: no weight is asked for beyond 1.1."""
    asked = []

    class Asked(Slope):
        def forward(self, x):
            asked.append(float(self.slope.detach()))
            return super().forward(x)

    modules = {"generator": Point(), "critic": Asked()}
    played = GanGame(
        modules,
        {name: torch.optim.SGD(m.parameters(), lr=0.1) for name, m in modules.items()},
        1,
        losses.get("wasserstein"),
        order="extragradient",
    )
    x = torch.full((1, 1), 1000.0, dtype=torch.float64)
    play(played, x, epochs=1, batch_size=1, clip=1.0)
    assert max(asked) == pytest.approx(1.1)
    assert float(modules["critic"].slope.detach()) == pytest.approx(1.1)


def test_an_unrolled_critic_bends_the_generators_gradient():
    """y' = y + kηx: the generator descends −x(y + kηx), y counted after the critic's own step."""
    eta, k = 0.1, 3
    way = duel("wasserstein", lr=eta, steps=1, unroll=k)
    y = 1 - eta * 1
    assert way[0].tolist() == pytest.approx([1 + eta * (y - 2 * k * eta), y])


def test_an_unrolled_critic_pays_its_penalties():
    """With R1 it descends xy + γy²/2: y' = y − η(x + γy), after its own step of the same."""
    eta, gamma = 0.1, 3.0
    way = duel("wasserstein", lr=eta, steps=1, unroll=1, penalty=f"r1:weight={gamma}")
    y = 1 - eta * (1 + gamma)
    ahead = y - eta * (1 + gamma * y)
    assert way[0].tolist() == pytest.approx([1 + eta * (ahead - eta), y])


def test_unrolling_stops_the_circles():
    plain = duel("wasserstein", lr=0.1, steps=120)
    ahead = duel("wasserstein", lr=0.1, steps=120, unroll=5)
    assert float(plain[-1].norm()) > 0.9
    assert float(ahead[-1].norm()) < 0.01


# ------------------------------------------------------------------ moves


def problem():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    return net, torch.randn(8, 3)


def test_optimistic_steps_have_the_formula():
    net, x = problem()
    other, _ = problem()
    optimizer = optimistic(torch.optim.SGD)(net.parameters(), lr=0.1)
    last = None
    for _ in range(4):
        for model in (net, other):
            model.zero_grad()
            model(x).square().mean().backward()
        optimizer.step()
        slopes = [p.grad.clone() for p in other.parameters()]
        with torch.no_grad():
            for parameter, new, old in zip(other.parameters(), slopes, last or slopes, strict=True):
                parameter -= 0.1 * (2 * new - old)
        last = slopes
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_looking_ahead_leaves_no_trace_but_gradients():
    net, x = problem()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        memory = {k: dict(v) for k, v in optimizer.state_dict()["state"].items()}
        memory = {k: {n: t.clone() for n, t in v.items()} for k, v in memory.items()}
        with updates.looking_ahead([optimizer]):
            assert not torch.equal(net.weight, before["weight"])
            assert net.weight.grad is None
            net(x).square().mean().backward()
        assert net.weight.grad is not None
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        after = optimizer.state_dict()["state"]
        assert after.keys() == memory.keys()
        assert all(t.equal(after[k][n]) for k, v in memory.items() for n, t in v.items())
        optimizer.step()


def test_frozen_weights_thaw_as_they_were():
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    with updates.frozen(net):
        assert not net.weight.requires_grad
    assert net.weight.requires_grad
    assert not net.bias.requires_grad
