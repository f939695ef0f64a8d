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
    assert after.report.attacked.value <= best["robust"] + 0.02
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
    assert after.attacked.value > before.attacked.value + 0.2


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
        seen.append(weights(net).clone())
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
        fit(network(), Shifted(x, y), BALL, **QUICK)
    fit(network(), Shifted(x, y), BALL, memory=False, **QUICK)
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
        with pytest.raises(rl.InputError, match=r"labels are 3 to 12"):
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
    assert "<svg" in (out / "training.html").read_text()
    assert (out / "report.html").is_file()
    assert run(command(module, out)) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(command(module, out, "--attacks", "none", "--resume")) == 0


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
        fit(network(), moved, BALL, validation=None)
    with pytest.raises(rl.InputError, match="free steps after each replay"):
        fit(network(), digits, BALL, objective="free", accumulate=2)
    for wrong, said in (
        ({"lr": -1.0}, "lr must be a number in"),
        ({"awp": math.nan}, "awp must be a number in"),
        ({"weight_decay": -1.0}, "weight_decay must be"),
        ({"objective": "pgd_at:steps=0"}, "steps must be a whole number in"),
        ({"on_overfitting": "rollback", "ema": 0.9}, "leave out ema"),
        ({"on_overfitting": "rollback", "validation": None}, "needs validation"),
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
    assert [len(evaluation["samples"]) for evaluation in evaluations] == [40, 40]
    first, second = (evaluation["attacked"]["value"] for evaluation in evaluations)
    assert second == pytest.approx(first, abs=0.05)


def test_the_name_is_the_function():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rl.fit is fitting
