"""Figures of a report: SVG curves and small pictures, from plain data alone."""

import base64
import io
from typing import Any

import numpy as np
from markupsafe import Markup

SAFE, OPEN, BROKEN = "#1b7f5c", "#e0a526", "#b3403a"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robustlearn",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def curve(evaluation: dict[str, Any]) -> Markup | None:
    """Accuracy against ε: the proven part, the open part, and what attacks broke."""
    data = evaluation["curve"]
    if data is None:
        return None
    eps, certified = data["eps"], data["certified"]
    attacked = np.array(data["attacked"], dtype=float)  # nan beyond the budget

    def draw(axes: Any) -> None:
        low = certified if certified is not None else [0.0] * len(eps)
        if certified is not None:
            axes.fill_between(eps, 0, low, color=SAFE, alpha=0.35, lw=0)
            axes.plot(eps, low, color=SAFE, label="certified")
        axes.fill_between(eps, low, attacked, color=OPEN, alpha=0.3, lw=0, label="open")
        axes.plot(eps, attacked, color=BROKEN, label="attacked")
        axes.axvline(evaluation["threat"]["eps"], color="0.5", lw=1, ls=":")
        axes.set(xlabel="ε", ylabel="share of samples", ylim=(0, 1.02), xlim=(0, eps[-1]))
        axes.legend(frameon=False, loc="upper right")

    return _svg(draw, "Accuracy against the budget ε, both bounds")


def scores(normal: list[float], new: list[float], threshold: float) -> Markup | None:
    """Distribution of anomaly scores: normal rows that the score had not seen, and new rows."""
    if not normal or not new:
        return None

    def draw(axes: Any) -> None:
        low, high = np.quantile([*normal, *new], [0.0, 0.99])
        bins = np.linspace(low, high if high > low else low + 1, 40).tolist()
        for values, colour, label in ((normal, SAFE, "normal rows"), (new, BROKEN, "new rows")):
            held = np.clip(values, bins[0], bins[-1])
            weights = np.full(len(held), 1 / len(held))
            axes.hist(held, bins, weights=weights, color=colour, alpha=0.45, label=label)
        axes.axvline(min(threshold, bins[-1]), color="0.3", lw=1, ls=":", label="threshold")
        axes.set(xlabel="anomaly score (the highest 1% in the last bar)", ylabel="share of rows")
        axes.legend(frameon=False)

    return _svg(draw, "Anomaly scores of normal and of new rows")


def curves(evaluations: list[dict[str, Any]], names: list[str]) -> Markup | None:
    """Accuracy under attack against ε of several models, certified ones dashed."""
    if any(evaluation["curve"] is None for evaluation in evaluations):
        return None

    def draw(axes: Any) -> None:
        for number, (evaluation, name) in enumerate(zip(evaluations, names, strict=True)):
            data, colour = evaluation["curve"], f"C{number}"
            attacked = np.array(data["attacked"], dtype=float)
            axes.plot(data["eps"], attacked, color=colour, label=_literal(name))
            if data["certified"] is not None:
                axes.plot(data["eps"], data["certified"], color=colour, ls="--")
        axes.axvline(evaluations[0]["threat"]["eps"], color="0.5", lw=1, ls=":")
        axes.set(xlabel="ε", ylabel="share of samples", ylim=(0, 1.02))
        axes.legend(frameon=False)

    return _svg(draw, "Accuracy against the budget ε of both models")


def margins(evaluation: dict[str, Any]) -> Markup | None:
    """Histogram of the margins, clean and the smallest found."""
    samples = evaluation["samples"]
    clean, found = (
        [float(s[name]) for s in samples if s[name] is not None]
        for name in ("clean_margin", "attacked_margin")
    )
    values = np.array(clean + found, dtype=float)
    values = values[np.isfinite(values)]
    if evaluation["task"] != "classification" or values.size == 0:
        return None
    low, high = np.quantile(values, [0.005, 0.995])
    edges = np.linspace(low, high if high > low else low + 1, 31)

    def draw(axes: Any) -> None:
        for data, colour, label in ((clean, SAFE, "clean"), (found, BROKEN, "under attack")):
            axes.hist(
                np.clip(data, edges[0], edges[-1]), edges, color=colour, alpha=0.5, label=label
            )
        axes.axvline(0, color="0.3", lw=1)
        axes.set(xlabel="margin (negative: misclassified)", ylabel="samples")
        axes.legend(frameon=False)

    return _svg(draw, "Margins of the samples, clean and under attack")


def cost(evaluation: dict[str, Any]) -> Markup | None:
    """Share of samples that stand against what the attacks so far have cost a sample."""
    runs = [run for run in evaluation["attacks"] if run["attempted"]]
    if evaluation["task"] != "classification" or not runs:
        return None
    n = evaluation["clean"]["n"]
    spent, standing = [0.0], [evaluation["clean"]["value"]]
    for run in runs:
        spent.append(spent[-1] + (run["forwards"] + run["backwards"]) / n)
        standing.append(standing[-1] - run["broken"] / n)

    def draw(axes: Any) -> None:
        axes.step(spent, standing, where="post", color=BROKEN)
        for run, at, left in zip(runs, spent[1:], standing[1:], strict=True):
            axes.annotate(run["name"].partition(":")[0], (at, left), fontsize=8, rotation=30)
        axes.set(xlabel="forward passes and gradients a sample", ylabel="share unbroken")

    return _svg(draw, "What the attacks cost, and what they found")


def trace(evaluation: dict[str, Any]) -> Markup | None:
    """Mean objective along the ascent that the verdict looked at."""
    values = evaluation["verdict"].get("ascent")
    if not values:
        return None

    def draw(axes: Any) -> None:
        axes.plot(values, color=BROKEN)
        axes.axhline(0, color="0.5", lw=1, ls=":")
        axes.set(xlabel="iteration", ylabel="mean objective (positive: broken)")

    return _svg(draw, "Loss against iteration")


def epochs(rows: list[dict[str, Any]], names: list[str]) -> Markup | None:
    """What was told of each epoch, a curve a name."""
    if not rows or not names:
        return None
    colours = {"clean": SAFE, "single": OPEN, "robust": BROKEN}

    def draw(axes: Any) -> None:
        at = [row["epoch"] + 1 for row in rows]
        for name in names:
            values = np.array([row["told"].get(name) for row in rows], dtype=float)
            axes.plot(at, values, color=colours.get(name, "0.3"), label=name, marker=".")
        axes.set(xlabel="epoch")
        axes.legend(frameon=False)

    return _svg(draw, ", ".join(names) + " against epoch")


def pictures(x: Any, x_adv: Any) -> dict[str, str] | None:
    """Before, after and their difference as PNG data, or None if samples are not images."""
    before, after = _image(np.array(x, dtype=float)), _image(np.array(x_adv, dtype=float))
    if before is None or after is None:
        return None
    low, high = min(before.min(), 0.0), max(before.max(), 1.0)
    change = after - before
    size = max(float(np.abs(change).max()), 1e-12)
    return {
        "before": _png((before - low) / (high - low)),
        "after": _png((after - low) / (high - low)),
        "change": _png(0.5 + change / (2 * size)),
    }


def flat(values: Any) -> list[float]:
    """Nested lists as one list."""
    return [float(v) for v in np.array(values, dtype=float).ravel()]


def _literal(name: str) -> str:
    """Return a name as matplotlib shows it: no formula, and not left out for its underscore."""
    return "\u200b" * name.startswith("_") + name.replace("$", r"\$")


def _image(array: np.ndarray) -> np.ndarray | None:
    """(C, H, W), (H, W, C) or (H, W) as (H, W) or (H, W, 3)."""
    if array.ndim == 3 and array.shape[0] in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    picture = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)
    return array if picture and min(array.shape[:2]) > 3 else None


def _png(array: np.ndarray) -> str:
    from matplotlib import image

    out = io.BytesIO()
    image.imsave(out, np.clip(array, 0, 1), cmap="gray", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _svg(draw: Any, title: str) -> Markup:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(6.0, 3.2), layout="constrained")
        FigureCanvasSVG(drawing)
        draw(drawing.add_subplot())
        out = io.StringIO()
        drawing.savefig(out, format="svg", metadata={"Date": None, "Title": title})
    text = out.getvalue()
    return Markup(text[text.index("<svg") :])
