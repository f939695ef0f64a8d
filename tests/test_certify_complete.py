"""Branch and bound against mixed-integer programs, and certificates of networks in the bracket."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import nn

import robustlearn as rl
from robustlearn.certify.bounds import Deadline, crown_bounds
from robustlearn.certify.complete import Property, decide, falsify
from robustlearn.certify.milp import least
from robustlearn.certify.networks import certified_radius
from robustlearn.certify.relax import Region
from robustlearn.models.trace import trace


def instance(seed, p, widths=(3, 6, 6, 3)):
    """A small random network, a point, and a threat of random size; every third has no box."""
    torch.manual_seed(seed)
    layers = [part for a, b in itertools.pairwise(widths)
              for part in (nn.Linear(a, b), nn.ReLU())]  # fmt: skip
    net = nn.Sequential(*layers[:-1]).double()
    for parameter in net.parameters():
        parameter.data.mul_(2)
    x = torch.rand(1, widths[0], dtype=torch.float64)
    walls = {} if seed % 3 == 0 else {"lower": 0.0, "upper": 1.0}
    return net, x, rl.LpBall(p, float(torch.rand(())) * 0.8, **walls)


def minimum(network, region, rule, threshold=None):
    with torch.no_grad():
        spans = crown_bounds(network, region)
        places = {
            i: ((spans[i][0] < 0) & (spans[i][1] > 0)).flatten().nonzero().squeeze(1)
            for i in network.activations
        }
        return min(
            least(network, region, r, c, spans, places, threshold=threshold)[0]
            for r, c in zip(rule.rows, rule.offsets, strict=True)
        )


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_decides_as_a_mixed_integer_program_does(p):
    seen = []
    for seed in range(52):
        net, x, threat = instance(seed, p)
        network, region = trace(net, x), Region(x, threat)
        with torch.no_grad():
            rule = Property.of_class(int(net(x).argmax()), 3)
            found = decide(network, region, rule, deadline=Deadline.after(30))
        truth = minimum(network, region, rule, threshold=0.0)
        seen.append(found.by)
        assert found.status == ("certified" if truth > 0 else "falsified"), seed
        if found.witness is not None:
            assert bool(threat.contains(x, found.witness[None]))
            assert int(net(found.witness[None]).argmax()) != int(net(x).argmax())
        elif math.isinf(p):  # for others the program stops once the sign is known
            assert found.bound <= truth + 1e-6
    assert {"crown_ibp", "attack"} <= set(seen)


def test_the_program_is_exact():
    """Against a dense grid of the box; the network is 6-Lipschitz there by its weights' norms."""
    net, x, _ = instance(4, math.inf, widths=(2, 5, 4, 2))
    region = Region(x, rl.LpBall(math.inf, 0.3))
    rule = Property.of_class(0, 2)
    value = minimum(trace(net, x), region, rule)
    axis = torch.linspace(-0.3, 0.3, 301, dtype=torch.float64)
    grid = x + torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        seen = float(rule.value(net(grid)).min())
    lipschitz = (
        math.prod(float(torch.linalg.matrix_norm(m.weight.detach(), 2)) for m in net[::2]) * 2**0.5
    )
    assert value <= seen + 1e-7
    assert seen <= value + lipschitz * 0.0015 * 2**0.5


def test_a_conjunction_is_weighed():
    """y₀ ≤ 0 and y₁ ≤ 0 for (x, 1 − x): neither row alone stays positive, their sum does."""
    net = nn.Linear(1, 2).double()
    net.weight.data = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    net.bias.data = torch.tensor([0.0, 1.0], dtype=torch.float64)
    relu = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    relu[0].load_state_dict(net.state_dict())
    relu[2].load_state_dict({"weight": torch.eye(2), "bias": torch.full((2,), -0.2)})
    x, rule = (
        torch.tensor([[0.5]]).double(),
        Property(torch.eye(2).double()[None], torch.zeros(1, 2)),
    )
    found = decide(trace(relu, x), Region(x, rl.LpBall(math.inf, 2.0)), rule)
    assert (found.status, found.by) == ("certified", "branch and bound")


def test_time_is_kept_and_leaves_it_open():
    net, x, _ = instance(1, math.inf, widths=(12, 60, 60, 60, 3))
    region = Region(x, rl.LpBall(math.inf, 0.12))
    label = int(net(x).argmax())
    found = decide(trace(net, x), region, Property.of_class(label, 3), deadline=Deadline.after(0))
    assert found.status in ("open", "falsified")
    assert found.by in ("crown_ibp", "attack")


def test_no_attack_is_claimed_outside_the_threat():
    net, x, _ = instance(2, 2)
    threat = rl.LpBall(2, 5.0, mask=torch.tensor([True, False, False]), lower=0.0, upper=1.0)
    for label in range(3):
        found = falsify(trace(net, x), Region(x, threat), Property.of_class(label, 3))
        if found is not None:
            assert (found[1:] == x[0, 1:]).all()
            assert 0 <= float(found[0]) <= 1


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x = x / 16
    net = MLPClassifier((24, 16), max_iter=60, random_state=0, tol=0.02).fit(x[:1200], y[:1200])
    return net, x[1200:1240], y[1200:1240]


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_bracket_of_a_perceptron(digits, p):
    """certified ≤ true ≤ attacked with each method, the stronger the narrower."""
    net, x, y = digits
    threat = rl.LpBall(p, {1: 1.0, 2: 0.4, math.inf: 0.06}[p], lower=0.0, upper=1.0)
    certified = []
    for method in ("ibp", "crown:seconds=9", "alpha_crown:seconds=9", "complete:seconds=5"):
        report = rl.evaluate(net, x, y, threat, attacks="quick", certify=method)
        certified.append(report.certified.value)
        assert report.certified.value <= report.attacked.value
        assert report.certificate["method"] == method.partition(":")[0]
    assert certified == sorted(certified)
    assert certified[-1] > 0.3
    assert report.certificate["open"] <= 0.1


def test_radii_grow_with_the_method(digits):
    net, x, _ = digits
    model, threat = rl.wrap(net), rl.LpBall(math.inf, 0.1, lower=0.0, upper=1.0)
    x = torch.as_tensor(x[:10])
    weak, strong = (
        certified_radius(model, x, threat, method=m, halvings=5) for m in ("ibp", "alpha_crown")
    )
    assert (weak <= strong).all()
    assert (strong <= 0.1).all()
    assert strong.mean() > weak.mean()


def test_a_regressor_is_bounded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    x = torch.rand(5, 3)
    model, threat = rl.wrap(net, task="regression"), rl.LpBall(2, 0.2)
    found = rl.certify(model, x, threat, y=torch.zeros(5))
    assert found.method == "alpha_crown"
    for seed in range(200):
        output = model(x + threat.sample(x, seed)).detach().numpy()
        assert (found.lower <= output).all()
        assert (output <= found.upper).all()
        assert (output**2 <= found.loss).all()


@pytest.mark.parametrize("method", ["ibp", "crown", "alpha_crown", "complete"])
def test_weights_that_are_not_numbers_are_refused(method):
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(rl.InputError, match="NaN"):
        rl.certify(net, torch.rand(3, 2), rl.LpBall(2, 0.1), y=[0, 1, 0], method=method)


def test_a_neuron_that_never_wakes_costs_nothing():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    net[0].bias.data[:] = torch.tensor([5.0, -9.0, 5.0])
    x = torch.rand(4, 2)
    found = rl.certify(net, x, rl.LpBall(math.inf, 0.5), method="crown")
    corners = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=2)))
    outputs = torch.stack([net(x + c) for c in corners]).detach()
    label = net(x).argmax(1)
    margin = outputs.gather(2, label[None, :, None].expand(4, 4, 1)).squeeze(2) - outputs.gather(
        2, 1 - label[None, :, None].expand(4, 4, 1)
    ).squeeze(2)
    np.testing.assert_allclose(found.margin, margin.amin(0), atol=1e-5)


def test_a_network_with_a_memory_is_refused():
    class Counts(nn.Module):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    with pytest.raises(rl.InputError, match="something else than what was recorded"):
        rl.certify(Counts(), torch.rand(2, 2), rl.LpBall(2, 0.1), method="crown")


def test_what_stands_in_the_way_is_named():
    net = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(rl.InputError, match="gelu"):
        rl.certify(net, torch.rand(2, 2), rl.LpBall(2, 0.1))
    with pytest.raises(rl.InputError, match="seconds alone"):
        rl.certify(net, torch.rand(2, 2), rl.LpBall(2, 0.1), method="crown:steps=3")
