"""Networks whose robustness is an illusion, each by one known mistake, for tests and benchmarks.

`DEVELOPMENT` and `HELD_OUT` are functions of a sound network and return the broken one. The
thresholds of robustlearn.evaluate.checks were set while looking at the first half only.
"""

import math

import torch
from torch import nn
from torch.nn import functional


class Before(nn.Module):
    """A network behind a change of its input."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.net(self.change(x))


class After(nn.Module):
    """A network with a change of its output."""

    def __init__(self, net, change):
        super().__init__()
        self.net, self.change = net, change

    def forward(self, x):
        return self.change(self.net(x))


class FalseGradient(torch.autograd.Function):
    """The identity with a backward pass of its own."""

    @staticmethod
    def forward(ctx, x, lie):
        ctx.lie = lie
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.lie(gradient), None


def rounded(levels):
    return lambda x: (x * levels).round() / levels


def lying(lie):
    return lambda x: FalseGradient.apply(x, lie)


def noise_of_its_size(gradient):
    return torch.randn_like(gradient) * gradient.abs().mean()


def blurred(x):
    """A mean filter in numpy's way: no gradient flows back."""
    return functional.avg_pool2d(x.detach(), 3, 1, 1)


def wavy(x):
    """A ripple too fine to see, whose slope drowns that of the image."""
    return x + 0.02 * torch.sin(math.tau * 80 * x)


def one_hot_levels(x, levels=16):
    """Thermometer code read back: piecewise constant, with a useless slope at the steps."""
    steps = torch.linspace(0, 1, levels + 1, device=x.device, dtype=x.dtype)[1:-1]
    code = torch.sigmoid(1e4 * (x[..., None] - steps))
    return code.mean(-1)


class WinnersOnly(nn.Module):
    """k winners take all: the largest tenth of the activations pass, as they are."""

    def __init__(self, share=0.1):
        super().__init__()
        self.share = share

    def forward(self, x):
        rows = x.flatten(1)
        least = rows.topk(max(1, int(self.share * rows.shape[1])), dim=1).values[:, -1:]
        return (rows * (rows >= least)).reshape(x.shape)


class Purified(nn.Module):
    """Gradient steps on the input towards certainty, in the forward pass, without a trace."""

    def __init__(self, net, steps=3, size=0.02):
        super().__init__()
        self.net, self.steps, self.size = net, steps, size

    def forward(self, x):
        point = x.detach()
        for _ in range(self.steps):
            with torch.enable_grad():
                point = point.detach().requires_grad_()
                surest = self.net(point).log_softmax(1).amax(1).sum()
                (slope,) = torch.autograd.grad(surest, point)
            point = (point + self.size * slope.sign()).clamp(0, 1).detach()
        return self.net(x + (point - x).detach())


class Drifting(nn.Module):
    """Adapts a running mean of its input at every call."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return self.net(x - 0.2 * self.mean)


class AmongOthers(nn.Module):
    """Normalises by the batch that a sample travels in."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x + 0.3 * (x.mean() - x.mean(0, keepdim=True)))


DEVELOPMENT = {
    "quantised input": lambda net: Before(net, rounded(8)),
    "randomised input": lambda net: Before(net, lambda x: x + 0.2 * torch.randn_like(x)),
    "saturated output": lambda net: After(net, lambda z: (1000 * z).softmax(1)),
    "zero gradient": lambda net: Before(net, lambda x: (x > 0.5).to(x.dtype)),
    "detached preprocessing": lambda net: Before(net, blurred),
    "random backward pass": lambda net: Before(net, lying(noise_of_its_size)),
    "optimised at test time": Purified,
}
HELD_OUT = {
    "shattered gradient": lambda net: Before(net, wavy),
    "thermometer code": lambda net: Before(net, one_hot_levels),
    "dropout left on": lambda net: Before(net, lambda x: functional.dropout(x, 0.3, True)),
    "reversed backward pass": lambda net: Before(net, lying(lambda g: -g)),
    "rounded output": lambda net: After(net, lambda z: (2 * z).round() / 2),
    "saturated activation": lambda net: Before(net, lambda x: torch.sigmoid(500 * (x - 0.5))),
    "drifting state": Drifting,
    "depends on the batch": AmongOthers,
}


def small_network(activation=nn.ReLU, channels=1):
    """Two convolutions and a hidden layer for images of 28 × 28."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        activation(),
        nn.Conv2d(16, 32, 4, 2, 1),
        activation(),
        nn.Flatten(),
        nn.Linear(32 * 49, 100),
        activation(),
        nn.Linear(100, 10),
    )


def trained(x, y, *, epochs=3, activation=nn.ReLU, seed=0):
    """Return a small network, trained on x (n, 1, 28, 28) and y (n,) in seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = small_network(activation)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
    return net.eval()
