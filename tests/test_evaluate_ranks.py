"""An evaluation in several processes gives the rows of one process, and writes once."""

import json

import evaluations
import numpy as np
import pytest
import torch
from evaluations import case, told
from test_loop_ranks import launch

from robustlearn.certify import Certificate


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def found(request, tmp_path_factory):
    """What each process found, and the folder that they shared."""
    folder = tmp_path_factory.mktemp("evaluations")
    done = launch(request.param, folder, script=evaluations.__file__)
    assert done.returncode == 0, done.stderr
    ranks = range(request.param)
    return [torch.load(folder / f"rank{r}", weights_only=False) for r in ranks], folder


def same(one, other):
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-6, abs=1e-9)
    return one == other


def assert_same(found, expected):
    torch.testing.assert_close(found["x_adv"], expected["x_adv"], rtol=0, atol=1e-9)
    for key in ("samples", "runs"):
        for row, other in zip(found[key], expected[key], strict=True):
            assert not {k for k in row if not same(row[k], other[k])}, (row, other)
    assert found["totals"] == pytest.approx(expected["totals"])
    assert found["notes"] == expected["notes"]
    assert found["verdict"] == expected["verdict"]


@pytest.mark.parametrize("name", evaluations.CASES)
def test_processes_find_what_one_finds(found, name):
    """150 samples in unequal parts: each attack, the audit and the search for nearer points."""
    parts = [part[name] for part in found[0]]
    assert_same(parts[0], told(case(name)))
    for part in parts[1:]:
        assert torch.equal(part.pop("x_adv"), parts[0]["x_adv"])
        assert part == {key: value for key, value in parts[0].items() if key != "x_adv"}


def test_each_certifies_its_share(found):
    numbers = [part["certified here"] for part in found[0]]
    assert sum(sum(part) for part in numbers) == evaluations.N


def test_a_certificate_of_parts_is_exact_if_all_are():
    radii = (np.array([0, 2]), [1.0, 3.0]), (np.array([1]), [2.0])
    parts = [
        (rows, Certificate("trees", exact=len(found) == 2, radius=np.array(found)))
        for rows, found in radii
    ]
    assert Certificate.joined(parts).radius.tolist() == [1.0, 2.0, 3.0]
    assert not Certificate.joined(parts).exact
    assert Certificate.joined(parts[:1]).exact


def test_what_one_refuses_all_refuse(found):
    assert [part["refused"] for part in found[0]] == ["sample 1 is not mine"] * len(found[0])


def test_all_have_one_certificate(found):
    """By the clock each proves what its own seconds are enough for, and all know all of it."""
    parts = [part["by the clock"] for part in found[0]]
    for part in parts[1:]:
        assert part["samples"] == parts[0]["samples"]
        assert part["runs"] == parts[0]["runs"]


def test_finished_batches_serve_any_number_of_processes(found):
    parts, folder = found
    expected = told(case("certified"))
    for again in (parts[0]["kept"], parts[0]["resumed"]):
        assert_same(again, expected)
    before = sorted((folder / "state").rglob("*"))
    assert_same(told(case("certified", resume=folder / "state")), expected)
    assert sorted((folder / "state").rglob("*")) == before  # nothing was left to do


def test_the_first_process_writes(found):
    folder = found[1] / "report"
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "samples.csv",
        "adversarial.npz",
        "report.html",
    }
    assert json.loads((folder / "report.json").read_text())["evaluations"][0]["samples"]


def test_the_command_prints_and_writes_once(found):
    parts, folder = found
    written = json.loads((folder / "command" / "report.json").read_text())
    assert json.loads(parts[0]["printed"]) == written
    assert not any(part["printed"] for part in parts[1:])
    rows = written["evaluations"][0]["samples"]
    assert [row["index"] for row in rows] == sorted({row["index"] for row in rows})
    kept = np.load(folder / "command" / "adversarial.npz")
    assert len(kept["x_adv"]) == sum(row["broken_by"] is not None for row in rows)
