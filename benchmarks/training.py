"""What each objective of robust training gives for the same number of gradients, and a recipe.

A run may take so many sample gradients: a sample that goes back through the network, whether for
the weights or for the adversary, counts one, and the epochs follow. Network, batch, ramp of ε,
optimiser and schedule are the same for all; a run is judged by its last weights,
nothing is chosen among its epochs. ``held`` is the share of training images held apart that stand
under the cheap attack of `robustlearn.train.validate`: choices, as that of the learning rate from
two, are made by it alone. ``robust`` is the share of test images that stand under
``evaluate(attacks="standard")``. Images are used where
their folder is; without it scikit-learn's digits show that the benchmark runs.

Tables: 1 objectives at equal gradients, 2 the recipe for MNIST, 3 a linear network beside the
optimum of `AdversarialRegressor`, 4 bfloat16 with channels last beside float32 on a network with
batch norm.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import recording
import torch
from evaluation import FOLDER, Counted, console, draw
from loop_overhead import network
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import robustlearn as rl
from robustlearn import data
from robustlearn.linear import AdversarialRegressor
from robustlearn.loop import Batch, Turn, play
from robustlearn.train import fit, validate

Row = dict[str, Any]
Pair = tuple[Tensor, Tensor]
Run = tuple[nn.Module, Row]
DEFAULT = "pgd_at:steps=1:step_size=0.5"
OBJECTIVES = {  # objective: whether perturbations are kept from epoch to epoch
    "standard": False,
    "fgsm": False,
    "n_fgsm": False,
    "free": False,
    "grad_align": False,
    "pgd_at:steps=7": False,
    "pgd_at:steps=2": False,
    DEFAULT: True,
    "adversarial_cross_entropy:steps=1:step_size=0.5": True,
    "trades:steps=1:step_size=0.5": True,
    "mart:steps=1:step_size=0.5": True,
    "margin:steps=1:step_size=0.5": True,
}
IMAGES = (("mnist", 0.3), ("fashion_mnist", 0.1))
TRAIN, HELD, TEST = 6_000, 500, 200
GRADIENTS = 96_000
RATES = (1e-3, 4e-3)  # of learning; one of them is chosen


@dataclass(frozen=True)
class Task:
    """Images to train on, to choose by and to judge by, and the network for them.

    Attributes
    ----------
    gradients : of samples, that a run may take.
    precision : that of `robustlearn.train.fit`.
    attacks : of the evaluation on the test images.
    """

    name: str
    build: Callable[[], nn.Module]
    threat: rl.LpBall
    train: Pair
    held: Pair
    test: Pair
    gradients: int
    precision: str = "float32"
    attacks: str = "standard"


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=len(TABLES), threads=1)
    recording.save(recording.measured(TABLES, given), given)


# Images


def tasks(full: bool) -> Iterator[Task]:
    """Yield the digits, and the images of the folder; ``ROBUSTLEARN_IMAGES`` names some of all."""
    wanted = os.environ.get("ROBUSTLEARN_IMAGES", "").split(",")
    if {"", "digits"} & set(wanted):
        yield digits(full)
    for name, eps in IMAGES if full else ():
        if (FOLDER / "images" / f"{name}.npz").is_file() and {"", name} & set(wanted):
            yield images(name, eps)


def digits(full: bool) -> Task:
    """Return scikit-learn's digits with a network of 13,706 parameters."""
    found = data.load("digits")
    x, y = torch.as_tensor(found.x).float(), torch.as_tensor(found.y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    sizes = [1000, 297, 500] if full else [200, 20, 10]
    train, held, test = ((x[rows], y[rows]) for rows in order[: sum(sizes)].split(sizes))
    return Task(
        name="digits",
        build=small_network,
        threat=rl.LpBall(math.inf, 0.15, lower=0, upper=1),
        train=train,
        held=held,
        test=test,
        gradients=48_000 if full else 800,
        attacks="standard" if full else "quick",
    )


def small_network() -> nn.Module:
    """Return a convolutional network for images (1, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 16),
        nn.ReLU(),
        nn.Linear(16, 10),
    )


def images(name: str, eps: float, *, train: int = TRAIN, test: int = TEST) -> Task:
    """Return a set of the folder; what is held apart are training images that come after them."""
    with np.load(FOLDER / "images" / f"{name}.npz") as file:
        x, y, x_test, y_test = (file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    order, places = (np.random.default_rng(0).permutation(len(part)) for part in (y, y_test))
    held, shown = order[train : train + HELD], places[:test]
    return Task(
        name=name,
        build=network,
        threat=rl.LpBall(math.inf, eps, lower=0, upper=1),
        train=pixels(x[order[:train]], y[order[:train]]),
        held=pixels(x[held], y[held]),
        test=pixels(x_test[shown], y_test[shown]),
        gradients=GRADIENTS,
        precision="bf16",
    )


def pixels(x: np.ndarray, y: np.ndarray) -> Pair:
    """Return images (n, 1, height, width) in [0, 1] and labels."""
    return torch.as_tensor(x[:, None] / np.float32(255)), torch.as_tensor(y.astype(np.int64))


def seeds(full: bool, seed: int) -> range:
    """Return the seeds of a table."""
    return range(seed, seed + (3 if full else 1))


# Objectives


def objectives(full: bool, seed: int) -> Iterator[Row]:
    """Train with each objective for equal gradients, and judge."""
    for task in tasks(full):
        for objective, kept in OBJECTIVES.items():
            cost = gradients_a_sample(task, objective)
            epochs = max(1, round(task.gradients / cost / len(task.train[0])))
            about = {
                "images": task.name,
                "objective": objective,
                "kept": kept,
                "precision": task.precision,
                "epochs": epochs,
                "gradients": cost * epochs * len(task.train[0]),
            }

            def run(lr: float, seed: int, about: Row = about, task: Task = task) -> Run:
                given = {"memory": about["kept"], "lr": lr}
                net, seconds = trained(task, about["objective"], about["epochs"], seed, **given)
                return net, {**about, "lr": lr, "seed": seed, "cpu_seconds": seconds}

            yield from chosen(run, RATES if full else RATES[:1], task, seeds(full, seed))


def chosen(
    run: Callable[[Any, int], Run], settings: Sequence[Any], task: Task, seeds: range
) -> Iterator[Row]:
    """Run all settings with the first seed, and the best by images held apart with the others.

    Test images are shown to that one alone: rows of the others have no ``robust``.
    """
    for number in seeds:
        found = [(*run(setting, number), setting) for setting in settings]
        for net, row, _ in found:
            held = validate(net, *task.held, task.threat, seed=number)
            row |= {"held_clean": held.clean, "held": held.robust}
        best, row, setting = max(found, key=lambda one: one[1]["held"])
        row |= told(best, task, number)
        settings = [setting]
        for _, row, _ in found:
            console.print(row)
            yield row


def gradients_a_sample(task: Task, objective: str) -> int:
    """Return how often a sample goes back through the network in an epoch."""
    counted, part = Counted(task.build()), tuple(values[:64] for values in task.train)
    fit(counted, part, task.threat, objective=objective, validation=None, epochs=1, ramp=0.0)
    return counted.gradients // len(part[0])


def trained(
    task: Task, objective: str, epochs: int, seed: int, **options: Any
) -> tuple[nn.Module, float]:
    """Return a network after so many epochs, and their CPU seconds."""
    torch.manual_seed(seed)
    net = task.build()
    given = {"validation": None, "attacks": None, "precision": task.precision, **options}
    start = time.process_time()
    fit(net, task.train, task.threat, objective=objective, epochs=epochs, seed=seed, **given)
    return net, time.process_time() - start


def told(net: nn.Module, task: Task, seed: int) -> Row:
    """Return what test images say."""
    report = rl.evaluate(
        net.eval(), *task.test, task.threat, attacks=task.attacks, certify="none", seed=seed
    )
    return {
        "clean": report.clean.value,
        "robust": report.attacked.value,
        "n": len(task.test[0]),
    }


def show_objectives(rows: list[Row]) -> None:
    """Print means over seeds, the best by images held apart first."""
    for name in dict.fromkeys(row["images"] for row in rows):
        mine = [row for row in rows if row["images"] == name]
        lines = []
        for objective in dict.fromkeys(row["objective"] for row in mine):
            runs = [row for row in mine if row["objective"] == objective and "robust" in row]
            figures = [spread(runs, key) for key in ("held", "robust", "clean")]
            seconds = statistics.mean(row["cpu_seconds"] for row in runs)
            cost = round(runs[0]["gradients"] / 1000)
            lines.append((objective, runs[0]["lr"], *figures, f"{cost}k", f"{seconds:.0f}"))
        lines.sort(key=lambda line: line[2], reverse=True)
        title = (
            f"1. Objectives at equal gradients: {name}, {len({row['seed'] for row in mine})} seeds"
        )
        names = ("objective", "rate", "held, %", "robust, %", "clean, %", "gradients", "CPU s")
        draw(title, names, lines)


def spread(rows: list[Row], key: str) -> str:
    """Return mean ± standard deviation over seeds, in per cent."""
    values = [100 * row[key] for row in rows]
    told = f"{statistics.mean(values):4.1f}"
    return told if len(values) == 1 else f"{told} ± {statistics.stdev(values):.1f}"


# Recipe


RECIPE: Row = {  # chosen by 12 epochs of 59,000 training images, on the 1,000 others
    "objective": "trades:steps=2:step_size=0.25:beta=6",
    "epochs": 30,
    "lr": 4e-3,
    "ema": 0.999,
    "precision": "bf16",
}


def recipe(full: bool, seed: int) -> Iterator[Row]:
    """Train as the README says, and judge the last weights on test images."""
    if not full:
        task, options = digits(full), {**RECIPE, "epochs": 2}
    elif (FOLDER / "images" / "mnist.npz").is_file():
        task, options = images("mnist", 0.3, train=59_500, test=1000), RECIPE
    else:
        return
    gradients_a_sample(task, RECIPE["objective"])  # imports what the first run needs
    for number in seeds(full, seed):
        net, seconds = trained(task, seed=number, **options)
        row = {"images": task.name, "seed": number, "cpu_seconds": seconds}
        row |= told(net, task, number)
        console.print(row)
        yield row


def show_recipe(rows: list[Row]) -> None:
    """Print each seed."""
    names = ("images", "seed", "cpu_seconds", "clean", "robust", "n")
    draw("2. The recipe", names, [tuple(row[name] for name in names) for row in rows])


# Linear networks


class Exact:
    """The game whose inner maximum is known: mean of (|wᵀx + b − y| + ε‖w‖_q)²."""

    def __init__(self, net: nn.Linear, threat: rl.LpBall, lr: float) -> None:
        self.threat = threat
        self.modules: dict[str, nn.Module] = {"model": net}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "model": torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0)
        }

    def step(self, batch: Batch, turn: Turn) -> dict[str, Tensor]:
        """Follow the gradient once."""
        net = turn.module("model")
        reach = self.threat.support(net.weight)
        loss = ((net(batch.x).squeeze(1) - batch.y).abs() + reach).square()
        turn.backward(loss)
        turn.update("model")
        return {"loss": loss.detach()}


def linear(full: bool, seed: int) -> Iterator[Row]:
    """Train a linear network on the exact loss and on attacked points, beside the solver."""
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    parts = torch.as_tensor(x), torch.as_tensor(y)
    given = {"epochs": 1500 if full else 20, "batch_size": len(x), "schedule": "cosine"}
    for p, eps in ((math.inf, 0.05), (2, 0.2)):
        threat = rl.LpBall(p, eps)
        start = time.process_time()
        exact = AdversarialRegressor(eps=eps, norm="inf" if math.isinf(p) else 2).fit(x, y)
        row = {"threat": str(threat), "n": len(x), "seed": seed}
        best = worst_error(exact.coef_, exact.intercept_, x, y, threat)
        yield {
            **row,
            "training": "AdversarialRegressor",
            "loss": best,
            "above": 0.0,
            "cpu_seconds": time.process_time() - start,
        }
        for objective in ("exact loss", "pgd_at"):
            torch.manual_seed(seed)
            net, start = nn.Linear(x.shape[1], 1).double(), time.process_time()
            if objective == "exact loss":
                play(Exact(net, threat, 0.02), parts, seed=seed, **given)
            else:
                fit(
                    net,
                    parts,
                    threat,
                    objective=objective,
                    validation=None,
                    lr=0.02,
                    ramp=0.0,
                    seed=seed,
                    **given,
                )
            seconds = time.process_time() - start
            found = worst_error(
                net.weight.detach().numpy()[0], float(net.bias.detach()), x, y, threat
            )
            yield {
                **row,
                "training": objective,
                "loss": found,
                "above": found / best - 1,
                "cpu_seconds": seconds,
            }


def worst_error(
    weight: np.ndarray, bias: float, x: np.ndarray, y: np.ndarray, threat: rl.LpBall
) -> float:
    """Return the mean of (|wᵀx + b − y| + ε‖w‖_q)²."""
    reach = float(threat.support(torch.as_tensor(weight)[None]))
    return float(((np.abs(x @ weight + bias - y) + reach) ** 2).mean())


def show_linear(rows: list[Row]) -> None:
    """Print how far above the optimum each ends."""
    names = ("threat", "training", "loss", "above", "cpu_seconds")
    draw("3. A linear network", names, [tuple(row[name] for name in names) for row in rows])


# Precision


FORMS: dict[str, Row] = {
    "float32": {"precision": "float32"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
}


def normed_network() -> nn.Module:
    """Return a convolutional network with batch norm for images (1, *, *)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(512, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def precisions(full: bool, seed: int) -> Iterator[Row]:
    """Train for equal gradients in both forms, and judge."""
    for task in tasks(full):
        normed = replace(task, build=normed_network)
        epochs = max(1, round(task.gradients / 2 / len(task.train[0])))
        for number in seeds(full, seed):
            for form, options in FORMS.items():
                net, seconds = trained(normed, DEFAULT, epochs, number, lr=4e-3, **options)
                row = {"images": task.name, "form": form, "seed": number, "cpu_seconds": seconds}
                row |= told(net, task, number)
                console.print(row)
                yield row


def show_precisions(rows: list[Row]) -> None:
    """Print means over seeds."""
    lines = []
    for name, form in dict.fromkeys((row["images"], row["form"]) for row in rows):
        runs = [row for row in rows if (row["images"], row["form"]) == (name, form)]
        seconds = statistics.mean(row["cpu_seconds"] for row in runs)
        lines.append((name, form, spread(runs, "robust"), spread(runs, "clean"), f"{seconds:.0f}"))
    draw("4. Precision", ("images", "form", "robust, %", "clean, %", "CPU s"), lines)


TABLES: recording.Tables = {
    1: (objectives, show_objectives),
    2: (recipe, show_recipe),
    3: (linear, show_linear),
    4: (precisions, show_precisions),
}


if __name__ == "__main__":
    main()
