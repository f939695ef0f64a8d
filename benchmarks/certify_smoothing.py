"""Randomised smoothing: votes and certified accuracy of staged looks and of a single one.

On networks trained by others where ROBUSTLEARN_DATA points to them, else on a small network that
is trained here; the noise is what each network was not trained for, so that accuracies are low.
"""

import importlib.util
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import nn

import robustlearn as rl
from robustlearn.certify.smoothing import LOOKS, smoothing
from robustlearn.models import Model, Smoothed

CASES = (("wong2018_mnist_eps0.1", "mnist", 0.25), ("sdp_mnist_cnn_a_adv", "mnist", 0.25))
ALPHA = 0.001
STAGES = {"single": LOOKS[-1:], "three": (100, 1_000, 10_000), "staged": LOOKS}


def models(full: bool) -> Iterator[tuple[str, Model, torch.Tensor, torch.Tensor, float]]:
    """Yield name, model, samples, labels and σ."""
    folder = os.environ.get("ROBUSTLEARN_DATA")
    if not full or folder is None:
        yield ("digits", *_digits(), 0.25)
        return
    spec = importlib.util.spec_from_file_location("zoo", Path(folder) / "models" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    for name, images, sigma in CASES:
        with np.load(Path(folder) / "images" / f"{images}.npz") as file:
            x, y = file["x_test"][:10_000:800, None], file["y_test"][:10_000:800]
        points = torch.as_tensor(x / np.float32(255))
        yield name, rl.wrap(zoo.load(name)), points, torch.as_tensor(y.astype(np.int64)), sigma


def _digits() -> tuple[Model, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    points, labels = torch.as_tensor(x / 16, dtype=torch.float32), torch.as_tensor(y)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(150):
        noisy = points + 0.25 * torch.randn_like(points)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(noisy), labels).backward()
        optimizer.step()
    return rl.wrap(net), points[:8], labels[:8]


def measure(full: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Certify at radii that are fixed, by each of the schedules."""
    for name, model, x, y, sigma in models(full):
        smoothed = Smoothed(model, sigma)
        for share in (0.5, 1.0, 2.0):
            threat = rl.LpBall(2, share * sigma)
            for schedule, looks in STAGES.items():
                before, start = model.forwards, time.process_time()
                found = smoothing(smoothed, x, threat, y, looks=looks, alpha=ALPHA, seed=seed + 1)
                assert found.certified is not None
                yield {
                    "model": name,
                    "sigma": sigma,
                    "eps": share * sigma,
                    "samples": len(x),
                    "looks": schedule,
                    "certified": float(found.certified.mean()),
                    "votes": (model.forwards - before) / len(x),
                    "cpu_seconds": time.process_time() - start,
                }


def show(rows: list[dict[str, Any]]) -> None:
    """Print votes a sample beside those of a single look."""
    table = Table("model", "σ", "ε", "looks", "certified", "votes", "of single")
    single = {(r["model"], r["eps"]): r["votes"] for r in rows if r["looks"] == "single"}
    for r in rows:
        share = r["votes"] / single[r["model"], r["eps"]]
        cells = (r["sigma"], r["eps"], r["looks"], r["certified"], r["votes"])
        text = (f"{c:.4g}" if isinstance(c, float) else c for c in cells)
        table.add_row(r["model"], *text, f"{share:.2f}")
    Console(width=120).print(table)


def main() -> None:
    """Measure, print the table, write the rows."""
    given = recording.arguments(__doc__ or "", tables=1, threads=1)
    recording.save(recording.measured({1: (measure, show)}, given), given)


if __name__ == "__main__":
    main()
