"""Evaluations that one process and several must answer alike, run by tests that start them."""

import contextlib
import io
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

import robustlearn as rl
from robustlearn import data
from robustlearn.cli import run
from robustlearn.errors import InputError
from robustlearn.evaluate import ensemble
from robustlearn.evaluate.sharing import Shares

N = 150  # more than twice the size of an audit


def digits(n=N):
    held_out = data.load("digits", part="test")
    return held_out.x[:n], held_out.y[:n]


def network(width=16, outputs=10):
    """A network that is trained a little, in float64 so that batches do not matter."""
    with torch.random.fork_rng([], device_type="cpu"):
        torch.manual_seed(0)
        middle = [nn.Linear(64, width), nn.Tanh()] if width else []
        net = nn.Sequential(nn.Flatten(), *middle, nn.Linear(width or 64, outputs)).double()
    train = data.load("digits", part="train")
    x, y = torch.as_tensor(train.x).double(), torch.as_tensor(train.y)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        output = net(x)
        mean = (output[:, 0] - y / 10).square().mean()
        (mean if outputs == 1 else nn.functional.cross_entropy(output, y)).backward()
        optimizer.step()
    return net


class Flat(nn.Module):
    """A network without slope, so that searches by scores run in full."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x.detach()) + 0 * x.sum()


BALL = rl.LpBall(math.inf, 0.03, lower=0.0, upper=1.0)
SCOPES = "pgd:steps=10,fmn:steps=10,pgd:steps=5:restarts=4@near,square:queries=60@audit"
CASES = {
    "scopes": (network, N, BALL, {"attacks": SCOPES}),
    "masked": (Flat, 40, replace(BALL, eps=0.06), {"attacks": "quick"}),
    "nearest": (network, 31, rl.LpBall(2, 0.5), {"attacks": "fmn:steps=20", "nearest": True}),
    "certified": (lambda: network(0), N, BALL, {"attacks": "pgd:steps=5"}),
    "fewer samples than processes": (lambda: network(0), 1, BALL, {"attacks": "pgd:steps=5"}),
    "regression": (lambda: network(outputs=1), 30, BALL, {"attacks": "fgsm,pgd:steps=5"}),
}


def case(name, **more):
    make, n, threat, options = CASES[name]
    x, y = digits(n)
    if name == "regression":
        y = y / 10 + 0.01
    return rl.evaluate(make(), x, y, threat, seed=3, batch_size=32, **options, **more)


def told(report):
    """All of a report that does not differ from run to run."""
    runs = [{**asdict(run), "seconds": 0} for run in report.attacks]
    totals = [report.clean, report.attacked, report.certified]
    return {
        "samples": [asdict(sample) for sample in report.samples],
        "runs": runs,
        "totals": [None if total is None else total.value for total in totals],
        "x_adv": torch.from_numpy(report.x_adv),
        "verdict": report.verdict["text"],
        "notes": report.notes,
        "created": report.environment["created"],
    }


@contextlib.contextmanager
def shared_work():
    """Tell how many samples this process has certified."""
    numbers, prove = [], ensemble.prove

    def counted(model, x, *given, **options):
        numbers.append(len(x))
        return prove(model, x, *given, **options)

    ensemble.prove = counted
    yield numbers
    ensemble.prove = prove


def refused():
    """What every process hears where one of them refuses its samples."""

    def refuse(rows):
        if 0 not in rows:
            raise InputError("sample 1 is not mine")

    try:
        Shares().divided(4, refuse)
    except InputError as error:
        return str(error)


def build():
    """What the command line finds here."""
    return network(0)


def command(folder):
    place = ["--model", f"{__file__}:build", "--out", str(folder / "command"), "--json"]
    return ["evaluate", *place, "--data", "digits", "--eps", "0.05", "--limit", "60"]


def ranks(folder):
    """Evaluate as one process of many; one case from what is on disk, and the command."""
    found = {name: told(case(name)) for name in CASES}
    report = case("certified", resume=folder / "state")
    report.save(folder / "report")
    found["kept"] = told(report)
    found["resumed"] = told(case("certified", resume=folder / "state"))
    with shared_work() as numbers:
        case("certified")
    found["certified here"], found["refused"] = numbers, refused()
    hurried = {"attacks": "fgsm", "certify": "complete:seconds=0.002"}
    found["by the clock"] = told(rl.evaluate(network(), *digits(31), BALL, **hurried))
    for _ in range(2):  # the second run clears what the first one kept
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run(command(folder)) == 0
    found["printed"] = printed.getvalue()
    torch.save(found, folder / f"rank{os.environ['RANK']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
