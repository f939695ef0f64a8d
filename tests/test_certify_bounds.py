"""Bounds of networks: each inside the one before, around everything that can be reached."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import robustlearn as rl
from robustlearn.certify.bounds import crown_bounds, interval_bounds, row_bounds
from robustlearn.certify.relax import Region, curve_lines
from robustlearn.models.trace import trace


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.conv2, self.skip = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Conv2d(2, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        y = self.conv2(functional.relu(self.bn(self.conv1(x)), inplace=True))
        y += self.skip(x)
        return self.head(functional.relu(y).mean((2, 3)))


class SlicedAndPadded(nn.Module):
    """A shortcut as of CIFAR's residual networks, an assignment in place, and clamps."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        short = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        y = (1 - torch.tanh(self.conv(x) - short)).clamp(0.2, 1.5)
        y[:, 0] = torch.maximum(y[:, 1], -y[:, 2].abs())
        return self.head(y.flatten(1)) / 2


def mlp(activation, *widths):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(nn.Flatten(), *layers[:-1])


NETWORKS = {
    "relu": lambda: mlp(nn.ReLU, 32, 12, 9, 3),
    "leaky": lambda: mlp(nn.LeakyReLU, 32, 12, 9, 3),
    "prelu": lambda: mlp(nn.PReLU, 32, 12, 9, 3),
    "tanh": lambda: mlp(nn.Tanh, 32, 12, 9, 3),
    "sigmoid": lambda: mlp(nn.Sigmoid, 32, 12, 9, 3),
    "pooling": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3, 3),
    ),
    "rows": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(2, 3, 3, padding=1),
        nn.MaxPool1d(4, 3, 2, return_indices=False),
        nn.Flatten(),
        nn.Linear(18, 3),
    ),
    "residual": Residual,
    "sliced": SlicedAndPadded,
}
THREATS = {
    "linf": rl.LpBall(math.inf, 0.08, lower=0.0, upper=1.0),
    "l2": rl.LpBall(2, 0.3, lower=0.0, upper=1.0),
    "l1": rl.LpBall(1, 0.9),
    "masked": rl.LpBall(
        3, 0.3, mask=torch.arange(32).reshape(2, 4, 4) % 2 == 0, scale=torch.rand(2, 4, 4) + 0.5
    ),
}


def made(name, seed=0, n=2):
    """A network in evaluation mode whose batch statistics are not those it began with."""
    torch.manual_seed(seed)
    net = NETWORKS[name]().double()
    for parameter in net.parameters():
        parameter.data.mul_(1.6)
    x = torch.rand(n, 2, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(20, 2, 4, 4, dtype=torch.float64) * 2)
    return net.eval(), x


def bounded(net, x, threat):
    """Lower and upper bounds of the outputs by the three methods, (2, n, K) each."""
    network, region = trace(net, x[:1]), Region(x, threat)
    with torch.no_grad():
        out = net(x).shape[1]
        intervals = interval_bounds(network, region)
        spans = crown_bounds(network, region)
        owner = torch.arange(len(x)).repeat_interleave(2 * out)
        rows = torch.cat([torch.eye(out), -torch.eye(out)]).double().repeat(len(x), 1)[:, None]
        found = [torch.stack([side.reshape(len(x), out) for side in intervals[network.output]])]
        for steps in (0, 15):
            least = row_bounds(network, region, network.output, rows, owner, spans, steps=steps)
            low, high = least.reshape(len(x), 2, out).unbind(1)
            found.append(torch.stack([low, -high]))
    return found


@pytest.mark.parametrize("threat", THREATS)
@pytest.mark.parametrize("name", NETWORKS)
def test_intervals_hold_crown_holds_alpha_crown_holds_samples(name, threat):
    net, x = made(name)
    ball = THREATS[threat]
    ibp, crown, alpha = bounded(net, x, ball)
    tiny = 1e-9
    assert (ibp[0] <= crown[0] + tiny).all()
    assert (crown[1] <= ibp[1] + tiny).all()
    assert (crown[0] <= alpha[0] + tiny).all()
    assert (alpha[1] <= crown[1] + tiny).all()
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(2000, *x.shape[1:], generator=generator, dtype=x.dtype)
    for i, point in enumerate(x):
        points = point + ball.argmax(directions, point.expand_as(directions)) * torch.rand(
            2000, 1, 1, 1, generator=generator, dtype=x.dtype
        ).round(decimals=1)
        with torch.no_grad():
            outputs = net(points)
        for low, high in (ibp[:, i], crown[:, i], alpha[:, i]):
            assert (outputs >= low - tiny).all()
            assert (outputs <= high + tiny).all()


@pytest.mark.parametrize("threat", THREATS)
def test_one_layer_is_exact(threat):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    x, ball = torch.rand(2, 2, 4, 4, dtype=torch.float64), THREATS[threat]
    _, crown, _ = bounded(net, x, ball)
    for k, weight in enumerate(net[1].weight.detach()):
        g = weight.reshape(1, 2, 4, 4).expand_as(x)
        with torch.no_grad():
            at = net(x)[:, k]
        torch.testing.assert_close(crown[1, :, k], at + ball.support(g, x))
        torch.testing.assert_close(crown[0, :, k], at - ball.support(-g, x))


def test_two_layers_against_all_corners():
    """One hidden ReLU: α-CROWN is exact, and a box's corners hold the extremes of both pieces."""
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1)).double()
    for parameter, value in zip(
        net.parameters(), ([[1.0, 2.0]], [0.1], [[-1.0]], [0.0]), strict=True
    ):
        parameter.data = torch.tensor(value, dtype=torch.float64)
    x, ball = torch.zeros(1, 2, dtype=torch.float64), rl.LpBall(math.inf, 0.5)
    _, crown, alpha = bounded(net, x, ball)
    assert float(crown[0]) == pytest.approx(-1.6)  # at (½, ½)
    assert float(alpha[1]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("kind", ["tanh", "sigmoid"])
def test_lines_lie_under_and_over_a_curve(kind):
    torch.manual_seed(0)
    ends = torch.sort(torch.randn(4000, 2, dtype=torch.float64) * 5, dim=1).values
    ends = torch.cat([ends, ends[:, :1] + torch.tensor([[0.0, 1e-7]]), ends * 40])
    low, high = ends.unbind(1)
    line = curve_lines(kind, low, high)
    for share in torch.linspace(0, 1, 101, dtype=torch.float64):
        z = low + share * (high - low)
        value = torch.tanh(z) if kind == "tanh" else torch.sigmoid(z)
        assert (line.under * z + line.below <= value + 1e-12).all()
        assert (line.over * z + line.above >= value - 1e-12).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_the_record_is_the_network(name):
    net, x = made(name)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, x[:1])(x), net(x))


def test_a_sample_is_bounded_alike_in_any_batch():
    """Bounds once went lost where a convolution laid out a batch in another order."""
    net, x = made("residual", n=4)
    ball = THREATS["linf"]
    together = bounded(net, x, ball)
    alone = bounded(net, x[2:3], ball)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[:, 2:3], b, rtol=1e-6, atol=1e-9)


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture(scope="module", autouse=True)
def operators():
    """Operators of somebody else's, that bear the names of torch's own."""
    library = torch.library.Library("robustlearn_tests", "FRAGMENT")
    for name in ("sum", "tanh"):
        library.define(f"{name}(Tensor x) -> Tensor")
        library.impl(name, lambda x: torch.sin(3 * x), "CompositeExplicitAutograd")
    yield
    library._destroy()


class Straight(torch.autograd.Function):
    """Rounds, and claims the derivative of what does not."""

    @staticmethod
    def forward(ctx, x):
        return x.floor()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda x: x.softmax(1), "_softmax"),
        (lambda x: functional.gelu(x), "gelu"),
        (lambda x: x * x, "mul"),
        (lambda x: x @ x.T, "mm"),
        (lambda x: x / (2 + x), "div"),
        (lambda x: x if x.sum() > 0 else -x, "gt"),
        (lambda x: x * float(x.sum()), "scalar|item"),
        (lambda x: x + torch.rand(2, 2), "random"),
        (lambda x: x + torch.from_numpy(x.numpy()), "numpy"),
        (lambda x: x.sort(1).values, "sort"),
        (lambda x: functional.dropout(x), "dropout|random|bernoulli|rand"),
        (lambda x: x.half().float(), "float16"),
        (lambda x: x.round(), "round"),
        (lambda x: functional.avg_pool2d(x[None], 1, divisor_override=-3), "divisor is neg"),
        (lambda x: functional.max_pool1d(x, 2, return_indices=True)[1].float(), "recorded"),
        (lambda x: torch.zeros(2, 2), "does not depend"),
        (nn.BatchNorm1d(2), "eval"),
        (nn.LayerNorm(2), "layer_norm"),
        (lambda x: torch.ops.robustlearn_tests.sum(x), "robustlearn_tests::sum"),
        (lambda x: torch.ops.robustlearn_tests.tanh(x), "robustlearn_tests::tanh"),
        (lambda x: x.sum(1, keepdim=True, dtype=torch.int64).float(), "sum.*int64"),
        (lambda x: x.view(torch.int32).float(), "view.*another type"),
        (lambda x: torch.zeros(1, 2, dtype=torch.int64).copy_(x).float(), "int64"),
        (lambda x: copy.deepcopy(x), "cannot be recorded"),
        (lambda x: x + torch.tensor([0.0, math.nan]), "add takes NaN"),
        (lambda x: x @ torch.full((2, 2), math.inf), "mm takes NaN or infinity"),
        (lambda x: x.clamp(min=torch.tensor([0.0, math.inf])), "NaN or infinity"),
        (lambda x: x + (x.round() - x).detach(), "round"),
        (lambda x: Straight.apply(x), "cannot be recorded"),
    ],
)
def test_what_is_not_known_is_refused_by_name(function, told):
    with pytest.raises(rl.InputError, match=told):
        trace(Of(function), torch.ones(2, 2))


def test_a_network_that_cuts_its_gradient_is_bounded_as_if_it_did_not():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.rand(4, 3)
    for method in ("ibp", "crown", "complete"):
        margins = [
            rl.certify(model, x, rl.LpBall(math.inf, 0.1), method=method).margin
            for model in (net, Of(lambda x: net(x.detach())))
        ]
        torch.testing.assert_close(*(torch.as_tensor(margin) for margin in margins))


WEIGHT = torch.tensor([[0.6, 1.7], [-1.2, 0.4]])


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.add(x, x.flip(1), alpha=2),
        lambda x: torch.sub(x, x.flip(1), alpha=2),
        lambda x: x @ WEIGHT.to(torch.int32).to(x.dtype),
        lambda x: x @ WEIGHT.half().to(x.dtype),
        lambda x: x @ (WEIGHT > 0).to(x.dtype),
        lambda x: x * (WEIGHT[0] > 1),
        lambda x: x.sum(1, keepdim=True, dtype=torch.float64).expand(-1, 2).to(x.dtype),
        lambda x: x.clamp(torch.tensor([-math.inf, 0.0]), torch.tensor([0.5, math.inf])) * 3,
        lambda x: x.clamp(min=-x.flip(1)),
        lambda x: x.data * 2,
        lambda x: torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False),
        torch.no_grad()(lambda x: torch.relu(x) * 2),
        torch.inference_mode()(lambda x: torch.relu(x) * 2),
    ],
)
def test_odd_ways_to_compute_are_recorded_as_they_are(function):
    """What is recorded has the module's values, and its bounds hold them."""
    net, x = Of(function), torch.zeros(1, 2, dtype=torch.float64)
    points = torch.rand(400, 2, generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    network = trace(net, x)
    with torch.no_grad():
        values = torch.cat([net(point[None]) for point in points])
        torch.testing.assert_close(network(points), values)
        low, high = crown_bounds(network, Region(x, rl.LpBall(math.inf, 1.0)))[network.output]
    assert (low[0] <= values + 1e-9).all()
    assert (values <= high[0] + 1e-9).all()
    assert high.isfinite().all()


def test_hooks_are_part_of_the_network():
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    net[0].register_forward_hook(lambda module, inputs, output: -3 * output)
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    net[2].register_full_backward_hook(lambda module, given, taken: (given[0] * 0,))
    x = torch.rand(5, 2, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(trace(net, x)(x), net(x))


def test_what_overflows_proves_nothing():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    for parameter in net.parameters():
        parameter.data.fill_(1e200)
    x = torch.ones(1, 2, dtype=torch.float64)
    for bounds in bounded(net, x, rl.LpBall(math.inf, 0.1))[1:]:
        assert (bounds[0] == -torch.inf).all()
        assert (bounds[1] == torch.inf).all()


def test_a_sum_that_overflows_proves_nothing():
    """Its ends are sums of ends: the lower one would be +∞."""
    x = torch.ones(1, 2, dtype=torch.float64)
    factor = torch.full((2,), 1e308, dtype=torch.float64)
    net = Of(lambda x: (x * factor).sum(1, keepdim=True))
    network, region = trace(net, x), Region(x, rl.LpBall(math.inf, 0.05))
    low, high = interval_bounds(network, region)[network.output]
    assert float(low) == -math.inf
    assert float(high) == math.inf


def test_no_budget_gives_the_outputs_and_a_huge_one_is_sound():
    net, x = made("residual")
    with torch.no_grad():
        at = net(x)
    for bounds in bounded(net, x, rl.LpBall(math.inf, 0.0)):
        torch.testing.assert_close(bounds[0], at)
        torch.testing.assert_close(bounds[1], at)
    for bounds in bounded(net, x, rl.LpBall(math.inf, 1e9)):
        assert (bounds[0] < at - 1).all()
        assert not bounds.isnan().any()
