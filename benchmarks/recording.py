"""Rows of a benchmark as CSV, and beside them what they were measured with."""

import argparse
import csv
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

# a table's number, how its rows are measured (in full?, seed) and how they are shown
Tables = dict[
    int,
    tuple[Callable[[bool, int], Iterable[dict[str, Any]]], Callable[[list[dict[str, Any]]], None]],
]
SOURCES = (":/robustlearn", ":/benchmarks", ":(top,exclude)benchmarks/results")
PACKAGES = (
    "robustlearn",
    "torch",
    "numpy",
    "scipy",
    "scikit-learn",
    "torchattacks",
    "foolbox",
    "adversarial-robustness-toolbox",
    "adv-lib",
    "torchdefenses",
    "cvxpy",
    "clarabel",
    "pyod",
)


def arguments(description: str, *, tables: int = 0, threads: int = 2) -> argparse.Namespace:
    """Parse --quick | --full, --out, --seed and --threads; --table where there are several."""
    parser = argparse.ArgumentParser(description=description)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="seconds: shows that it runs (default)")
    size.add_argument("--full", action="store_true", help="minutes: the figures that are quoted")
    parser.add_argument("--out", type=Path, help="CSV file for the raw rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=threads)
    if tables:
        parser.add_argument("--table", type=int, choices=range(1, tables + 1), help="only this one")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    return given


def measured(tables: Tables, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure and print the tables that are asked for; return their rows, saved as they come."""
    rows: list[dict[str, Any]] = []
    for number, (measure, show) in tables.items():
        if given.table in (None, number):
            mine = []
            for row in measure(given.full, given.seed):
                mine.append({"table": number, **row})
                save([*rows, *mine], given)
            rows += mine
            if mine:
                show(mine)
    return rows


def save(rows: list[dict[str, Any]], given: argparse.Namespace) -> None:
    """Write the rows and a JSON file with commit, versions, hardware, seed and command."""
    if given.out is None:
        return
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="", encoding="utf-8") as file:
        columns = dict.fromkeys(key for row in rows for key in row)
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    about = {
        "command": shlex.join([*_asked(), "python", *sys.argv]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted": bool(_git("status", "--porcelain", "--", *SOURCES)),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "seed": given.seed,
    }
    given.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def _asked() -> list[str]:
    """Return the variables that say what is measured, as they stand before a command."""
    chosen = {name for name in os.environ if name.startswith("ROBUSTLEARN_")}
    return [f"{name}={os.environ[name]}" for name in sorted(chosen - {"ROBUSTLEARN_DATA"})]


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "?")
