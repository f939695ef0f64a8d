"""The answer as a table for the terminal."""

from typing import Any

from rich.table import Table
from rich.text import Text


def table(document: dict[str, Any]) -> Table:
    """Return one row an evaluation: both bounds with their 95% intervals, and the cost."""
    shown = Table(title="How robust? certified ≤ true ≤ attacked", title_justify="left")
    for name in ("model", "threat", "clean", "attacked", "certified", "n", "gradients a sample"):
        shown.add_column(name, justify="left" if name in ("model", "threat") else "right")
    for evaluation in document["evaluations"]:
        n = evaluation["clean"]["n"]
        gradients = sum(run["backwards"] for run in evaluation["attacks"]) / n
        shown.add_row(
            Text(evaluation["model"]),
            Text(evaluation["threat"]["text"]),
            figure(evaluation["clean"], evaluation["task"]),
            figure(evaluation["attacked"], evaluation["task"]),
            figure(evaluation["certified"], evaluation["task"]),
            str(n),
            f"{gradients:.1f}",
        )
    return shown


def figure(estimate: dict[str, Any] | None, task: str) -> str:
    """An estimate with its interval: a percentage for accuracy, a number for a loss."""
    if estimate is None:
        return "none"
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if task == "classification":
        return f"{value:.1%} ({low:.1%} to {high:.1%})"
    return f"{value:.4g} ({low:.4g} to {high:.4g})"
