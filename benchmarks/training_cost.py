"""What a step of robust training costs, and how that grows.

Tables: 1 a step of `robustlearn.train.fit` beside a bare step with the same forward and backward
passes, and beside one whose adversary calls ``.backward()``, which computes gradients of the
weights that nobody asked for; steps alternate, on copies of one network, so that all see the same
machine. 2 the same with bfloat16 and channels last beside a float32 ``.backward()`` loop.
3 CPU seconds against width, samples, steps of the adversary, and processes.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import recording
import torch
from evaluation import draw
from loop_overhead import interleaved, network
from torch import Tensor, nn
from torch.nn import functional

import robustlearn as rl
from robustlearn.train import fit

Row = dict[str, Any]
BATCH, EPS, LR = 64, 0.1, 1e-3
THREAT = rl.LpBall(math.inf, EPS, lower=0, upper=1)


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=len(TABLES), threads=1)
    recording.save(recording.measured(TABLES, given), given)


class Residual(nn.Module):
    """x ↦ relu(x + two convolutions with batch norm)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return activations of the same shape."""
        return (x + self.body(x)).relu()


def residual_network(width: int = 32) -> nn.Module:
    """Return a network with batch norm for images (3, 32, 32); 122,218 parameters at width 32."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Residual(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        Residual(2 * width),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * width, 10),
    )


class Bare:
    """PGD training without a library: batch, ascent, step.

    Parameters
    ----------
    steps : of the ascent; ``naive`` takes its gradients by ``.backward()``, with those of the
        weights, as a first version does.
    """

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor, steps: int, *, naive: bool) -> None:
        self.net, self.x, self.y, self.steps, self.naive = net, x, y, steps, naive
        self.optimizer = torch.optim.AdamW(net.parameters(), LR, weight_decay=0.0)

    def step(self) -> None:
        """Follow the gradient once."""
        index = torch.randint(len(self.x), (BATCH,))
        x, y = self.x[index], self.y[index]
        point = (x + torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
        for _ in range(self.steps):
            moved = point + 2.5 * EPS / self.steps * self.slope(point, y).sign()
            point = moved.clamp(x - EPS, x + EPS).clamp(0, 1)
        self.optimizer.zero_grad()
        functional.cross_entropy(self.net(point), y).backward()
        self.optimizer.step()

    def slope(self, point: Tensor, y: Tensor) -> Tensor:
        """Return the gradient by the point."""
        leaf = point.detach().requires_grad_()
        loss = functional.cross_entropy(self.net(leaf), y, reduction="sum")
        if not self.naive:
            return torch.autograd.grad(loss, leaf)[0]
        loss.backward()
        return leaf.grad


# Overhead


def networks() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Return networks and the shapes of their images."""
    return {
        "two convolutions": (network, (1, 28, 28)),
        "batch norm": (residual_network, (3, 32, 32)),
    }


def noise(samples: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return samples without a pattern: here only time counts."""
    return torch.rand(samples, *shape), torch.randint(10, (samples,))


def overhead(full: bool, seed: int) -> Iterator[Row]:
    """Compare a step of fit in float32 with bare ones."""
    cells = [("two convolutions", 1), ("two convolutions", 10), ("batch norm", 1)]
    for name, steps in cells if full else cells[:1]:
        for naive in (False, True):
            yield compared(name, steps, seed, full, naive=naive)


def faster(full: bool, seed: int) -> Iterator[Row]:
    """Compare bfloat16 and channels last with a float32 loop that calls ``.backward()``."""
    cells = [(name, 1) for name in reversed(networks())]
    for name, steps in cells if full else cells[1:]:
        for precision, last in (("bf16", False), ("float32", True), ("bf16", True)):
            yield compared(name, steps, seed, full, naive=True, precision=precision, last=last)


def compared(
    name: str,
    steps: int,
    seed: int,
    full: bool,
    *,
    naive: bool,
    precision: str = "float32",
    last: bool = False,
) -> Row:
    """Return the row of a training whose steps alternate with bare ones."""
    torch.manual_seed(seed)
    build, shape = networks()[name]
    count = (100 if full else 15) * BATCH
    x, y = noise(count, shape)
    bare = Bare(build().train(), x, y, steps, naive=naive)
    net = build()
    order = torch.channels_last if last else torch.contiguous_format
    times = interleaved(
        lambda between: fit(
            net.to(memory_format=order),
            (x.contiguous(memory_format=order), y),
            THREAT,
            objective=f"pgd_at:steps={steps}",
            precision=precision,
            validation=None,
            epochs=1,
            batch_size=BATCH,
            ramp=0.0,
            lr=LR,
            seed=seed,
            progress=between,
        ),
        bare.step,
    )
    ours, floor = (statistics.median(times[kind][5:]) for kind in ("loop", "bare"))
    return {
        "network": name,
        "steps": steps,
        "beside": ".backward() in the ascent" if naive else "bare passes",
        "precision": precision,
        "channels_last": last,
        "seed": seed,
        "fit_ms": 1e3 * ours,
        "bare_ms": 1e3 * floor,
        "ratio": ours / floor,
        "cpu_seconds": sum(map(sum, times.values())),
    }


def show_overhead(rows: list[Row]) -> None:
    """Print the rows."""
    names = (
        "network",
        "steps",
        "beside",
        "precision",
        "channels_last",
        "fit_ms",
        "bare_ms",
        "ratio",
    )
    title = f"{rows[0]['table']}. CPU time of a step of fit beside a bare one"
    draw(title, names, [tuple(row[name] for name in names) for row in rows])


# Growth


def growth(full: bool, seed: int) -> Iterator[Row]:
    """Train at several sizes, one thing grown at a time, and in one and two processes."""
    base = {"width": 16, "samples": 256, "steps": 2}
    grown = {"width": (16, 32, 64), "samples": (256, 512, 1024), "steps": (2, 4, 8)}
    if not full:
        base, grown = {"width": 4, "samples": 64, "steps": 1}, {"samples": (64, 128)}
    fit(nn.Linear(2, 10), noise(8, (2,)), THREAT, epochs=1, validation=None)  # imports
    for key, values in grown.items():
        for value in values:
            sizes = base | {key: value}
            for number in range(3 if full else 1):
                spent = spend(**sizes, seed=seed + number)
                yield {"grown": key, "value": value, **sizes, "cpu_seconds": spent, "processes": 1}
    for processes in (1, 2) if full else ():
        yield from in_processes(processes, base)


def spend(width: int, samples: int, steps: int, seed: int) -> float:
    """Return the CPU seconds of an epoch."""
    torch.manual_seed(seed)
    data, net = noise(samples, (3, 32, 32)), residual_network(width)
    start = time.process_time()
    given = {"validation": None, "epochs": 1, "batch_size": BATCH, "ramp": 0.0, "seed": seed}
    fit(net, data, THREAT, objective=f"pgd_at:steps={steps}", **given)
    return time.process_time() - start


def in_processes(processes: int, sizes: Row) -> Iterator[Row]:
    """Train under torchrun, and yield the mean CPU seconds of a process and the wall's."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, "--nproc-per-node", str(processes), __file__]
    run = subprocess.run(
        command,
        env={**os.environ, WORKER: json.dumps(sizes)},
        check=True,
        capture_output=True,
        text=True,
    )
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    for number in range(max(row["run"] for row in found) + 1):
        mine = [row for row in found if row["run"] == number]
        yield {
            "grown": "processes",
            "value": processes,
            **sizes,
            "cpu_seconds": statistics.mean(row["cpu_seconds"] for row in mine),
            "wall_seconds": max(row["wall_seconds"] for row in mine),
            "processes": processes,
        }


WORKER = "ROBUSTLEARN_TRAINING_COST"  # the sizes of a worker's training


def work() -> None:
    """Be one of several processes: the first run imports, three count."""
    torch.set_num_threads(1)
    sizes = json.loads(os.environ[WORKER])
    for number in range(-1, 3):
        begun = time.perf_counter()
        spent = spend(**sizes, seed=max(number, 0))
        told = {"run": number, "cpu_seconds": spent, "wall_seconds": time.perf_counter() - begun}
        if number >= 0:
            sys.stdout.write(json.dumps(told) + "\n")
            sys.stdout.flush()


def show_growth(rows: list[Row]) -> None:
    """Print medians and exponents."""
    lines = []
    for key in dict.fromkeys(row["grown"] for row in rows):
        part = [row for row in rows if row["grown"] == key]
        values = sorted({row["value"] for row in part})
        times = [
            statistics.median(row["cpu_seconds"] for row in part if row["value"] == value)
            for value in values
        ]
        power = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        told = [f"{value}: {seconds:.2f}" for value, seconds in zip(values, times, strict=True)]
        lines.append((key, power, ", ".join(told)))
    draw("3. CPU seconds of a process ~ size^exponent", ("in", "exponent", "seconds"), lines)


TABLES: recording.Tables = {
    1: (overhead, show_overhead),
    2: (faster, show_overhead),
    3: (growth, show_growth),
}


if __name__ == "__main__":
    work() if WORKER in os.environ else main()
