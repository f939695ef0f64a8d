"""What the command line shows: tables, and where the report is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robustlearn.report import comparison_table, conclusion, figure, table


def show(reports: Sequence[Any], out: Path | None) -> None:
    """Print the table, the notes, and where the report is."""
    console = Console()
    console.print(table({"evaluations": [report.to_dict() for report in reports]}))
    for report in reports:
        if report.certified is None:
            console.print(Text(f"{report.model}: {report.certificate['reason']}"))
        console.print(Text(f"{report.model}: {report.verdict['text']}"))
        for run in report.attacks:
            if run.audit is not None:
                console.print(Text(f"{run.name}: {run.audit}"))
        for note in report.notes:
            console.print(Text(f"note on {report.model}: {note}"))
    if out is not None:
        console.print(Text(f"report: {out / 'report.html'}"))


def show_certificate(result: dict[str, Any], out: Path | None) -> None:
    """Print what was proven."""
    console = Console()
    exact = ", exact" if result["exact"] else ""
    if result["alpha"]:
        exact = f", each wrong with probability at most {result['alpha']:g}"
    console.print(Text(f"{result['model']} on {result['data']}, {result['threat']['text']}"))
    console.print(Text(f"method: {result['method']}{exact}; {len(result['samples'])} samples"))
    total = figure(result["certified"], result["task"])
    if result["task"] == "regression":
        console.print(Text(f"worst mean squared error, certified: {total}"))
    else:
        radius = np.array([row["radius"] for row in result["samples"]])
        quartiles = " / ".join(f"{v:.4g}" for v in np.quantile(radius, [0.25, 0.5, 0.75]))
        console.print(Text(f"right and certified: {total}"))
        console.print(Text(f"radius, quartiles: {quartiles}"))
    if result["open"] is not None:
        console.print(Text(f"neither certified nor falsified: {result['open']:.1%}"))
    if out is not None:
        console.print(Text(f"rows: {out / 'samples.csv'}"))


def show_comparison(result: dict[str, Any], out: Path | None) -> None:
    """Print two models beside each other, and what the test says."""
    console = Console()
    console.print(comparison_table(result))
    console.print(Text(conclusion(result)))
    for model, verdict in zip(result["models"], result["verdicts"], strict=True):
        console.print(Text(f"{model}: {verdict}"))
    if out is not None:
        console.print(Text(f"page: {out}"))


def attack_rows() -> list[dict[str, Any]]:
    """Return name, needs, norms and summary of each attack."""
    from robustlearn.attacks import ATTACKS

    return [
        {"name": name, **entry.facts, "summary": entry.summary} for name, entry in ATTACKS.items()
    ]


def show_attacks(rows: list[dict[str, Any]]) -> None:
    """Print the attacks and the presets."""
    from robustlearn.evaluate import PRESETS, plan

    console = Console()
    shown = Table("name", "needs", "norms", "what it does", box=None, pad_edge=False)
    for row in rows:
        shown.add_row(row["name"], row["needs"], row["norms"], Text(row["summary"]))
    console.print(shown)
    for preset in PRESETS:
        steps = ", ".join(step.label for step in plan(preset))
        console.print(Text(f"\n{preset} = {steps}"))
