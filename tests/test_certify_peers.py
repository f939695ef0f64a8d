"""Bounds beside those of auto_LiRPA, where it can be imported."""

import importlib
from pathlib import Path

import pytest

pytest.importorskip("auto_LiRPA")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def compared():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        peers = importlib.import_module("certify_peers")
        return [row for row in peers.bounds(False, 0) if row["dtype"] == "float64"]


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
