"""Modes, quality and reverse KL of generators, on two mixtures whose modes are known.

The 8-ring (radius 1, standard deviation 0.01) and the 25-grid (spacing 2, 0.05) of Lin et al.
(2018). A mode counts if a tenth of its share of the samples lies within 3 standard deviations of
it; the share of samples of high quality is that within 3 standard deviations of any mode. Networks,
steps, batches and optimiser are the same for all methods; only the recipe was tuned: depth, batch,
learning rate, γ and its annealing, on seeds that are not in the tables.

Tables 1 and 2: the recommended recipe beside the plain GAN on the ring and on the grid, 5 seeds;
its penalties are annealed.
Table 3: every loss of `robustlearn.gan.LOSSES` as its authors stabilise it, those on scores with
R1 and R2 too, and cures of the plain GAN; on the ring, with half the steps and one seed.
"""

import statistics
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from robustlearn.gan import LOSSES, Judgement, Mixture, fit_gan, losses, mode_coverage
from robustlearn.gan.metrics import mmd, sliced_wasserstein
from robustlearn.gan.mixtures import grid, perceptron, ring
from robustlearn.gan.regularizers import spectral

NOISE, WIDTH = 2, 64
DEPTH = {"generator": 6, "critic": 3}
STEPS = {"8-ring": 5000, "25-grid": 12_000}
STEPS_AN_EPOCH = 500
BATCH = {"8-ring": 256, "25-grid": 512}
GAMMA = {"8-ring": 0.004, "25-grid": 0.005}
ANNEAL = 20.0
DATA = {"8-ring": ring, "25-grid": grid}


@dataclass(frozen=True)
class Method:
    """A loss with its stabilisers; ``penalty`` may name the weight γ of the data."""

    loss: str
    penalty: str = ""
    spectral: bool = False
    options: dict[str, Any] = field(default_factory=dict)


R1_R2 = "r1:weight={gamma} + r2:weight={gamma}"
MAIN = {
    "recommended": Method("relativistic_paired", R1_R2),
    "plain GAN": Method("non_saturating"),
}
CURES = {
    "plain GAN, packs of 4": Method("non_saturating", options={"packing": 4}),
    "plain GAN, unrolled 3": Method("non_saturating", options={"unroll": 3}),
    "plain GAN, extragradient": Method("non_saturating", options={"order": "extragradient"}),
}
STABLE = {  # as their authors stabilise them; other losses have nothing
    "wasserstein": Method("wasserstein", "gradient_penalty"),
    "hinge": Method("hinge", spectral=True),
    "mmd": Method("mmd", spectral=True),
}


class Featured(nn.Module):
    """A critic whose last hidden layer is handed out too."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.body = perceptron(inputs, WIDTH, width=WIDTH, depth=DEPTH["critic"] - 1)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Judgement:
        """Return scores and features."""
        features = nn.functional.leaky_relu(self.body(x), 0.2)
        return Judgement(self.score(features), features)


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=3, threads=1)
    tables: recording.Tables = {
        1: (lambda full, seed: recipe("8-ring", full, seed), show),
        2: (lambda full, seed: recipe("25-grid", full, seed), show),
        3: (every_loss, show),
    }
    recording.save(recording.measured(tables, given), given)


def recipe(data: str, full: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Yield the rows of table 1 or 2."""
    steps = STEPS[data] if full else 20
    for number in range(5 if full else 1):
        for name, method in MAIN.items():
            yield measure(data, name, method, seed + number, steps, ANNEAL)


def every_loss(full: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Yield the rows of table 3."""
    data = "8-ring"
    steps = STEPS[data] // 2 if full else 5
    for loss in LOSSES:
        yield measure(data, loss, STABLE.get(loss, Method(loss)), seed, steps)
        if full and losses.get(loss).critic_on == "scores":
            yield measure(data, f"{loss} + R1 + R2", Method(loss, R1_R2), seed, steps)
    for name, method in CURES.items():
        yield measure(data, name, method, seed, steps)


def critic(method: Method) -> nn.Module:
    """Return the critic that a loss needs."""
    pair = losses.get(method.loss)
    inputs = 2 * method.options.get("packing", 1)
    if pair.critic_on == "scores" and pair.generator_on == "features":
        return Featured(inputs)
    outputs = {"scores": 1, "errors": inputs, "features": 16}[pair.critic_on]
    zero = pair.critic_on == "scores" and not method.spectral
    made = perceptron(inputs, outputs, width=WIDTH, depth=DEPTH["critic"], zero=zero)
    return spectral(made) if method.spectral else made


def measure(
    data: str, name: str, method: Method, seed: int, steps: int, anneal: float = 1.0
) -> dict[str, Any]:
    """Train a generator and return its row."""
    mixture: Mixture = DATA[data]()
    epoch = min(steps, STEPS_AN_EPOCH)
    count = 10_000 if epoch == STEPS_AN_EPOCH else 500
    torch.manual_seed(seed)
    generator = perceptron(NOISE, 2, width=WIDTH, depth=DEPTH["generator"])
    started = time.process_time()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = fit_gan(
            generator,
            critic(method),
            mixture.sample(epoch * BATCH[data], seed=seed),
            noise=NOISE,
            loss=method.loss,
            penalty=method.penalty.format(gamma=GAMMA[data]),
            anneal=anneal,
            lr=4e-3,
            schedule="cosine",
            ema=0.99,
            epochs=steps // epoch,
            batch_size=BATCH[data],
            known=mixture,
            compare=count // 10,
            seed=seed,
            **method.options,
        )
    seconds = time.process_time() - started
    fake, real = result.sample(count, seed=seed + 1), mixture.sample(count, seed=seed + 1000)
    found = mode_coverage(fake, mixture.centres, mixture.std)
    return {
        "data": data,
        "method": name,
        "loss": method.loss,
        "penalty": method.penalty.format(gamma=GAMMA[data]),
        "anneal": anneal,
        "seed": seed,
        "steps": steps,
        "modes": found.modes,
        "of": len(mixture.centres),
        "high_quality": round(found.high_quality, 4),
        "reverse_kl": round(found.reverse_kl, 4),
        "sliced_wasserstein": round(sliced_wasserstein(real, fake), 4),
        "mmd": round(mmd(real[:2000], fake[:2000]), 5),
        "accuracy": round(result.figures.get("accuracy", float("nan")), 4),
        "warned": "; ".join(sorted(str(w.message).split(": ")[1] for w in told)),
        "cpu_seconds": round(seconds, 2),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print means over the seeds, and the least number of modes."""
    table = Table(
        "data", "method", "seeds", "modes", "least", "high quality", "reverse KL", "CPU s"
    )
    for data, name in dict.fromkeys((row["data"], row["method"]) for row in rows):
        mine = [row for row in rows if (row["data"], row["method"]) == (data, name)]

        def mean(key: str, mine: list[dict[str, Any]] = mine) -> float:
            return statistics.fmean(row[key] for row in mine)

        table.add_row(
            data,
            name,
            str(len(mine)),
            f"{mean('modes'):.1f} / {mine[0]['of']}",
            str(min(row["modes"] for row in mine)),
            f"{mean('high_quality'):.1%}",
            f"{mean('reverse_kl'):.3f}",
            f"{mean('cpu_seconds'):.0f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
