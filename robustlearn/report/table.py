"""The answer as a table for the terminal."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def table(document: dict[str, Any]) -> Table:
    """Return one row an evaluation: both bounds with their 95% intervals."""
    title = "How robust? certified ≤ true ≤ attacked"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for name in ("model", "threat"):
        shown.add_column(name, overflow="fold")
    for name in ("clean", "attacked", "certified", "n"):
        shown.add_column(name, justify="right", no_wrap=True)
    for evaluation in document["evaluations"]:
        estimates = (evaluation[name] for name in ("clean", "attacked", "certified"))
        shown.add_row(
            Text(evaluation["model"]),
            Text(evaluation["threat"]["text"]),
            *(figure(estimate, evaluation["task"], "\n") for estimate in estimates),
            str(evaluation["clean"]["n"]),
        )
    return shown


def figure(estimate: dict[str, Any] | None, task: str, gap: str = " ") -> str:
    """An estimate with its interval: a percentage for accuracy, a number for a loss."""
    if estimate is None:
        return "none"
    form = "{:.1%}" if task == "classification" else "{:.4g}"
    value, low, high = (_shown(form, estimate[key]) for key in ("value", "low", "high"))
    return f"{value}{gap}({low.removesuffix('%')}–{high})"


def _shown(form: str, value: Any) -> str:
    if value is None:
        return "?"
    return value if isinstance(value, str) else form.format(value)
