"""What `robustlearn fit-linear` does: train, measure on data held out, compare, and save."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from sklearn.linear_model import HuberRegressor, LinearRegression, LogisticRegression, RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from robustlearn import data
from robustlearn.errors import InputError
from robustlearn.linear import (
    AdversarialClassifier,
    AdversarialRegressor,
    certified_radius,
    worst_case_loss,
)

REGRESSION = ("squared", "absolute", "huber")
REPORTED = 20  # coefficients in the printed table


def fitted(
    dataset: data.Dataset,
    *,
    norm: float,
    eps: float,
    relative: bool,
    loss: str,
    standardize: bool,
    test_size: float,
    seed: int,
    tol: float,
    huber_threshold: float,
    huber_relative: bool,
) -> tuple[Any, dict[str, Any]]:
    """Return the model fitted to a part of the data, and what there is to tell of it."""
    x = dataset.x.reshape(len(dataset), -1)
    regression = loss in REGRESSION
    if regression and (dataset.class_names is not None or dataset.y.dtype.kind not in "biuf"):
        raise InputError(f"the targets of {dataset.name} are classes: say --loss logistic")
    data.check(x, dataset.y)
    stratify = None if regression else dataset.y
    parts = train_test_split(
        x, dataset.y, test_size=test_size, random_state=seed, stratify=stratify
    )
    options: dict[str, Any] = {"norm": norm, "loss": loss, "relative": relative, "tol": tol}
    if loss == "huber":
        options |= {"huber_threshold": huber_threshold, "huber_relative": huber_relative}
    kind = AdversarialRegressor if regression else AdversarialClassifier
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = _pipeline(kind(eps, **options), standardize).fit(parts[0], parts[2])
    notes += [str(one.message) for one in caught]
    last = model[-1]
    if loss == "huber":
        notes += _all_linear(model, parts[0], parts[2])
    names = dataset.feature_names or tuple(f"x{j}" for j in range(x.shape[1]))
    return model, {
        "data": dataset.name,
        "task": "regression" if regression else "classification",
        "loss": loss,
        "norm": "inf" if np.isinf(norm) else norm,
        "standardized": standardize,
        "train": len(parts[0]),
        "test": len(parts[1]),
        "seed": seed,
        "eps": float(np.max(last.eps_)),
        **({"huber_threshold": last.huber_threshold_} if loss == "huber" else {}),
        "eps_max": last.eps_max_,
        "objective": last.objective_,
        "dual_gap": last.dual_gap_,
        "steps": last.n_iter_,
        "features": list(names),
        "coefficients": np.atleast_2d(last.coef_).tolist(),
        "intercepts": np.atleast_1d(last.intercept_).tolist(),
        "comparison": _compared(model, parts, norm, standardize),
        "notes": notes,
    }


def _compared(model: Any, parts: list[Any], norm: float, standardize: bool) -> list[dict[str, Any]]:
    """Return the errors of the model and of its peers on the part held out."""
    x, held, y, truth = parts
    last = model[-1]
    eps = float(np.max(last.eps_))
    rows = [{"model": type(last).__name__, **_errors(model, held, truth, eps, norm)}]
    others = (
        {"logistic regression": LogisticRegression(max_iter=1000)}
        if hasattr(last, "classes_")
        else {"least squares": LinearRegression(), "RidgeCV": RidgeCV(), "Huber": HuberRegressor()}
    )
    for name, other in others.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the peers' own convergence
            peer = _pipeline(other, standardize).fit(x, y)
        rows.append({"model": name, **_errors(peer, held, truth, eps, norm)})
    return rows


def _all_linear(model: Any, x: Any, y: Any) -> list[str]:
    """Return a note if the Huber loss has no row in its quadratic part: it is an absolute loss."""
    last = model[-1]
    inner = model[:-1].transform(x) if len(model) > 1 else x
    given = last.coef_, float(last.intercept_), inner, y, last.eps_, last.norm
    heights = worst_case_loss(*given, "absolute")
    if (heights <= last.huber_threshold_).any():
        return []
    return [
        f"no training row is in the quadratic part of the Huber loss (threshold "
        f"{last.huber_threshold_:.4g}, least |residual| + ε‖w‖ {heights.min():.4g}): it is the "
        "absolute loss; raise --huber-threshold, or leave it in standard deviations of the target"
    ]


def _pipeline(estimator: Any, standardize: bool) -> Any:
    return make_pipeline(*([StandardScaler()] if standardize else []), estimator)


def _errors(model: Any, x: Any, y: Any, eps: float, norm: float) -> dict[str, float]:
    """Return clean and certified error on data held out, the attack in the model's own units."""
    inner = model[:-1].transform(x) if len(model) > 1 else x
    last = model[-1]
    if not hasattr(last, "classes_"):
        w, b = last.coef_, float(last.intercept_)
        clean, worst = (worst_case_loss(w, b, inner, y, e, norm).mean() for e in (0.0, eps))
        return {"clean_error": float(clean), "certified_error": float(worst)}
    wrong = last.predict(inner) != y
    broken = wrong | (certified_radius(last, inner, norm) <= eps)
    return {"clean_error": float(wrong.mean()), "certified_error": float(broken.mean())}


def save(model: Any, path: Path) -> None:
    """Write the model without pickle, whole or not at all."""
    import skops.io

    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    skops.io.dump(model, whole)
    whole.replace(path)


def show(result: dict[str, Any], out: Path | None) -> None:
    """Print coefficients, objective with its proof, and the comparison."""
    console = Console()
    unit = ", features standardised" if result["standardized"] else ""
    console.print(
        Text(
            f"{result['data']}: {result['loss']} loss, L{result['norm']} attack, "
            f"ε = {result['eps']:.4g} ({_share(result)} of ε_max{unit}), "
            f"{result['train']} samples, {result['test']} held out"
        )
    )
    console.print(_coefficients(result))
    console.print(
        Text(
            f"objective (mean worst-case loss) {result['objective']:.8g}, proven to within "
            f"{result['dual_gap']:.1e}; {result['steps']} steps"
        )
    )
    shown = Table("on the data held out", "clean error", "certified worst case", box=None)
    for row in result["comparison"]:
        figures = (f"{row[name]:.4g}" for name in ("clean_error", "certified_error"))
        shown.add_row(row["model"], *figures)
    console.print(shown)
    what = "mean squared error" if result["task"] == "regression" else "share of wrong predictions"
    console.print(Text(f"errors: {what}; the worst case is exact"))
    for note in result["notes"]:
        console.print(Text(f"note: {note}"))
    if out is not None:
        console.print(Text(f"model: {out}"))


def _share(result: dict[str, Any]) -> str:
    return f"{result['eps'] / result['eps_max']:.0%}" if result["eps_max"] else "–"


def _coefficients(result: dict[str, Any]) -> Table:
    """Return a table of the largest coefficients of the first model."""
    several = len(result["coefficients"]) > 1
    shown = Table("feature", "coefficient" + (" (first class)" if several else ""), box=None)
    values = np.asarray(result["coefficients"][0])
    order = np.argsort(-np.abs(values))
    for j in order[:REPORTED]:
        shown.add_row(Text(result["features"][j]), f"{values[j]:.6g}")
    if len(order) > REPORTED:
        shown.add_row(f"… {len(order) - REPORTED} more", "")
    shown.add_row("intercept", f"{result['intercepts'][0]:.6g}")
    return shown
