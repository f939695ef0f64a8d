"""How fast and how exact linear models trained for the worst case are, beside their peers.

Every method in a cell gets the same data, one BLAS thread, and its turn in every round. A first
round warms up, unless something takes more than 5 s: then it counts, and there are two. The
objective is worked out here from a method's coefficients: the mean worst-case loss at the ε of
the cell. relative_gap = (objective − bound) / objective, the bound being what robustlearn proves
from the data: in its own run for itself, in an untimed run for the others. Times are CPU seconds;
"× unit" is the median over rounds of the time over that of scikit-learn's Ridge (with its
defaults; LogisticRegression in classification) in the same round.

Tables: 1 regression, 2 a general solver, 3 the published algorithm, 4 other losses, 5 hard data,
6 path, 7 growth. A warning is kept in the row of the run that gave it.
"""

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import recording
import scipy.linalg as sla
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer, load_diabetes
from sklearn.linear_model import HuberRegressor, LogisticRegression, Ridge
from threadpoolctl import threadpool_limits

import robustlearn.linear as rl

try:
    import cvxpy as cp
except ImportError:
    cp = None

Array = NDArray[np.float64]
NORMS = (1, 2, math.inf)
DUAL = {1: math.inf, 2: 2, math.inf: 1}
SLOW = 5.0  # seconds, from which on a cell gets two rounds
LIMIT, ITERATIONS = 25.0, 5000  # of the published algorithm: CPU seconds, ridge solves
FLOOR = 1e-12  # relative, keeps its weights finite
KNEE = 1.35  # of the Huber loss
LOSSES: dict[str, Callable[[Array], Array]] = {
    "squared": np.square,
    "absolute": np.abs,
    "huber": lambda t: np.where(t <= KNEE, t**2 / 2, KNEE * t - KNEE**2 / 2),
    "logistic": lambda t: np.logaddexp(0, t),
    "hinge": lambda t: np.maximum(0, 1 + t),
    "squared_hinge": lambda t: np.maximum(0, 1 + t) ** 2,
}
ROUNDING = "objective 0 but for rounding"
REGRESSION = ("squared", "absolute", "huber")
UNITS = ("Ridge", "LogisticRegression")
Data = tuple[str, Array, Array]
Row = dict[str, Any]
console = Console(width=115)


@dataclass(frozen=True)
class Cell:
    """One problem; eps is a fraction of ε_max if ``relative``. Labels of classes are ±1."""

    data: str
    x: Array
    y: Array
    norm: float
    eps: float
    intercept: bool = True
    loss: str = "squared"
    tol: float = 1e-10
    relative: bool = True

    def objective(self, w: Array, b: float, eps: float) -> float:
        """Mean of φ(|wᵀx + b − y| + ε‖w‖_q), or of ℓ(ε‖w‖_q − y(wᵀx + b))."""
        z, c = self.x @ w + b, eps * np.linalg.norm(w, DUAL[self.norm])
        height = np.abs(z - self.y) + c if self.loss in REGRESSION else c - self.y * z
        return float(LOSSES[self.loss](height).mean())

    def model(self, eps: float | None = None) -> Any:
        """Return the estimator of robustlearn, at another absolute eps if given."""
        regression = self.loss in REGRESSION
        kind = rl.AdversarialRegressor if regression else rl.AdversarialClassifier
        return kind(
            self.eps if eps is None else eps,
            norm=self.norm,
            loss=self.loss,
            relative=self.relative and eps is None,
            fit_intercept=self.intercept,
            tol=self.tol,
            **({"huber_threshold": KNEE} if regression else {}),
        )


@dataclass(frozen=True)
class Reference:
    """What an untimed run of robustlearn says of a cell."""

    eps: float
    eps_max: float
    bound: float


@dataclass(frozen=True)
class Fit:
    """What a method found; eps and bound only where they differ from those of the reference."""

    coef: Array
    intercept: float
    steps: int | None = None
    eps: float | None = None
    bound: float | None = None
    note: str = ""


Method = Callable[[Cell, Reference], Fit]


def main() -> None:
    """Measure, print the tables, write the rows."""
    given = recording.arguments(__doc__.split("\n", 1)[0], tables=len(TABLES), threads=1)
    with threadpool_limits(given.threads):
        rows = recording.measured(TABLES, given)
    if rows:
        show_warnings(rows)
        recording.save(rows, given)


# Data


def gaussian(n: int, d: int, seed: int) -> Data:
    """Gaussian x, half of the weights zero, as much noise as signal."""
    generator = np.random.default_rng([seed, n, d])
    x, w = generator.standard_normal((n, d)), generator.standard_normal(d)
    w[: d // 2] = 0
    w /= np.linalg.norm(w)
    return "gaussian", x, x @ w + generator.standard_normal(n)


def standardised(name: str) -> Data:
    """Return diabetes, or breast cancer with labels ±1."""
    load = load_diabetes if name == "diabetes" else load_breast_cancer
    x, y = load(return_X_y=True)
    y = (y - y.mean()) / y.std() if name == "diabetes" else np.where(y > 0, 1.0, -1.0)
    return name, (x - x.mean(0)) / x.std(0), y


def hard(full: bool, seed: int) -> Iterator[Data]:
    """Data that solvers stumble over."""
    n, d = (300, 20) if full else (60, 6)
    generator = np.random.default_rng([seed, 5])
    _, x, y = gaussian(n, d, seed)
    noise, few = generator.standard_normal(n), generator.permutation(n)[: n // 20]
    w = generator.standard_normal(d)
    heavy = generator.standard_t(2, (n, d))
    yield "t, 2 degrees", heavy, heavy @ w + generator.standard_t(2, n)
    far = np.ones(n)
    far[few] = 50
    yield "y ×50 in 5%", x, y * far
    yield "x ×50 in 5%", x * far[:, None], y
    scales = np.geomspace(1e-3, 1e3, d)
    yield "columns 1e-3…1e3", x * scales, y
    turn = np.linalg.qr(generator.standard_normal((d, d)))[0]
    yield "condition 1e6", x * scales @ turn, (x * scales @ turn) @ w + noise
    yield "duplicate columns", np.hstack([x, x[:, : d // 2]]), y
    yield "duplicate rows", np.vstack([x, x[: n // 2]]), np.append(y, y[: n // 2])
    constant = x.copy()
    constant[:, 0], constant[:, 1] = 0, 3
    yield "constant columns", constant, y
    yield "ties", x.round(), y.round()
    yield "y binary", x, (y > 0).astype(float)
    yield "noiseless", x, x @ w
    yield "d = 1", x[:, -1:], y
    square = generator.standard_normal((2 * d, 2 * d))
    yield "n = d", square, square[:, :d] @ w + noise[: 2 * d]
    yield "x ×1e5", x * 1e5, y
    yield "x ×1e-5", x * 1e-5, y


# Methods


def robustlearn(cell: Cell, reference: Reference) -> Fit:
    model = cell.model().fit(cell.x, cell.y)
    w, b = parameters(model)
    return Fit(w, b, model.n_iter_, bound=model.objective_ - model.dual_gap_)


def parameters(model: Any) -> tuple[Array, float]:
    """Return w (d,) and b of a regressor or of a classifier of two classes."""
    return np.ravel(model.coef_), float(np.ravel(model.intercept_)[0])


def plain(kind: Callable[..., Any]) -> Method:
    """Return an estimator of scikit-learn with its defaults."""

    def method(cell: Cell, reference: Reference) -> Fit:
        model = kind(fit_intercept=cell.intercept).fit(cell.x, cell.y)
        steps = np.max(model.n_iter_) if getattr(model, "n_iter_", None) is not None else None
        return Fit(*parameters(model), steps)

    return method


def reweighted_ridge(cell: Cell, reference: Reference) -> Fit:
    """Iteratively reweighted ridge regression, until 1e-10 above the bound at most.

    (|r| + c)² = min over η in (0, 1) of r²/η + c²/(1 − η), at η = |r|/(|r| + c), and
    ‖w‖₁² = min over η in the simplex of Σ w²/η, at η = |w|/‖w‖₁: given all η, the problem is
    ridge regression with weights of the rows (and of the columns). Written after Ribeiro,
    Zachariah and Schön, "Efficient optimization algorithms for linear adversarial training"
    (AISTATS 2025), for the norms 2 and ∞ of the attack.
    """
    start, eps, y = time.process_time(), reference.eps, cell.y
    n, d = cell.x.shape
    x = np.column_stack([cell.x, np.ones(n)]) if cell.intercept else cell.x
    room, best, found, note, step = np.empty_like(x), math.inf, np.zeros(x.shape[1]), "", 0
    rows, columns = np.full(n, 2.0), np.full(d, eps**2 * 2 * n * (1 if cell.norm == 2 else d))
    small = FLOOR * float(np.abs(y).mean())
    while not note:
        step += 1
        try:
            v = _weighted_ridge(x, y, rows, columns, room)
        except sla.LinAlgError:
            note = "the matrix is no longer positive definite"
            break
        residual, w = np.abs(x @ v - y), np.abs(v[:d])
        c = eps * float(np.linalg.norm(w, DUAL[cell.norm]))
        value = float(((residual + c) ** 2).mean())
        best, found = (value, v) if value < best else (best, found)
        if best * (1 - 1e-10) <= reference.bound:
            note = "1e-10 reached"
        elif time.process_time() - start > LIMIT or step == ITERATIONS:
            note = f"stopped after {step} iterations"
        residual += small
        rows = 1 + c / residual
        columns = np.full(d, eps**2 * (n + float(residual.sum()) / c))
        if cell.norm == math.inf:
            columns *= w.sum() / (w + FLOOR * w.max())
    return Fit(found[:d], float(found[d:].sum()), step, note=note)


def _weighted_ridge(x: Array, y: Array, rows: Array, columns: Array, room: Array) -> Array:
    """(XᵀΩX + diag)⁻¹XᵀΩy; the last column may have no penalty."""
    np.multiply(x, np.sqrt(rows)[:, None], out=room)
    gram = room.T @ room
    gram[np.arange(len(columns)), np.arange(len(columns))] += columns
    return sla.cho_solve(sla.cho_factor(gram), x.T @ (rows * y))


def cvxpy(cell: Cell, reference: Reference) -> Fit:
    """The same problem for a general conic solver, with its defaults."""
    n, d = cell.x.shape
    w, c, t = cp.Variable(d), cp.Variable(), cp.Variable(n)
    b = cp.Variable() if cell.intercept else cp.Constant(0.0)
    limits = [reference.eps * cp.norm(w, DUAL[cell.norm]) <= c]
    if cell.loss in REGRESSION:
        r = cp.Variable(n)
        limits += [r == cell.x @ w + b - cell.y, r + c <= t, c - r <= t]
    else:
        limits += [t == c - cp.multiply(cell.y, cell.x @ w + b)]
    total = {
        "squared": cp.sum_squares,
        "absolute": cp.sum,
        "huber": lambda t: cp.sum(cp.huber(t, KNEE)) / 2,
        "logistic": lambda t: cp.sum(cp.logistic(t)),
        "hinge": lambda t: cp.sum(cp.pos(1 + t)),
        "squared_hinge": lambda t: cp.sum_squares(cp.pos(1 + t)),
    }[cell.loss](t)
    problem = cp.Problem(cp.Minimize(total / n), limits)
    problem.solve(solver=cp.CLARABEL)
    told = problem.solver_stats
    note = f"{problem.status}; {told.solve_time:.3g} s in Clarabel itself"
    return Fit(np.asarray(w.value), float(b.value), told.num_iters, note=note)


def budgets(reference: Reference, count: int) -> Array:
    return np.geomspace(0.9, 0.01, count) * reference.eps_max


def path(count: int) -> Method:
    """`regularization_path`; of its models, the one with the largest gap is looked at."""

    def method(cell: Cell, reference: Reference) -> Fit:
        found = rl.regularization_path(
            cell.x,
            cell.y,
            eps=budgets(reference, count),
            norm=cell.norm,
            loss=cell.loss,
            fit_intercept=cell.intercept,
            tol=cell.tol,
        )
        worst = int(np.argmax(found.gap / found.objective))
        bound = float(found.objective[worst] - found.gap[worst])
        eps, b = float(found.eps[worst]), float(found.intercept[worst])
        return Fit(found.coef[worst], b, int(found.steps.sum()), eps, bound, f"{count} budgets")

    return method


def one_by_one(count: int) -> Method:
    """The same as `path`, with a fit for each budget."""

    def method(cell: Cell, reference: Reference) -> Fit:
        found = [cell.model(eps).fit(cell.x, cell.y) for eps in budgets(reference, count)]
        worst = max(found, key=lambda model: model.dual_gap_ / model.objective_)
        bound = worst.objective_ - worst.dual_gap_
        steps = sum(model.n_iter_ for model in found)
        note = f"{count} budgets"
        return Fit(worst.coef_, worst.intercept_, steps, worst.eps_, bound, note)

    return method


RIDGE: dict[str, Method] = {"Ridge": plain(Ridge)}
OURS: dict[str, Method] = {"robustlearn": robustlearn}


def general() -> dict[str, Method]:
    """cvxpy, where it is installed."""
    if cp is None or "CLARABEL" not in cp.installed_solvers():
        console.print("cvxpy with Clarabel is not installed, and not measured")
        return {}
    return {"cvxpy": cvxpy}


# Measuring


def measure(cell: Cell, methods: dict[str, Method], repeats: int) -> list[Row]:
    """Return one row a method and round."""
    reference = refer(cell)
    first = [clocked(name, method, cell, reference) for name, method in methods.items()]
    slow = max(row["cpu_seconds"] for row in first) > SLOW
    turns, wanted = ([first], min(repeats, 2)) if slow else ([], repeats)
    while len(turns) < wanted:
        turns.append([clocked(*method, cell, reference) for method in methods.items()])
    few = f"only {wanted} repeats" if wanted < repeats else ""
    for turn, rows in enumerate(turns):
        for row in rows:
            row |= {"repeat": turn, "note": "; ".join(filter(None, (row["note"], few)))}
    return [row for rows in turns for row in rows]


def refer(cell: Cell) -> Reference:
    """Fit outside the clock. What it warns of or fails with, the timed runs do again."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            model = cell.model().fit(cell.x, cell.y)
        except Exception:
            return Reference(math.nan, math.nan, math.nan)
    return Reference(model.eps_, model.eps_max_, model.objective_ - model.dual_gap_)


def clocked(name: str, method: Method, cell: Cell, reference: Reference) -> Row:
    """Run a method once. A failure is a row too."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        start = time.process_time()
        try:
            fit = method(cell, reference)
        except Exception as error:
            fit = Fit(np.full(cell.x.shape[1], np.nan), np.nan, note=f"failed: {error!r}")
        seconds = time.process_time() - start
    value = cell.objective(fit.coef, fit.intercept, fit.eps or reference.eps)
    gap = value - (reference.bound if fit.bound is None else fit.bound)
    start = cell.objective(np.zeros_like(fit.coef), 0.0, 0.0)
    note = ROUNDING if value <= 1e-14 * start else fit.note
    known = reference.eps_max if reference.eps_max > 0 else math.nan
    return {
        "data": cell.data,
        "n": cell.x.shape[0],
        "d": cell.x.shape[1],
        "norm": cell.norm,
        "eps_fraction": cell.eps if cell.relative else cell.eps / known,
        "intercept": cell.intercept,
        "loss": cell.loss,
        "method": name,
        "repeat": None,
        "cpu_seconds": seconds,
        "objective": value,
        "relative_gap": gap / value if value > 0 else gap,
        "steps": fit.steps,
        "warning": " | ".join(dict.fromkeys(map(_briefly, told))),
        "note": note,
    }


def _briefly(told: warnings.WarningMessage) -> str:
    return f"{told.category.__name__}: {str(told.message).splitlines()[0]}"


def regression(full: bool, seed: int) -> Iterator[Row]:
    sizes = (1000, 100), (10_000, 100), (100_000, 100), (10_000, 1000), (200, 2000)
    sets = (gaussian(*size, seed) for size in (sizes if full else ((200, 10), (20, 40))))
    for data in (standardised("diabetes"), *sets):
        small = len(data[1]) <= 10_000
        for norm in NORMS:
            for intercept in (True, False):
                peers = {"HuberRegressor": plain(HuberRegressor)} if intercept and small else {}
                for eps in (0.5, 0.1, 0.01) if full else (0.1,):
                    cell = Cell(*data, norm, eps, intercept)
                    yield from measure(cell, RIDGE | OURS | peers, 5 if full else 1)


def general_solver(full: bool, seed: int) -> Iterator[Row]:
    data = gaussian(*((1000, 100) if full else (100, 5)), seed)
    cells = [Cell(*data, p, eps) for p in NORMS for eps in ((0.5, 0.1, 0.01) if full else (0.1,))]
    if full:
        cells.append(Cell(*gaussian(10_000, 100, seed), 2, 0.1))
    methods = RIDGE | OURS | general()
    for cell in cells:
        yield from measure(cell, methods, 5 if full else 1)


def published(full: bool, seed: int) -> Iterator[Row]:
    methods = RIDGE | OURS | {"reweighted ridge": reweighted_ridge}
    for n, d in ((1000, 100), (10_000, 100), (100_000, 100)) if full else ((200, 10),):
        for norm in (2, math.inf):
            cell = Cell(*gaussian(n, d, seed), norm, 0.1)
            yield from measure(cell, methods, 5 if full else 1)


def other_losses(full: bool, seed: int) -> Iterator[Row]:
    name, x, y = gaussian(*((1000, 100) if full else (100, 5)), seed)
    logistic: dict[str, Method] = {"LogisticRegression": plain(LogisticRegression)}
    peers, repeats = general(), 5 if full else 1
    for loss in list(LOSSES)[1:]:
        target, unit = (y, RIDGE) if loss in REGRESSION else (np.where(y > 0, 1.0, -1.0), logistic)
        for norm in NORMS:
            cell = Cell(name, x, target, norm, 0.1, loss=loss, tol=1e-8)
            yield from measure(cell, unit | OURS | peers, repeats)
    for norm in (2, math.inf):
        data = standardised("breast_cancer")
        cell = Cell(*data, norm, 0.1, loss="logistic", tol=1e-8, relative=False)
        yield from measure(cell, logistic | OURS, repeats)


def hard_data(full: bool, seed: int) -> Iterator[Row]:
    for name, x, y in hard(full, seed):
        sign = np.where(y > y.mean(), 1.0, -1.0)
        for loss in LOSSES if full else ("squared", "logistic"):
            for norm in NORMS:
                for eps in (0.5, 0.1, 0.01) if full else (0.1,):
                    target = y if loss in REGRESSION else sign
                    cell = Cell(name, x, target, norm, eps, loss=loss, tol=1e-8)
                    yield from measure(cell, OURS, 1)


def along_a_path(full: bool, seed: int) -> Iterator[Row]:
    if not hasattr(rl, "regularization_path"):
        console.print("robustlearn.linear.regularization_path does not exist: no table 6")
        return
    count = 20 if full else 4
    methods = RIDGE | OURS | {"path": path(count), "fit by fit": one_by_one(count)}
    for n in (1000, 10_000) if full else (200,):
        for norm in NORMS:
            cell = Cell(*gaussian(n, 100 if full else 5, seed), norm, 0.1, tol=1e-8)
            yield from measure(cell, methods, 5 if full else 1)


def growth(full: bool, seed: int) -> Iterator[Row]:
    by_n = [(n, 50) for n in (1000, 3000, 10_000, 30_000, 100_000)]
    by_d = [(20_000, d) for d in (10, 20, 50, 100, 200, 400)]
    if not full:
        by_n, by_d = [(100, 5), (300, 5)], [(400, 3), (400, 6)]
    for n, d in by_n + by_d:
        for norm in NORMS:
            cell = Cell(*gaussian(n, d, seed), norm, 0.1)
            yield from measure(cell, RIDGE | OURS, 5 if full else 1)


# Tables


def groups(rows: list[Row], *by: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """Return the rows that agree in those columns, in order of appearance."""
    for key in dict.fromkeys(tuple(row[name] for name in by) for row in rows):
        yield key, [row for row in rows if tuple(row[name] for name in by) == key]


def median(rows: list[Row], method: str) -> float:
    """Median of the milliseconds of a method; NaN without it."""
    found = [1000 * row["cpu_seconds"] for row in rows if row["method"] == method]
    return statistics.median(found) if found else math.nan


def ratio(rows: list[Row], method: str) -> float:
    """Median of the seconds of a method over those of the unit in the same round."""
    kept = ("data", "n", "d", "norm", "eps_fraction", "intercept", "loss", "repeat")
    unit = {
        tuple(row[name] for name in kept): row["cpu_seconds"]
        for row in rows
        if row["method"] in UNITS
    }
    found = [
        row["cpu_seconds"] / unit[tuple(row[name] for name in kept)]
        for row in rows
        if row["method"] == method
    ]
    return statistics.median(found) if found else math.nan


def worst(rows: list[Row], method: str = "robustlearn") -> float:
    """Return the largest relative gap; NaN if there is one."""
    return float(np.max([row["relative_gap"] for row in rows if row["method"] == method]))


def brief(value: Any) -> str:
    """Write a number in few letters, nothing for what is missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, float):
        return str(value)
    small, large = 0 < abs(value) < 1e-3, 1e3 <= abs(value) < 1e9
    return f"{value:.1e}" if small else f"{value:.0f}" if large else f"{value:.3g}"


def draw(title: str, columns: tuple[str, ...], lines: list[tuple[Any, ...]]) -> None:
    table = Table(*columns, title=title, padding=(0, 0, 0, 1) if len(columns) > 9 else (0, 1))
    for line in lines:
        table.add_row(*map(brief, line))
    console.print(table)


def show_regression(rows: list[Row]) -> None:
    budgets = tuple(dict.fromkeys(row["eps_fraction"] for row in rows))
    lines = []
    for (data, n, d, norm, intercept), mine in groups(rows, "data", "n", "d", "norm", "intercept"):
        times = [ratio(part, "robustlearn") for _, part in groups(mine, "eps_fraction")]
        steps = max(row["steps"] for row in mine if row["method"] == "robustlearn")
        huber = ratio(mine, "HuberRegressor")
        unit = median(mine, "Ridge")
        lines.append((data, n, d, norm, intercept, unit, *times, worst(mine), steps, huber))
    names = ("data", "n", "d", "norm", "b", "Ridge ms", *(f"× at {eps:g}" for eps in budgets))
    title = "1. Squared loss: time in units of Ridge, by ε/ε_max; worst gap, most steps"
    draw(title, (*names, "gap", "steps", "× Huber"), lines)


def show_beside(title: str) -> Callable[[list[Row]], None]:
    """Return a table with a line a cell and method; the unit has a column of its own."""

    def show(rows: list[Row]) -> None:
        keys = ("data", "n", "d", "loss", "norm", "eps_fraction")
        keys = tuple(key for key in keys if len({row[key] for row in rows}) > 1)
        heads = tuple("ε/max" if key == "eps_fraction" else key for key in keys)
        lines: list[tuple[Any, ...]] = []
        for key, mine in groups(rows, *keys):
            unit = max(median(mine, name) for name in UNITS if name in {r["method"] for r in mine})
            methods = dict.fromkeys(row["method"] for row in mine)
            told = [method for method in methods if method not in UNITS or len(methods) == 2]
            for method in told:
                steps = max((r["steps"] or 0) for r in mine if r["method"] == method) or None
                cell = (*key, unit) if method == told[0] else ("",) * (len(keys) + 1)
                figures = median(mine, method), ratio(mine, method), worst(mine, method)
                lines.append((*cell, method, *figures, steps))
        draw(title, (*heads, "unit ms", "method", "CPU ms", "× unit", "gap", "steps"), lines)

    return show


def show_hard(rows: list[Row]) -> None:
    over = [row for row in rows if not row["relative_gap"] <= 1e-8]
    silent = [row for row in over if not row["warning"] and ROUNDING not in row["note"]]
    lines = []
    for (data,), mine in groups(rows, "data"):
        cells = []
        for _, part in groups(mine, "loss"):
            above = [row for row in part if not row["relative_gap"] <= 1e-8]
            counts = {
                "w": sum(bool(row["warning"]) for row in above),
                "!": sum(row in silent for row in above),
                "z": sum(ROUNDING in row["note"] for row in above),
            }
            told = "".join(f" {count}{mark}" for mark, count in counts.items() if count)
            known = [row for row in part if ROUNDING not in row["note"]]
            cells.append((brief(worst(known)) if known else "0") + told)
        lines.append((data, *cells))
    draw(
        "5. Worst gap at tol=1e-8. Cells above 1e-8: w with a warning, ! without; z minimum 0",
        ("data", *dict.fromkeys(row["loss"] for row in rows)),
        lines,
    )
    names = ("data", "loss", "norm", "eps_fraction", "relative_gap", "objective", "note")
    if silent:
        lines = [tuple(row[name] for name in names) for row in silent]
        draw("Above 1e-8 without a warning", names, lines)


def show_growth(rows: list[Row]) -> None:
    lines = []
    for name, fixed in (("n", "d"), ("d", "n")):
        held = statistics.mode(row[fixed] for row in rows)
        for (norm, method), mine in groups(rows, "norm", "method"):
            part = [row for row in mine if row[fixed] == held]
            points = sorted((n, median(found, method)) for (n,), found in groups(part, name))
            size, spent = np.log(np.array(points, dtype=float)).T
            power = float(np.polyfit(size, spent, 1)[0])
            low, high = points[0], points[-1]
            lines.append((name, f"{fixed} = {held}", norm, method, power, *low, *high))
    names = ("in", "other", "norm", "method", "exponent", "from", "CPU ms", "to", "CPU ms")
    draw("7. Time ~ size^exponent, at ε = 0.1·ε_max, with intercept", names, lines)


def show_warnings(rows: list[Row]) -> None:
    """Say which methods warned how often, and what the first warning was."""
    lines = []
    for (table, method), mine in groups(rows, "table", "method"):
        told = [row["warning"] for row in mine if row["warning"]]
        told += [row["note"] for row in mine if row["note"].startswith("failed")]
        if told:
            lines.append((table, method, f"{len(told)}/{len(mine)}", told[0]))
    if lines:
        draw("Warnings and failures", ("table", "method", "runs", "the first"), lines)


TABLES: recording.Tables = {
    1: (regression, show_regression),
    2: (general_solver, show_beside("2. Squared loss, beside a general solver")),
    3: (published, show_beside("3. Squared loss, beside the published algorithm, to 1e-10")),
    4: (other_losses, show_beside("4. Other losses, tol=1e-8")),
    5: (hard_data, show_hard),
    6: (along_a_path, show_beside("6. Budgets from .9 to .01 of ε_max, tol=1e-8: the worst gap")),
    7: (growth, show_growth),
}


if __name__ == "__main__":
    main()
