"""What a step of the training loop costs above its bare forward and backward passes.

Ratio = median CPU time of a step of `robustlearn.loop.play` / that of a bare step: batch
gathered by index, losses, backward, SGD. After each step of the loop comes one of the bare loop,
on another copy of the network, so that both see the same machine. A step of the loop also checks
the gradient, seeds the random streams, sums two metrics and sets the learning rate; with an
average of the weights (``ema``) it does what the bare step leaves out.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from robustlearn.loop import Batch, Turn, play

EPS, STEP = 0.1, 0.05
BATCH = 64
Losses = Callable[[nn.Module, nn.Module, Tensor, Tensor], Tensor]


def main() -> None:
    """Measure, print a table, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], threads=1)
    torch.manual_seed(given.seed)
    epochs = 4 if given.full else 1
    rows = [
        measure(name, passes, losses, ema, epochs, given.seed)
        for name, passes, losses in (("standard", 1, standard), ("PGD-2", 3, adversarial))
        for ema in (None, 0.99)
    ]
    recording.save(rows, given)
    show(rows)


def network() -> nn.Module:
    """Return a convolutional network of 166,406 parameters for images (1, 28, 28)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def standard(outer: nn.Module, inner: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy at the points themselves."""
    return F.cross_entropy(outer(x), y, reduction="none")


def adversarial(outer: nn.Module, inner: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy after two sign steps within an L∞ ball."""
    delta = torch.zeros_like(x)
    for _ in range(2):
        point = (x + delta).requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(inner(point), y, reduction="sum"), point)
        delta = (delta + STEP * slope.sign()).clamp(-EPS, EPS)
    return standard(outer, inner, x + delta, y)


class Training:
    """The game of minimising some losses."""

    def __init__(self, losses: Losses) -> None:
        self.losses = losses
        self.modules: dict[str, nn.Module] = {"model": network()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"model": sgd(self.modules["model"])}

    def step(self, batch: Batch, turn: Turn) -> dict[str, Tensor]:
        """Follow the gradient once."""
        net = turn.module("model")
        losses = self.losses(net, turn.unwrapped("model"), batch.x, batch.y)
        turn.backward(losses)
        turn.update("model")
        return {"loss": losses.detach(), "large": (losses > 1).float()}


class Bare:
    """The same without a loop around it."""

    def __init__(self, losses: Losses, x: Tensor, y: Tensor) -> None:
        self.losses, self.x, self.y = losses, x, y
        self.net = network()
        self.optimizer = sgd(self.net)

    def step(self) -> None:
        """Follow the gradient once."""
        index = torch.randint(len(self.x), (BATCH,))
        losses = self.losses(self.net, self.net, self.x[index], self.y[index])
        self.optimizer.zero_grad()
        losses.mean().backward()
        self.optimizer.step()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)


def interleaved(
    train: Callable[[Callable[[object], None]], object], bare: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the CPU seconds of each step of a training, and of the bare step after it.

    Parameters
    ----------
    train : trains, and calls what it is given after each step.
    """
    times: dict[str, list[float]] = {"loop": [], "bare": []}
    start = time.process_time()

    def between(_: object) -> None:
        nonlocal start
        ended = time.process_time()
        times["loop"].append(ended - start)
        bare()
        start = time.process_time()
        times["bare"].append(start - ended)

    train(between)
    return times


def measure(
    name: str, passes: int, losses: Losses, ema: float | None, epochs: int, seed: int
) -> dict[str, Any]:
    """Return a row: median milliseconds of both, and their ratio."""
    x, y = torch.rand(100 * BATCH, 1, 28, 28), torch.randint(10, (100 * BATCH,))
    given = {"epochs": epochs, "batch_size": BATCH, "seed": seed, "ema": ema}
    whole = time.perf_counter()
    times = interleaved(
        lambda between: play(Training(losses), (x, y), progress=between, **given),
        Bare(losses, x, y).step,
    )
    loop, floor = (statistics.median(times[kind][10:]) for kind in ("loop", "bare"))
    return {
        "training": name,
        "passes": passes,
        "ema": ema is not None,
        "steps": len(times["loop"]),
        "loop_ms": round(1e3 * loop, 4),
        "bare_ms": round(1e3 * floor, 4),
        "ratio": round(loop / floor, 4),
        "seed": seed,
        "seconds": time.perf_counter() - whole,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    table = Table("training", "average", "loop, ms", "bare, ms", "ratio")
    for row in rows:
        average = "yes" if row["ema"] else "no"
        figures = [f"{row[name]:.2f}" for name in ("loop_ms", "bare_ms")]
        table.add_row(row["training"], average, *figures, f"{row['ratio']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
