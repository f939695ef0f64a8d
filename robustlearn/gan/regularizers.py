"""What keeps the critic from growing steep: penalties on its gradient, and parts of networks.

A penalty is a function ``(critic, real, fake, *, keys, weight, …) -> (n,)`` that is added to the
critic's loss; norms are those of each sample's own gradient, never of a batch. ``critic`` maps
(n, *shape) to scores (n,).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from robustlearn import _tensor, registry
from robustlearn.errors import InputError
from robustlearn.registry import NOT_NEGATIVE, Registry

PENALTIES = Registry("penalty")
Critic = Callable[[Tensor], Tensor]
Penalty = Callable[[Critic, Tensor, Tensor, Tensor], Tensor]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)


def gradient_norms(critic: Critic, x: Tensor) -> Tensor:
    """‖∇D(xᵢ)‖₂ of each sample, (n,), differentiable by the critic's weights.

    Scores of a sample must not depend on the others of the batch (no batch norm).

    Examples
    --------
    >>> gradient_norms(lambda x: 3 * x[:, 0] - 4 * x[:, 1], torch.zeros(2, 2))
    tensor([5., 5.])
    """
    squares = _squares(critic, x)
    # the root of 0 has no slope: there the norm is 0 and so is its derivative
    return torch.where(squares > 0, squares, 1.0).sqrt() * (squares > 0)


@PENALTIES.register("r1", ranges={"weight": NOT_NEGATIVE})
def r1(critic: Critic, real: Tensor, fake: Tensor, keys: Tensor, *, weight: float = 1.0) -> Tensor:
    """(γ/2)·‖∇D(x)‖² at real samples. Source: Mescheder et al. (2018).

    Examples
    --------
    >>> critic, x = nn.Linear(2, 1, bias=False), torch.zeros(3, 2)
    >>> with torch.no_grad():
    ...     _ = critic.weight.copy_(torch.tensor([[3.0, 4.0]]))
    >>> r1(lambda x: critic(x)[:, 0], x, x, None, weight=0.1).tolist()
    [1.25, 1.25, 1.25]
    """
    return weight / 2 * _squares(critic, real)


@PENALTIES.register("r2", ranges={"weight": NOT_NEGATIVE})
def r2(critic: Critic, real: Tensor, fake: Tensor, keys: Tensor, *, weight: float = 1.0) -> Tensor:
    """(γ/2)·‖∇D(x̃)‖² at generated samples. Source: Mescheder et al. (2018)."""
    return weight / 2 * _squares(critic, fake)


@PENALTIES.register("gradient_penalty", ranges={"weight": NOT_NEGATIVE, "centre": NOT_NEGATIVE})
def gradient_penalty(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    keys: Tensor,
    *,
    weight: float = 10.0,
    centre: float = 1.0,
) -> Tensor:
    """λ·(‖∇D(x̂)‖ − c)² at x̂ = u·x + (1 − u)·x̃, u uniform in [0, 1) for each sample.

    c = 1: Gulrajani et al. (2017); 0 on a linear critic with Lipschitz constant 1. c = 0:
    Thanh-Tung et al. (2019), which keeps the equilibrium stable where c = 1 does not.
    """
    share = _tensor.column(_tensor.uniform(keys, (), real.dtype), real)
    between = share * real.detach() + (1 - share) * fake.detach()
    if centre == 0:
        return weight * _squares(critic, between)
    return weight * (gradient_norms(critic, between) - centre).square()


@PENALTIES.register("dragan", ranges={"weight": NOT_NEGATIVE, "spread": NOT_NEGATIVE})
def dragan(
    critic: Critic,
    real: Tensor,
    fake: Tensor,
    keys: Tensor,
    *,
    weight: float = 10.0,
    spread: float = 0.5,
) -> Tensor:
    """λ·(‖∇D(x + δ)‖ − 1)², δ = u·c·std(x)·v, u and v uniform in [0, 1), v for each feature.

    Real samples are moved by up to c times the standard deviation over the whole batch. Source:
    Kodali et al. (2017).
    """
    real = real.detach()
    share = _tensor.uniform(_tensor.fold(keys, 0), (), real.dtype)
    noise = _tensor.uniform(_tensor.fold(keys, 1), tuple(real.shape[1:]), real.dtype)
    moved = real + _tensor.column(share, real) * spread * real.std() * noise
    return weight * (gradient_norms(critic, moved) - 1).square()


def _squares(critic: Critic, x: Tensor) -> Tensor:
    """‖∇D(xᵢ)‖², whose derivative is smooth at 0."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return _tensor.flat(slope).square().sum(1)


def penalties(chosen: str) -> list[Penalty]:
    """Return the penalties of a text such as ``"r1:weight=0.5 + r2:weight=0.5"``; "" for none.

    Raises
    ------
    InputError for a penalty or an option that there is not, and a value out of its range.

    Examples
    --------
    >>> [len(penalties(text)) for text in ("", "r1 + r2", "gradient_penalty:centre=0")]
    [0, 2, 1]
    """
    return [_penalty(part) for part in chosen.split("+") if part.strip()]


def _penalty(text: str) -> Penalty:
    function, options = registry.chosen(PENALTIES, text)
    return lambda critic, real, fake, keys: function(critic, real, fake, keys, **options)


# ---------------------------------------------------------------- parts of networks


def spectral(module: nn.Module) -> nn.Module:
    """Divide the weight of every linear and convolutional layer by its largest singular value.

    W/σ(W), σ by power iteration as the network is called in training (torch's
    ``parametrizations.spectral_norm``): with 1-Lipschitz activations the critic is 1-Lipschitz, up
    to what convolutions add. In place. Source: Miyato et al. (2018).

    Raises
    ------
    InputError if there is no such layer, or one of zeros: it has nothing to be divided by.

    Examples
    --------
    >>> layer = spectral(nn.Linear(5, 3, bias=False))
    >>> for _ in range(100):
    ...     _ = layer(torch.zeros(1, 5))
    >>> round(torch.linalg.svdvals(layer.weight.detach())[0].item(), 3)
    1.0
    """
    found = [part for part in module.modules() if isinstance(part, LAYERS)]
    if not found:
        raise InputError(f"{type(module).__name__} has no linear or convolutional layer")
    if any(not bool(layer.weight.any()) for layer in found):
        raise InputError("a layer starts at 0, which no norm can be made of: start it at random")
    for layer in found:
        parametrizations.spectral_norm(layer)
    return module


def clipped(module: nn.Module, bound: float = 0.01) -> nn.Module:
    """Cut all weights to [−c, c] before each call: for the Wasserstein loss, which knows no bound.

    The network is Lipschitz then, with a constant that c and its depth decide. Gradients are those
    of the weights that were cut, so that a weight can leave the edge again. In place. Source:
    Arjovsky et al. (2017).

    Raises
    ------
    InputError unless the bound is positive.

    Examples
    --------
    >>> layer = clipped(nn.Linear(1, 1, bias=False), 0.5)
    >>> with torch.no_grad():
    ...     _ = layer.weight.fill_(-3.0)
    >>> layer(torch.ones(1, 1)).item()
    -0.5
    """
    if not bound > 0:
        raise InputError(f"weights are cut at a positive bound; got {bound}")
    module.register_forward_pre_hook(functools.partial(_cut, bound=bound))
    return module


def _cut(module: nn.Module, given: tuple[Any, ...], *, bound: float) -> None:
    for parameter in module.parameters():
        parameter.data.clamp_(-bound, bound)  # data: a second call must not void the first's graph


class MinibatchDiscrimination(nn.Module):
    """(n, d) -> (n, d + b): beside x_i the closeness o_i = Σ_{j≠i} exp(−‖M_i − M_j‖₁), M = x·T.

    b tables of c numbers each; a critic that sees the others of its batch can tell a collapsed one.
    Source: Salimans et al. (2016). Not with penalties on the gradient, which take samples one by
    one.

    Parameters
    ----------
    inputs : d.
    tables, width : b and c.

    Examples
    --------
    >>> layer = MinibatchDiscrimination(2, tables=3)
    >>> layer(torch.zeros(5, 2))[0].tolist()
    [0.0, 0.0, 4.0, 4.0, 4.0]
    """

    def __init__(self, inputs: int, *, tables: int = 16, width: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, tables, width) / inputs**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return x and the closeness of each sample to the others."""
        rows = torch.einsum("nd,dbc->nbc", x, self.weight)
        apart = (rows[:, None] - rows[None]).abs().sum(3)
        closeness = torch.exp(-apart).sum(1) - 1  # without itself
        return torch.cat([x, closeness], 1)


def packed(x: Tensor, size: int) -> Tensor:
    """(n, c, *) -> (n, m·c, *): each sample beside the m − 1 that follow it in the batch.

    A critic of packs sees m samples of one kind at once, and so whether they are alike. Packs here
    overlap, the last ones take up the first samples: as many packs as samples, each of m
    independent ones. Source: Lin et al. (2018).

    Raises
    ------
    InputError for packs larger than the batch.

    Examples
    --------
    >>> packed(torch.tensor([[1], [2], [3]]), 2).tolist()
    [[1, 2], [2, 3], [3, 1]]
    """
    if not 1 <= size <= len(x):
        raise InputError(f"packs of 1 to {len(x)} samples can be made of this batch; got {size}")
    return torch.cat([x.roll(-shift, 0) for shift in range(size)], 1)
