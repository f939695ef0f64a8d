"""Bounds beside those of auto_LiRPA, where it can be imported."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("auto_LiRPA")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def compared():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("peers", BENCHMARKS / "certify_peers.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["peers"] = module
        spec.loader.exec_module(module)
        yield [row for row in module.bounds(False, 0) if row["dtype"] == "float64"]
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop("peers", None)


def test_intervals_and_crown_are_the_same(compared):
    rows = [row for row in compared if "alpha" not in row["method"]]
    assert rows
    for row in rows:
        assert max(row["tighter"], row["looser"]) < 1e-9 * (1 + abs(row["ours"])), row


def test_optimised_slopes_bound_as_well(compared):
    rows = [row for row in compared if "alpha" in row["method"]]
    assert rows
    for row in rows:
        assert row["gain"] > -0.01, row
