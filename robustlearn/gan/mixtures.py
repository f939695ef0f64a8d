"""Data whose modes are known, and the small networks that are tried on it."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LEAK = 0.2  # slope of the leaky ReLUs below 0


@dataclass(frozen=True, eq=False)
class Mixture:
    """(1/K) Σ N(mₖ, σ²I): K modes, each as likely.

    Attributes
    ----------
    centres : (K, d) the modes m.
    std : σ.
    """

    centres: Tensor
    std: float

    def sample(self, count: int, *, seed: int = 0) -> Tensor:
        """Return (count, d) samples."""
        source = torch.Generator().manual_seed(seed)
        modes = torch.randint(len(self.centres), (count,), generator=source)
        noise = torch.randn(count, self.centres.shape[1], generator=source)
        return self.centres[modes] + self.std * noise


def ring(modes: int = 8, *, radius: float = 1.0, std: float = 0.01) -> Mixture:
    """Return the modes (r·cos 2πk/K, r·sin 2πk/K), as Lin et al. (2018) have them.

    Examples
    --------
    >>> ring(4).centres.round().abs().tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    angles = torch.arange(modes) * (2 * math.pi / modes)
    return Mixture(radius * torch.stack([angles.cos(), angles.sin()], 1), std)


def grid(side: int = 5, *, spacing: float = 2.0, std: float = 0.05) -> Mixture:
    """Return side² modes on a square grid around 0, as Lin et al. (2018) have them.

    Examples
    --------
    >>> grid(2).centres.tolist()
    [[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]
    """
    places = (torch.arange(side) - (side - 1) / 2) * spacing
    return Mixture(torch.cartesian_prod(places, places), std)


def perceptron(
    inputs: int, outputs: int, *, width: int = 128, depth: int = 2, zero: bool = False
) -> nn.Sequential:
    """Return ``depth`` hidden layers with leaky ReLUs; ``zero`` starts the last layer at 0.

    Weights are drawn so that the layers keep the size of their input (He et al. 2015): a deep
    generator is then steep enough to leave little between modes. A critic that starts at 0 asks
    nothing of the generator yet: both losses stand at log 2.

    Examples
    --------
    >>> perceptron(2, 1, zero=True)(torch.ones(1, 2)).item()
    0.0
    """
    sizes = [inputs, *[width] * depth]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layer = nn.Linear(before, after)
        nn.init.kaiming_normal_(layer.weight, a=LEAK)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.LeakyReLU(LEAK)]
    last = nn.Linear(sizes[-1], outputs)
    if zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
