"""Adversarial weight perturbation: the second adversary, who moves the weights."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

Slopes = Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


@contextlib.contextmanager
def perturbed(module: nn.Module, slopes: Slopes, gamma: float) -> Iterator[None]:
    """w ← w + γ·‖w‖·∇/‖∇‖, layer by layer, while the context lasts.

    Moved are the weights of two or more dimensions; what is done to them meanwhile (an optimiser
    must not step) is undone.

    Parameters
    ----------
    slopes : weights -> the gradients by them of the loss to be raised, None where there is none;
        equal in all processes (`Turn.slopes`), or their weights would part.
    gamma : the length of the move as a share of ‖w‖, in Frobenius' norm.

    Notes
    -----
    Source: Wu, Xia and Wang (2020); γ 5e-3 with TRADES and 1e-2 with PGD training.
    """
    moved = [w for w in module.parameters() if w.requires_grad and w.dim() > 1]
    gradients = slopes(moved)
    before = [w.detach().clone() for w in moved]
    with torch.no_grad():
        for weight, gradient in zip(moved, gradients, strict=True):
            if gradient is not None:
                length = gradient.norm().clamp_min(torch.finfo(gradient.dtype).tiny)
                weight.add_(gradient * (gamma * weight.norm() / length))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(moved, before, strict=True):
                weight.copy_(value)
