"""`robustlearn detect` as a user meets it."""

import csv
import json

import numpy as np
import pytest

from robustlearn.cli import run
from robustlearn.report import detection_page


@pytest.fixture
def folder(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    normal, new = random.normal(size=(200, 3)), random.normal(size=(20, 3))
    new[4] = [0.0, 9.0, 0.0]
    for name, rows in (("normal", normal), ("new", new)):
        np.savetxt(tmp_path / f"{name}.csv", rows, delimiter=",", header="a,<b>,c", comments="")
    np.savez(tmp_path / "normal.npz", x=normal)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def detect(*more, data="normal.csv", score="new.csv", method="mean-distance"):
    return run(["detect", "--data", data, "--score", score, "--method", method, *more])


def test_it_flags_and_explains_and_writes_a_page(folder, capsys):
    assert detect("--out", "report", "--false-alarm", "1/50") == 0
    shown = capsys.readouterr().out
    assert "rows are flagged" in shown
    assert "<b> 9 →" in shown
    document = json.loads((folder / "report" / "detection.json").read_text())
    found = document["samples"][4]
    assert found["flagged"]
    assert found["p_value"] == pytest.approx(1 / 201)
    assert found["changes"][0][0] == "<b>"
    with (folder / "report" / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows if row["flagged"] == "True"] == [
        sample["row"] for sample in document["samples"] if sample["flagged"]
    ]
    page = (folder / "report" / "detection.html").read_text()
    assert "&lt;b&gt;" in page
    assert "<b>9" not in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http-equiv", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert page == detection_page(document)  # it can be drawn again from the document alone


def test_json_alone_and_the_hard_negatives(folder, capsys):
    assert detect("--json", "--explain", "0", method="hard-negatives") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["samples"][4]["flagged"]
    assert document["samples"][4]["changes"] == []


def test_a_rate_that_so_few_rows_cannot_keep_is_told(folder, capsys):
    assert detect("--false-alarm", "0.001") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "smallest p-value is 0.00498: give more normal rows" in shown
    assert "approximate" not in shown
    lines = (folder / "normal.csv").read_text().splitlines()
    (folder / "few.csv").write_text("\n".join(lines[:31]))
    assert detect(data="few.csv") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Learnt from 30 rows alone, that rate is approximate" in shown


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": "none.csv"}, "there is no data file"),
        ({"data": "normal.npz"}, "give the same columns"),
        ({"method": "magic"}, "--method must be one of"),
    ],
)
def test_what_the_user_can_mend(folder, capsys, options, said):
    assert detect(**options) == 2
    assert said in capsys.readouterr().err


def test_rows_that_cannot_be_read_are_told_by_place(folder, capsys):
    (folder / "header.csv").write_text("a,<b>,c\n")
    (folder / "gap.csv").write_text("a,<b>,c\n1,2,3\n4,,6\n")
    for name, said in (
        ("header.csv", "header.csv has a header and no rows"),
        ("gap.csv", "gap.csv holds NaN in row 1, column 1 (<b>)"),
    ):
        assert detect(score=name) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert said in shown
        assert "HistGradientBoosting" not in shown
    assert detect("--seed", "-1") == 2
    assert "random_state must be" in capsys.readouterr().err


def test_a_table_without_names_is_not_read_short_of_a_row(folder, capsys):
    (folder / "bare.csv").write_text("0.5,0,1\n1,2,3\n4,5,6\n")
    assert detect(data="bare.csv", score="bare.csv") == 2
    assert "the first line of bare.csv holds numbers, 0.5, 0, 1" in capsys.readouterr().err
    (folder / "counted.csv").write_text("0,1,3\n1,2,3\n4,5,6\n")  # as pandas names columns
    assert detect("--json", data="counted.csv", score="counted.csv") == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 2


@pytest.mark.parametrize("x", [[["1", "a"], ["2", "b"]], [], 3.0])
def test_arrays_that_are_no_rows_of_numbers(folder, capsys, x):
    np.savez(folder / "other.npz", x=x)
    assert detect(data="other.npz") == 2
    assert "numbers (n, d) were expected" in capsys.readouterr().err


def test_a_row_beyond_all_measure_is_flagged_and_reported(folder):
    (folder / "huge.csv").write_text("a,<b>,c\n0,0,0\n1e308,0,0\n")
    assert detect("--out", "huge", "--quiet", score="huge.csv") == 0
    document = json.loads((folder / "huge" / "detection.json").read_text())
    assert [sample["flagged"] for sample in document["samples"]] == [False, True]
    assert (folder / "huge" / "detection.html").exists()


def test_columns_that_are_left_out_or_hold_text(folder, capsys):
    (folder / "text.csv").write_text("a,<b>,c,kind\n1,2,3,x\n2,3,4,y\n")
    assert detect(data="text.csv") == 2
    assert "the columns kind hold text" in capsys.readouterr().err
    assert detect("--drop", "kind", data="text.csv", score="text.csv") == 0
    assert detect("--drop", "sort", data="text.csv") == 2
    assert "has no column 'sort'" in capsys.readouterr().err
