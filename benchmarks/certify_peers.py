"""Bounds of networks beside those of auto_LiRPA: how far apart, and what each costs.

Both bound the same margins, of the predicted class against each other class, of the same samples
in the same ℓ∞ box, in one process, with one thread. The methods are made the same:

- ``ibp``: intervals of the outputs;
- ``crown_ibp``: intervals before each ReLU, one backward pass from the margins;
- ``crown``: backward passes from each ReLU whose sign intervals leave open, and from the margins;
- ``alpha_crown``: as before, and as many steps of ascent in the slopes of the margins alone, each
  with the learning rate of its own defaults, Adam in both (auto_LiRPA is given the intervals of its
  own CROWN, which it otherwise bounds anew in each step);
- ``alpha_all``: the slopes of what is before the margins too: here those of each neuron for its own
  bounds, in half as many steps, there all of them together for the margins.

Lower slopes begin at 1 where u > −l, else at 0, which is ``adaptive`` there. robustlearn takes the
tighter of a backward pass and of intervals that start at the bounds known so far. Table 1 asks
auto_LiRPA for its like (``compare_crown_with_ibp``), and sample by sample but for the slopes: in a
batch it bounds neurons that are open in any sample of it in all of them. Table 2, of times, is of
the batch and without what that like costs, and gives it the faster of its two modes of
convolutions. The upper bounds of margins are left out in both. Times are processor seconds,
measured by turns; preparing a network, recording here and ``BoundedModule`` there, is a row of its
own. Without auto_LiRPA the rows of robustlearn alone remain.

``tighter`` and ``looser`` are the largest amounts by which a bound of robustlearn lies above and
below that of auto_LiRPA, in units of the outputs; ``gain`` is that of the mean bound, in shares of
the mean's size. Both tables are in either dtype; the last lines of table 2 compare the defaults,
float64 here and float32 there.
"""

import contextlib
import copy
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import robustlearn as rl
from robustlearn import data
from robustlearn.certify.bounds import crown_bounds, interval_bounds, margin_rows, row_bounds
from robustlearn.certify.relax import Region
from robustlearn.models.graph import Network
from robustlearn.models.trace import trace

PEER = "auto_LiRPA"
METHODS = {
    "ibp": "IBP",
    "crown_ibp": "CROWN-IBP",
    "crown": "CROWN",
    "alpha_crown": "alpha-CROWN",
    "alpha_all": "alpha-CROWN",
}
STEPS = 20  # of ascent, in both
TRAINING, EPOCHS = 1500, 5
DTYPES = (torch.float32, torch.float64)
TOOLS = ("robustlearn", PEER)
DEFAULTS = {"robustlearn": "float64", PEER: "float32"}
TURNS, REPEATS = 3, {"ibp": 10, "crown_ibp": 3}  # of the full form; in a turn, where it is short
Rows = Iterator[dict[str, Any]]


class Residual(nn.Module):
    """Two convolutions with batch norms beside a shortcut, then means and a linear layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1)
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.head = nn.Linear(width * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 8, 8) ↦ (n, 10)."""
        x = torch.relu(self.norms[0](self.stem(x)))
        y = torch.relu(self.norms[1](self.first(x)))
        y = torch.relu(self.norms[2](self.second(y)) + x)
        return self.head(functional.avg_pool2d(y, 2).flatten(1))


def perceptron(depth: int, width: int) -> nn.Module:
    """Return so many hidden layers of a width, on images of 8 × 8."""
    layers: list[nn.Module] = [nn.Flatten()]
    for before in (64, *[width] * (depth - 1)):
        layers += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convolutional() -> nn.Module:
    """Two convolutions and two linear layers, on images of 28 × 28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 4, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 4, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10)),
    )


@dataclass(frozen=True)
class Kind:
    """How a network is made, the size of its images, ε, how many; and whether it is a small one."""

    make: Callable[[], nn.Module]
    size: int
    eps: float
    n: int
    small: bool = False


NETWORKS = {
    "mlp 3 × 100": Kind(lambda: perceptron(3, 100), 8, 0.05, 16, small=True),
    "mlp 6 × 200": Kind(lambda: perceptron(6, 200), 8, 0.01, 8),
    "cnn": Kind(convolutional, 28, 0.02, 4),
    "residual": Kind(lambda: Residual(4), 8, 0.04, 16, small=True),
}


def trained(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """Return a network trained on digits in the ordinary way, and the digits it has not seen."""
    size = NETWORKS[name].size
    digits = data.load("digits")
    images = torch.as_tensor(digits.x).float()
    images = functional.interpolate(images, (size, size), mode="bilinear")
    x, y = images[:TRAINING], torch.as_tensor(digits.y[:TRAINING])
    torch.manual_seed(seed)
    net = NETWORKS[name].make()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(EPOCHS):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False), images[TRAINING:]


@dataclass(frozen=True)
class Task:
    """A network of a dtype, points, their budget and the rows of their margins (n, 9, 10)."""

    name: str
    net: nn.Module
    x: Tensor
    eps: float
    margins: Tensor

    @property
    def facts(self) -> dict[str, Any]:
        """What every row of it says."""
        dtype = str(self.x.dtype).removeprefix("torch.")
        return {"network": self.name, "eps": self.eps, "n": len(self.x), "dtype": dtype}


def tasks(full: bool, seed: int) -> Iterator[Task]:
    for name, kind in NETWORKS.items():
        if not (full or kind.small):
            continue
        net, x = trained(name, seed)
        for dtype in DTYPES:
            of, points = copy.deepcopy(net).to(dtype), x[: kind.n if full else 3].to(dtype)
            margins = margin_rows(of(points).argmax(1), 10).to(dtype)
            yield Task(name, of, points, kind.eps, margins)


def apart(task: Task) -> list[Task]:
    """Return a task for each sample."""
    split = zip(task.x.split(1), task.margins.split(1), strict=True)
    return [replace(task, x=x, margins=margins) for x, margins in split]


def methods(task: Task) -> list[str]:
    """Return the methods; where it takes long, not the last."""
    return list(METHODS)[: None if NETWORKS[task.name].small else -1]


# The two tools: what is made ready, and from that the bounds by a method.


def recorded(task: Task) -> Network:
    return trace(task.net, task.x, task.x.dtype)


def ours(task: Task, network: Network, method: str) -> Tensor:
    region = Region(task.x, rl.LpBall(math.inf, task.eps, lower=0.0, upper=1.0))
    with torch.no_grad():
        if "ibp" in method:
            spans = interval_bounds(network, region)
        else:
            steps = STEPS // 2 if method == "alpha_all" else 0
            spans = crown_bounds(network, region, steps=steps)
        if method == "ibp":
            return spans[network.output][0].flatten(1)
        n, rivals, _ = task.margins.shape
        owner = torch.arange(n).repeat_interleave(rivals)
        rows = task.margins.flatten(0, 1)[:, None]
        steps = STEPS if method.startswith("alpha") else 0
        least = row_bounds(network, region, network.output, rows, owner, spans, steps=steps)
        return least.reshape(n, rivals)


def wrapped(task: Task, convolutions: str = "patches", *, intersected: bool = False) -> Any:
    import auto_LiRPA

    options = {
        "conv_mode": convolutions,
        "compare_crown_with_ibp": intersected,
        "optimize_bound_args": {"iteration": STEPS},
    }
    with _default(task.x.dtype):
        return auto_LiRPA.BoundedModule(task.net, task.x[:1], bound_opts=options)


def theirs(task: Task, module: Any, method: str) -> Tensor:
    from auto_LiRPA import BoundedTensor, PerturbationLpNorm

    low, high = ((task.x + side).clamp(0, 1) for side in (-task.eps, task.eps))
    points = BoundedTensor(task.x, PerturbationLpNorm(norm=math.inf, x_L=low, x_U=high))
    outputs, slopes = method == "ibp", method.startswith("alpha")
    margins = None if outputs else task.margins
    fixed = None
    with _default(task.x.dtype):
        if method == "alpha_crown":
            with torch.no_grad():
                module.compute_bounds(x=(points,), method="CROWN", C=margins, bound_upper=False)
            entering = [node.inputs[0] for node in module.relus]
            fixed = {node.name: (node.lower, node.upper) for node in entering}
        with torch.set_grad_enabled(slopes):
            return module.compute_bounds(
                x=(points,), method=METHODS[method], C=margins, bound_upper=outputs,
                interm_bounds=fixed,
            )[0].detach()  # fmt: skip


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    """Make a dtype that of new tensors, which auto_LiRPA keeps its best bounds in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def available() -> bool:
    """Tell whether auto_LiRPA can be imported, and say so if it cannot."""
    found = importlib.util.find_spec(PEER) is not None
    if not found:
        Console().print(f"{PEER} cannot be imported: its rows and the comparison are left out")
    return found


# Tables


def bounds(full: bool, seed: int) -> Rows:
    """Bounds by each method, and how far apart."""
    beside = available()
    for task in tasks(full, seed):
        network = recorded(task)
        module = wrapped(task, intersected=True) if beside else None
        for method in methods(task):
            mine = ours(task, network, method)
            row = {**task.facts, "method": method, "ours": float(mine.mean())}
            if beside:
                alone = [task] if method.startswith("alpha") else apart(task)
                other = torch.cat([theirs(part, module, method) for part in alone])
                mean = float(other.mean())
                row |= {
                    "theirs": mean, "gain": (row["ours"] - mean) / abs(mean),
                    "tighter": float((mine - other).max()), "looser": float((other - mine).max()),
                }  # fmt: skip
            yield row


def times(full: bool, seed: int) -> Rows:
    """Processor seconds of each method, and of what goes before, by turns."""
    beside = available()
    for task in tasks(full, seed):
        network = recorded(task)
        ready = {"robustlearn": partial(recorded, task)}
        bound = {"robustlearn": partial(ours, task, network)}
        if beside:
            module, mode = fastest(task)
            ready[PEER], bound[PEER] = partial(wrapped, task, mode), partial(theirs, task, module)
        for turn in range(TURNS if full else 1):
            for method in ("ready", *methods(task)):
                for tool in bound:
                    work = ready[tool] if method == "ready" else partial(bound[tool], method)
                    spent = seconds(work, REPEATS.get(method, 1))
                    yield {
                        **task.facts, "method": method, "tool": tool, "turn": turn,
                        "cpu_seconds": spent,
                    }  # fmt: skip


def fastest(task: Task) -> tuple[Any, str]:
    """Return auto_LiRPA's module in the mode of convolutions in which CROWN takes it less time."""
    found = []
    for mode in ("patches", "matrix"):
        module = wrapped(task, mode)
        theirs(task, module, "crown")  # warms up
        found.append((seconds(partial(theirs, task, module, "crown"), 2), mode, module))
    _, mode, module = min(found, key=lambda one: one[0])
    return module, mode


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Processor seconds of one call."""
    start = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - start) / repeats


def show_bounds(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    columns = [name for name in rows[0] if name not in ("table", "eps")]
    table = Table(*columns, title="Lower bounds: means, and by how much ours are above and below")
    for row in rows:
        cells = (row[name] for name in columns)
        table.add_row(*(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=110).print(table)


def show_times(rows: list[dict[str, Any]]) -> None:
    """Print medians, and the median over turns of the ratio of the two."""
    table = Table(title="Milliseconds of the processor a call, median; ours / theirs")
    for column in ("network", "method", "dtype", *TOOLS, "ratio"):
        table.add_column(column)
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("network", "method", "dtype", "tool"))
        found.setdefault(key, []).append(row["cpu_seconds"])
    pairs = [("float32", "float32"), ("float64", "float64"), tuple(DEFAULTS.values())]
    for network, method in dict.fromkeys(key[:2] for key in found):
        for pair in pairs:
            spent = [
                found.get((network, method, dtype, tool), [])
                for dtype, tool in zip(pair, TOOLS, strict=True)
            ]
            cells = [f"{1e3 * statistics.median(part):.3g}" if part else "" for part in spent]
            ratios = [a / b for a, b in zip(*spent, strict=False)]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
            kind = pair[0] if pair[0] == pair[1] else "defaults"
            table.add_row(network, method, kind, *cells, ratio)
    Console(width=110).print(table)


TABLES: recording.Tables = {1: (bounds, show_bounds), 2: (times, show_times)}


def main() -> None:
    """Measure and print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=len(TABLES), threads=1)
    recording.save(recording.measured(TABLES, given), given)


if __name__ == "__main__":
    main()
