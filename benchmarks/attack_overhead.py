"""What a 40-step PGD costs above its bare forward and backward passes, beside other libraries.

Ratio = time of the attack / time of the floor in the same round, where the floor is a plain loop
of 40 forward and backward passes of the same network on the same batch (gradients by the input
alone, parameters frozen) and one more forward pass. Rounds are interleaved. No sample is dropped.

Every library runs on the same samples, ε and number of steps, once with the network as a user
has it (parameters learning) and once with parameters frozen by hand; robust accuracy is measured
here, by the network itself. A peer gets the best of three step sizes for its accuracy; robustlearn
runs with its defaults.
"""

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
from robustlearn.cli.demo import DigitsNet, trained

STEPS = 40
Attack = Callable[[nn.Module, Tensor, Tensor, float, float], Tensor]


def main() -> None:
    """Measure, print a table, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0])
    rounds, batches = (7, (64, 512)) if given.full else (2, (64,))
    peers = available_peers()
    rows: list[dict[str, Any]] = []
    for name, net, x, y, eps in networks(given.seed, full=given.full):
        for batch in batches:
            rows += measure(name, net, x[:batch], y[:batch], eps, rounds, peers)
    recording.save(rows, given)
    show(rows)


def networks(seed: int, *, full: bool) -> list[tuple[str, nn.Module, Tensor, Tensor, float]]:
    """Return the digits network of the demo, and a third-party MNIST network where it is at hand."""
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


def ours(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
    """robustlearn with its defaults."""
    threat = rl.LpBall(math.inf, eps, lower=0.0, upper=1.0)
    return pgd(net, x, y, threat, steps=STEPS, stop_when_broken=False)


def floor(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
    """The bare passes: nothing is done with the gradients."""
    point = x.clone().requires_grad_()
    for _ in range(STEPS):
        loss = nn.functional.cross_entropy(net(point), y, reduction="sum")
        torch.autograd.grad(loss, point)
    with torch.no_grad():
        net(point)
    return x


def available_peers() -> dict[str, Attack]:
    """Return the other libraries that are installed (`make bench` installs all)."""
    found: dict[str, Attack] = {}
    for name, make in (
        ("torchattacks", _torchattacks),
        ("foolbox", _foolbox),
        ("ART", _art),
        ("adv-lib", _adv_lib),
    ):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found[name] = make()
        except ImportError as error:
            Console(stderr=True).print(f"{name} is not measured: {error}")
    return found


def _torchattacks() -> Attack:
    import torchattacks

    def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
        return torchattacks.PGD(net, eps=eps, alpha=step, steps=STEPS, random_start=True)(x, y)

    return attack


def _foolbox() -> Attack:
    import foolbox

    def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
        model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        run = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=True).run
        return run(model, x, foolbox.criteria.Misclassification(y), epsilon=eps)

    return attack


def _art() -> Attack:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
        model = PyTorchClassifier(
            net, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0, 1), device_type="cpu"
        )
        run = ProjectedGradientDescentPyTorch(
            model,
            eps=eps,
            eps_step=step,
            max_iter=STEPS,
            num_random_init=1,
            batch_size=len(x),
            verbose=False,
        )
        return torch.as_tensor(run.generate(x.numpy(), y.numpy()))

    return attack


def _adv_lib() -> Attack:
    if importlib.util.find_spec("torchvision") is None:
        for name in ("torchvision", "torchvision.models", "torchvision.transforms"):
            # imported for attacks on perceptual distance, which are not used here
            sys.modules.setdefault(name, _Anything(name))
    from adv_lib.attacks import pgd_linf

    def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float, step: float) -> Tensor:
        return pgd_linf(
            net, x, y, eps, steps=STEPS, random_init=True, restarts=1, absolute_step_size=step
        )

    return attack


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
    peers: dict[str, Attack],
) -> list[dict[str, Any]]:
    """Return one row a method, state of the parameters, and round."""
    methods: dict[str, Attack] = {"robustlearn": ours, **peers}
    steps = {method: best_step(attack, net, x, y, eps) for method, attack in peers.items()}
    rows = []
    for turn in range(-1, rounds):  # the first round warms up
        net.requires_grad_(False)
        _, base = timed(floor, net, x, y, eps, 0.0)
        for method, attack in methods.items():
            step, _ = steps.get(method, (0.0, 0.0))
            for frozen in (False, True):
                net.requires_grad_(not frozen)
                torch.manual_seed(turn + 1)
                x_adv, seconds = timed(attack, net, x, y, eps, step)
                rows.append(
                    {
                        "network": name,
                        "batch": len(x),
                        "eps": eps,
                        "method": method,
                        "parameters": "frozen" if frozen else "learning",
                        "round": turn,
                        "step_size": step,
                        "seconds": seconds,
                        "floor_seconds": base,
                        "ratio": seconds / base,
                        "robust_accuracy": robust(net, x, x_adv, y, eps),
                    }
                )
    net.requires_grad_(True)
    return [row for row in rows if row["round"] >= 0]


def best_step(
    attack: Attack, net: nn.Module, x: Tensor, y: Tensor, eps: float
) -> tuple[float, float]:
    """Return the step size of three with which the peer does best, and its robust accuracy."""
    tried = []
    for step in (2.5 * eps / STEPS, eps / 10, eps / 4):
        torch.manual_seed(0)
        tried.append((robust(net, x, attack(net, x, y, eps, step), y, eps), step))
    accuracy, step = min(tried)
    return step, accuracy


def robust(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> float:
    """Share of samples that are right at x_adv; a point outside the threat does not count."""
    allowed = ((x_adv - x).abs().amax((1, 2, 3)) <= eps * (1 + 1e-5)) & (x_adv.amin((1, 2, 3)) >= 0)
    with torch.no_grad():
        right = net(torch.where(allowed[:, None, None, None], x_adv, x)).argmax(1) == y
    return float(right.float().mean())


def timed(attack: Attack, *given: Any) -> tuple[Tensor, float]:
    """Return the points and the wall-clock seconds."""
    start = time.perf_counter()
    x_adv = attack(*given)
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
