"""What must come out alike on every device: objectives, attacks, evaluations, validation, the loop.

Each piece of work returns tensors on the CPU. As a script it does all of it on the CPU and on the
stand-in for an accelerator, and saves both.
"""

import inspect
import math
import os
import sys
import traceback
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import nn

import robustlearn as rl
from robustlearn.attacks import ATTACKS, unsuitable
from robustlearn.evaluate import PRESETS
from robustlearn.train.inner import Craft
from robustlearn.train.objectives import OBJECTIVES, Criterion
from robustlearn.train.validation import validate

N, SIDE, CLASSES = 6, 4, 4
BOX = {"lower": 0.0, "upper": 1.0}
BALL = rl.LpBall(math.inf, 0.1, **BOX)
FEW = {"steps": 3, "queries": 24, "restarts": 2, "searches": 1, "targets": 2}


def samples(n=N):
    source = torch.Generator().manual_seed(1)
    x = torch.rand(n, 2, SIDE, SIDE, generator=source)
    return x, torch.randint(CLASSES, (n,), generator=source)


def network(outputs=CLASSES, *, linear=False):
    with torch.random.fork_rng([], device_type="cpu"):
        torch.manual_seed(0)
        if linear:
            return nn.Sequential(nn.Flatten(), nn.Linear(2 * SIDE**2, outputs))
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),  # batch norm would leave its gradient to rounding
            nn.BatchNorm2d(4),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(4 * (SIDE - 2) ** 2, outputs),
        )


def objective(name, criterion, device):
    """Loss, points and gradients of a step of training."""
    net = network(CLASSES if criterion.classifies else 1).to(device)
    x, y = (values.to(device) for values in samples())
    craft = Craft(keys=torch.arange(N, device=device))
    found = OBJECTIVES[name].function(net, x, y, BALL, craft=craft, criterion=criterion)
    found.loss.sum().backward()
    gradients = {f"gradient {k}": p.grad.cpu() for k, p in net.named_parameters()}
    return {"loss": found.loss.detach().cpu(), "points": found.points.detach().cpu(), **gradients}


def attack(name, p, device):
    """Points of an attack."""
    linear = ATTACKS[name].facts["needs"] == "affine"
    model = rl.wrap(network(linear=linear).to(device), task="classification")
    x, _ = samples()
    x = x.to(device)
    y = model(x).argmax(1)
    threat = rl.LpBall(p, {0: 5, 1: 1.0, 2: 0.5}.get(p, 0.1), **BOX)
    known = inspect.signature(ATTACKS[name].function).parameters
    options = {key: count for key, count in FEW.items() if key in known and key != "targets"}
    if "generator" in known:
        options["generator"] = torch.arange(N, device=device)
    return {"x_adv": ATTACKS[name].function(model, x, y, threat, **options).cpu()}


def shortened(step):
    """A step of a preset with few steps and queries."""
    counts = {key: FEW[key] for key in FEW if key in step.options}
    return replace(step, options={**step.options, **counts})


def evaluation(preset, task, device):
    """Rows of an evaluation that moves the network to the device, and its points."""
    net, (x, y) = network(CLASSES if task == "classification" else 1), samples(12)
    with torch.no_grad():
        output = net.eval()(x)
    y = output.argmax(1) if task == "classification" else output.squeeze(1) + 0.1
    model = rl.wrap(net, task=task)
    fit = [
        s for s in PRESETS[preset] if unsuitable(s.name, model, BALL, tuple(x.shape[1:])) is None
    ]
    given = {"attacks": [shortened(step) for step in fit], "certify": "none", "device": device}
    report = rl.evaluate(model, x, y, BALL, **given)
    rows = [list(asdict(sample).values()) for sample in report.samples]
    runs = [(run.name, run.broken, run.forwards, run.skipped) for run in report.attacks]
    told = str([rows, runs, report.verdict["text"]])
    return {"x_adv": torch.from_numpy(report.x_adv), "rows": told}


def validation(device):
    x, y = (values.to(device) for values in samples(12))
    found = validate(network().to(device), x, y, BALL)
    return {"figures": torch.tensor(list(asdict(found).values()))}


def training(options, device):
    """Weights after training, and the rows of its epochs; the loop finds the device itself."""
    net = network()
    given = {"epochs": 3, "batch_size": 8, "lr": 0.01, "attacks": None, "validation": 0.25}
    history = rl.fit(net, samples(24), BALL, **{**given, **options}).history
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    return {**history.weights["model"], "rows": str(rows)}


def works():
    """Return all pieces of work, by name: functions of the device."""
    found = {}
    for name in OBJECTIVES:
        found[f"objective {name}"] = partial(objective, name, Criterion())
    found["objective on errors"] = partial(objective, "pgd_at", Criterion("huber"))
    weights = Criterion(smoothing=0.1, weights=torch.arange(1.0, CLASSES + 1))
    found["objective with weights"] = partial(objective, "trades", weights)
    for name, entry in ATTACKS.items():
        if entry.facts["needs"] == "trees":  # which are on the CPU
            continue
        norms = entry.facts["norms"]
        for p in (0, 1, 2, math.inf) if norms != "any" else (2, math.inf):
            if norms == "any" or str(p) in norms.split(", "):
                found[f"attack {name} {p}"] = partial(attack, name, p)
    found["evaluate quick"] = partial(evaluation, "quick", "classification")
    found["evaluate standard"] = partial(evaluation, "standard", "classification")
    found["evaluate errors"] = partial(evaluation, "quick", "regression")
    found["validate"] = validation
    for name in OBJECTIVES:
        found[f"fit {name}"] = partial(
            training, {"objective": name, "epochs": 2, "validation": None}
        )
    found["fit with all"] = partial(
        training, {"awp": 0.01, "ema": 0.9, "clip": 1.0, "accumulate": 2}
    )
    found["fit channels last"] = partial(training, {"channels_last": True})
    found["fit rollback"] = partial(training, {"on_overfitting": "rollback"})
    return found


def done(device):
    """Do all; what fails is told in its place."""
    results = {}
    for name, work in works().items():
        try:
            results[name] = work(device)
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    from fake_device import DEVICE, NAME, fake_device  # before the first gradient

    found = {"cpu": done(torch.device("cpu"))}
    AcceleratorState._reset_state(True)
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    with fake_device():
        found["there"] = done(DEVICE)
    torch.save(found, Path(sys.argv[1]))
