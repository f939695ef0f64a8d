"""Moves of players that look ahead: optimistic, extragradient and unrolled."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer


def optimistic(kind: type[Optimizer]) -> Callable[..., Optimizer]:
    """w ← w + 2Δₜ − Δₜ₋₁, Δₜ the step that another optimiser would take; the first is Δ₀.

    For gradient descent w ← w − η(2gₜ − gₜ₋₁), which converges in bilinear games where descent
    itself spirals outwards. Source: Daskalakis et al. (2018).

    Parameters
    ----------
    kind : the class of the other optimiser, whose arguments are those of the new one.

    Examples
    --------
    >>> weight = nn.Parameter(torch.zeros(1))
    >>> optimizer = optimistic(torch.optim.SGD)([weight], lr=0.1)
    >>> for slope in (1.0, 0.0):
    ...     weight.grad = torch.tensor([slope])
    ...     optimizer.step()
    ...     print(round(weight.item(), 4))
    -0.1
    0.0
    """

    class Optimistic(kind):  # type: ignore[valid-type, misc]
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups
            followed = [p for group in groups for p in group["params"] if p.grad is not None]
            before = [parameter.clone() for parameter in followed]
            value = super().step(closure)
            for parameter, old in zip(followed, before, strict=True):
                move = parameter - old
                last = self.state[parameter].get("last_move", move)
                parameter.add_(move - last)
                self.state[parameter]["last_move"] = move
            return value

    Optimistic.__name__ = Optimistic.__qualname__ = f"Optimistic{kind.__name__}"
    return Optimistic


@contextlib.contextmanager
def looking_ahead(optimizers: Iterable[Optimizer]) -> Iterator[None]:
    """Within, the weights are where the optimisers' next steps would lead; after, where they were.

    The gradients of the next steps are there before, clipped if steps are; they are cleared. What
    is left of it are the gradients taken at the point ahead: a step along them is the extragradient
    method (Korpelevich 1976; Gidel et al. 2019).
    """
    optimizers = list(optimizers)
    kept = [(optimizer, _weights(optimizer), _memory(optimizer)) for optimizer in optimizers]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    try:
        yield
    finally:
        for optimizer, weights, memory in kept:
            with torch.no_grad():
                for parameter, value in weights:
                    parameter.copy_(value)
            optimizer.state.clear()
            optimizer.state.update(memory)


def _weights(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    groups = optimizer.param_groups
    return [(p, p.detach().clone()) for group in groups for p in group["params"]]


def _memory(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    return {
        parameter: {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in entries.items()
        }
        for parameter, entries in optimizer.state.items()
    }


def unrolled(
    module: nn.Module,
    losses: Callable[[Callable[..., Any]], Tensor],
    *,
    steps: int,
    step_size: float,
) -> Callable[..., Any]:
    """Return a module after k steps of descent, differentiable by all that its losses depend on.

    w₍ᵢ₊₁₎ = w₍ᵢ₎ − η·∇ mean ℓ(w₍ᵢ₎), i < k; the module itself stays as it is. Source: Metz et
    al. (2017).

    Parameters
    ----------
    losses : the module as a function -> (n,) what it minimises.
    """
    weights = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def called(*inputs: Any) -> Any:
        return functional_call(module, weights, inputs)

    for _ in range(steps):
        slopes = torch.autograd.grad(
            losses(called).mean(), list(weights.values()), create_graph=True, allow_unused=True
        )
        weights = {
            name: value if slope is None else value - step_size * slope
            for (name, value), slope in zip(weights.items(), slopes, strict=True)
        }
    return called


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Within, no gradient reaches the module's weights; after, those that it reached before."""
    open_ones = [p for p in module.parameters() if p.requires_grad]
    for parameter in open_ones:
        parameter.requires_grad_(False)
    try:
        yield module
    finally:
        for parameter in open_ones:
            parameter.requires_grad_(True)
