"""What a 40-step PGD costs above its bare forward and backward passes, beside other libraries.

Ratio = time of the attack / time of the floor in the same round, where the floor is a plain loop
of 40 forward and backward passes of the same network on the same batch (gradients by the input
alone, parameters frozen) and one more forward pass. The floor is measured again right before each
attack. Attacks are made ready outside the clock. No sample is dropped.

Every library runs on the same samples, ε and number of steps, once with the network as a user
has it (parameters learning) and once with parameters frozen by hand; robust accuracy is measured
here, by the network itself. A peer gets the best of three step sizes for its accuracy; robustlearn
runs with its defaults.
"""

import importlib
import importlib.util
import math
import os
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import robustlearn as rl
from robustlearn import data
from robustlearn.attacks import pgd
from robustlearn.cli.demo import trained

STEPS = 40
Attack = Callable[[Tensor, Tensor], Tensor]
Make = Callable[[nn.Module, float, float], Attack]  # network, eps, step size


def main() -> None:
    """Measure, print a table, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0])
    rounds, batches = (5, (64, 512)) if given.full else (2, (64,))
    peers = available_peers()
    rows: list[dict[str, Any]] = []
    for name, net, x, y, eps in networks(given.seed, full=given.full):
        for batch in batches:
            rows += measure(name, net, x[:batch], y[:batch], eps, rounds, peers)
    recording.save(rows, given)
    show(rows)


def networks(seed: int, *, full: bool) -> list[tuple[str, nn.Module, Tensor, Tensor, float]]:
    """Return the digits network of the demo, and a third-party MNIST network where there is one."""
    digits = data.load("digits")
    net = trained(digits.take(slice(0, 1200)), seed, lambda *told: None)
    x, y = torch.as_tensor(digits.x[1200:]).float(), torch.as_tensor(digits.y[1200:])
    found: list[tuple[str, nn.Module, Tensor, Tensor, float]] = [
        ("digits CNN", net.eval(), x, y, 0.1)
    ]
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("ROBUSTLEARN_DATA", beside))
    if full and (folder / "models" / "zoo.py").is_file():
        spec = importlib.util.spec_from_file_location("zoo", folder / "models" / "zoo.py")
        zoo: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(zoo)  # type: ignore[union-attr]
        with np.load(folder / "images" / "mnist.npz") as file:
            x = torch.as_tensor(file["x_test"][:512, None] / np.float32(255))
            y = torch.as_tensor(file["y_test"][:512].astype(np.int64))
        found.append(("MNIST CNN", zoo.load("sdp_mnist_cnn_a_adv"), x, y, 0.3))
    return found


def ours(net: nn.Module, eps: float, step: float) -> Attack:
    """robustlearn with its defaults."""
    model, threat = rl.wrap(net), rl.LpBall(math.inf, eps, lower=0.0, upper=1.0)
    return lambda x, y: pgd(model, x, y, threat, steps=STEPS, stop_when_broken=False)


def floor(net: nn.Module, eps: float, step: float) -> Attack:
    """The bare passes: nothing is done with the gradients."""

    def passes(x: Tensor, y: Tensor) -> Tensor:
        point = x.clone().requires_grad_()
        for _ in range(STEPS):
            loss = nn.functional.cross_entropy(net(point), y, reduction="sum")
            torch.autograd.grad(loss, point)
        with torch.no_grad():
            net(point)
        return x

    return passes


def available_peers() -> dict[str, Make]:
    """Return the other libraries that are installed (`make bench` installs all)."""
    found: dict[str, Make] = {}
    for name, module, make in (
        ("torchattacks", "torchattacks", _torchattacks),
        ("foolbox", "foolbox", _foolbox),
        ("ART", "art.attacks.evasion", _art),
        ("adv-lib", "adv_lib.attacks", _adv_lib),
    ):
        if name == "adv-lib":
            stand_ins()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except ImportError as error:
            Console(stderr=True).print(f"{name} is not measured: {error}")
        else:
            found[name] = make
    return found


def _torchattacks(net: nn.Module, eps: float, step: float) -> Attack:
    import torchattacks

    return torchattacks.PGD(net, eps=eps, alpha=step, steps=STEPS, random_start=True)


def _foolbox(net: nn.Module, eps: float, step: float) -> Attack:
    import foolbox

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=True)
    criterion = foolbox.criteria.Misclassification
    return lambda x, y: attack.run(model, x, criterion(y), epsilon=eps)


def _art(net: nn.Module, eps: float, step: float) -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(x: Tensor, y: Tensor) -> Tensor:
        run = ProjectedGradientDescentPyTorch(
            PyTorchClassifier(
                net, nn.CrossEntropyLoss(), x.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
            ),
            eps=eps,
            eps_step=step,
            max_iter=STEPS,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.as_tensor(run.generate(x.numpy(), y.numpy()))

    return attack


def _adv_lib(net: nn.Module, eps: float, step: float) -> Attack:
    from adv_lib.attacks import pgd_linf

    options = {"steps": STEPS, "random_init": True, "restarts": 1, "absolute_step_size": step}
    return lambda x, y: pgd_linf(net, x, y, eps, **options)


def stand_ins() -> None:
    """Let adv-lib be imported without what it needs for other attacks and for plots."""
    for package in ("torchvision", "visdom"):
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            for name in (package, f"{package}.models", f"{package}.transforms"):
                sys.modules.setdefault(name, _Anything(name))


class _Anything(types.ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def measure(
    name: str,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    rounds: int,
    peers: dict[str, Make],
) -> list[dict[str, Any]]:
    """Return one row a method, state of the parameters, and round."""
    steps = {method: best_step(make, net, x, y, eps) for method, make in peers.items()}
    methods: dict[str, Make] = {"robustlearn": ours, **peers}
    ready = {method: make(net, eps, steps.get(method, 0.0)) for method, make in methods.items()}
    bare = floor(net, eps, 0.0)
    rows = []
    for turn in range(-1, rounds):  # the first round warms up
        for method, attack in ready.items():
            for frozen in (False, True):
                net.requires_grad_(False)
                _, base = timed(bare, x, y)
                net.requires_grad_(not frozen)
                torch.manual_seed(turn + 1)
                x_adv, seconds = timed(attack, x, y)
                rows.append(
                    {
                        "network": name,
                        "batch": len(x),
                        "eps": eps,
                        "method": method,
                        "parameters": "frozen" if frozen else "learning",
                        "round": turn,
                        "step_size": steps.get(method),
                        "seconds": seconds,
                        "floor_seconds": base,
                        "ratio": seconds / base,
                        "robust_accuracy": robust(net, x, x_adv, y, eps),
                    }
                )
    net.requires_grad_(True)
    return [row for row in rows if row["round"] >= 0]


def best_step(make: Make, net: nn.Module, x: Tensor, y: Tensor, eps: float) -> float:
    """Return the step size of three with which the peer leaves the least accuracy."""
    tried = []
    for step in (2.5 * eps / STEPS, eps / 10, eps / 4):
        torch.manual_seed(0)
        tried.append((robust(net, x, make(net, eps, step)(x, y), y, eps), step))
    return min(tried)[1]


def robust(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> float:
    """Share of samples that are right at x_adv; a point outside the threat does not count."""
    allowed = ((x_adv - x).abs().amax((1, 2, 3)) <= eps * (1 + 1e-5)) & (x_adv.amin((1, 2, 3)) >= 0)
    with torch.no_grad():
        right = net(torch.where(allowed[:, None, None, None], x_adv, x)).argmax(1) == y
    return float(right.float().mean())


def timed(attack: Attack, x: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """Return the points and the wall-clock seconds."""
    start = time.perf_counter()
    x_adv = attack(x, y)
    return x_adv.detach(), time.perf_counter() - start


def show(rows: list[dict[str, Any]]) -> None:
    """Print medians."""
    table = Table(title=f"PGD, {STEPS} steps: time over the floor (median), and robust accuracy")
    for column in ("network", "batch", "method", "ratio, learning", "ratio, frozen", "robust"):
        table.add_column(column, justify="left" if column in ("network", "method") else "right")
    groups = dict.fromkeys((r["network"], r["batch"], r["method"]) for r in rows)
    for network, batch, method in groups:
        key = (network, batch, method)
        mine = [r for r in rows if (r["network"], r["batch"], r["method"]) == key]
        medians = [
            f"{statistics.median(r['ratio'] for r in mine if r['parameters'] == state):.3f}"
            for state in ("learning", "frozen")
        ]
        accuracy = statistics.mean(r["robust_accuracy"] for r in mine)
        table.add_row(network, str(batch), method, *medians, f"{accuracy:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
