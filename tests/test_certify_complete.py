"""Branch and bound against mixed-integer programs, and certificates of networks in the bracket."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from programs import least
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier
from torch import nn

import robustlearn as rl
from robustlearn.certify import bounds, certified_radius, complete
from robustlearn.certify.bounds import Deadline, crown_bounds
from robustlearn.certify.complete import Property, decide, falsify
from robustlearn.certify.relax import Region
from robustlearn.models.graph import Network
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


def test_a_frozen_feature_is_a_constant():
    """Branch and bound, cuts included, says of scale (1, 0, 1) what it says without the second."""
    seen = []
    for seed, eps in ((19, 0.8), (20, 0.8), (42, 0.8), (60, 1.5)):
        net, x, _ = instance(seed, 2)
        label = int(net(x).argmax())
        less = copy.deepcopy(net)
        less[0].bias.data += net[0].weight.data[:, 1] * x[0, 1]
        less[0].weight.data = net[0].weight.data[:, ::2]
        rule, found = Property.of_class(label, 3), []
        for module, point, scale in ((net, x, [1.0, 0.0, 1.0]), (less, x[:, ::2], [1.0, 1.0])):
            region = Region(point, rl.LpBall(2, eps, scale=torch.tensor(scale)))
            with torch.no_grad():
                found.append(decide(trace(module, point), region, rule))
        assert found[0].status == found[1].status != "open"
        seen.append(found[0].by)
    assert "branch and bound" in seen


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


@pytest.fixture(scope="module")
def ramps():
    """y = (x⁺ − 0.2, (1 − x)⁺ − 0.2) of x near ½: never both ≤ 0, their maximum is ≥ 0.3."""
    net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).double()
    net[0].load_state_dict(
        {"weight": torch.tensor([[1.0], [-1.0]]), "bias": torch.tensor([0.0, 1.0])}
    )
    net[2].load_state_dict({"weight": torch.eye(2), "bias": torch.full((2,), -0.2)})
    x = torch.tensor([[0.5]]).double()
    return trace(net, x), Region(x, rl.LpBall(math.inf, 2.0))


def test_a_conjunction_is_weighed(ramps):
    """y₀ ≤ 0 and y₁ ≤ 0: neither row alone stays positive, their sum does."""
    rule = Property(torch.eye(2).double()[None], torch.zeros(1, 2).double())
    found = decide(*ramps, rule)
    assert (found.status, found.by) == ("certified", "branch and bound")
    assert 0 < found.bound <= 0.3


def test_the_bound_is_the_least_of_all_groups(ramps):
    """A second group, y₀ + 0.21 ≤ 0, is settled at once, and nearer than the first."""
    rows = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]).double()
    rule = Property(rows, torch.tensor([[0.0, 0.0], [0.21, 0.21]]).double())
    found = decide(*ramps, rule)
    assert (found.status, found.by) == ("certified", "branch and bound")
    assert 0 < found.bound <= 0.01 + 1e-12


@pytest.mark.parametrize("closed", [False, True])
def test_a_tie_is_a_violation_where_the_rule_says_so(closed):
    net = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    net[0].load_state_dict({"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    x = torch.tensor([[-0.75]]).double()
    rule = Property(torch.ones(1, 1, 1).double(), torch.zeros(1, 1).double(), closed)
    found = decide(trace(net, x), Region(x, rl.LpBall(math.inf, 0.25)), rule)
    assert found.status == ("falsified" if closed else "open")


@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_a_tie_where_nothing_may_move_is_open(p):
    x = torch.ones(1, 2, dtype=torch.float64)
    found = decide(trace(nn.ReLU(), x), Region(x, rl.LpBall(p, 0.0)), Property.of_class(0, 2))
    assert found.status == "open"
    assert found.bound <= 0


@pytest.mark.parametrize("size", [1e-10, 1e-6, 1.0])
def test_a_narrow_violation_among_small_weights_is_no_proof(size):
    """|x/10⁷ − 0.31373| ≤ 10⁻⁵ at x = 3,137,300, in any unit; solvers drop what is below 10⁻⁹."""
    net = nn.Linear(1, 2, bias=False).double()
    net.weight.data = size * torch.tensor([[1.0], [-1.0]]).double()
    x = torch.zeros(1, 1).double()
    offsets = 1e7 * size * torch.tensor([[-0.31374, 0.31372]]).double()
    rule = Property(torch.eye(2).double()[None], offsets)
    found = decide(trace(net, x), Region(x, rl.LpBall(math.inf, 1e7)), rule)
    assert found.status == "falsified"


@pytest.mark.parametrize("seed", [13, 36])
def test_small_outputs_are_not_proven_by_tolerances(seed):
    net, x, _ = instance(seed, math.inf, widths=(2, 8, 8, 2))
    axis = torch.linspace(-1, 1, 101, dtype=torch.float64)
    grid = x + torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        margin = float((net(grid) @ torch.tensor([1.0, -1.0]).double()).min())
        net[-1].bias[0] -= margin + 4e-3
        for part in (net[-1].weight, net[-1].bias):
            part.mul_(1e-7)
        found = decide(
            trace(net, x), Region(x, rl.LpBall(math.inf, 1.0)), Property.of_class(0, 2),
            deadline=Deadline.after(5),
        )  # fmt: skip
    assert found.status != "certified"
    assert found.bound <= -4e-10


def test_time_is_kept_and_leaves_it_open():
    net, x, _ = instance(1, math.inf, widths=(12, 60, 60, 60, 3))
    region = Region(x, rl.LpBall(math.inf, 0.12))
    label = int(net(x).argmax())
    found = decide(trace(net, x), region, Property.of_class(label, 3), deadline=Deadline.after(0))
    assert found.status in ("open", "falsified")
    assert found.by in ("crown_ibp", "attack")


@pytest.fixture
def passes(monkeypatch):
    """A clock on which every pass through a network, forward or backward, takes a second."""
    seconds = [0]

    def timed(function):
        def pass_(*given, **options):
            seconds[0] += 1
            return function(*given, **options)

        return pass_

    monkeypatch.setattr(bounds.time, "perf_counter", lambda: float(seconds[0]))
    monkeypatch.setattr(Network, "__call__", timed(Network.__call__))
    for module in (bounds, complete):
        monkeypatch.setattr(module, "backward", timed(module.backward))
    return seconds


@pytest.mark.parametrize("limit", [1, 10, 45, 60, 100])
@pytest.mark.parametrize("p", [2, math.inf])
def test_no_step_goes_on_after_its_time(passes, p, limit):
    """One round of each kind of step is the most that may lie beyond the limit."""
    net, x, _ = instance(1, p, widths=(6, 30, 30, 30, 3))
    network, region = trace(net, x), Region(x, rl.LpBall(p, {2: 0.35, math.inf: 0.18}[p]))
    rule = Property.of_class(int(network(x).argmax()), 3)
    passes[0] = 0
    found = decide(network, region, rule, deadline=Deadline.after(limit))
    assert found.status == "open"
    assert limit <= passes[0] <= limit + 6


@pytest.mark.parametrize("method", ["crown", "alpha_crown"])
def test_samples_share_their_time(passes, method):
    """The first sixteen do not spend what is there for the others."""
    net, x, _ = instance(1, 2, widths=(6, 30, 30, 30, 3))
    x = x + 0.01 * torch.arange(32)[:, None]
    found = rl.certify(net, x, rl.LpBall(2, 0.4), method=method, seconds=1)
    assert passes[0] <= 32 + 24  # of which 16 record the network
    margin = found.margin - rl.certify(net, x, rl.LpBall(2, 0.4), method="ibp").margin
    assert (margin[16:] > 0).any()


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


class Band(nn.Module):
    """(c, 0) in real arithmetic; in float32 far from it where |x| < 0.1, a tenth of the box."""

    def forward(self, x):
        large = torch.relu(1 - (10 * x).abs()) * 1e6
        third = large / 3
        return torch.cat([third + third + third - large + 0.01, x * 0], 1)


@pytest.mark.parametrize("method", ["ibp", "crown", "complete"])
def test_rounding_where_nobody_looked_is_allowed_for(method):
    net, points = Band(), torch.linspace(-0.1, 0.1, 501)[:, None]
    margin = float((net(points) @ torch.tensor([1.0, -1.0])).min())
    assert margin < 0
    found = rl.certify(
        net, torch.full((1, 1), 0.5), rl.LpBall(math.inf, 1.0), y=[0], method=method, seconds=0.2
    )
    assert not found.certified.any()
    assert found.margin[0] <= margin


def test_rounding_is_expected_as_it_is_seen():
    torch.manual_seed(0)
    layers = [nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, 80), nn.ReLU(), nn.Linear(80, 4)]
    net, x = nn.Sequential(*layers), torch.rand(40, 50)
    network, low = trace(net, x), x[:, None].double()
    with torch.no_grad():
        seen = (net(x).double() - network(x.double())).abs().amax(1)
        expected = network.rounding(low - 0.1, low + 0.1, network.unit)
    assert (seen <= 3 * expected).all()
    assert (expected <= 1e-4).all()


@pytest.mark.parametrize("n", [1, 2])
def test_what_mixes_a_batch_is_refused(n):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    with pytest.raises(rl.InputError, match="other samples of a batch"):
        rl.certify(Centred(), torch.zeros(n, 2), rl.LpBall(2, 0.0), y=[0] * n, method="ibp")


@pytest.mark.parametrize(("head", "outputs"), [(nn.Softmax(1), 3), (nn.Sigmoid(), 1)])
def test_a_head_that_is_bypassed_is_no_part_of_what_is_bounded(head, outputs):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, outputs)), torch.rand(5, 2)
    net[2].weight.data *= 20
    models = [rl.wrap(module, task="classification") for module in (net, nn.Sequential(net, head))]
    with pytest.warns(UserWarning, match="the logits before it are used"):
        found = [rl.certify(model, x, rl.LpBall(math.inf, 0.1), method="crown") for model in models]
    np.testing.assert_array_equal(found[0].margin, found[1].margin)
    assert "forward" not in vars(head)


def test_a_budget_of_passes_has_one_result(digits):
    net, x, y = digits
    found = [
        rl.certify(net, x, rl.LpBall(math.inf, 0.03), y=y, passes=passes).margin
        for passes in (200, 200, 0)
    ]
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] >= found[2]).all()
    assert (found[0] > found[2]).any()


def test_what_stands_in_the_way_is_named():
    net = nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(rl.InputError, match="gelu"):
        rl.certify(net, torch.rand(2, 2), rl.LpBall(2, 0.1))
    with pytest.raises(rl.InputError, match="seconds alone"):
        rl.certify(net, torch.rand(2, 2), rl.LpBall(2, 0.1), method="crown:steps=3")
    for text in ("auto:seconds=-1", "crown:seconds=nan", "trees:seconds=soon"):
        with pytest.raises(rl.InputError, match=r"seconds must be a number in \[0, inf\]"):
            rl.certify(net, torch.rand(2, 2), rl.LpBall(2, 0.1), method=text)
    with pytest.raises(rl.InputError, match="halvings must be a whole number"):
        certified_radius(net, torch.rand(2, 2), rl.LpBall(2, 0.1), halvings=-1)
