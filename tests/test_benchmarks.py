"""Every benchmark runs in its quick form and leaves rows and their circumstances."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "recording")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_quick_run(name, tmp_path):
    out = tmp_path / "rows.csv"
    command = [sys.executable, FOLDER / f"{name}.py", "--quick", "--out", out]
    subprocess.run(command, check=True, capture_output=True, timeout=250)
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    about = json.loads(out.with_suffix(".json").read_text())
    assert {"command", "commit", "versions", "processor", "threads", "seed"} <= set(about)
    times = [row.get("seconds") or row.get("cpu_seconds") for row in rows]
    assert any(times)  # tables of counts alone have none
    assert all(float(time) > 0 for time in times if time)
