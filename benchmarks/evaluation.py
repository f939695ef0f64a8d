"""How low evaluations find robust accuracy, and what that costs, beside AutoAttack and other peers.

Every method gets the same samples, the same network and ε; forward passes and gradients are
counted outside of all libraries, by the samples that go through the network and back. A sample
counts as broken if the network itself misclassifies the method's point in a batch of its own and
the point is within ε (1e-6 of tolerance for peers, none for us) and the box.

Tables: 1 evaluations against AutoAttack's protocol as torchattacks runs it (100 iterations, 9
targets, 5,000 queries), 2 verified instances of VNN-COMP 2021, 3 single attacks beside their
peers at equal gradients, 4 gradients in bfloat16, 5 growth, 6 attacks that see labels only, by
the distance they reach. Networks by others are used where
their folder is; without it a network of digits shows that the benchmark runs.
"""

import importlib.util
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import recording
import torch
from attack_overhead import stand_ins
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import robustlearn as rl
from robustlearn import data
from robustlearn.attacks import ATTACKS
from robustlearn.cli.demo import trained

Row = dict[str, Any]
Method = Callable[[nn.Module, Tensor, Tensor, rl.LpBall], Tensor]
BESIDE = Path(__file__).parents[2] / "shared" / "data"
FOLDER = Path(os.environ.get("ROBUSTLEARN_DATA", BESIDE))
CELLS = (  # network, p, ε, samples
    ("rsl18a_mnist_mlp_eps0.1", math.inf, 0.1, 500),
    ("wong2018_mnist_eps0.1", math.inf, 0.1, 500),
    ("sdp_mnist_cnn_a_adv", math.inf, 0.3, 500),
    ("eran_mnist_6_100", math.inf, 0.03, 500),
    ("wong2018_fashion_eps0.1", math.inf, 0.1, 500),
    ("rsl18a_mnist_mlp_eps0.1", 2, 1.5, 500),
    ("wong2018_mnist_eps0.1", 2, 1.5, 500),
    ("sdp_cifar_cnn_a_adv", math.inf, 2 / 255, 500),
    ("sdp_cifar_cnn_a_adv", 2, 0.25, 500),
    ("vnncomp21_resnet2b", math.inf, 2 / 255, 500),
    ("sdp_cifar_cnn_a_adv", math.inf, 8 / 255, 500),
)
console = Console(width=120)


class Counted(nn.Module):
    """A network that counts the samples that go through it, and back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forwards = self.gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        self.forwards += len(x)
        out = self.net(x)
        if out.requires_grad:
            out.register_hook(self._count)
        return out

    def _count(self, slope: Tensor) -> None:
        self.gradients += len(slope)


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=len(TABLES), threads=1)
    rows = recording.measured(TABLES, given)
    if rows:
        recording.save(rows, given)


# Networks and samples


def zoo() -> Any:
    """Return the module that loads networks by others, or None."""
    place = FOLDER / "models" / "zoo.py"
    if not place.is_file():
        return None
    spec = importlib.util.spec_from_file_location("zoo", place)
    module: Any = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def images(name: str) -> tuple[Tensor, Tensor]:
    """Return a test set in [0, 1], (n, channels, height, width), and its labels."""
    if name == "cifar10":
        with np.load(FOLDER / "images" / "cifar10_test.npz") as file:
            x, y = file["x"].transpose(0, 3, 1, 2), file["y"]
    else:
        with np.load(FOLDER / "images" / f"{name}.npz") as file:
            x, y = file["x_test"][:, None], file["y_test"]
    pixels = torch.as_tensor(np.ascontiguousarray(x) / np.float32(255))
    return pixels, torch.as_tensor(y.astype(np.int64))


def cells(full: bool, seed: int) -> Iterator[tuple[str, nn.Module, Tensor, Tensor, rl.LpBall]]:
    """Yield networks, samples and threats; the network of digits where there are no others."""
    module = zoo()
    if not full or module is None:
        digits = data.load("digits")
        net = trained(digits.take(slice(0, 600)), seed, lambda *told: None).eval()
        part = digits.take(slice(1200, 1240))
        x, y = torch.as_tensor(part.x).float(), torch.as_tensor(part.y)
        yield "digits CNN", net, x, y, rl.LpBall(math.inf, 0.1, lower=0, upper=1)
        return
    chosen = os.environ.get("ROBUSTLEARN_NETWORKS", "").split(",")
    for name, p, eps, n in CELLS:
        if any(part in name for part in chosen):
            x, y = images(module.MODELS[name][0])
            rows = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:n]
            threat = rl.LpBall(p, eps, lower=0, upper=1)
            yield name, module.load(name), x[rows], y[rows], threat


# Measuring


def measured(
    name: str, method: Method, net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall, slack: float
) -> Row:
    """Run a method on the samples that are right, and count."""
    counted = Counted(net).eval()
    right = _right(net, x, y)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x_adv = method(counted, x[right], y[right], threat)
    seconds = time.process_time() - start
    wide = rl.LpBall(threat.p, float(threat.eps) + slack, lower=-slack, upper=1 + slack)
    inside = wide.contains(x[right], x_adv)
    broken = inside & ~_right(net, x_adv, y[right])
    distance = threat.norm(x_adv.double() - x[right].double())
    return {
        "method": name,
        "n": len(x),
        "clean": int(right.sum()),
        "robust": int(right.sum() - broken.sum()),
        "outside": int((~inside).sum()),
        "median_distance": float(distance[broken].median()) if broken.any() else math.nan,
        "forwards": counted.forwards / len(x),
        "gradients": counted.gradients / len(x),
        "cpu_seconds": seconds,
    }


def _right(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part).argmax(1) for part in x.split(100)]) == y


def preset(name: str) -> Method:
    """Return `robustlearn.evaluate` with a preset; its diagnosis is counted too."""

    def method(net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall) -> Tensor:
        report = rl.evaluate(net, x, y, threat, attacks=name, certify="none")
        return torch.as_tensor(report.x_adv)

    return method


def autoattack(net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall) -> Tensor:
    """AutoAttack's standard protocol, from torchattacks: on what stands, one after the other."""
    import torchattacks as ta

    norm, eps = ("Linf" if math.isinf(threat.p) else "L2"), float(threat.eps)
    common: Row = {"norm": norm, "eps": eps, "seed": 0, "n_restarts": 1}
    parts = [
        ta.APGD(net, steps=100, loss="ce", **common),
        ta.APGDT(net, steps=100, n_classes=10, **common),
        ta.FAB(net, steps=100, multi_targeted=True, n_classes=10, **common),
        ta.Square(net, n_queries=5000, p_init=0.8, loss="margin", **common),
    ]
    best = x.clone()
    for part in parts:
        for rows in torch.arange(len(x)).split(250):
            with torch.no_grad():
                left = rows[net(best[rows]).argmax(1) == y[rows]]
            if len(left):
                found = part(x[left], y[left]).detach()
                gone = ~_right(net, found, y[left])
                best[left[gone]] = found[gone]
    return best


def against_autoattack(full: bool, seed: int) -> Iterator[Row]:
    methods: list[tuple[str, Method, float]] = [
        (name, preset(name), 0.0) for name in ("quick", "standard")
    ]
    if _importable("torchattacks"):
        methods.append(("AutoAttack", autoattack, 1e-6))
    for name, net, x, y, threat in cells(full, seed):
        for label, method, slack in methods:
            row = measured(label, method, net, x, y, threat, slack)
            yield {"network": name, "threat": str(threat), "seed": seed, **row}


def show_against(rows: list[Row]) -> None:
    lines = []
    for row in rows:
        peer = [
            r
            for r in rows
            if (r["network"], r["threat"]) == (row["network"], row["threat"])
            and r["method"] == "AutoAttack"
        ]
        shares = [f"1/{peer[0][key] / max(row[key], 1e-9):.1f}" for key in COSTS if peer]
        lines.append(
            (
                row["network"],
                row["threat"],
                row["method"],
                f"{row['robust']}/{row['n']}",
                row["forwards"],
                row["gradients"],
                " ".join(shares),
                row["cpu_seconds"],
            )
        )
    names = ("network", "threat", "method", "robust", "forwards", "gradients", "of AA's", "CPU s")
    draw("1. Evaluations; costs a sample", names, lines)


# Verified instances


def verified(full: bool, seed: int) -> Iterator[Row]:
    place, module = FOLDER / "verification" / "vnncomp2021.json", zoo()
    if not place.is_file() or module is None:
        console.print("the verified instances are not here: no table 2")
        return
    instances = json.loads(place.read_text())
    networks: dict[str, tuple[nn.Module, str]] = {
        "resnet_2b.onnx": (module.load("vnncomp21_resnet2b"), "cifar10")
    }
    if _importable("onnx"):
        networks["mnist-net_256x2.onnx"] = (
            perceptron(place.parent / "mnist-net_256x2.onnx"),
            "mnist",
        )
    for name, (net, source) in networks.items():
        x, y = images(source)
        for eps in sorted({r["eps"] for r in instances if r["net"] == name}):
            mine = [r for r in instances if r["net"] == name and r["eps"] == eps]
            if not full:
                mine = mine[:3]
            rows = torch.tensor([r["index"] for r in mine])
            threat = rl.LpBall(math.inf, eps, lower=0, upper=1)
            report = rl.evaluate(net, x[rows], y[rows], threat, certify="none", seed=seed)
            broken = {s.index: s.broken_by is not None for s in report.samples}
            for verdict in ("sat", "unsat"):
                at = [i for i, r in enumerate(mine) if r["verdict"] == verdict]
                yield {
                    "network": name,
                    "threat": str(threat),
                    "verdict": verdict,
                    "n": len(at),
                    "broken": sum(broken[i] for i in at),
                }


def perceptron(path: Path) -> nn.Module:
    """Rebuild a chain of matrices, biases and ReLUs from an ONNX file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    weights = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    layers: list[nn.Module] = [nn.Flatten()]
    for node in graph.node:
        known = [weights[name] for name in node.input if name in weights]
        if node.op_type in ("Gemm", "MatMul"):
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            matrix = known[0] if turned or node.input[0] in weights else known[0].T
            layer = nn.Linear(matrix.shape[1], matrix.shape[0])
            layer.weight.data = matrix.contiguous()
            layer.bias.data = known[1] if len(known) > 1 else torch.zeros(matrix.shape[0])
            layers.append(layer)
        elif node.op_type == "Add":
            layers[-1].bias.data = known[0].flatten()  # type: ignore[union-attr]
        elif node.op_type == "Relu":
            layers.append(nn.ReLU())
        elif node.op_type not in ("Flatten", "Reshape", "Constant"):
            raise ValueError(f"{path.name} holds {node.op_type}, which is not read here")
    return nn.Sequential(*layers).eval()


def show_verified(rows: list[Row]) -> None:
    names = ("network", "threat", "verdict", "n", "broken")
    draw("2. VNN-COMP 2021: all sat are to be found, no unsat broken", names, pick(rows, names))


# Single attacks


def ours(name: str, **options: Any) -> Method:
    """One attack of robustlearn."""

    def method(net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall) -> Tensor:
        run = ATTACKS[name].function
        return torch.cat(
            [
                run(rl.wrap(net), a, b, threat.select(rows), **options)
                for rows, a, b in _batches(x, y)
            ]
        )

    return method


def _batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for rows in torch.arange(len(x)).split(250):
        yield rows, x[rows], y[rows]


def torchattack(name: str, **options: Any) -> Method:
    """One attack of torchattacks."""

    def method(net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall) -> Tensor:
        import torchattacks as ta

        given = dict(options)
        if name in ("APGD", "APGDT", "FAB", "Square"):
            given["norm"] = "Linf" if math.isinf(threat.p) else "L2"
        if name == "PGD":
            given["alpha"] = float(threat.eps) / 4
        if name != "CW":
            given["eps"] = float(threat.eps)
        attack = getattr(ta, name)(net, **given)
        return torch.cat([attack(a, b).detach() for _, a, b in _batches(x, y)])

    return method


def adversarial_library(name: str, **options: Any) -> Method:
    """One attack of adv-lib."""

    def method(net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall) -> Tensor:
        stand_ins()
        from adv_lib import attacks

        given = dict(options)
        if name == "fmn":
            given["norm"] = threat.p
        run = getattr(attacks, name)
        return torch.cat([run(net, a, b, **given).detach() for _, a, b in _batches(x, y)])

    return method


def singles(p: float) -> list[tuple[str, str, Method, Method]]:
    """Return attack, peer, and both methods, at equal gradients (queries)."""
    still: Row = {"stop_when_broken": False}
    pairs = [
        ("pgd 40", "torchattacks", ours("pgd", steps=40), torchattack("PGD", steps=40)),
        (
            "apgd 50",
            "torchattacks",
            ours("apgd", steps=50, loss="dlr"),
            torchattack("APGD", steps=50, loss="dlr"),
        ),
        (
            "square 500",
            "torchattacks",
            ours("square", queries=500),
            torchattack("Square", n_queries=500, loss="margin"),
        ),
        (
            "fab 20",
            "torchattacks",
            ours("fab", steps=20),
            torchattack("FAB", steps=20, n_classes=10),
        ),
        ("fmn 50", "adv-lib", ours("fmn", steps=50), adversarial_library("fmn", steps=50)),
    ]
    if p == 2:
        pairs += [
            ("ddn 50", "adv-lib", ours("ddn", steps=50), adversarial_library("ddn", steps=50)),
            (
                "C&W 9 × 40",
                "adv-lib",
                ours("carlini_wagner", searches=9, steps=40),
                adversarial_library(
                    "carlini_wagner_l2", binary_search_steps=9, max_iterations=40, initial_const=0.1
                ),
            ),
        ]
    else:
        pairs = [pair for pair in pairs if pair[0] != "pgd 40"] + [
            ("pgd 40", "torchattacks", ours("pgd", steps=40, **still), torchattack("PGD", steps=40))
        ]
    return pairs


def single_attacks(full: bool, seed: int) -> Iterator[Row]:
    for name, net, x, y, threat in cells(full, seed):
        for attack, peer, mine, theirs in singles(threat.p):
            module = {"torchattacks": "torchattacks", "adv-lib": "adv_lib"}[peer]
            if threat.p == 2 and attack == "pgd 40":
                continue
            far = threat
            if attack.split()[0] in ("fab", "fmn", "ddn", "C&W"):  # distances beyond ε count too
                far = rl.LpBall(threat.p, 4 * float(threat.eps), lower=0, upper=1)
            methods = [("robustlearn", mine, 0.0)]
            if _importable(module):
                methods.append((peer, theirs, 1e-6))
            for label, method, slack in methods:
                row = measured(label, method, net, x[:200], y[:200], far, slack)
                yield {"network": name, "threat": str(far), "attack": attack, "seed": seed, **row}


def show_singles(rows: list[Row]) -> None:
    names = (
        "network",
        "threat",
        "attack",
        "method",
        "robust",
        "n",
        "median_distance",
        "outside",
        "forwards",
        "gradients",
        "cpu_seconds",
    )
    draw("3. Single attacks at equal gradients or queries", names, pick(rows, names))


# bfloat16 and growth


def half_precision(full: bool, seed: int) -> Iterator[Row]:
    for name, net, x, y, threat in cells(full, seed):
        for _ in range(3 if full else 1):
            for precision in (None, "bfloat16"):
                method = ours("apgd", steps=50, loss="margin", precision=precision)
                row = measured(str(precision), method, net, x, y, threat, 0.0)
                yield {"network": name, "threat": str(threat), "seed": seed, **row}


def show_half(rows: list[Row]) -> None:
    lines = []
    for network, threat in dict.fromkeys((r["network"], r["threat"]) for r in rows):
        mine = [r for r in rows if (r["network"], r["threat"]) == (network, threat)]
        whole, half = ([r for r in mine if r["method"] == m] for m in ("None", "bfloat16"))
        faster = statistics.median(
            a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(whole, half, strict=True)
        )
        lines.append((network, threat, whole[0]["robust"], half[0]["robust"], faster))
    names = ("network", "threat", "robust float32", "robust bfloat16", "× faster")
    draw("4. Gradients in bfloat16 (apgd, 50 steps)", names, lines)


def growth(full: bool, seed: int) -> Iterator[Row]:
    name, net, x, y, threat = next(cells(full, seed))
    n = min(200, len(x))
    sizes = [
        (n // 4, 20, 1),
        (n // 2, 20, 1),
        (n, 20, 1),
        (n, 40, 1),
        (n, 80, 1),
        (n, 20, 2),
        (n, 20, 4),
    ]
    for _ in range(3 if full else 1):
        for samples, steps, targets in sizes:
            method = ours("apgd", steps=steps, targets=targets, loss="dlr", stop_when_broken=False)
            row = measured("apgd", method, net, x[:samples], y[:samples], threat, 0.0)
            yield {"network": name, "samples": samples, "steps": steps, "targets": targets, **row}


QUERIES = 1000  # of attacks that see labels only
FAR = {math.inf: 1.0, 2: 50.0}  # beyond any distance here: all of the way back counts


def label_attacks(full: bool, seed: int) -> Iterator[Row]:
    queries, n = (QUERIES, 50) if full else (100, 8)
    for name, net, x, y, threat in cells(full, seed):
        far = rl.LpBall(threat.p, FAR[threat.p], lower=0, upper=1)
        mine = {"queries": queries, "stop_when_broken": False}
        methods = [(own, ours(own, **mine), 0.0) for own in ("retreat", "hop_skip_jump")]
        if _importable("foolbox"):
            methods += [(f"foolbox {peer}", foolbox(peer, queries), 1e-6) for peer in PEERS]
        for label, method, slack in methods:
            row = measured(label, method, net, x[:n], y[:n], far, slack)
            yield {"network": name, "norm": str(threat.p), "seed": seed, **row}


# peers, with their options for so many queries
PEERS: dict[str, Callable[[int], Row]] = {
    "BoundaryAttack": lambda queries: {"steps": queries},
    "HopSkipJumpAttack": lambda queries: {
        "steps": 5,
        "initial_gradient_eval_steps": queries // 12,
    },
}


def foolbox(name: str, queries: int) -> Method:
    """One attack of foolbox; what it asks before and after its steps is counted, not cut."""

    def method(net: nn.Module, x: Tensor, y: Tensor, threat: rl.LpBall) -> Tensor:
        import foolbox as fb

        options = PEERS[name](queries)
        start = fb.attacks.LinearSearchBlendedUniformNoiseAttack(steps=20)
        if name == "HopSkipJumpAttack":
            options["constraint"] = "linf" if math.isinf(threat.p) else "l2"
        attack = getattr(fb.attacks, name)(init_attack=start, **options)
        wrapped = fb.PyTorchModel(net, bounds=(0, 1))
        found = []
        for _, a, b in _batches(x, y):
            begun = start.run(wrapped, a, fb.criteria.Misclassification(b))
            begun = torch.where((net(begun).argmax(1) != b)[:, None, None, None], begun, 1 - a)
            found.append(attack.run(wrapped, a, b, starting_points=begun))
        return torch.cat(found)

    return method


def show_labels(rows: list[Row]) -> None:
    names = ("network", "norm", "method", "robust", "n", "median_distance", "forwards")
    draw("6. Attacks that see labels only", names, pick(rows, names))


def show_growth(rows: list[Row]) -> None:
    top = {key: max(r[key] for r in rows) for key in ("samples", "steps", "targets")}
    low = {"samples": top["samples"], "steps": 20, "targets": 1}
    lines = []
    for key in top:
        held = [k for k in top if k != key]
        part = [r for r in rows if all(r[k] == low[k] for k in held)]
        values = sorted({r[key] for r in part})
        times = [statistics.median(r["cpu_seconds"] for r in part if r[key] == v) for v in values]
        power = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        lines.append(
            (key, power, *(f"{v}: {1000 * t:.0f} ms" for v, t in zip(values, times, strict=True)))
        )
    draw("5. Time ~ size^exponent (apgd)", ("in", "exponent", "", "", ""), lines)


# Tables


def _importable(module: str) -> bool:
    found = importlib.util.find_spec(module) is not None
    if not found:
        console.print(f"{module} is not installed, and not measured")
    return found


def pick(rows: list[Row], names: tuple[str, ...]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in names) for row in rows]


def draw(title: str, columns: tuple[str, ...], lines: list[tuple[Any, ...]]) -> None:
    table = Table(*columns, title=title)
    for line in lines:
        table.add_row(*(f"{v:.3g}" if isinstance(v, float) else str(v) for v in line))
    console.print(table)


COSTS = ("forwards", "gradients")
TABLES: recording.Tables = {
    1: (against_autoattack, show_against),
    2: (verified, show_verified),
    3: (single_attacks, show_singles),
    4: (half_precision, show_half),
    5: (growth, show_growth),
    6: (label_attacks, show_labels),
}


if __name__ == "__main__":
    main()
