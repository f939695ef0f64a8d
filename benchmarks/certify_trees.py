"""Trees: exact worst cases and their bound, in time, share certified and against other solvers.

Table 1: samples a second of the bound and of the exact worst case, by library, norm and ε.
Table 2: the same worst cases by a mixed-integer program (HiGHS).
"""

import importlib
import itertools
import math
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import recording
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, milp
from sklearn import ensemble
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler

import robustlearn as rl
from robustlearn._leaves import Search, Space, distances, gap

THREATS = ((math.inf, 0.02), (math.inf, 0.05), (2, 0.05), (1, 0.1))
BOXES = 4_000


def models(full: bool, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield estimators of 100 trees of depth 5; XGBoost and LightGBM where installed."""
    count = 100 if full else 10
    sizes = {"n_estimators": count, "max_depth": 5, "random_state": seed}
    yield "gradient boosting", ensemble.GradientBoostingClassifier(**sizes)
    yield "random forest", ensemble.RandomForestClassifier(**sizes)
    yield (
        "histogram boosting",
        ensemble.HistGradientBoostingClassifier(max_iter=count, max_depth=5, random_state=seed),
    )
    for home, name, more in (
        ("xgboost", "XGBClassifier", {"learning_rate": 0.2}),
        ("lightgbm", "LGBMClassifier", {"verbose": -1}),
    ):
        try:
            library = importlib.import_module(home)
        except ImportError:
            continue
        yield home, getattr(library, name)(n_jobs=1, **sizes, **more)


def data(full: bool, seed: int) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
    """Yield built-in data, scaled to the unit box."""
    for name, load in (("cancer", load_breast_cancer), ("wine", load_wine)):
        x, y = load(return_X_y=True)
        parts = train_test_split(x, y, random_state=seed, test_size=0.3)
        scaler = MinMaxScaler().fit(parts[0])
        x_train, x_test = (scaler.transform(part).clip(0, 1) for part in parts[:2])
        n = 50 if full else 4
        yield name, (x_train, x_test[:n], parts[2], parts[3][:n])
        if not full:
            return


def speeds(full: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Measure bound and exact worst case, without radii."""
    for dataset, (x_train, x, y_train, y) in data(full, seed):
        for kind, estimator in models(full, seed):
            model = rl.wrap(estimator.fit(x_train, y_train))
            for p, eps in THREATS:
                space = Space.of(rl.LpBall(p, eps), x)
                start = time.process_time()
                bound = rl.certify(model, x, rl.LpBall(p, eps), y=y, method="leaves")
                bounded = time.process_time() - start
                start = time.process_time()
                exact = [_worst(model, space, row, int(y[row]), eps) for row in range(len(x))]
                searched = time.process_time() - start
                yield {
                    "data": dataset,
                    "model": kind,
                    "norm": p,
                    "eps": eps,
                    "samples": len(x),
                    "leaves": len(model.trees.tree),
                    "clean": float((estimator.predict(x) == y).mean()),
                    "certified_by_bound": float(bound.certified.mean()),
                    "certified_exactly": float(np.mean([low > 0 for low, _, _ in exact])),
                    "settled": float(np.mean([low >= high - 1e-9 for low, high, _ in exact])),
                    "boxes": float(np.mean([boxes for _, _, boxes in exact])),
                    "bound_cpu_seconds": bounded,
                    "cpu_seconds": searched,
                }


def _worst(model: Any, space: Space, row: int, label: int, eps: float) -> tuple[float, float, int]:
    far, low, high, boxes = distances(model.trees, _one(space, row))[0], math.inf, math.inf, 0
    for rival in range(model.num_classes or 2):
        if rival != label:
            weight, offset = gap(model.trees, label, rival)
            found = Search(model.trees, space.at(row), weight, far, eps).run(BOXES)
            low, high = min(low, found.bound + offset), min(high, found.value + offset)
            boxes += found.boxes
    return low, high, boxes


def _one(space: Space, row: int) -> Space:
    return Space(space.p, space.x[row : row + 1], space.unit, space.lower, space.upper)


def programs(full: bool, seed: int) -> Iterable[dict[str, Any]]:
    """Measure the search beside a mixed-integer program, p = ∞."""
    _, (x_train, x, y_train, y) = next(iter(data(full, seed)))
    n = 5 if full else 2
    for kind, estimator in models(full, seed):
        model = rl.wrap(estimator.fit(x_train, y_train))
        for eps in (0.02, 0.05):
            space = Space.of(rl.LpBall(math.inf, eps), x[:n])
            far = distances(model.trees, space)
            times, values = np.zeros(2), np.zeros((n, 2))
            for row in range(n):
                weight, offset = gap(model.trees, int(y[row]), 1 - int(y[row]))
                start = time.process_time()
                search = Search(model.trees, space.at(row), weight, far[row], eps)
                values[row, 0] = search.run(10 * BOXES).bound + offset
                times[0] += time.process_time() - start
                start = time.process_time()
                reached = np.flatnonzero(far[row] <= eps)
                values[row, 1] = _program(model.trees, weight, reached) + offset
                times[1] += time.process_time() - start
            yield {
                "model": kind,
                "eps": eps,
                "samples": n,
                "milp_settled": float(np.isfinite(values[:, 1]).mean()),
                "largest_difference": float(np.nanmax(np.abs(values[:, 0] - values[:, 1]))),
                "cpu_seconds": times[0],
                "milp_cpu_seconds": times[1],
            }


def _program(leaves_of: Any, weight: np.ndarray, reached: np.ndarray) -> float:
    """min Σ weight over one leaf per tree, with one binary per cut (Kantchelian et al., 2016)."""
    parts = (leaves_of.feature, leaves_of.low, leaves_of.high)
    feature, low, high = (part[reached] for part in parts)
    before = np.nextafter(low, -np.inf)
    ends = [*zip(feature.ravel(), high.ravel(), strict=True)]
    ends += zip(feature.ravel(), before.ravel(), strict=True)
    cuts = sorted({(f, end) for f, end in ends if math.isfinite(end)})
    place = {cut: number for number, cut in enumerate(cuts)}
    rows: list[tuple[list[tuple[int, int]], float, float]] = []
    b = len(cuts)
    for one, two in itertools.pairwise(cuts):
        if one[0] == two[0]:
            rows.append(([(place[one], 1), (place[two], -1)], -np.inf, 0))
    for tree in np.unique(leaves_of.tree[reached]):
        mine = np.flatnonzero(leaves_of.tree[reached] == tree)
        rows.append(([(b + leaf, 1) for leaf in mine], 1, 1))
    for leaf in range(len(reached)):
        for f, start, end in zip(feature[leaf], low[leaf], high[leaf], strict=True):
            if math.isfinite(end):
                rows.append(([(b + leaf, 1), (place[f, end], -1)], -np.inf, 0))
            if math.isfinite(start):
                cut = place[f, np.nextafter(start, -np.inf)]
                rows.append(([(b + leaf, 1), (cut, 1)], -np.inf, 1))
    entries = [(r, *term) for r, (terms, _, _) in enumerate(rows) for term in terms]
    at, column, value = np.array(entries).T
    matrix = sparse.csr_array((value, (at, column)), shape=(len(rows), b + len(reached)))
    found = milp(
        np.r_[np.zeros(b), weight[reached]],
        constraints=LinearConstraint(matrix, [r[1] for r in rows], [r[2] for r in rows]),
        integrality=np.r_[np.ones(b), np.zeros(len(reached))],
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0, "time_limit": 20},
    )
    return float(found.fun) if found.status == 0 else math.nan


def _show(rows: list[dict[str, Any]]) -> None:
    columns = [name for name in rows[0] if name != "table"]
    table = Table(*columns)
    for row in rows:
        values = [row[name] for name in columns]
        table.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values))
    Console(width=200).print(table)


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__ or "", tables=2, threads=1)
    tables: recording.Tables = {1: (speeds, _show), 2: (programs, _show)}
    recording.save(recording.measured(tables, given), given)


if __name__ == "__main__":
    main()
