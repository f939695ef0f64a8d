"""Verdicts of `evaluate` on broken defences and on sound models: detections and false alarms.

The thresholds of robustlearn.evaluate.checks.base were set on the development half of the models;
the held-out half was only looked at afterwards. Defences of the development half around another
network are a part of their own: they are new models, but not new kinds.
"""

import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from rich.console import Console
from rich.table import Table
from sklearn import (
    datasets,
    ensemble,
    linear_model,
    neighbors,
    neural_network,
    pipeline,
    preprocessing,
    svm,
)
from torch import Tensor, nn

import robustlearn as rl
from robustlearn import data
from robustlearn.cli.demo import trained
from robustlearn.evaluate.binarisation import unit_test

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import defences

FOLDER = Path(os.environ.get("ROBUSTLEARN_DATA", Path(__file__).parents[2] / "shared" / "data"))
TRAIN, TEST = 10_000, 500
EVALUATED = 200  # samples
LINF = {"lower": 0.0, "upper": 1.0}


@dataclass(frozen=True)
class Case:
    """A model whose verdict is known beforehand."""

    name: str
    half: str  # development, or held out
    sound: bool
    model: Any
    x: Any
    y: Any
    threat: rl.LpBall


def main() -> None:
    """Measure, print a table, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], threads=1)
    rows = []
    for case in everything() if given.full else digits(given.seed):
        rows.append(measured(case, given.seed))
        Console(stderr=True).print(case.name, rows[-1]["trustworthy"], rows[-1]["failed"])
    recording.save(rows, given)
    show(rows)


def measured(case: Case, seed: int) -> dict[str, Any]:
    """Return one row: the verdict, its evidence, its cost, and the unit test of a classifier."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that give probabilities
        start = time.perf_counter()
        x, y, given = case.x[:EVALUATED], case.y[:EVALUATED], {"seed": seed, "certify": "none"}
        report = rl.evaluate(case.model, x, y, case.threat, attacks="quick", **given)
        verdict, failed = report.verdict, [f for f in report.verdict["findings"] if told(f)]
        seconds = time.perf_counter() - start
        test = None
        model = rl.wrap(case.model)
        if model.differentiable and model.task != "regression":
            test = unit_test(model, case.x, case.y, case.threat, seed=seed, samples=16)
    return {
        "model": case.name,
        "half": case.half,
        "sound": case.sound,
        "threat": str(case.threat),
        "clean": report.clean.value,
        "attacked": report.attacked.value,
        "verdict": verdict["text"].split()[0].strip(":"),
        "trustworthy": verdict["trustworthy"],
        "failed": " ".join(finding["check"] for finding in failed),
        "seconds": seconds,
        "planted": test and test.planted,
        "found": test and test.found,
        "by_chance": test and test.by_chance,
        "unit_test": test and test.passed,
        "evidence": json.dumps({f["check"]: f["evidence"] for f in verdict["findings"]}),
    }


def told(finding: dict[str, Any]) -> bool:
    """Tell whether a finding speaks against the evaluation."""
    return finding["passed"] is False


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line a model, and detections and false alarms of each half."""
    table = Table("half", "model", "verdict", "checks that failed", "unit test", box=None)
    for row in rows:
        right = row["trustworthy"] == row["sound"] or (row["attacked"] == 0 and not row["sound"])
        planted = f"{row['found']} of {row['planted']}" if row["planted"] is not None else "–"
        failed = row["failed"].split()
        table.add_row(
            row["half"],
            row["model"],
            row["verdict"] + ("" if right else " (wrong)"),
            f"{len(failed)}: {failed[0]}" if failed else "–",
            planted,
        )
    console = Console(width=130)
    console.print(table)
    for half in dict.fromkeys(row["half"] for row in rows):
        mine = [row for row in rows if row["half"] == half]
        broken = [row for row in mine if not row["sound"]]
        sound = [row for row in mine if row["sound"]]
        caught = sum(not row["trustworthy"] for row in broken)
        through = sum(row["attacked"] == 0 for row in broken)
        alarms = sum(not row["trustworthy"] for row in sound)
        failed = sum(row["unit_test"] is False for row in broken)
        falsely = sum(row["unit_test"] is False for row in sound)
        console.print(
            f"{half}: {caught} of {len(broken)} broken models are suspicious, {through} attacked "
            f"to nothing; {alarms} false alarms on "
            f"{len(sound)} sound ones; the unit test of pgd fails {failed} and {falsely} of them"
        )


# ---------------------------------------------------------------------- small models


def digits(seed: int) -> Iterator[Case]:
    """Yield a network and forests on built-in data: no other data is needed."""
    images = data.load("digits")
    net = trained(images.take(slice(0, 1200)), seed, lambda *told: None)
    x, y = images.x[1200:], images.y[1200:]
    threat = rl.LpBall(math.inf, 0.1, **LINF)
    yield Case("digits CNN", "development", True, net, x, y, threat)
    for name in ("quantised input", "randomised input", "detached preprocessing"):
        broken = defences.DEVELOPMENT[name](net)
        yield Case(f"digits CNN, {name}", "development", False, broken, x, y, threat)


def estimators() -> Iterator[Case]:
    """Yield scikit-learn's models, with gradients and without."""
    x, y = datasets.load_digits(return_X_y=True)
    x, train, test = x / 16, slice(0, 1200), slice(1200, None)
    binary, z = datasets.load_breast_cancer(return_X_y=True)
    binary = (binary - binary.min(0)) / np.ptp(binary, 0)
    table, t = datasets.load_diabetes(return_X_y=True)
    table, t = (table - table.mean(0)) / table.std(0), (t - t.mean()) / t.std()
    box, plain = rl.LpBall(math.inf, 0.1, **LINF), rl.LpBall(2, 0.3)
    two, one = rl.LpBall(2, 1.0, **LINF), rl.LpBall(1, 2.0, **LINF)
    first, second = "development", "held out"
    perceptron = neural_network.MLPRegressor(hidden_layer_sizes=(50,), max_iter=500, random_state=0)
    for half, threat, model in (
        (first, box, ensemble.RandomForestClassifier(50, random_state=0)),
        (first, two, neighbors.KNeighborsClassifier()),
        (first, box, linear_model.LogisticRegression(max_iter=2000)),
        (first, one, linear_model.LogisticRegression(max_iter=2000)),
        (second, box, svm.SVC()),
        (second, two, neural_network.MLPClassifier(random_state=0, max_iter=500)),
        (second, one, neural_network.MLPClassifier(random_state=0, max_iter=500)),
        (second, box, ensemble.ExtraTreesClassifier(50, random_state=0)),
        (second, two, linear_model.RidgeClassifier()),
    ):
        name = f"{type(model).__name__} on digits"
        yield Case(name, half, True, fitted(model, x[train], y[train]), x[test], y[test], threat)
    for half, model in (
        (first, linear_model.LogisticRegression(max_iter=2000)),
        (second, svm.LinearSVC()),
    ):
        name = f"{type(model).__name__} on two classes"
        yield Case(name, half, True, fitted(model, binary, z), binary, z, plain)
    for half, model in (
        (first, linear_model.Ridge()),
        (first, perceptron),
        (second, linear_model.HuberRegressor()),
        (second, ensemble.GradientBoostingRegressor(random_state=0)),
    ):
        name = f"{type(model).__name__} on diabetes"
        yield Case(name, half, True, fitted(model, table, t), table, t, plain)


def tables() -> Iterator[Case]:
    """Yield perceptrons on rows with units and whole numbers: sound, held out."""
    x, y = datasets.load_wine(return_X_y=True)
    low, high = x.min(0), x.max(0)
    whole = np.array([column in (4, 12) for column in range(x.shape[1])])  # magnesium, proline
    model = pipeline.make_pipeline(
        preprocessing.StandardScaler(), neural_network.MLPClassifier(random_state=0, max_iter=500)
    )
    for p, eps in ((math.inf, 0.1), (2, 0.2), (1, 0.3)):
        threat = rl.Tabular(p, eps, lower=low, upper=high, scale=high - low, integer=whole)
        name = f"MLPClassifier on wine, whole numbers, p = {p}"
        yield Case(name, "held out", True, fitted(model, x, y), x, y, threat)


def fitted(model: Any, x: Any, y: Any) -> Any:
    """Fit without convergence warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(x, y)


# ---------------------------------------------------------------------- networks on images


def everything() -> Iterator[Case]:
    """Yield both halves; needs the third-party data."""
    yield from estimators()
    yield from tables()
    yield from development()
    yield from held_out()


def development() -> Iterator[Case]:
    """Yield the models on which the thresholds were set: MNIST."""
    net, x, y = learned("mnist", nn.ReLU)
    half, threat = "development", rl.LpBall(math.inf, 0.1, **LINF)
    yield Case("MNIST CNN", half, True, net, x, y, threat)
    yield Case("MNIST CNN, little ε", half, True, net, x, y, rl.LpBall(math.inf, 0.02, **LINF))
    loud = defences.After(net, lambda z: 100 * z)
    yield Case("MNIST CNN, logits × 100", half, True, loud, x, y, threat)
    for name, eps in (
        ("rsl18a_mnist_mlp_eps0.1", 0.1),
        ("wong2018_mnist_eps0.1", 0.1),
        ("eran_mnist_6_100", 0.02),
    ):
        yield Case(name, half, True, zoo().load(name), x, y, rl.LpBall(math.inf, eps, **LINF))
    for name, make in defences.DEVELOPMENT.items():
        yield Case(f"MNIST CNN, {name}", half, False, make(net), x, y, threat)


def held_out() -> Iterator[Case]:
    """Yield models that were not looked at before: other data, networks, defences and norms."""
    half, threat = "held out", rl.LpBall(math.inf, 0.1, **LINF)
    for name, p, eps in (
        ("wong2018_fashion_eps0.1", math.inf, 0.1),
        ("wong2018_fashion_eps0.1", 2, 1.0),
        ("sdp_mnist_cnn_a_adv", math.inf, 0.3),
        ("sdp_mnist_cnn_a_adv", math.inf, 0.1),
        ("sdp_cifar_cnn_a_adv", math.inf, 2 / 255),
        ("sdp_cifar_cnn_a_adv", math.inf, 8 / 255),
        ("vnncomp21_resnet2b", math.inf, 2 / 255),
        ("vnncomp21_resnet2b", 2, 0.3),
        ("cifar_resnet20", math.inf, 1 / 255),
        ("cifar_resnet20", 2, 0.1),
    ):
        x, y = images(zoo().MODELS[name][0])
        yield Case(name, half, True, zoo().load(name), x, y, rl.LpBall(p, eps, **LINF))
    net, x, y = learned("fashion_mnist", nn.ReLU)
    yield Case("Fashion CNN", half, True, net, x, y, threat)
    for name, make in defences.HELD_OUT.items():
        yield Case(f"Fashion CNN, {name}", half, False, make(net), x, y, threat)
    for name, make in defences.DEVELOPMENT.items():
        yield Case(f"Fashion CNN, {name}", "known kinds", False, make(net), x, y, threat)
    winners, _, _ = learned("fashion_mnist", defences.WinnersOnly)
    yield Case("Fashion CNN, k winners take all", half, False, winners, x, y, threat)
    robust = zoo().load("wong2018_fashion_eps0.1")
    for name, make in defences.HELD_OUT.items():
        yield Case(f"wong2018_fashion, {name}", half, False, make(robust), x, y, threat)


def images(name: str, *, train: bool = False) -> tuple[Tensor, Tensor]:
    """Return test images in [0, 1] and labels; with ``train`` the first of the training set."""
    path = FOLDER / "images" / (f"{name}_test.npz" if name == "cifar10" else f"{name}.npz")
    n, part = (TRAIN, "_train") if train else (TEST, "_test")
    with np.load(path) as file:
        if name == "cifar10":
            x, y = file["x"][:n].transpose(0, 3, 1, 2), file["y"][:n]
        else:
            x, y = file[f"x{part}"][:n, None], file[f"y{part}"][:n]
    return torch.as_tensor(x / np.float32(255)), torch.as_tensor(y.astype(np.int64))


def learned(name: str, activation: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a small network trained on 10,000 images, and test images."""
    net = defences.trained(*images(name, train=True), activation=activation)
    return (net, *images(name))


def zoo() -> Any:
    """Return the module that loads the third-party networks."""
    if "zoo" not in sys.modules:
        spec = importlib.util.spec_from_file_location("zoo", FOLDER / "models" / "zoo.py")
        sys.modules["zoo"] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(sys.modules["zoo"])  # type: ignore[union-attr]
    return sys.modules["zoo"]


if __name__ == "__main__":
    main()
