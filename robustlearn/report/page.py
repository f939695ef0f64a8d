"""The report as one HTML file that needs nothing else."""

import functools
import math
from pathlib import Path
from typing import Any

from robustlearn.report import figures
from robustlearn.report.comparison import compared, conclusion, stands
from robustlearn.report.table import figure

SHOWN_FEATURES = 8
SHOWN_SAMPLES = 200
SHOWN_CLASSES = 20


def page(document: dict[str, Any]) -> str:
    """Render a document; every name in it is escaped, and nothing is fetched from a network."""
    evaluations = [_view(evaluation) for evaluation in document["evaluations"]]
    return str(template().render(document=document, evaluations=evaluations))


def comparison_page(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Render the comparison of two documents of one evaluation each."""
    result = compared(first, second)
    shares = {
        name: [figure(share, "classification") for share in result[name]["shares"]]
        for name in ("clean", "attacked")
    }
    evaluations = [document["evaluations"][0] for document in (first, second)]
    curves = figures.curves(evaluations, result["models"])
    return str(
        template("comparison.html").render(
            c=result, conclusion=conclusion(result), figures=shares, curves=curves
        )
    )


@functools.cache
def template(name: str = "page.html") -> Any:
    """Return a template of this folder, in which every name is escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda value: f"{100 * value:.4g}%"
    return environment.get_template(name)


def number(value: Any) -> str:
    """A figure for reading: four digits, and a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == "inf":
        return "∞"
    if isinstance(value, float):
        return "∞" if math.isinf(value) and value > 0 else f"{value:.4g}"
    return str(value)


def _view(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return what the template shows of an evaluation."""
    task = evaluation["task"]
    columns = [key for key in evaluation["samples"][0] if _used(evaluation, key)]
    return {
        **evaluation,
        "figures": {
            name: figure(evaluation[name], task) for name in ("clean", "attacked", "certified")
        },
        "summary": _summary(evaluation),
        "curve_svg": figures.curve(evaluation),
        "margins_svg": figures.margins(evaluation),
        "cost_svg": figures.cost(evaluation),
        "trace_svg": figures.trace(evaluation),
        "confusion": _confusion(evaluation),
        "verdict_line": evaluation["verdict"]["text"].partition("\n")[0],
        "examples": [_example(evaluation, example) for example in evaluation["examples"]],
        "columns": columns,
        "rows": evaluation["samples"][:SHOWN_SAMPLES],
        "forwards": sum(run["forwards"] for run in evaluation["attacks"]),
        "backwards": sum(run["backwards"] for run in evaluation["attacks"]),
        "seconds": sum(run["seconds"] for run in evaluation["attacks"]),
    }


def _used(evaluation: dict[str, Any], key: str) -> bool:
    return any(sample[key] is not None for sample in evaluation["samples"])


def _confusion(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """Return accuracy by class, and how often each class is taken for each other."""
    if evaluation["task"] != "classification":
        return None
    samples = evaluation["samples"]
    labels = sorted({s[key] for s in samples for key in ("label", "prediction")}, key=str)
    if all(isinstance(label, int) for label in labels):
        labels.sort()
    if len(labels) > SHOWN_CLASSES:
        return None
    rows = []
    for label in labels:
        mine = [s for s in samples if s["label"] == label]
        if not mine:
            continue
        rows.append(
            {
                "name": _class_name(evaluation, label),
                "n": len(mine),
                "clean": sum(s["clean_correct"] for s in mine) / len(mine),
                "attacked": sum(stands(s) for s in mine) / len(mine),
                "counts": [sum(s["prediction"] == other for s in mine) for other in labels],
            }
        )
    return {"names": [_class_name(evaluation, label) for label in labels], "rows": rows}


def _summary(evaluation: dict[str, Any]) -> str:
    attacked, certified = evaluation["attacked"], evaluation["certified"]
    if evaluation["task"] == "regression":
        clean, found = number(evaluation["clean"]["value"]), number(attacked["value"])
        if certified is None:
            return (
                f"Attacks raise the mean squared error from {clean} to at least {found}; no "
                "certificate bounds it from above."
            )
        return (
            f"The mean worst squared error lies between {found} (found) and "
            f"{number(certified['value'])} (proven); clean it is {clean}."
        )
    if certified is None:
        return (
            f"At most {attacked['value']:.1%} of the samples are robust: attacks broke the rest. "
            "No certificate bounds the share from below."
        )
    if certified["value"] == attacked["value"]:
        return f"Exactly {attacked['value']:.1%} of these samples are robust: both bounds meet."
    return (
        f"Between {certified['value']:.1%} (proven) and {attacked['value']:.1%} (unbroken) of the "
        f"samples are robust; {attacked['value'] - certified['value']:.1%} are open."
    )


def _example(evaluation: dict[str, Any], example: dict[str, Any]) -> dict[str, Any]:
    shown = {key: example[key] for key in ("index", "label", "prediction", "distance", "broken_by")}
    for key in ("label", "prediction"):
        shown[key] = _class_name(evaluation, shown[key])
    pictures = figures.pictures(example["x"], example["x_adv"])
    if pictures is not None:
        return {**shown, "pictures": pictures, "features": None}
    return {**shown, "pictures": None, "features": _changes(evaluation, example)}


def _class_name(evaluation: dict[str, Any], label: Any) -> str:
    classes = evaluation["classes"]
    if evaluation["task"] == "classification" and classes and isinstance(label, int):
        return str(classes[label]) if 0 <= label < len(classes) else str(label)
    return number(label)


def _changes(evaluation: dict[str, Any], example: dict[str, Any]) -> list[tuple[str, float, float]]:
    """Return the features that changed most, as (name, before, after)."""
    before, after = figures.flat(example["x"]), figures.flat(example["x_adv"])
    names = evaluation["feature_names"] or [f"feature {j}" for j in range(len(before))]
    order = sorted(range(len(before)), key=lambda j: -abs(after[j] - before[j]))
    kept = [j for j in order[:SHOWN_FEATURES] if after[j] != before[j]]
    return [(names[j] if j < len(names) else f"feature {j}", before[j], after[j]) for j in kept]
