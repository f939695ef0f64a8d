"""`fit` and `robustlearn train`: known optima, exact resume, and what is refused."""

import json
import math
import re
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from games import Listener
from safetensors.torch import load_file
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

import robustlearn as rl
from robustlearn.cli import run
from robustlearn.linear import AdversarialRegressor
from robustlearn.loop import Samples
from robustlearn.train import Standing, fit
from robustlearn.train import fit as fitting
from robustlearn.train.objectives import OBJECTIVES, Criterion, options_of
from robustlearn.train.validation import validate

BALL = rl.LpBall(math.inf, 0.15, lower=0.0, upper=1.0)


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16).float(), torch.tensor(y)


def network(seed=0, width=48):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def weights(net):
    return torch.cat([w.detach().reshape(-1) for w in net.parameters()])


# ---------------------------------------------------------------------- known truth


def adversarial_loss(weight, bias, x, y, eps):
    """mean of (|wᵀx + b − y| + ε‖w‖₁)²: the worst case for p = ∞."""
    return float(((np.abs(x @ weight + bias - y) + eps * np.abs(weight).sum()) ** 2).mean())


@pytest.mark.parametrize("eps", [0.05, 0.3])  # where few errors, and where most, can change sign
@pytest.mark.parametrize(("objective", "off"), [("pgd_at:steps=1:step_size=1", 1e-4), (None, 1e-2)])
def test_a_linear_network_reaches_the_optimum_of_the_solver(objective, off, eps):
    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    exact = AdversarialRegressor(eps=eps, norm="inf").fit(x, y)
    net = nn.Linear(10, 1).double()
    fit(
        net,
        (x, y),
        rl.LpBall(math.inf, eps),
        objective=objective,
        validation=None,
        epochs=1500,
        batch_size=len(x),
        lr=0.02,
        schedule="cosine",
        ramp=0.0,
    )
    found = adversarial_loss(net.weight.detach().numpy()[0], float(net.bias.detach()), x, y, eps)
    best = adversarial_loss(exact.coef_, exact.intercept_, x, y, eps)
    assert best <= found <= best * (1 + off)


def test_without_a_budget_it_is_standard_training(digits):
    nets = [network(), network()]
    given = {"epochs": 2, "validation": None, "memory": False, "ramp": 0.0}
    fit(nets[0], digits, replace(BALL, eps=0.0), objective="pgd_at", **given)
    fit(nets[1], digits, BALL, objective="standard", **given)
    torch.testing.assert_close(weights(nets[0]), weights(nets[1]), rtol=1e-4, atol=1e-5)


def test_training_makes_it_robust_and_says_how_robust(digits):
    x, y = digits
    plain, robust = network(), network()
    given = {"epochs": 12, "lr": 3e-3, "attacks": "quick"}
    before = fit(plain, (x, y), BALL, objective="standard", **given)
    after = fit(robust, (x, y), BALL, **given)
    assert after.report.attacked.value > before.report.attacked.value + 0.2
    assert after.report.clean.value > 0.85
    best = after.history.rows[after.history.best]["validation"]
    assert best["robust"] == max(r["validation"]["robust"] for r in after.history.rows)
    assert after.report.attacked.value <= best["robust"] + 0.1  # on other samples
    assert "attacked" in str(after)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(digits, name):
    data = (digits[0][:600], digits[1][:600])
    rows = fit(network(), data, BALL, objective=name, epochs=4, lr=5e-3, attacks=None).history.rows
    assert rows[-1]["metrics"]["loss"] < rows[0]["metrics"]["loss"]
    assert rows[-1]["validation"]["clean"] > 0.5


@pytest.mark.parametrize("memory", [True, False])
def test_trades_has_an_adversary_from_the_first_step_on(digits, memory):
    """At x itself the divergence has no slope: an ascent that starts there goes nowhere."""
    plain, robust = network(), network()
    given = {"epochs": 8, "lr": 3e-3, "attacks": "quick", "memory": memory}
    before = fit(plain, digits, BALL, objective="standard", **given).report
    after = fit(robust, digits, BALL, objective="trades:steps=3", **given).report
    assert after.attacked.value > before.attacked.value + 0.1


def test_a_class_without_samples_does_not_matter(digits):
    x, y = (part[digits[1] != 3][:400] for part in digits)
    result = fit(network(), (x, y), BALL, epochs=6, lr=3e-3, attacks="fgsm")
    assert result.report.clean.value > 0.5
    assert 3 not in result.report.predictions
    assert all(row["skipped"] == 0 for row in result.history.rows)


def test_the_figures_of_a_validation(digits):
    """Of a linear model all three are known."""
    x, y = digits[0][:200].double(), (digits[1][:200] > 4).long()
    net = nn.Linear(64, 1).double()
    torch.manual_seed(1)
    threat = rl.LpBall(math.inf, 0.01)
    gap = (net(x).squeeze(1) * (2 * y - 1)).detach()
    reach = 0.01 * float(net.weight.detach().abs().sum())
    found = validate(rl.wrap(net, task="classification").source, x, y, threat)
    assert found.clean == pytest.approx(float((gap > 0).double().mean()))
    assert found.robust == pytest.approx(float((gap > reach).double().mean()))
    assert found.robust <= found.single <= found.clean


# ---------------------------------------------------------------------- catastrophic overfitting


def test_what_counts_as_overfitting():
    sound, better = Standing(0.9, 0.7, 0.6), Standing(0.95, 0.8, 0.7)
    assert not sound.overfitted(None)
    assert not sound.overfitted(better)
    assert Standing(0.99, 0.9, 0.1).overfitted(None)
    assert Standing(0.9, 0.85, 0.3).overfitted(better)
    assert not Standing(0.5, 0.3, 0.3).overfitted(better)  # worse, but not masked
    assert not Standing(-1.0, -9.0, -20.0).overfitted(None)  # errors of a regressor


@pytest.mark.parametrize("policy", ["warn", "rollback"])
def test_overfitting_is_told_and_rolled_back(digits, monkeypatch, policy):
    told = iter([Standing(0.9, 0.5, 0.4), Standing(0.99, 0.98, 0.01), Standing(0.9, 0.5, 0.3)])
    seen = []

    def found(net, *given, **options):
        seen.append(weights(net.source).clone())
        return next(told)

    monkeypatch.setattr(sys.modules["robustlearn.train.training"], "validate", found)
    games = []
    made = sys.modules["robustlearn.train.training"].RobustGame

    def kept(**given):
        games.append(made(**given))
        return games[-1]

    monkeypatch.setattr(sys.modules["robustlearn.train.training"], "RobustGame", kept)
    given = {"epochs": 3, "attacks": None, "on_overfitting": policy, "memory": False}
    with pytest.warns(UserWarning, match="catastrophic overfitting: 98.0% stand after a single"):
        fit(network(), (digits[0][:300], digits[1][:300]), BALL, objective="fgsm", **given)
    assert games[0].objective == ("pgd_at" if policy == "rollback" else "fgsm")
    if policy == "rollback":
        assert torch.equal(torch.cat([v.reshape(-1) for v in games[0].good.values()]), seen[0])


def test_a_network_that_has_not_seen_the_full_budget_is_not_overfitted(digits, monkeypatch):
    told = iter(
        [Standing(0.99, 0.9, 0.1), Standing(0.99, 0.95, 0.1), *[Standing(0.9, 0.5, 0.4)] * 2]
    )
    monkeypatch.setattr(
        sys.modules["robustlearn.train.training"], "validate", lambda *a, **k: next(told)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(network(), (digits[0][:300], digits[1][:300]), BALL, epochs=4, ramp=0.5, attacks=None)


def test_a_run_that_is_resumed_knows_its_best_weights(digits, tmp_path, monkeypatch):
    """Worse weights after the interruption must not be what is rolled back to."""
    told = [Standing(0.9, 0.6, s) for s in (0.4, 0.6, 0.5)] + [Standing(0.99, 0.98, 0.01)] * 2
    data = (digits[0][:300], digits[1][:300])
    given = {"epochs": 5, "attacks": None, "on_overfitting": "rollback", "save_every": 0.0}
    calls = iter(told)
    monkeypatch.setattr(
        sys.modules["robustlearn.train.training"], "validate", lambda *a, **k: next(calls)
    )

    def interrupt(moment):
        if (moment.epoch, moment.step) == (2, 2):
            raise KeyboardInterrupt

    nets = [network(), network(), network(seed=5)]
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        whole = fit(nets[0], data, BALL, out=tmp_path / "whole", **given)
    calls = iter(told)
    with pytest.raises(KeyboardInterrupt):
        fit(nets[1], data, BALL, out=tmp_path / "parts", progress=interrupt, **given)
    with pytest.warns(UserWarning, match="catastrophic overfitting"):
        parts = fit(nets[2], data, BALL, out=tmp_path / "parts", resume=True, **given)
    rows = [[{**r, "seconds": 0} for r in result.history.rows] for result in (whole, parts)]
    assert rows[0] == rows[1]


def test_a_run_that_is_killed_while_it_is_validated_rolls_back_as_the_other(
    few, tmp_path, monkeypatch
):
    """No step is played again then, and the epoch that has overfitted must still be judged so."""
    told = [Standing(0.9, 0.6, 0.4), Standing(0.99, 0.98, 0.01), *[Standing(0.9, 0.5, 0.3)] * 3]
    given = {"epochs": 5, "attacks": None, "on_overfitting": "rollback", "save_every": 0.0}
    given |= {"patience": 2, "ramp": 0.0}
    calls = iter(told)

    def found(*given, **options):
        standing = next(calls)
        if standing is None:
            raise KeyboardInterrupt
        return standing

    monkeypatch.setattr(sys.modules["robustlearn.train.training"], "validate", found)
    with pytest.warns(UserWarning, match="back to the best weights"):
        whole = fit(network(), few, BALL, out=tmp_path / "whole", **given)
    calls = iter([told[0], None])
    with pytest.raises(KeyboardInterrupt):
        fit(network(), few, BALL, out=tmp_path / "parts", **given)
    calls = iter(told[1:])
    with pytest.warns(UserWarning, match="back to the best weights"):
        parts = fit(network(seed=5), few, BALL, out=tmp_path / "parts", resume=True, **given)
    rows = [[{**r, "seconds": 0} for r in result.history.rows] for result in (whole, parts)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4  # patience begins anew with the objective of several steps


# ---------------------------------------------------------------------- interruption


@pytest.mark.parametrize(
    "options", [{}, {"ema": 0.9, "awp": 0.005}, {"on_overfitting": "rollback"}]
)
def test_an_interrupted_training_ends_with_equal_weights(digits, tmp_path, options):
    data = (digits[0][:400], digits[1][:400])
    given = {"epochs": 3, "attacks": None, "save_every": 0.0, **options}

    def interrupt(moment):
        if (moment.epoch, moment.step) == (1, 3):
            raise KeyboardInterrupt

    whole, parts = network(), network()
    first = fit(whole, data, BALL, out=tmp_path / "whole", **given)
    with pytest.raises(KeyboardInterrupt):
        fit(parts, data, BALL, out=tmp_path / "parts", progress=interrupt, **given)
    again = network(seed=5)
    second = fit(again, data, BALL, out=tmp_path / "parts", resume=True, **given)
    assert torch.equal(weights(whole), weights(again))
    rows = [[{**r, "seconds": 0} for r in result.history.rows] for result in (first, second)]
    assert rows[0] == rows[1]
    with pytest.raises(rl.InputError, match="awp"):
        fit(again, data, BALL, out=tmp_path / "parts", resume=True, **{**given, "awp": 0.3})


def test_a_memory_of_another_run_is_no_start(few, tmp_path):
    """The folder of that run is gone, or another is named; no step is made from its points."""
    file = tmp_path / "kept.npy"
    given = {**QUICK, "memory": file, "resume": True}
    fit(network(), few, BALL, out=tmp_path / "one", **given)
    content = file.read_bytes()
    with pytest.raises(rl.InputError, match="holds perturbations of another run"):
        fit(network(), few, BALL, out=tmp_path / "two", **given)
    assert file.read_bytes() == content
    fit(network(), few, BALL, out=tmp_path / "one", **given)
    np.save(file, np.zeros_like(np.load(file)))  # as of a run that was killed before its first step
    fit(network(), few, BALL, out=tmp_path / "two", **given)


class Noting(nn.Module):
    """A network that notes whether it is trained, and in which type it computes."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = network(), set()

    def forward(self, x):
        output = self.net(x)
        self.seen.add((self.training, output.dtype))
        return output


@pytest.mark.parametrize("objective", ["pgd_at:steps=2", "trades:steps=1", "mart:steps=1"])
def test_points_may_be_sought_in_another_precision_than_weights_are_trained(few, objective):
    net = Noting()
    fit(net, few, BALL, objective=objective, crafting="bf16", **QUICK)
    assert {(True, torch.float32), (False, torch.bfloat16)} <= net.seen
    assert (True, torch.bfloat16) not in net.seen
    with pytest.raises(rl.InputError, match="crafting is one of"):
        fit(net, few, BALL, crafting="fp8", **QUICK)


class Shifted(torch.utils.data.Dataset):
    """Digits that are moved to and fro by a draw of their own."""

    def __init__(self, x, y, *, draws=True):
        self.x, self.y, self.draws = x, y, draws

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        shift = int(torch.randint(2, ())) if self.draws else 0
        return self.x[i].roll(shift), self.y[i]


QUICK = {"epochs": 1, "attacks": None, "validation": None}


def test_perturbations_of_samples_that_are_drawn_anew_are_not_kept(digits):
    x, y = digits[0][:128], digits[1][:128]
    with pytest.raises(rl.InputError, match="memory=False to augment"):
        fit(network(), Shifted(x, y), BALL, memory=True, **QUICK)
    assert not fit(network(), Shifted(x, y), BALL, **QUICK).settings["memory"]
    assert fit(network(), Shifted(x, y, draws=False), BALL, **QUICK).settings["memory"]


@pytest.mark.parametrize("kind", ["dataset", "loader", "samples"])
def test_a_data_set_is_trained_on_as_arrays_are(digits, kind):
    x, y = digits[0][:150].double(), digits[1][:150].to(torch.uint8)
    given = {"epochs": 2, "batch_size": 32, "attacks": None}
    pairs = Shifted(x, y, draws=False)
    data = {"dataset": pairs, "loader": torch.utils.data.DataLoader(pairs), "samples": None}
    nets = [network(), network()]
    results = [fit(nets[0], (x, y), BALL, **given)]
    results.append(fit(nets[1], data[kind] or Samples((x, y)), BALL, **given))
    assert torch.equal(*map(weights, nets))
    assert len({str(result.history.rows[-1]["validation"]) for result in results}) == 1
    told = fit(network(), (x, y), BALL, validation=data[kind] or Samples((x, y)), **given)
    assert told.history.rows[0]["validation"]


def test_a_label_of_a_data_set_that_is_no_class_is_named(digits):
    x, y = digits[0][:64], digits[1][:64] + 3
    for objective in ("standard", "pgd_at", "trades"):
        with pytest.raises(rl.InputError, match="labels out of range"):
            fit(network(), Shifted(x, y, draws=False), BALL, objective=objective, **QUICK)


def test_where_features_move_in_whole_steps_ascents_start_afresh():
    x = torch.randint(0, 5, (64, 4), generator=torch.Generator().manual_seed(0)).float()
    y = (x[:, 0] > 2).long()
    kept = {}
    for integer in ([True, False, False, False], [False] * 4):
        threat = rl.Tabular(1, 2.0, integer=integer, lower=0.0, upper=4.0)
        kept[integer[0]] = fit(nn.Linear(4, 2), (x, y), threat, **QUICK).settings
    assert (kept[True]["memory"], kept[True]["objective"]) == (False, "pgd_at:steps=2")
    assert kept[False]["memory"]


# ---------------------------------------------------------------------- the command line


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "my_module.py"
    path.write_text(
        "import torch\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))\n"
    )
    return f"{path}:build"


def command(module, out, *more):
    box = ["--data", "digits", "--eps", "0.1", "--lower", "0", "--upper", "1", "--limit", "400"]
    return ["train", "--model", module, *box, "--epochs", "2", "--out", str(out), *more]


def test_the_command_writes_weights_and_reports(module, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(command(module, out, "--attacks", "quick")) == 0
    said = capsys.readouterr()
    assert re.search(r"epoch 2: loss [.\d]+, robust [.\d]+; held out clean [.\d]+", said.err)
    assert "best epoch" in said.out
    assert set(load_file(out / "model.safetensors")) == {"1.weight", "1.bias"}
    told = json.loads((out / "training.json").read_text())
    assert told["schema"] == "robustlearn-training/1"
    assert [row["epoch"] for row in told["rows"]] == [0, 1]
    page = (out / "training.html").read_text()
    assert "<svg" in page
    assert (out / "report.html").is_file()
    whole = json.loads((out / "report.json").read_text())["evaluations"][0]
    for name in ("data", "task", "clean", "attacked", "certified"):
        assert told["evaluated"][name] == whole[name]
    assert told["gradients"] == 4  # 2 epochs with one step and one update
    assert "4 gradients a sample" in page
    for name in ("clean", "attacked", "certified"):
        assert f"{name} {whole[name]['value']:.1%} ({100 * whole[name]['low']:.1f}–" in page
    assert run(command(module, out)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(command(module, out, "--attacks", "none", "--resume")) == 0


@pytest.mark.parametrize(
    ("objective", "options", "gradients"),
    [
        ("standard", {}, 1),
        ("free", {}, 4),
        ("free:replays=2", {}, 2),
        ("trades:steps=3", {}, 5),  # three steps, then x and the point
        ("pgd_at:steps=2", {"awp": 0.01, "ramp": 0.0}, 4),
    ],
)
def test_the_gradients_of_a_sample_are_counted(few, objective, options, gradients):
    result = fit(network(), few, BALL, objective=objective, validation=None, **options, **QUICK)
    assert [row["metrics"]["gradients"] for row in result.history.rows] == [gradients]
    assert result.document()["gradients"] == gradients


def test_trackers_hear_what_was_asked_and_the_bracket(few):
    listener = Listener()
    result = fit(network(), few, BALL, trackers=[listener], epochs=2, attacks="quick")
    asked = {"objective": result.settings["objective"], "lr": 1e-3, "ramp": 0.5}
    assert {name: listener.asked[name] for name in asked} == asked
    assert "0.15" in listener.asked["threat"]
    bounds = ("clean", "attacked", "certified")
    final = {f"final/{name}": getattr(result.report, name).value for name in bounds}
    assert listener.heard[-1] == (2, final)
    fit(network(), few, BALL, trackers=[listener], epochs=1, attacks=None)
    assert listener.heard[-1][0] == 0  # no figures, no row


def test_progress_is_told_from_python_too(few, capsys):
    fit(network(), few, BALL, progress=True, **{**QUICK, "epochs": 2})
    assert re.search(r"epoch 1: loss [.\d]+.*\nepoch 2: loss", capsys.readouterr().err)
    fit(network(), few, BALL, **QUICK)
    assert not capsys.readouterr().err


def test_the_command_takes_data_to_choose_by_to_judge_by_and_to_mix_in(module, tmp_path, capsys):
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(tmp_path / "more.npz", x=x[400:500], y=y[400:500])
    np.savez(
        tmp_path / "two.npz", x_train=x[:9], y_train=y[:9], x_test=x[500:560], y_test=y[500:560]
    )
    more, two = str(tmp_path / "more.npz"), str(tmp_path / "two.npz")
    asked = ["--validation", more, "--test", two, "--extra", more, "--extra-share", "0.5"]
    asked += ["--class-weights", "balanced", "--memory-file", str(tmp_path / "kept.npy")]
    assert run(command(module, tmp_path / "run", "--attacks", "quick", "--json", *asked)) == 0
    told = json.loads(capsys.readouterr().out)["settings"]
    assert told["memory"]
    assert sum(told["class_weights"]) == pytest.approx(10, abs=1)
    (report,) = json.loads((tmp_path / "run" / "report.json").read_text())["evaluations"]
    assert (report["data"], len(report["samples"])) == ("test", 60)
    assert np.load(tmp_path / "kept.npy").shape == (500, 1, 8, 8)
    assert run(command(module, tmp_path / "other", "--class-weights", "1,x")) == 2
    assert "one number a class" in capsys.readouterr().err
    assert run(command(module, tmp_path / "other", "--test", "iris")) == 2


def test_the_seed_of_the_command_seeds_what_builds_the_network(tmp_path, untouched):
    path = tmp_path / "unseeded.py"
    path.write_text(
        "import random\n\nimport numpy as np\nimport torch\n\ndef build():\n"
        "    net = torch.nn.Linear(64, 10)\n"
        "    with torch.no_grad():\n"
        "        net.bias += random.random() + np.random.rand()\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), net)\n"
    )
    given = ["--attacks", "none", "--validation", "0", "--quiet"]
    found = []
    for name, seed in (("one", 7), ("again", 7), ("other", 8)):
        out = tmp_path / name
        asked = command(f"{path}:build", out, "--seed", str(seed), *given)
        assert run([*asked, "--lr", "1e-30", "--limit", "20"]) == 0
        found.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())
    assert not any(torch.allclose(found[0][name], value) for name, value in found[2].items())


def test_balanced_weights_count_the_classes_of_the_network(module, tmp_path, capsys):
    x = np.zeros((10, 64), dtype=np.float32)
    asked = ["--class-weights", "balanced", "--attacks", "none", "--validation", "0", "--json"]
    y = np.array([0] * 8 + [2.0] * 2)
    for labels, said in (
        (y, None),
        (np.sign(y - 1), "labels out of range: y spans -1 to 1, but Sequential has 10 classes"),
        (y + 0.5, "fractions like 0.5"),
    ):
        np.savez(tmp_path / "data.npz", x=x, y=labels)
        given = command(module, tmp_path / str(said), *asked, "--data", str(tmp_path / "data.npz"))
        assert run(given) == (0 if said is None else 2)
        told = capsys.readouterr()
        if said is None:
            weights = json.loads(told.out)["settings"]["class_weights"]
            assert weights == pytest.approx([10 / (10 * n) for n in (8, 1, 2, *[1] * 7)])
        else:
            assert said in told.err


def test_the_command_prints_json_and_takes_a_criterion(tmp_path, capsys):
    path = tmp_path / "regression.py"
    path.write_text("import torch\n\nnet = torch.nn.Linear(10, 1)\n")
    given = [
        "train",
        "--model",
        f"{path}:net",
        "--data",
        "diabetes",
        "--norm",
        "l2",
        "--eps",
        "0.1",
    ]
    more = ["--criterion", "huber", "--epochs", "2", "--attacks", "none", "--json"]
    assert run([*given, *more, "--out", str(tmp_path / "run")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["criterion"] == "huber"
    assert len(told["rows"]) == 2
    assert run([*given, "--criterion", "hinge", "--out", str(tmp_path / "other")]) == 2
    assert "a criterion is cross_entropy, squared or huber" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--objective", "tradez"], "there is no objective named 'tradez'"),
        (["--objective", "trades:gamma=1"], "trades has no option 'gamma'; it has beta, steps"),
        (["--objective", "trades:beta=abc"], "beta must be a number"),
        (["--validation", "1.5"], "validation is a share"),
        (["--ramp", "-1"], "ramp is a share"),
        (["--on-overfitting", "hope"], "on_overfitting is one of warn, rollback"),
        (["--optimizer", "lion"], "an optimizer is adamw, sgd"),
        (["--no-memory", "--memory-file", "kept.npy"], "--no-memory keeps no perturbations"),
        (["--extra-share", "0.5"], "the share of --extra in a batch: say which data"),
    ],
)
def test_what_is_refused(module, tmp_path, capsys, more, said):
    assert run(command(module, tmp_path / "run", *more)) == 2
    assert said in capsys.readouterr().err


def test_other_refusals(digits):
    x, y = digits
    with pytest.raises(rl.InputError, match="one budget for all samples"):
        fit(network(), digits, rl.LpBall(2, torch.full((len(x),), 0.1)))
    moved = Samples((x, y), augment=lambda x, keys: x)
    with pytest.raises(rl.InputError, match="memory=False to augment"):
        fit(network(), moved, BALL, validation=None, memory=True)
    with pytest.raises(rl.InputError, match="free steps after each replay"):
        fit(network(), digits, BALL, objective="free", accumulate=2)
    for wrong, said in (
        ({"lr": -1.0}, "lr must be a number in"),
        ({"awp": math.nan}, "awp must be a number in"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"objective": "pgd_at:steps=0"}, "steps must be a whole number in"),
        ({"on_overfitting": "rollback", "ema": 0.9}, "leave out ema"),
        ({"on_overfitting": "rollback", "validation": None}, "'rollback' look at samples held"),
        ({"patience": 2, "validation": 0}, "patience=2 look at .* and validation=0 holds out none"),
    ):
        with pytest.raises(rl.InputError, match=said):
            fit(network(), digits, BALL, **wrong)
    with pytest.raises(rl.InputError, match="labels out of range"):
        fit(network(), (x, y + 1), BALL)
    with pytest.raises(rl.InputError, match="gives steps twice"):
        options_of("pgd_at:steps=1:steps=2")
    with pytest.raises(rl.InputError, match="for classifiers"):
        fit(nn.Linear(64, 1), (x, y.float()), BALL, objective="trades", validation=None, epochs=1)


def test_regression_with_huber(digits):
    x, y = digits
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 1))
    result = fit(net, (x, y.float()), BALL, criterion=Criterion("huber"), epochs=3, attacks="quick")
    rows = result.history.rows
    assert rows[-1]["validation"]["robust"] > rows[0]["validation"]["robust"]
    assert result.report.task == "regression"


@pytest.mark.slow
def test_two_processes_train_as_one(module, tmp_path):
    outs = [tmp_path / "one", tmp_path / "two"]
    for out, launcher in zip(
        outs, (["-m"], ["-m", "torch.distributed.run", "--nproc_per_node", "2", "-m"]), strict=True
    ):
        told = [
            sys.executable,
            *launcher,
            "robustlearn",
            *command(module, out, "--attacks", "fgsm"),
        ]
        subprocess.run(told, check=True, timeout=240, capture_output=True)
    one, two = (load_file(out / "model.safetensors") for out in outs)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)
    evaluations = [json.loads((out / "report.json").read_text())["evaluations"][0] for out in outs]
    samples = [evaluation["samples"] for evaluation in evaluations]
    assert len(samples[0]) == 20
    for first, second in zip(*samples, strict=True):
        assert second["digest"] == first["digest"]
        for name in ("clean_margin", "attacked_margin"):
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-4)


def test_the_name_is_the_function():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.fit is fitting


# ---------------------------------------------------------------------- what is given

QUICK = {"epochs": 1, "attacks": None}


@pytest.fixture(scope="module")
def few(digits):
    return digits[0][:300], digits[1][:300]


@pytest.mark.parametrize("seed", range(4))
def test_a_single_logit_is_trained_whatever_it_is_for_the_first_sample(few, seed):
    x, y = few[0], (few[1] > 4).long()
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        net[2].bias.fill_(0.4 - net(x[:1]).squeeze())  # the logit of the first sample is 0.4
    result = fit(net, (x, y), BALL, epochs=1, attacks="fgsm")
    assert result.settings["criterion"] == "cross_entropy"
    assert result.report.task == "classification"


def test_a_wrapped_network_is_trained(few):
    net = network()
    assert fit(rl.wrap(net), few, BALL, **QUICK).model is net


@pytest.mark.parametrize("outputs", [1, 10])
def test_whole_labels_in_a_floating_type_are_classes(few, outputs):
    y = few[1].float() if outputs > 1 else (few[1] > 4).float()
    net = nn.Linear(64, outputs)
    result = fit(net, (few[0], y), BALL, **QUICK)
    assert result.settings["criterion"] == "cross_entropy"
    assert result.history.rows[0]["validation"]["robust"] >= 0
    fit(nn.Linear(64, outputs), (few[0], y), BALL, criterion="cross_entropy", **QUICK)
    extra = few[0][:9], y[:9]
    for data in (
        Samples((few[0], y), extra=extra, ratio=0.1),
        Samples(Shifted(few[0], y), extra=extra, ratio=0.1),
    ):
        result = fit(nn.Linear(64, outputs), data, BALL, **QUICK)
        assert result.settings["criterion"] == "cross_entropy"


def test_whole_targets_are_targets_where_the_criterion_says_so(few):
    result = fit(nn.Linear(64, 1), few, BALL, criterion="squared", **QUICK)
    assert result.history.rows[0]["validation"]["robust"] < 0


def test_a_column_of_targets_is_trained_as_a_row(few):
    rows = []
    for shape in ((-1,), (-1, 1)):
        torch.manual_seed(0)
        y = few[1].float().reshape(shape)
        rows.append(fit(nn.Linear(64, 1), (few[0], y), BALL, **QUICK).history.rows[0]["metrics"])
    assert rows[0] == rows[1]


def test_the_report_is_not_about_the_samples_that_chose_the_epoch(few, monkeypatch):
    chose = []

    def found(net, x, y, *given, **options):
        chose.append(x)
        return Standing(0.5, 0.4, 0.3)

    monkeypatch.setattr(sys.modules["robustlearn.train.training"], "validate", found)
    given = {"epochs": 1, "attacks": "fgsm", "validation": 0.2}
    halves = fit(network(), few, BALL, **given).report
    assert len(halves.x) == len(chose[0]) == 30
    assert not torch.cdist(chose[0], torch.tensor(halves.x)).eq(0).any()
    assert halves.data.startswith("held out, apart from those that chose")
    own = fit(network(), few, BALL, test=(few[0][:50], few[1][:50]), **given).report
    assert (own.data, len(own.x), len(chose[1])) == ("test", 50, 60)
    pair = fit(network(), few, BALL, **{**given, "validation": few}).report
    assert pair.data.endswith("chose the epoch: biased upwards")
    single = fit(network(), few, BALL, **{**given, "validation": np.float32(0.2)}).report
    assert len(single.x) == len(halves.x)


def test_a_share_that_holds_out_no_sample_is_told(few):
    eight = few[0][:8], few[1][:8]
    with pytest.warns(UserWarning, match=r"validation=0.1 holds out none of 8 samples"):
        result = fit(network(), eight, BALL, epochs=1, attacks="fgsm")
    assert (result.report, result.history.best) == (None, 0)
    with pytest.raises(rl.InputError, match="holds out none of 8: give a larger share"):
        fit(network(), eight, BALL, epochs=1, patience=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(network(), eight, BALL, epochs=1, validation=0)


def test_after_a_rollback_the_restored_weights_are_told_and_kept(few, monkeypatch):
    """The overfitted epoch has the higher figure, and its weights are gone."""
    told = iter([Standing(0.9, 0.2, 0.1), Standing(0.99, 0.98, 0.2), Standing(0.9, 0.2, 0.05)])
    seen = []

    def found(net, *given, **options):
        seen.append(weights(net.source).clone())
        return next(told)

    monkeypatch.setattr(sys.modules["robustlearn.train.training"], "validate", found)
    net = network()
    with pytest.warns(UserWarning, match="back to the best weights"):
        result = fit(net, few, BALL, epochs=3, attacks=None, ramp=0.0, on_overfitting="rollback")
    assert result.history.best == 0
    assert result.history.rows[1]["validation"]["robust"] == 0.1
    assert torch.equal(weights(net), seen[0])


def test_a_weak_network_is_no_overfitted_one():
    assert not Standing(0.4, 0.033, 0.0).overfitted(Standing(0.3, 0.03, 0.02))
    assert not Standing(0.85, 0.113, 0.0).overfitted(Standing(0.8, 0.1, 0.013))  # ε has just grown
    assert Standing(0.9, 0.2, 0.05).overfitted(Standing(0.9, 0.2, 0.15))


def test_a_second_overfitting_is_not_advised_what_is_on(few, monkeypatch):
    masked = Standing(0.99, 0.98, 0.01)
    told = iter([Standing(0.9, 0.5, 0.4), masked, masked])
    monkeypatch.setattr(
        sys.modules["robustlearn.train.training"], "validate", lambda *a, **k: next(told)
    )
    given = {"epochs": 3, "attacks": None, "ramp": 0.0, "on_overfitting": "rollback"}
    with pytest.warns(UserWarning, match="catastrophic") as caught:
        result = fit(network(), few, BALL, **given)
    said = [str(w.message) for w in caught if "catastrophic" in str(w.message)]
    assert [text.rsplit("; ")[-1] for text in said] == [
        "back to the best weights, with more steps",
        "use more steps",
    ]
    assert result.settings["rolled_back"] == {"after_epoch": 1, "to": "pgd_at:steps=4"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"criterion": Criterion(smoothing=0.5)}, "smoothing was 0.0, is 0.5"),
        ({"criterion": Criterion(weights=torch.arange(1.0, 11))}, "class_weights was"),
        ({"validation": 60}, "validation was"),
        ({"train": 151}, "data was"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(few, tmp_path, changed, said):
    given = {**QUICK, "out": tmp_path, "validation": (few[0][:50], few[1][:50])}
    fit(network(), few, BALL, **given)
    if "validation" in changed:
        changed = {"validation": tuple(part[50 : changed["validation"]] for part in few)}
    y = few[1].clone()
    y[changed.pop("train", [])] = 0
    with pytest.raises(rl.InputError, match=said):
        fit(network(), (few[0], y), BALL, resume=True, **{**given, **changed})


FIRST = torch.arange(64) == 0


def tabular(**given):
    sides = {"integer": [False] * 64, "lower": 0.0, "upper": 1.0}
    return rl.Tabular(1, 0.5, **{**sides, **given})


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (replace(BALL, eps=0.1234561), replace(BALL, eps=0.1234569), "eps was 0.1234561"),
        (replace(BALL, mask=FIRST), replace(BALL, mask=~FIRST), "mask was"),
        (replace(BALL, scale=1.0 + FIRST), replace(BALL, scale=1.0 + ~FIRST), "scale was"),
        (replace(BALL, lower=-1.0 * FIRST), replace(BALL, lower=-1.0 * FIRST.roll(1)), "lower was"),
        (tabular(integer=FIRST), tabular(integer=FIRST.roll(1)), "integer was"),
        (tabular(groups=[(0, 1)]), tabular(groups=[(0, 2)]), "groups was"),
        (tabular(direction=[1] + [0] * 63), tabular(direction=[-1] + [0] * 63), "direction was"),
    ],
)
def test_a_checkpoint_against_another_threat_of_equal_name_is_refused(
    tmp_path, before, after, said
):
    assert str(before) == str(after)
    data = FIRST.float().repeat(20, 1), torch.arange(20) % 10
    given = {**QUICK, "out": tmp_path, "objective": "standard", "validation": None}
    fit(network(), data, before, **given)
    fit(network(), data, replace(before), resume=True, **given)
    with pytest.raises(rl.InputError, match=said):
        fit(network(), data, after, resume=True, **given)


def test_the_settings_tell_how_it_was_trained(few):
    told = fit(network(), few, BALL, lr=0.01, ema=0.9, optimizer="sgd", **QUICK).settings
    asked = {"lr": 0.01, "ema": 0.9, "optimizer": "SGD", "batch_size": 64, "precision": "float32"}
    assert asked.items() <= told.items()
    assert {"weight_decay", "schedule", "clip", "patience", "accumulate"} <= told.keys()


def test_the_settings_tell_the_rates_of_the_optimizer_that_was_given(few):
    told = []
    for rates in ((0.3, 0.3), (0.3, 0.1)):

        def made(parameters, rates=rates):
            weight, *rest = parameters
            groups = [{"params": [weight], "lr": rates[0]}, {"params": rest, "lr": rates[1]}]
            return torch.optim.SGD(groups, weight_decay=0.01)

        told.append(fit(network(), few, BALL, optimizer=made, **QUICK).settings)
    assert [settings["lr"] for settings in told] == [0.3, [0.3, 0.1]]
    assert [settings["weight_decay"] for settings in told] == [0.01, 0.01]


class Shares(nn.Module):
    """A softmax that is no layer."""

    def __init__(self):
        super().__init__()
        self.inner = network()

    def forward(self, x):
        return self.inner(x).softmax(1)


def ending_in(layer, outputs=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs), layer)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (ending_in(nn.Softmax(1)), "ends in Softmax.*remove that layer"),
        (ending_in(nn.Sigmoid(), 1), "ends in Sigmoid"),
        (nn.Sequential(nn.Sequential(nn.Linear(64, 10), nn.Softmax(-1))), "ends in Softmax"),
        (Shares(), "returns probabilities"),
        (nn.Flatten(), "has no parameter to train"),
        (nn.LazyLinear(10), "lazy layers.*send a batch"),
        (nn.Linear(64, 10).requires_grad_(False), "has no parameter to train"),
        (lambda x: x, "training needs a torch network"),
        (rl.wrap(lambda x: x, num_classes=2), "training needs a torch network"),
    ],
)
def test_networks_that_would_train_on_the_wrong_function_are_refused(few, net, said):
    y = few[1] if "Sigmoid" not in said else (few[1] > 4).long()
    with pytest.raises(rl.InputError, match=said):
        fit(net, (few[0], y), BALL, **QUICK)


def test_a_gate_inside_and_the_head_of_a_regressor_are_no_softmax_at_the_end(few):
    gate = nn.Sequential(nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 10), nn.LogSoftmax(1))
    fit(gate, few, BALL, **QUICK)
    fit(ending_in(nn.Sigmoid(), 1), (few[0], few[1] / 9), BALL, **QUICK)


X, Y = torch.rand(60, 64, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 10


@pytest.mark.parametrize(
    ("data", "threat", "options", "said"),
    [
        ((X, Y), BALL, {"attacks": "standrd"}, "no attack named 'standrd'"),
        ((X + 1, Y), BALL, {"validation": None}, "data outside the box"),
        (Samples((X + 1, Y)), BALL, {"validation": None}, "data outside the box"),
        ((X, Y), BALL, {"validation": (X - 1, Y)}, "data outside the box"),
        ((X, Y), rl.LpBall(0, 3, lower=0.0, upper=1.0), {}, "is known for p = 1, 2 and ∞; got p"),
        ((X, Y), rl.LpBall(3, 0.1), {"validation": None}, "got p = 3"),
        ((X, Y), "linf", {}, "a threat is expected.*got 'linf'"),
        ((X, Y), BALL, {"validation": (X, Y[:50])}, "validation: x has 60 samples, y has 50"),
        ((X, Y), BALL, {"test": (X, Y[:50])}, "test: x has 60 samples, y has 50"),
        ((X, Y), BALL, {"validation": (X, Y, Y)}, r"validation is a pair \(x, y\).*3 parts"),
        ((X, Y, Y), BALL, {}, r"train is a pair \(x, y\).*3 parts"),
        ((X, None), BALL, {}, "train has no labels"),
        (Samples(X), BALL, {"validation": None}, "expected one class or target a sample"),
        ((X, Y[:, None].repeat(1, 2)), BALL, {}, r"y of train has shape \(60, 2\)"),
        ((X, Y + 0.5), BALL, {"criterion": "cross_entropy"}, "fractions like 0.5"),
        ((X, Y + 0.5), BALL, {}, "predicts 10 targets, and squared is for one"),
        ((X, Y), BALL, {"validation": (X, Y + 5)}, "labels out of range"),
        (Samples((X, Y + 0.5)), BALL, {"criterion": "cross_entropy"}, "y holds fractions like 0.5"),
        ((X, Y + math.nan), BALL, {}, "y of train holds NaN"),
        ((X * math.nan, Y), BALL, {}, "x holds NaN"),
    ],
)
def test_what_cannot_be_is_told_before_the_first_step(data, threat, options, said):
    def stepped(moment):
        raise AssertionError("a step was played")

    with pytest.raises(rl.InputError, match=said):
        fit(network(), data, threat, progress=stepped, **{**QUICK, **options})


def test_any_norm_is_trained_where_nothing_walks(few):
    fit(network(), few, rl.LpBall(3, 0.1), objective="standard", validation=None, **QUICK)
