"""Hard negatives: points on shells around normal rows, moved to where a critic accepts them."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlearn._tensor import column
from robustlearn.attacks.ascent import stepper
from robustlearn.threats import LpBall

NEAR, FAR = 0.5, 8.0  # radii of the shells, in local distances to the nearest normal rows
STEP = 0.3  # of an ascent, in radii
EDGE = -1.0  # the logit that a generator aims at: odds of 1 to 2.7 that the critic accepts
CODES = 8  # random numbers that a generator starts from

Critic = Callable[[Tensor], Tensor]  # (m, n, d) -> (m, n)


@dataclass(frozen=True)
class Negatives:
    """Points (m, n, d) at the distances ``radius`` (m, n) from the rows ``base`` (m, n, d)."""

    base: Tensor
    radius: Tensor
    points: Tensor

    def parts(self, first: int) -> "tuple[Negatives, Negatives]":
        """Return the first points of each critic, and the rest."""
        held = (self.base, self.radius, self.points)
        return Negatives(*(t[:, :first] for t in held)), Negatives(*(t[:, first:] for t in held))


@dataclass(frozen=True)
class Shells:
    """Where negatives are drawn: x + ρ(x)·r·u, log r uniform on [log ½, log 8], ‖u‖₂ = 1.

    Half of the directions u change some features only, so that anomalies in few features have
    their like among the negatives.

    Parameters
    ----------
    rows : (n, d) normal rows, scaled.
    spacing : (n,) the distances ρ to their nearest neighbours.
    """

    rows: Tensor
    spacing: Tensor

    def sample(self, base: Tensor, generator: torch.Generator) -> Negatives:
        """Return a negative for each row number in ``base`` (m, n)."""
        around = self.rows[base]
        drawn = torch.rand(base.shape, generator=generator).to(around)
        radius = self.spacing[base] * NEAR * (FAR / NEAR) ** drawn
        direction = torch.randn(around.shape, generator=generator) * _chosen(around, generator)
        unit = functional.normalize(direction.to(around), dim=2)
        return Negatives(around, radius, around + radius[..., None] * unit)


def _chosen(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return the features (m, n, d) that change: all, or a random share, at least one."""
    share = torch.rand(*like.shape[:2], 1, generator=generator)
    some = torch.rand(*like.shape[:2], 1, generator=generator) < 0.5
    chosen = (torch.rand(like.shape, generator=generator) < share) | ~some
    one = torch.randint(0, like.shape[2], (*like.shape[:2], 1), generator=generator)
    return chosen.scatter(2, one, True)


def ascended(critic: Critic, negatives: Negatives, steps: int) -> Negatives:
    """Move negatives on their shells towards what the critic calls normal.

    δ ← r·w/‖w‖₂, w = project(δ + 0.3·r·∇D(x + δ)/‖∇D(x + δ)‖₂): the steepest step of the attacks
    package in the ball of radius r, then back onto its sphere, so that a negative cannot become
    the normal row that it belongs to.

    Parameters
    ----------
    critic : logits (m, n, d) -> (m, n); none depends on another row.
    steps : gradients.

    Returns
    -------
    `Negatives` of the same bases and radii.
    """
    base, radius = negatives.base.flatten(0, 1), negatives.radius.flatten()
    step = stepper(LpBall(2, radius), base)
    point = negatives.points.flatten(0, 1)
    for _ in range(steps):
        ascent = _gradient(critic, point.reshape(negatives.points.shape)).reshape(point.shape)
        point = _on_sphere(base, step(point, ascent, STEP), radius)
    return Negatives(negatives.base, negatives.radius, point.reshape(negatives.points.shape))


def _gradient(critic: Critic, points: Tensor) -> Tensor:
    with torch.enable_grad():
        at = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(at).sum(), at)
    return gradient


def _on_sphere(base: Tensor, point: Tensor, radius: Tensor) -> Tensor:
    """Return base + radius·(point − base)/‖point − base‖₂."""
    return base + column(radius, base) * functional.normalize(point - base, dim=1)


class Generator(nn.Module):
    """A network as the adversary: (row, log r/ρ, noise) ↦ a direction on the row's shell.

    It is trained to place points just outside the critics' level set D ≥ 0, and to spread them:
    E (D(x + r·u) + 1)² + ‖E u‖₂², the mean direction being zero where they are dispersed.
    """

    def __init__(self, inputs: int, generator: torch.Generator, width: int = 64) -> None:
        super().__init__()
        sizes = [inputs + CODES + 1, width, width, inputs]
        self.layers = nn.ModuleList()
        for before, after in itertools.pairwise(sizes):
            layer = nn.utils.skip_init(nn.Linear, before, after)
            drawn = torch.randn(after, before, generator=generator)
            layer.weight.data = drawn * math.sqrt(2 / before)
            layer.bias.data.zero_()
            self.layers.append(layer)
        self.optimizer = torch.optim.Adam(self.parameters(), 5e-4, betas=(0.5, 0.99))

    def forward(self, negatives: Negatives, generator: torch.Generator) -> Negatives:
        """Return other points on the shells of the given negatives."""
        base, radius = negatives.base, negatives.radius[..., None]
        codes = torch.randn(*base.shape[:2], CODES, generator=generator).to(base)
        x = torch.cat([base, radius.log(), codes], 2)
        for layer in self.layers[:-1]:
            x = functional.leaky_relu(layer(x), 0.1)
        unit = functional.normalize(self.layers[-1](x), dim=2)
        return Negatives(base, negatives.radius, base + radius * unit)

    def trained(self, critic: Critic, on: Negatives, generator: torch.Generator) -> Negatives:
        """Take one step towards the boundary; return the points before it, detached."""
        made = self(on, generator)
        unit = (made.points - made.base) / made.radius[..., None]
        loss = (critic(made.points) - EDGE).square().mean() + unit.mean((0, 1)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return Negatives(made.base, made.radius, made.points.detach())
