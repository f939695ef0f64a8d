"""One change for all samples."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from robustlearn import _tensor, losses
from robustlearn.attacks.ascent import sharp
from robustlearn.attacks.base import OPTIONS
from robustlearn.errors import InputError
from robustlearn.models import Model, check_range, wrap
from robustlearn.registry import COUNT, check_options
from robustlearn.tabular import Tabular
from robustlearn.threats import LpBall


def universal(
    model: Any,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    epochs: int = 20,
    batch_size: int = 128,
    step_size: float = 0.5,
    generator: torch.Generator | int = 0,
) -> Tensor:
    """One δ that raises the loss of as many samples as it can: max Σᵢ min(loss(xᵢ + δ, yᵢ), 0).

    Over shuffled batches δ ← project(δ + α·steepest(Σᵢ ∇ᵢ)), where ∇ᵢ is the gradient at
    xᵢ + δ, stopped at the walls, and the samples that are broken already do not pull. α falls
    with a cosine from ``step_size`` (in units of ε) to 0.

    Parameters
    ----------
    x, y, loss : as for `fgsm`; by default a classifier's log-odds.
    threat : p in {1, 2, ∞} and one budget for all samples.
    epochs : passes over the samples, a gradient a sample each; after each the δ is measured on
        all of them at the cost of a forward pass, and the best is kept.
    batch_size : samples a step.
    generator : for the order of the samples.

    Returns
    -------
    δ, (1, *shape), in the ball and within the mask; ``threat.restrict(x, δ)`` gives points of
    the threat, for other samples too.

    Notes
    -----
    It depends on the whole set by its nature, and returns no x_adv: so it is not filed under
    ``ATTACKS``, whose members must not let one sample's neighbours decide about it.
    Source: Shafahi et al. (2020), with their clipped loss at the decision boundary.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> delta = universal(net, torch.rand(8, 2), torch.zeros(8).long(), LpBall(math.inf, 0.1))
    >>> delta.shape
    torch.Size([1, 2])
    """
    given = {"epochs": epochs, "batch_size": batch_size, "step_size": step_size}
    check_options("universal", given, OPTIONS | {"epochs": COUNT, "batch_size": COUNT})
    if isinstance(threat, Tabular):
        raise InputError(
            f"universal: one change for all rows need not lead to rows that exist ({threat}); "
            "attack each row by itself, with pgd or evaluate, or give an LpBall"
        )
    if isinstance(threat.eps, Tensor):
        raise InputError("a universal change has one budget: give eps as a number")
    model = wrap(model)
    _tensor.check_points(x)
    threat.check(x)
    if isinstance(generator, int):
        generator = torch.Generator().manual_seed(generator)
    with model.session(), torch.no_grad():
        model.settle(x, y)
        if model.task == "classification":
            y = y.long()
            check_range(model, y)
        chosen = sharp(losses.get(loss, str(model.task)))
        if loss is None and model.task == "classification":
            chosen = losses.log_odds
        search = _Search(model, x, y, threat, chosen, batch_size)
        return search.run(epochs, step_size, generator)


@dataclass(frozen=True, eq=False)
class _Search:
    """The samples, and what is done with a δ on them."""

    model: Model
    x: Tensor
    y: Tensor
    threat: LpBall
    loss: losses.Loss
    batch_size: int

    def run(self, epochs: int, step_size: float, generator: torch.Generator) -> Tensor:
        """Ascend over shuffled batches; return the best δ after an epoch."""
        ball = replace(self.threat, lower=None, upper=None)
        delta = best = torch.zeros_like(self.x[:1])
        most = self.reached(delta)
        for epoch in range(epochs):
            size = step_size * (1 + math.cos(math.pi * epoch / epochs)) / 2
            order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
            for rows in order.split(self.batch_size):
                delta = ball.project(delta + size * ball.argmax(self.pull(rows, delta)))
            reached = self.reached(delta)
            if reached > most:
                most, best = reached, delta
        return ball.restrict(torch.zeros_like(best), best)

    def pull(self, rows: Tensor, delta: Tensor) -> Tensor:
        """Return the sum of the gradients of the samples that stand, (1, *shape)."""
        x, y = self.x[rows], self.y[rows]
        point = self.threat.restrict(x, delta.expand_as(x))
        gradient, _, output = self.model.gradient(point, y, self.loss)
        gradient[self.loss.broken(output, y)] = 0
        return self.threat.inward(gradient, point).sum(0, keepdim=True)

    def reached(self, delta: Tensor) -> tuple[int, float]:
        """Return how many samples δ breaks, and the mean objective."""
        broken, total = 0, 0.0
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            output = self.model(self.threat.restrict(x, delta.expand_as(x)))
            broken += int(self.loss.broken(output, y).sum())
            total += float(self.loss.objective(output, y).sum())
        return broken, total / len(self.x)
