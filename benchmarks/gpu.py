"""How many samples a second the accelerator trains on, attacks and evaluates, and in what memory.

The network is a residual one with batch norm, for images (3, 32, 32); training is PGD with two
steps. ``bare`` is a float32 loop that calls ``.backward()`` in the inner maximisation too, as
most libraries do, so that it computes gradients of the parameters there. Without an accelerator
everything runs on the CPU, the table says so, and seconds are those of the processor.
"""

import resource
import time
from collections.abc import Callable
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import robustlearn as rl
from robustlearn.attacks import ATTACKS

EPS, STEP, STEPS = 8 / 255, 0.5, 2
WARM = 3  # first calls, which are not measured
BALL = rl.LpBall(float("inf"), EPS, lower=0.0, upper=1.0)
TRAININGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "channels last": {"channels_last": True},
    "bf16": {"precision": "bf16"},
    "bf16, channels last": {"precision": "bf16", "channels_last": True},
    "bf16, channels last, pinned": {
        "precision": "bf16",
        "channels_last": True,
        "pin_memory": True,
    },
}


def main() -> None:
    """Measure for about a minute (--full) or for seconds, print a table, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0])
    torch.manual_seed(given.seed)
    bench = Bench(given.full)
    rows = [bench.row("train", "bare float32", bench.bare)]
    for name, options in TRAININGS.items():
        if "pin_memory" in options and bench.device.type == "cpu":
            continue
        rows.append(bench.row("train", name, lambda options=options: bench.fit(options)))
    rows.append(bench.row("attack", "pgd, 10 steps", bench.attack))
    rows.append(bench.row("evaluate", "quick", bench.evaluate))
    recording.save(rows, given)
    show(rows)


class Residual(nn.Module):
    """x + two convolutions of it, each with batch norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [
            part
            for _ in range(2)
            for part in (
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
            )
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return what has the shape of x, (n, width, height, width)."""
        return x + self.layers(x)


def network(width: int) -> nn.Module:
    """Return a network of three residual blocks for images (3, 32, 32)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1),
        Residual(width),
        nn.Conv2d(width, 2 * width, 3, 2, 1),
        Residual(2 * width),
        Residual(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 10),
    )


class Enough(Exception):
    """Ends a training that is measured."""


class Clock:
    """Counts samples from the call after the warm-up until the time is over."""

    def __init__(self, seconds: float, batch: int) -> None:
        self.limit, self.batch = seconds, batch
        self.calls, self.started, self.seconds = 0, 0.0, 0.0

    def __call__(self, _: object = None) -> None:
        """Count a batch; raise `Enough` when the time is over."""
        self.calls += 1
        if self.calls == WARM:
            wait()
            self.started = now()
        elif self.calls > WARM and now() - self.started > self.limit:
            wait()
            self.seconds = now() - self.started
            raise Enough

    @property
    def rate(self) -> float:
        """Samples a second."""
        return (self.calls - WARM) * self.batch / self.seconds


class Bench:
    """Network, data and device of all measurements."""

    def __init__(self, full: bool) -> None:
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        self.device = found or torch.device("cpu")
        self.seconds = 6.0 if full else 0.5
        self.width, self.batch = (64, 256) if found and full else (32, 64) if full else (8, 16)
        self.x = torch.rand(20 * self.batch, 3, 32, 32)
        self.y = torch.randint(10, (len(self.x),))

    def row(self, task: str, how: str, measure: Callable[[], tuple[int, float, float]]) -> Any:
        """Return samples, seconds, rate and peak memory of a measurement."""
        if self.device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats()
        samples, seconds, rate = measure()
        return {
            "task": task,
            "how": how,
            "device": str(self.device),
            "batch": self.batch,
            "samples": samples,
            "seconds": seconds,
            "samples_per_second": round(rate, 1),
            "peak_mb": round(self.peak() / 2**20, 1),
        }

    def peak(self) -> float:
        """Return the most bytes held: on the accelerator, or else by the process so far."""
        if self.device.type != "cpu":
            return float(torch.accelerator.max_memory_allocated())
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def fit(self, options: dict[str, Any]) -> tuple[int, float, float]:
        """Train by `robustlearn.fit`."""

        def train(clock: Clock) -> None:
            rl.fit(
                network(self.width),
                (self.x, self.y),
                BALL,
                objective=f"pgd_at:steps={STEPS}:step_size={STEP}",
                optimizer="sgd",
                lr=1e-3,
                schedule="constant",
                validation=None,
                ramp=0.0,
                memory=False,
                epochs=10**6,
                batch_size=self.batch,
                progress=clock,
                **options,
            )

        return self._timed(train)

    def bare(self) -> tuple[int, float, float]:
        """Train by a loop as it is written by hand."""
        net = network(self.width).to(self.device)
        optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, nesterov=True)

        def train(clock: Clock) -> None:
            while True:
                index = torch.randperm(len(self.x))[: self.batch]
                x, y = self.x[index].to(self.device), self.y[index].to(self.device)
                delta = torch.empty_like(x).uniform_(-EPS, EPS)
                net.eval()
                for _ in range(STEPS):
                    delta.requires_grad_()
                    F.cross_entropy(net(x + delta), y).backward()
                    stepped = delta.detach() + STEP * EPS * delta.grad.sign()
                    delta = (x + stepped.clamp(-EPS, EPS)).clamp(0, 1) - x
                net.train()
                optimizer.zero_grad()
                F.cross_entropy(net(x + delta), y).backward()
                optimizer.step()
                clock()

        return self._timed(train)

    def attack(self) -> tuple[int, float, float]:
        """Attack mini-batches."""
        model, x, y = self._wrapped()
        pgd = ATTACKS["pgd"].function

        def attack(clock: Clock) -> None:
            with model.session():
                while True:
                    pgd(model, x, y, BALL, steps=10, generator=0)
                    clock()

        return self._timed(attack)

    def evaluate(self) -> tuple[int, float, float]:
        """Attack as `evaluate` does, once; its certificates of networks are the CPU's work."""
        model, _, _ = self._wrapped()
        n = 2 * self.batch
        predicted = torch.cat(
            [model(part.to(self.device)).argmax(1).cpu() for part in self.x[:n].split(self.batch)]
        )
        start = now()
        given = {"attacks": "quick", "certify": "none", "batch_size": self.batch}
        rl.evaluate(model, self.x[:n], predicted, BALL, **given)
        wait()
        seconds = now() - start
        return n, seconds, n / seconds

    def _wrapped(self) -> tuple[Any, Tensor, Tensor]:
        net = network(self.width).to(self.device).eval()
        model = rl.wrap(net, task="classification")
        x = self.x[: self.batch].to(self.device)
        return model, x, model(x).argmax(1)

    def _timed(self, work: Callable[[Clock], None]) -> tuple[int, float, float]:
        clock = Clock(self.seconds, self.batch)
        try:
            work(clock)
        except Enough:
            pass
        return (clock.calls - WARM) * self.batch, clock.seconds, clock.rate


def now() -> float:
    """Return seconds: of the clock where there is an accelerator, else of the processor."""
    return time.perf_counter() if torch.accelerator.is_available() else time.process_time()


def wait() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows, and what training gains on the bare loop."""
    device = rows[0]["device"]
    there = "no accelerator was found: on the CPU" if device == "cpu" else f"on {device}"
    table = Table("task", "how", "samples/s", "time of bare", "peak, MB", title=there)
    bare = rows[0]["samples_per_second"]
    for row in rows:
        ratio = f"{bare / row['samples_per_second']:.2f}" if row["task"] == "train" else ""
        rate, peak = f"{row['samples_per_second']:.0f}", f"{row['peak_mb']:.0f}"
        table.add_row(row["task"], row["how"], rate, ratio, peak)
    Console().print(table)


if __name__ == "__main__":
    main()
