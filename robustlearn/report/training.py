"""What training did, epoch by epoch: training.json and a page of curves."""

import json
from pathlib import Path
from typing import Any

from robustlearn.report import figures
from robustlearn.report.files import plain, replace_file
from robustlearn.report.page import template
from robustlearn.report.table import figure

SCHEMA = "robustlearn-training/1"


def write_training(document: dict[str, Any], folder: Path) -> Path:
    """Write training.json and training.html; return the folder.

    Parameters
    ----------
    document : plain data with ``model, settings, rows, best, stopped, gradients, evaluated``; the
        rows are those of `robustlearn.loop.History`, ``gradients`` those of a sample over all
        epochs, and ``evaluated`` both bounds of the report, or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    whole = plain({"schema": SCHEMA, **document})
    text = json.dumps(whole, indent=1, allow_nan=False)
    replace_file(folder / "training.json", text.encode())
    replace_file(folder / "training.html", training_page(whole).encode())
    return folder


def training_page(document: dict[str, Any]) -> str:
    """Render what training did; every name is escaped, and nothing is fetched from a network."""
    rows = [
        {**row, "told": {**_prefixed("training", row["metrics"]), **row["validation"]}}
        for row in document["rows"]
    ]
    columns = list(rows[-1]["told"]) if rows else []
    shares = [name for name in columns if name in ("clean", "single", "robust")]
    drawn = [
        ("Held-out samples that are right", figures.epochs(rows, shares)),
        ("Mean loss of training", figures.epochs(rows, ["training loss"])),
    ]
    return str(
        template("training.html").render(
            t={**document, "rows": rows, "settings": _shown(document["settings"])},
            columns=columns,
            lead=_lead(document),
            bracket=_bracket(document["evaluated"]),
            figures=[pair for pair in drawn if pair[1] is not None],
        )
    )


def _shown(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings; those in parts as text."""
    return {
        name: ", ".join(f"{part} {held}" for part, held in value.items())
        if isinstance(value, dict)
        else value
        for name, value in settings.items()
    }


def _bracket(evaluated: dict[str, Any] | None) -> str:
    """Return both bounds in words, each with its interval; nothing without an evaluation."""
    if evaluated is None:
        return ""
    told = [
        f"{name} {figure(found, evaluated['task'])}"
        for name in ("clean", "attacked", "certified")
        if (found := evaluated[name]) is not None
    ]
    return f"In the end, on {evaluated['data']}: {', '.join(told)}."


def _prefixed(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix} {name}": value for name, value in values.items()}


def _lead(document: dict[str, Any]) -> str:
    rows, best = document["rows"], document["best"]
    seconds = sum(row["seconds"] for row in rows)
    text = f"{len(rows)} epochs in {seconds:.0f} s, {document['gradients']:.4g} gradients a sample."
    if best is None or not rows[best]["validation"]:
        return text
    found = rows[best]["validation"]
    return f"{text} The weights are those of epoch {best + 1}: " + ", ".join(
        f"{name} {value:.4g}" for name, value in found.items()
    )
