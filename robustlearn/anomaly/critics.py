"""Bagged critics: small networks that tell normal rows from hard negatives, trained as one."""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlearn.anomaly.negatives import Generator, Negatives, Shells, ascended
from robustlearn.gan import losses as adversarial

WARM_UP = 0.1  # share of the steps before negatives are moved: there is nothing to climb yet
SHORTEST = 20  # steps of a schedule: torch divides by zero for fewer than 11
GENERATED = 0.25  # share of the negatives that come from a generator, where there is one


@dataclass(frozen=True)
class Recipe:
    """How critics are trained; see `HardNegativeDetector` for what the entries mean."""

    steps: int
    batch_size: int
    learning_rate: float
    loss: str
    ascent_steps: int


class Critics(nn.Module):
    """m networks side by side: (m, n, d) -> (m, n) logits, positive for what looks normal."""

    def __init__(
        self, count: int, inputs: int, width: int, generator: torch.Generator, layers: int = 2
    ) -> None:
        super().__init__()
        sizes = [inputs] + [width] * layers
        self.layers = nn.ModuleList(
            Parallel(count, a, b, generator) for a, b in itertools.pairwise(sizes)
        )
        self.last = Parallel(count, width, 1, generator, gain=0.1)

    @property
    def count(self) -> int:
        """How many networks there are."""
        return len(self.last.weight)

    def features(self, x: Tensor) -> Tensor:
        """Return the last hidden layers, (m, n, width)."""
        for layer in self.layers:
            x = functional.leaky_relu(layer(x), 0.1)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.last(self.features(x))[..., 0]

    def of_all(self, x: Tensor) -> Tensor:
        """Return every critic's logits of the same rows, (n, d) -> (m, n)."""
        return self(x.expand(self.count, *x.shape))


class Parallel(nn.Module):
    """m affine layers, (m, n, a) -> (m, n, b)."""

    def __init__(
        self, count: int, inputs: int, outputs: int, generator: torch.Generator, gain: float = 1.0
    ) -> None:
        super().__init__()
        drawn = torch.randn(count, inputs, outputs, generator=generator)
        self.weight = nn.Parameter(drawn * gain * math.sqrt(2 / inputs))
        self.bias = nn.Parameter(torch.zeros(count, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return weight·x + bias of each."""
        return torch.baddbmm(self.bias, x, self.weight)


def bags(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """Return which critics see which row, (rows, count): each row all but every fourth of them.

    The critics that never saw a row tell what they would say of a new one.
    """
    left_out = count // 4 if count >= 4 else min(1, count - 1)
    order = torch.rand(rows, count, generator=generator).argsort(1)
    seen = order >= left_out
    return seen | ~seen.any(0)  # of very few rows a critic may have got none: it sees all


def train(
    critics: Critics,
    network: Generator | None,
    seen: Tensor,
    shells: Shells,
    recipe: Recipe,
    generator: torch.Generator,
) -> None:
    """Play the game: each critic against negatives around its own rows, moved as it learns.

    Parameters
    ----------
    critics, network : trained in place; a network places a quarter of the negatives.
    seen : (rows, m), which of `shells.rows` each critic may see; see `bags`.
    shells : where negatives are.
    generator : of all that is random.
    """
    pair, own = adversarial.get(recipe.loss), [part.nonzero().squeeze(1) for part in seen.T]
    optimizer = torch.optim.AdamW(
        critics.parameters(), recipe.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=max(SHORTEST, recipe.steps), pct_start=WARM_UP
    )
    for step in range(recipe.steps):
        real, base = (_drawn(own, recipe.batch_size, generator) for _ in range(2))
        negatives = shells.sample(base, generator)
        if recipe.ascent_steps and step >= WARM_UP * recipe.steps:
            moved, rest = negatives.parts(recipe.batch_size // 2)
            negatives = _joined(ascended(critics, moved, recipe.ascent_steps), rest)
        if network is not None:
            rest, replaced = negatives.parts(round((1 - GENERATED) * recipe.batch_size))
            negatives = _joined(rest, network.trained(critics, replaced, generator))
        optimizer.zero_grad()
        r, q = critics(shells.rows[real]), critics(negatives.points)
        pair.critic(r.flatten(), q.flatten()).mean().mul(critics.count).backward()
        optimizer.step()
        schedule.step()


def _drawn(own: list[Tensor], size: int, generator: torch.Generator) -> Tensor:
    """Return row numbers (m, size), each critic's out of its own."""
    return torch.stack(
        [rows[torch.randint(0, len(rows), (size,), generator=generator)] for rows in own]
    )


def _joined(first: Negatives, second: Negatives) -> Negatives:
    pairs = zip(vars(first).values(), vars(second).values(), strict=True)
    return Negatives(*(torch.cat(pair, 1) for pair in pairs))
