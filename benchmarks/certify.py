"""Certificates of networks: methods on random networks, published instances, brackets, training.

Tables 2 to 5 need the third-party data that ROBUSTLEARN_DATA points to; without it they are left
out. Times are of one thread, processor seconds beside those of the clock.
"""

import importlib.util
import json
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import robustlearn as rl
from robustlearn.certify.bounds import Deadline
from robustlearn.certify.complete import Property, decide
from robustlearn.certify.relax import Region
from robustlearn.models import onnx
from robustlearn.models.trace import trace
from robustlearn.train import fit, interval_init_

FOLDER = Path(os.environ.get("ROBUSTLEARN_DATA", Path(__file__).parents[2] / "shared" / "data"))
BOX = {"lower": 0.0, "upper": 1.0}
BRACKETS = {  # at the ε that each was trained or published for
    "wong2018_mnist_eps0.1": 0.1,
    "sdp_mnist_cnn_a_adv": 0.3,
    "sdp_cifar_cnn_a_adv": 2 / 255,
    "eran_mnist_6_100": 0.02,
}
SAMPLES, SECONDS = 200, 4  # of a bracket; seconds a sample in the mean: hard ones take more
TIMEOUT = 120  # of an instance
TRAINED = {0.1: 0.2, 0.3: 0.4}  # ε of certificates: of training, wider as Gowal et al. (2018) do
EPOCHS, RATE = 22, 4e-3  # with width chosen at 0.1 on 500 training images, in runs of 8 epochs
Rows = Iterator[dict[str, Any]]


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> dict[str, float]:
    now = clocks()
    return {"seconds": now[0] - start[0], "cpu_seconds": now[1] - start[1]}


def methods(full: bool, seed: int) -> Rows:
    """Share certified and time of each method on a random network of 3 × 64 neurons."""
    torch.manual_seed(seed)
    widths = [nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)]
    net, x = nn.Sequential(*widths), torch.rand(64 if full else 8, 20)
    for p, eps in ((math.inf, 0.06), (2, 0.2), (1, 0.6)):
        for method in ("ibp", "crown", "alpha_crown", "complete"):
            start = clocks()
            found = rl.certify(net, x, rl.LpBall(p, eps, **BOX), method=method, seconds=5)
            counts = Counter(found.status.tolist())
            yield {"p": p, "eps": eps, "method": method, "n": len(x), **counts, **since(start)}


def zoo() -> Any:
    spec = importlib.util.spec_from_file_location("zoo", FOLDER / "models" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def images(name: str, n: int | None = None, part: str = "test") -> tuple[Tensor, Tensor]:
    with np.load(
        FOLDER / "images" / f"{'cifar10_test' if name == 'cifar10' else name}.npz"
    ) as file:
        if name == "cifar10":
            x, y = file["x"][:n].transpose(0, 3, 1, 2), file["y"][:n]
        else:
            x, y = file[f"x_{part}"][:n, None], file[f"y_{part}"][:n]
    return torch.as_tensor(x / np.float32(255)), torch.as_tensor(y.astype(np.int64))


def instances(full: bool, seed: int) -> Rows:
    """VNN-COMP 2021: an answer, how it came about, and whether it is the agreed one."""
    if not full or not FOLDER.is_dir():
        return
    listed = json.loads((FOLDER / "verification" / "vnncomp2021.json").read_text())
    known = {
        "mnist-net_256x2.onnx": (
            onnx.read(FOLDER / "verification" / "mnist-net_256x2.onnx"),
            images("mnist")[0].reshape(-1, 784, 1),
        ),
        "resnet_2b.onnx": (zoo().load("vnncomp21_resnet2b"), images("cifar10")[0]),
    }
    for row in listed:
        module, x = known[row["net"]]
        x = x[row["index"] : row["index"] + 1]
        region = Region(x.double(), rl.LpBall(math.inf, row["eps"], **BOX))
        rule, start = Property.of_class(row["label"], 10), clocks()
        with torch.no_grad():
            found = decide(
                trace(module, x), region, rule, dtype=x.dtype, deadline=Deadline.after(TIMEOUT)
            )
        answer = {"certified": "unsat", "falsified": "sat", "open": "unknown"}[found.status]
        agreed = {key: row[key] for key in ("net", "index", "eps", "verdict")}
        yield {**agreed, "answer": answer, "by": found.by, "boxes": found.boxes, **since(start)}


def brackets(full: bool, seed: int) -> Rows:
    """Both bounds on the accuracy of networks that others trained."""
    if not full or not FOLDER.is_dir():
        return
    for name, eps in BRACKETS.items():
        x, y = images(zoo().MODELS[name][0], SAMPLES)
        start = clocks()
        report = rl.evaluate(
            zoo().load(name), x, y, rl.LpBall(math.inf, eps, **BOX), attacks="quick",
            certify=f"auto:seconds={SECONDS}", seed=seed,
        )  # fmt: skip
        values = {key: getattr(report, key).value for key in ("clean", "attacked", "certified")}
        yield {"model": name, "eps": eps, "n": len(x), **values, **since(start)}


def training(eps: float, full: bool, seed: int) -> Rows:
    """Certified accuracy on all test images of a small network that was trained for it."""
    if not full or not FOLDER.is_dir():
        return
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(3136, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    x, y = images("mnist", part="train")
    wider, start = rl.LpBall(math.inf, TRAINED[eps], **BOX), clocks()
    fit(
        interval_init_(net), (x, y), wider, objective="ibp", epochs=EPOCHS, batch_size=128, lr=RATE,
        ramp=0.6, seed=seed, validation=None, attacks=None, memory=False, channels_last=True,
    )  # fmt: skip
    spent, threat = since(start), rl.LpBall(math.inf, eps, **BOX)
    test, labels = images("mnist")
    by_intervals = rl.certify(net, test, threat, y=labels, method="ibp").certified
    left = torch.from_numpy(~by_intervals)  # CROWN proves all that intervals do
    more = rl.certify(net, test[left], threat, y=labels[left], method="crown").certified.sum()
    proven = {
        "ibp": float(by_intervals.mean()),
        "crown": float((by_intervals.sum() + more) / len(test)),
    }
    with torch.no_grad():
        clean = float((net(test).argmax(1) == labels).float().mean())
    yield {"eps": eps, "trained_at": TRAINED[eps], "clean": clean, **proven, **spent}


def show(rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        cells = (row.get(key, "") for key in columns)
        table.add_row(*(f"{c:.4g}" if isinstance(c, float) else str(c) for c in cells))
    Console().print(table)


def main() -> None:
    """Measure and print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=5, threads=1)
    measured: recording.Tables = {
        1: (methods, show), 2: (instances, show), 3: (brackets, show),
        4: (partial(training, 0.1), show), 5: (partial(training, 0.3), show),
    }  # fmt: skip
    recording.save(recording.measured(measured, given), given)


if __name__ == "__main__":
    main()
