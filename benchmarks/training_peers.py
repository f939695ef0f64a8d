"""Robust training beside trainers of other libraries, for the same CPU seconds.

`robustlearn.train.fit` is run first; every other trainer then gets the seconds that it took, with
the same images, network, batch, optimiser, schedule and ramp of ε: a loop of ours hands it batches,
sets learning rate and ε by the share of the seconds that is used up, and stops when they are.
Hence trainers that know no ramp have one too. Of all settings (steps, precision, one of two
learning rates) the best by images held apart, of the first seed, is run with the other seeds.

Peers: PGD of torchattacks in a loop written by hand, in float32 and under autocast to bfloat16;
ART's trainers after Madry and TRADES; TRADES of torchdefenses, the former name of MAIR (its AT is
the first loop again).
"""

import contextlib
import importlib.util
import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import MagicMock

import recording
import torch
from evaluation import Counted, draw
from torch import Tensor, nn
from torch.nn import functional
from training import (
    DEFAULT,
    RATES,
    Row,
    Run,
    Task,
    chosen,
    gradients_a_sample,
    seeds,
    spread,
    tasks,
    trained,
)

from robustlearn.loop import rate

BATCH, RAMP = 64, 0.5  # those of fit
SHARE = 1.0  # of a task's gradients, that robustlearn takes
Step = Callable[[Tensor, Tensor, float], None]  # x, y, ε: moves the weights
Make = Callable[[nn.Module, torch.optim.Optimizer], Step]


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=len(TABLES), threads=1)
    recording.save(recording.measured(TABLES, given), given)


# Peers


def by_hand(steps: int, *, half: bool = False) -> Make:
    """Madry's training with an attack of torchattacks."""

    def make(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        import torchattacks

        attack = torchattacks.PGD(net, eps=0.0, alpha=0.0, steps=steps)

        def step(x: Tensor, y: Tensor, eps: float) -> None:
            attack.eps, attack.alpha = eps, 2.5 * eps / steps
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                points = attack(x, y)
                loss = functional.cross_entropy(net(points), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return make


def art(trainer: str, steps: int) -> Make:
    """A trainer of the Adversarial Robustness Toolbox."""

    def make(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        from art.attacks.evasion import ProjectedGradientDescentPyTorch
        from art.defences import trainer as trainers
        from art.estimators.classification import PyTorchClassifier

        whole = Counted(net)  # of a Sequential its TRADES takes the first layer's output as logits
        classifier = PyTorchClassifier(
            whole, nn.CrossEntropyLoss(), (1, 28, 28), 10, optimizer, clip_values=(0.0, 1.0)
        )
        given = {"eps": 0.1, "eps_step": 0.1, "max_iter": steps, "num_random_init": 1}
        if trainer == "TRADES":
            attack = ProjectedGradientDescentPyTorch(
                classifier, batch_size=BATCH, verbose=False, **given
            )
            training = trainers.AdversarialTrainerTRADESPyTorch(classifier, attack, beta=6.0)
        else:
            training = trainers.AdversarialTrainerMadryPGD(classifier, 1, BATCH, **given)
            attack = training.attack

        def step(x: Tensor, y: Tensor, eps: float) -> None:
            eps = max(eps, 1e-6)  # it refuses 0
            attack.set_params(eps=eps, eps_step=min(eps, 2.5 * eps / steps), verbose=False)
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
                training.fit(x.numpy(), y.numpy(), nb_epochs=1, batch_size=BATCH)

        return step

    return make


def torchdefenses(trainer: str, steps: int) -> Make:
    """The step of a trainer of torchdefenses; its own loop writes files and knows no ramp."""

    def make(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
        for part in ("utils", "utils.datasets"):  # they need torchvision, the trainers do not
            sys.modules.setdefault(f"torchdefenses.{part}", MagicMock())
        from torchdefenses import RobModel
        from torchdefenses import trainer as trainers

        options = {"beta": 6.0} if trainer == "TRADES" else {}
        training = getattr(trainers, trainer)(
            RobModel(net, 10), eps=0.1, alpha=0.1, steps=steps, **options
        )
        training.optimizer = optimizer

        def step(x: Tensor, y: Tensor, eps: float) -> None:
            training.atk.eps, training.atk.alpha = eps, 2.5 * eps / steps
            training._do_iter((x, y))

        return step

    return make


PEERS: dict[str, tuple[str, dict[str, Make]]] = {  # method: its module, its settings
    "torchattacks": (
        "torchattacks",
        {
            "2 steps": by_hand(2),
            "5 steps": by_hand(5),
            "2 steps, bf16": by_hand(2, half=True),
        },
    ),
    "ART, Madry": ("art", {"2 steps": art("Madry", 2)}),
    "ART, TRADES": ("art", {"2 steps": art("TRADES", 2)}),
    "torchdefenses, TRADES": ("torchdefenses", {"2 steps": torchdefenses("TRADES", 2)}),
}


# Measuring


def measure(full: bool, seed: int) -> Iterator[Row]:
    """Train with each library, and judge."""
    for task in tasks(full):
        if full and task.name == "digits":
            continue  # a matter of seconds, in which a library's start counts
        rates = RATES if full else RATES[:1]
        whole = list(chosen(ours(task, SHARE), rates, task, seeds(full, seed)))
        yield from whole
        best = [row for row in whole if "robust" in row]
        seconds = {row["seed"]: row["cpu_seconds"] for row in best}
        yield from chosen(ours(task, SHARE / 2), [best[0]["lr"]], task, seeds(full, seed))
        for name, (module, makers) in PEERS.items():
            if importlib.util.find_spec(module) is not None:
                settings = list(itertools.product(makers, rates))
                run = theirs(task, name, seconds)
                yield from chosen(run, settings if full else settings[:1], task, seeds(full, seed))


def ours(task: Task, share: float) -> Callable[[Any, int], Run]:
    """Return how robustlearn is run, for a share of the task's gradients."""
    cost = gradients_a_sample(task, DEFAULT)  # which imports what the first run needs, too
    epochs = max(1, round(share * task.gradients / cost / len(task.train[0])))

    def run(lr: float, seed: int) -> Run:
        net, seconds = trained(task, DEFAULT, epochs, seed, lr=lr)
        row = {
            "images": task.name,
            "method": "robustlearn" if share == SHARE else "robustlearn, half the time",
            "setting": f"{DEFAULT}, {task.precision}",
            "lr": lr,
            "seed": seed,
            "samples": epochs * len(task.train[0]),
            "cpu_seconds": seconds,
        }
        return net, row

    return run


def theirs(task: Task, name: str, seconds: dict[int, float]) -> Callable[[Any, int], Run]:
    """Return how a peer is run, for the seconds of each seed."""

    def run(setting: tuple[str, float], seed: int) -> Run:
        make, lr = PEERS[name][1][setting[0]], setting[1]
        about = {"images": task.name, "method": name, "setting": setting[0], "lr": lr, "seed": seed}
        net, spent = timed(task, make, seconds[seed], lr, seed)
        return net, {**about, **spent}

    return run


def timed(task: Task, make: Make, seconds: float, lr: float, seed: int) -> Run:
    """Train until the CPU seconds are used up."""
    torch.manual_seed(seed)
    net = task.build()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0)
    step, samples, (x, y) = make(net, optimizer), 0, task.train
    start = time.process_time()
    for rows in itertools.chain.from_iterable(orders(len(x), seed)):
        progress = (time.process_time() - start) / seconds
        if progress >= 1:
            break
        optimizer.param_groups[0]["lr"] = lr * rate("one_cycle", progress)
        net.train()
        step(x[rows], y[rows], float(task.threat.eps) * min(1.0, progress / RAMP))
        samples += len(rows)
    return net, {"samples": samples, "cpu_seconds": time.process_time() - start}


def orders(n: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Yield the batches of epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(n, generator=generator).split(BATCH)


def show(rows: list[Row]) -> None:
    """Print means over seeds of the settings that were chosen."""
    for name in dict.fromkeys(row["images"] for row in rows):
        mine = [row for row in rows if row["images"] == name]
        lines: list[tuple[Any, ...]] = []
        for method in dict.fromkeys(row["method"] for row in mine):
            runs = [row for row in mine if row["method"] == method and "robust" in row]
            seconds = statistics.mean(row["cpu_seconds"] for row in runs)
            thousands = statistics.mean(row["samples"] for row in runs) / 1000
            figures = (spread(runs, figure) for figure in ("held", "robust", "clean"))
            best = (method, runs[0]["setting"], runs[0]["lr"])
            lines.append((*best, *figures, f"{thousands:.0f}k", f"{seconds:.0f}"))
        names = (
            "method",
            "setting",
            "rate",
            "held, %",
            "robust, %",
            "clean, %",
            "samples",
            "CPU s",
        )
        draw(
            f"Trainers in equal time: {name}, {len({row['seed'] for row in mine})} seeds",
            names,
            lines,
        )


TABLES: recording.Tables = {1: (measure, show)}


if __name__ == "__main__":
    main()
