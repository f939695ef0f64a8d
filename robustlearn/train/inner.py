"""The inner maximisation of training: few gradients of the input, none of the parameters."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robustlearn import _tensor, losses
from robustlearn.attacks.ascent import stepper
from robustlearn.models.base import Objective
from robustlearn.threats import LpBall


@dataclass(frozen=True)
class Craft:
    """How the points of a mini-batch are made, whatever the objective.

    Attributes
    ----------
    keys : (n,) random keys, or a seed; see `LpBall.sample`.
    start : (n, *shape) perturbations to start from, in place of random ones.
    points : (n, *shape) points that are there already: nothing is crafted.
    module : the network without a wrapper that would synchronise gradients; None for the one
        that is trained.
    autocast : makes the context in which the network computes, as for mixed precision.
    climbing : the same where points are sought, and no weights are trained; None for the same.
    returned : called with each slope (m, *) that goes from an output back through the network.
    """

    keys: Tensor | int = 0
    start: Tensor | None = None
    points: Tensor | None = None
    module: nn.Module | None = None
    autocast: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    climbing: Callable[[], AbstractContextManager[None]] | None = None
    returned: Callable[[Tensor], None] | None = None

    def network(self, model: nn.Module) -> nn.Module:
        """Return the network to climb."""
        return model if self.module is None else self.module

    def forward(self, model: nn.Module, x: Tensor, *, climbs: bool = False) -> Tensor:
        """Return the output in float32 or better."""
        with self.climbing() if climbs and self.climbing else self.autocast():
            output = model(x)
        if self.returned is not None and output.requires_grad:
            output.register_hook(self.returned)
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output

    def begin(self, x: Tensor, threat: LpBall) -> Tensor:
        """Return where an ascent starts: at what is kept, or at a random member of the threat.

        At random too where zero is kept, as before a sample's first visit: at x itself an
        objective such as a divergence from f(x) has no slope.
        """
        keys = _tensor.keys(self.keys, x)
        if self.start is None:
            return x + threat.sample(x, keys)
        delta, kept = threat.project(self.start, x), self.start.flatten(1).any(1)
        if not bool(kept.all()):
            delta = torch.where(kept.view(-1, *[1] * (x.dim() - 1)), delta, threat.sample(x, keys))
        return x + delta


@dataclass(frozen=True, eq=False)
class Divergence:
    """KL(p ‖ softmax(z)) for fixed p, and its derivative softmax(z) − p."""

    target: Tensor

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the divergence (n,) and its derivative by the logits."""
        z = losses.two_columns(output)
        value = (self.target * (self.target.clamp_min(1e-30).log() - z.log_softmax(1))).sum(1)
        slope = z.softmax(1) - self.target
        return value, slope if slope.shape == output.shape else slope[:, 1:].reshape(output.shape)


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Hold a network in evaluation mode, so that crafting leaves its batch statistics alone."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextlib.contextmanager
def statistics_held(module: nn.Module) -> Iterator[None]:
    """Let batch norm use the batch's statistics, and leave its running ones alone.

    For passes in training mode beside the one that is trained on, which would count a batch twice.
    """
    kinds = nn.modules.batchnorm._BatchNorm
    tracking = [m for m in module.modules() if isinstance(m, kinds) and m.track_running_stats]
    for part in tracking:
        part.track_running_stats = not part.training  # one in evaluation mode uses the running ones
    try:
        yield
    finally:
        for part in tracking:
            part.track_running_stats = True


def ascend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    objective: Objective,
    *,
    start: Tensor,
    steps: int,
    step_size: float,
    craft: Craft,
) -> Tensor:
    """x_adv ← project(x_adv + α·steepest(∇ₓ objective)), as often as ``steps`` says.

    Parameters
    ----------
    x, start : (n, *shape), the samples and where the ascent starts; y : (n,).
    objective : what has ``look(output, y)``, as for attacks.
    step_size : α in units of ε.

    Returns
    -------
    (n, *shape), in the threat; the last point, not the best. Cost: one forward and one backward
    pass a step, without gradients of the parameters.
    """
    network = craft.network(model)
    step, point = stepper(threat, x), start.clone()
    with evaluating(network):
        for _ in range(steps):
            point = step(point.detach(), slope(network, point, y, objective, craft), step_size)
    return threat.enclose(x, point)


def slope(
    network: nn.Module, point: Tensor, y: Tensor, objective: Objective, craft: Craft
) -> Tensor:
    """∂ objective(network(point), y) / ∂point per sample, where it is not finite 0."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        output = craft.forward(network, leaf, climbs=True)
        _, direction = objective.look(output.detach(), y)
        (gradient,) = torch.autograd.grad(output, leaf, direction)
    return gradient.contiguous().nan_to_num_(0.0, 0.0, 0.0)
