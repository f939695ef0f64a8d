"""The command line as a user meets it: answers, exit statuses, and what it refuses to do."""

import collections
import csv
import json
import os
import pickle
import re
import subprocess
import sys
import time

import joblib
import numpy as np
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

import robustlearn
from robustlearn.cli import run

MODULE = """
import numpy as np, torch
from torch import nn
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression, Ridge

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))

def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def smoothed():
    from robustlearn import wrap
    from robustlearn.models import Smoothed
    return Smoothed(wrap(linear()), 0.5)

def linear():
    return LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True))

ready = linear()

def scores(x):
    return np.c_[x[:, 0], x[:, 1], x[:, 2]]

def broken():
    raise RuntimeError("no weights here")

def regressor():
    x, y = load_iris(return_X_y=True)
    return Ridge().fit(x, x[:, 0] + 0.5 * y)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(MODULE)
    x, y = load_iris(return_X_y=True)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    table = np.c_[x, x[:, 0] + 0.5 * y]
    np.savetxt(tmp_path / "t.csv", table, delimiter=",", header="a,b,c,d,t", comments="")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(model="my_module.py:linear", *more, data="data.npz", eps="3/10"):
    return run(["evaluate", "--model", model, "--data", data, "--norm", "l2", "--eps", eps, *more])


def test_help_is_fast_and_does_not_load_torch():
    command = [sys.executable, "-X", "importtime", "-m", "robustlearn", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "evaluate" in answer.stdout
    assert "torch" not in answer.stderr
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "robustlearn", "--help"], stdout=-3, check=True)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.5


def test_version_and_attacks(capsys):
    assert run(["--version"]) == 0
    assert robustlearn.__version__ in capsys.readouterr().out
    assert run(["attacks"]) == 0
    shown = capsys.readouterr().out
    assert "linear_exact" in shown
    assert "standard = " in shown
    assert run(["attacks", "--json"]) == 0
    assert {"name", "needs", "norms", "minimal", "summary"} == set(
        json.loads(capsys.readouterr().out)[0]
    )


@pytest.mark.parametrize("name", ["build", "linear", "ready", "scores"])
def test_evaluate_on_my_own_model(folder, capsys, name):
    assert evaluate(f"my_module.py:{name}", "--out", "report", "--attacks", "quick") == 0
    shown = capsys.readouterr()
    assert "report/report.html" in shown.out
    assert "clean: 150" in shown.err  # progress
    document = json.loads((folder / "report" / "report.json").read_text())
    assert document["evaluations"][0]["threat"]["eps"] == 0.3
    assert (folder / "report" / "samples.csv").is_file()
    assert document["command"].startswith("robustlearn evaluate --model my_module.py:")


def test_json_and_quiet(folder, capsys):
    assert evaluate("my_module.py:linear", "--json", "--limit", "40", "--seed", "3") == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    evaluation = json.loads(shown.out)["evaluations"][0]
    assert evaluation["clean"]["n"] == 40
    numbers = [s["index"] for s in evaluation["samples"]]
    assert numbers == sorted(numbers)
    assert max(numbers) > 40  # a random part, not the first rows
    labels = load_iris().target[numbers]
    assert [s["label"] for s in evaluation["samples"]] == labels.tolist()
    assert evaluation["certified"]["value"] == evaluation["attacked"]["value"]
    assert evaluate("my_module.py:linear", "--quiet", "--attacks", "fgsm") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_a_csv_and_a_regressor(folder, capsys):
    given = ["--target", "t", "--attacks", "fgsm,pgd:steps=5", "--json"]
    assert evaluate("my_module.py:regressor", *given, data="t.csv") == 0
    evaluation = json.loads(capsys.readouterr().out)["evaluations"][0]
    assert evaluation["task"] == "regression"
    assert evaluation["feature_names"] == ["a", "b", "c", "d"]
    assert evaluation["clean"]["value"] <= evaluation["attacked"]["value"]
    assert evaluation["attacked"]["value"] <= evaluation["certified"]["value"] * (1 + 1e-9)


FLOWERS = """
import numpy as np
from sklearn.linear_model import LogisticRegression

def build():
    table = np.loadtxt("flowers.csv", delimiter=",", skiprows=1)
    return LogisticRegression(max_iter=5000).fit(table[:, :4], table[:, 4].astype(int))
"""
FEATURES = """feature,type,mutable,min,max
unused,int,True,0,9
d,int,True,0,30
c,int,False,0,80
b,real,True,15,50
a,int,True,40,80
"""


@pytest.fixture
def flowers(folder):
    """Iris in whole millimetres as a table, a classifier of it, and what its features may do."""
    x, y = load_iris(return_X_y=True)
    rows = np.c_[(10 * x).round(), y]
    np.savetxt("flowers.csv", rows, fmt="%d", delimiter=",", header="a,b,c,d,t", comments="")
    (folder / "flowers.py").write_text(FLOWERS)
    (folder / "features.csv").write_text(FEATURES)
    return rows


def answered(verb, *more, table="features.csv"):
    """The exit status of a verb on the flowers, L∞ within a twentieth of each range."""
    given = "--model flowers.py:build --data flowers.csv --target t --norm linf --eps 1/20"
    return run([verb, *given.split(), "--features", table, *more])


def never_misled(rows):
    """Which flowers no allowed change misleads: without a sum over features, corners suffice."""
    reach = np.array([2, 35 / 20, 0, 1])  # a: 40/20; b: not whole; c: frozen; d: ⌊30/20⌋
    low, high = np.array([40, 15, 0, 0]), np.array([80, 50, 80, 30])
    x, y = rows[:, :4], rows[:, 4].astype(int)
    model = LogisticRegression(max_iter=5000).fit(x, y)
    ends = [np.maximum(x - reach, low) - x, np.minimum(x + reach, high) - x]
    safe = np.ones(len(x), bool)
    for rival in range(3):
        w = model.coef_[y] - model.coef_[rival]
        margin = (w * x).sum(1) + model.intercept_[y] - model.intercept_[rival]
        worst = margin + np.minimum(w * ends[0], w * ends[1]).sum(1)
        safe &= (worst > 0) | (y == rival)
    return safe


def test_a_table_of_features(flowers, capsys):
    truth = never_misled(flowers)
    assert answered("certify", "--json") == 0
    proven = json.loads(capsys.readouterr().out)
    assert [s["certified"] for s in proven["samples"]] == truth.tolist()
    assert answered("evaluate", "--out", "report", "--quiet") == 0
    with open("report/report.json") as file:
        found = json.load(file)["evaluations"][0]
    assert found["threat"]["type"] == "Tabular"
    assert [s["broken_by"] is None and s["clean_correct"] for s in found["samples"]] == list(truth)
    assert found["attacked"]["value"] < found["clean"]["value"]
    with np.load("report/adversarial.npz") as file:
        index, x_adv = file["index"], file["x_adv"]
    change = np.abs(x_adv - flowers[index, :4])
    assert (change <= [2, 35 / 20, 0, 1]).all()
    assert (x_adv[:, [0, 2, 3]] % 1 == 0).all()


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["--lower", "0"], FEATURES, "leave out --lower and --upper"),
        (["--upper", "9"], FEATURES, "leave out --lower and --upper"),
        ([], FEATURES.replace("a,int", "z,int"), "the feature table does not know a"),
        ([], FEATURES.replace(",max", ",most"), "lacks the columns max"),
        ([], FEATURES.replace("40,80", "60,80"), "data outside the box"),
        ([], FEATURES.replace("False", "no"), "mutable must be True or False"),
        ([], "", "not a readable table"),
        ([], None, "features.csv"),
    ],
)
@pytest.mark.parametrize("verb", ["evaluate", "certify"])
def test_a_table_of_features_that_cannot_be_used(flowers, capfd, verb, arguments, text, message):
    os.remove("features.csv")
    if text is not None:
        with open("features.csv", "w") as file:
            file.write(text)
    assert answered(verb, *arguments) == 2
    shown = capfd.readouterr().err
    assert message in " ".join(shown.split())
    assert "fault of robustlearn" not in shown


def test_certify(folder, capsys):
    command = ["certify", "--data", "iris", "--norm", "linf", "--eps", "1/10"]
    assert run([*command, "--model", "my_module.py:linear", "--out", "rows"]) == 0
    assert "linear, exact" in capsys.readouterr().out
    with open("rows/samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 150
    assert float(rows[0]["radius"]) > 0
    assert run([*command, "--model", "my_module.py:linear", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["exact"] is True
    assert result["certified"]["value"] == np.mean([float(r["radius"]) > 0.1 for r in rows])
    assert result["certified"]["low"] < result["certified"]["value"]
    table = ["certify", "--data", "t.csv", "--target", "t", "--norm", "linf", "--eps", "1/10"]
    assert run([*table, "--model", "my_module.py:regressor"]) == 0
    assert "worst mean squared error, certified: " in capsys.readouterr().out
    assert run([*command, "--model", "my_module.py:scores"]) == 2
    assert "scores is a black box: there is no network to bound" in capsys.readouterr().err


def test_certify_tells_what_is_open_and_what_is_only_probable(folder, capsys):
    command = ["certify", "--data", "iris", "--norm", "l2", "--eps", "1/4"]
    assert run([*command, "--model", "my_module.py:deep", "--budget", "1/2", "--out", "rows"]) == 0
    shown = capsys.readouterr().out
    with open("rows/samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = collections.Counter(row["status"] for row in rows)
    assert set(counts) <= {"certified", "falsified", "open"}
    assert f"neither certified nor falsified: {counts['open'] / 150:.1%}" in shown
    assert {row["by"] for row in rows} >= {"crown_ibp", "prediction"}
    assert run([*command, "--model", "my_module.py:smoothed", "--limit", "5"]) == 0
    assert "smoothing, each wrong with probability at most 0.001" in capsys.readouterr().out
    assert run([*command, "--model", "my_module.py:deep", "--seconds", "-1"]) == 2
    assert "seconds must be" in capsys.readouterr().err


def test_an_output_folder_keeps_what_is_in_it(folder):
    kept = folder / "r" / ".robustlearn-state" / "keep" / "thesis.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("years")
    (folder / "r" / "state").mkdir()
    (folder / "r" / "state" / "mine.npz").write_text("mine")
    for _ in range(2):
        assert evaluate("my_module.py:build", "--out", "r", "--attacks", "fgsm", "--quiet") == 0
    assert kept.read_text() == "years"
    assert (folder / "r" / "state" / "mine.npz").read_text() == "mine"


def test_resume(folder, capsys):
    assert evaluate("my_module.py:build", "--out", "r", "--attacks", "fgsm") == 0
    first = json.loads((folder / "r" / "report.json").read_text())
    assert evaluate("my_module.py:build", "--out", "r", "--attacks", "fgsm", "--resume") == 0
    again = json.loads((folder / "r" / "report.json").read_text())
    assert again["evaluations"][0]["samples"] == first["evaluations"][0]["samples"]
    assert evaluate("my_module.py:linear", "--out", "r", "--attacks", "fgsm", "--resume") == 2
    assert "changed since; go on with what was asked then" in capsys.readouterr().err
    assert evaluate("my_module.py:linear", "--out", "r", "--attacks", "fgsm") == 0  # starts anew
    assert evaluate("my_module.py:build", "--resume") == 2
    assert "--resume goes with --out" in capsys.readouterr().err


def test_a_budget_and_nearest_points(folder, capsys):
    plain = ["--attacks", "pgd:steps=30,fmn", "--certify", "none", "--json", "--limit", "30"]
    assert evaluate("my_module.py:linear", *plain, "--budget", "gradients=20") == 0
    (capped,) = json.loads(capsys.readouterr().out)["evaluations"]
    assert [run["name"] for run in capped["attacks"]] == ["pgd:steps=20", "fmn"]
    assert capped["attacks"][1]["skipped"] == "the budget is spent: gradients=20"
    assert capped["notes"] == [
        "the budget gradients=20 shortens pgd:steps=30 to pgd:steps=20",
        "the budget gradients=20 leaves nothing for fmn",
    ]
    assert evaluate("my_module.py:linear", *plain, "--budget", "gradients=many") == 2
    assert "write a budget as gradients=60,forwards=500" in capsys.readouterr().err
    for more in ([], ["--nearest"]):
        assert evaluate("my_module.py:linear", *plain, *more, eps="1") == 0
        (found,) = json.loads(capsys.readouterr().out)["evaluations"]
        first, second = found["attacks"]
        assert first["attempted"] == round(found["clean"]["value"] * 30)
        assert second["attempted"] == first["attempted"] - (0 if more else first["broken"])
        assert first["broken"] > 0


def test_compare(folder, capsys):
    for model in ("linear", "build"):
        assert evaluate(f"my_module.py:{model}", "--out", model, "--attacks", "pgd:steps=3") == 0
    capsys.readouterr()
    assert run(["compare", "linear", "build/report.json", "--out", "pages/both.html"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Under attack LogisticRegression holds on more of these samples than Seq" in shown
    assert "page: pages/both.html" in shown
    assert "LogisticRegression or Sequential?" in (folder / "pages" / "both.html").read_text()
    assert run(["compare", "build", "linear", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["attacked"]
    stands = []
    for name in ("build", "linear"):
        (one,) = json.loads((folder / name / "report.json").read_text())["evaluations"]
        rows = one["samples"]
        stands.append(np.array([s["clean_correct"] and not s["broken_by"] for s in rows]))
    assert found["only_first"] == (stands[0] & ~stands[1]).sum()
    assert found["only_second"] == (stands[1] & ~stands[0]).sum()
    assert evaluate("my_module.py:linear", "--out", "other", "--attacks", "fgsm", eps="0.1") == 0
    (folder / "other" / "torn").write_text('{"schema"')
    for second, message in (
        ("other", "the threats differ"),
        ("nowhere", "nowhere"),
        ("other/torn", "not readable as JSON"),
        ("data.npz", "not readable as JSON"),
    ):
        capsys.readouterr()
        assert run(["compare", "linear", second]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nothing.py:build"], "there is no file nothing.py"),
        (["--model", "nothing"], "there is no model 'nothing'"),
        (["--model", "my_module.py"], "say which model of my_module.py"),
        (["--model", "my_module.py:net"], "there is no 'net'; there are:"),
        (["--model", "my_module.py:broken"], "RuntimeError: no weights here"),
        (["--model", "no_such_package.x:net"], "importing no_such_package.x failed"),
        (["--data", "nothing.npz"], "there is no data file"),
        (["--data", "wine"], "batch of shape"),
        (["--eps", "8/0"], "not a number or a fraction"),
        (["--eps", "-1"], "eps must be finite and not negative"),
        (["--norm", "l0.5"], "p must be a number from 1"),
        (["--norm", "max"], "the norm must be linf"),
        (["--lower", "0", "--upper", "1"], "data outside the box"),
        (["--attacks", "fgsm,magic"], "no attack named 'magic'"),
        (["--device", "toaster"], "cannot be used"),
        (["--certify", "magic"], "no certificate named 'magic'"),
        (["--limit", "0"], "0 is not in the range|greater than or equal to 1"),
        (["--what"], "No such option|no such option"),
        (["--out", "/proc/nothing/here", "--attacks", "fgsm"], "/proc/nothing"),
    ],
)
def test_what_the_user_can_mend_exits_with_two(folder, capfd, arguments, message):
    given = {"--model": "my_module.py:build", "--data": "data.npz", "--eps": "0.1"}
    given |= dict(zip(arguments[::2], [*arguments[1::2], ""], strict=False))
    assert run(["evaluate", *(part for pair in given.items() for part in pair if part)]) == 2
    shown = capfd.readouterr().err
    assert re.search(message, " ".join(shown.split()))
    assert "fault of robustlearn" not in shown


def test_our_own_faults_exit_with_one(folder, monkeypatch, capsys):
    from robustlearn import data

    def fault(*args, **kwargs):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(data, "load", fault)
    assert evaluate() == 1
    assert "this is a fault of robustlearn; please report" in capsys.readouterr().err


class Evil:
    """A pickle that runs code."""

    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("kind", ["pickle", "joblib", "torch"])
def test_nothing_is_unpickled_unless_allowed(folder, capsys, kind):
    model = LogisticRegression(max_iter=1000).fit(*load_iris(return_X_y=True))
    for thing, name in ((Evil(), "evil"), (model, "model")):
        path = folder / f"{name}.bin"
        if kind == "torch":
            torch.save(thing, path)
        elif kind == "joblib":
            joblib.dump(thing, path)
        else:
            path.write_bytes(pickle.dumps(thing))
        assert evaluate(str(path)) == 2
        assert "Unpickling runs whatever code the file contains" in capsys.readouterr().err
        assert not (folder / "pwned").exists()
    with pytest.warns(UserWarning, match="this runs the code that the file contains"):
        assert evaluate(str(path), "--allow-pickle", "--attacks", "fgsm") == 0
    torch.save({"weight": torch.ones(2)}, folder / "weights.pt")
    with pytest.warns(UserWarning, match="unpickling"):
        assert evaluate("weights.pt", "--allow-pickle") == 2
    assert "holds a dictionary (weights?), not a model" in capsys.readouterr().err


def test_pickled_data_is_refused(folder, capsys):
    np.savez("evil.npz", x=np.array([Evil()], dtype=object), y=np.zeros(1))
    assert evaluate(data="evil.npz") == 2
    assert "object arrays are pickles" in capsys.readouterr().err
    assert not (folder / "pwned").exists()


def test_an_interrupt_says_how_to_go_on(folder, monkeypatch, capsys):
    from robustlearn import data

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    assert evaluate() == 130
    assert "an evaluation with --out goes on if" in capsys.readouterr().err
    asked = ["--model", "my_module.py:build", "--data", "iris", "--eps", "1", "--out", "run"]
    assert run(["train", *asked]) == 130
    assert "stopped; it goes on from its last checkpoint if" in capsys.readouterr().err
    assert run(["fit-linear", "--data", "iris", "--eps", "1"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_the_demo_in_small(folder, capsys):
    start = time.perf_counter()
    assert run(["demo", "--limit", "60", "--out", "robustness-report"]) == 0
    assert time.perf_counter() - start < 120
    shown = capsys.readouterr()
    assert "DigitsNet" in shown.out
    assert "training the network: 20" in shown.err
    document = json.loads((folder / "robustness-report" / "report.json").read_text())
    network, pipeline = document["evaluations"]
    assert 0 <= network["certified"]["value"] <= network["attacked"]["value"]
    assert pipeline["certified"]["value"] == pipeline["attacked"]["value"]
    assert network["attacked"]["value"] < network["clean"]["value"]
    for name in ("report.html", "samples.csv", "adversarial.npz"):
        assert (folder / "robustness-report" / name).is_file()


def test_fit_linear_and_certify_what_it_saved(folder, capsys):
    command = ["fit-linear", "--data", "t.csv", "--target", "t", "--eps", "1/20", "--norm", "linf"]
    assert run([*command, "--loss", "huber", "--out", "m.skops"]) == 0
    told = capsys.readouterr().out
    assert "proven to within" in told
    assert "least squares" in told
    assert run([*command, "--json", "--relative", "--standardize"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["dual_gap"] <= 1e-8 * result["objective"]
    assert result["eps"] == pytest.approx(result["eps_max"] / 20)
    assert [row["model"] for row in result["comparison"]][:2] == [
        "AdversarialRegressor",
        "least squares",
    ]
    for row in result["comparison"]:
        assert row["clean_error"] <= row["certified_error"]
    certify = ["certify", "--model", "m.skops", "--data", "t.csv", "--target", "t", "--eps", "1/20"]
    assert run([*certify, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["exact"]


def test_fit_linear_on_classes(folder, capsys):
    command = ["fit-linear", "--data", "iris", "--eps", "0.5", "--standardize"]
    assert run([*command, "--loss", "hinge", "--out", "m.skops", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert run(["evaluate", "--model", "m.skops", "--data", "iris", "--eps", "0.1", "--json"]) == 0
    bracket = json.loads(capsys.readouterr().out)["evaluations"][0]
    assert bracket["certified"]["value"] <= bracket["attacked"]["value"]
    assert run(command) == 2
    assert "say --loss logistic" in capsys.readouterr().err


def test_a_skops_file_with_foreign_types_is_refused(folder, capsys):
    import skops.io

    skops.io.dump({"model": Foreign()}, "foreign.skops")
    assert run(["certify", "--model", "foreign.skops", "--data", "iris", "--eps", "0.1"]) == 2
    assert "neither scikit-learn's nor ours" in capsys.readouterr().err
    (folder / "broken.skops").write_bytes(b"nothing")
    assert run(["certify", "--model", "broken.skops", "--data", "iris", "--eps", "0.1"]) == 2
    assert "not a readable .skops file" in capsys.readouterr().err


class Foreign:
    """Neither scikit-learn's nor ours."""


def test_the_threshold_of_huber_follows_the_target(folder, capsys):
    table = np.loadtxt("t.csv", delimiter=",", skiprows=1)
    header = (folder / "t.csv").read_text().splitlines()[0]
    target = header.split(",").index("t")
    table[:, target] *= 1e4
    np.savetxt("big.csv", table, delimiter=",", header=header, comments="")
    command = ["fit-linear", "--target", "t", "--eps", "0.1", "--relative", "--loss", "huber"]
    results = []
    for name in ("t.csv", "big.csv"):
        assert run([*command, "--data", name, "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
        assert results[-1]["notes"] == []
    small, big = results
    assert big["huber_threshold"] == pytest.approx(1e4 * small["huber_threshold"])
    np.testing.assert_allclose(big["coefficients"][0], 1e4 * np.array(small["coefficients"][0]))
    raw = [*command, "--data", "big.csv", "--huber-absolute", "--huber-threshold", "1e-3"]
    assert run([*raw, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["huber_threshold"] == 1e-3
    assert "no training row is in the quadratic part" in result["notes"][0]


def test_fit_linear_of_many_classes_with_a_relative_budget(folder, capsys):
    command = ["fit-linear", "--data", "iris", "--eps", "0.2", "--relative", "--loss", "hinge"]
    assert run([*command, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["eps"] == pytest.approx(0.2 * result["eps_max"])


def test_a_name_that_begins_like_ours_is_not_trusted(monkeypatch, folder, capsys):
    import skops.io

    names = ["robustlearn.linear.path.Path", "robustlearn.linear.search.AdversarialRegressorCV"]
    monkeypatch.setattr(skops.io, "get_untrusted_types", lambda file: names)
    (folder / "m.skops").write_bytes(b"")
    assert run(["certify", "--model", "m.skops", "--data", "iris", "--eps", "0.1"]) == 2
    assert "neither scikit-learn's nor ours: robustlearn.linear.path.Path;" in (
        capsys.readouterr().err
    )
