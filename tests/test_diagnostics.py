"""Verdicts: each known mistake is found by the check that is for it, and sound models pass."""

import json
import math

import defences
import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

import robustlearn as rl
from robustlearn import _tensor, data, losses
from robustlearn.attacks import ATTACKS
from robustlearn.cli import run
from robustlearn.evaluate import CHECKS, diagnose, unit_test
from robustlearn.evaluate.checks.gradients import _bend
from robustlearn.evaluate.probes import Probes, Reached, everywhere

THREAT = rl.LpBall(math.inf, 0.1, lower=0.0, upper=1.0)
CULPRITS = {  # the check that names the mistake
    "quantised input": "gradient_available",
    "randomised input": "repeatable_outputs",
    "saturated activation": "gradient_available",
    "saturated output": "logits_rather_than_probabilities",
    "zero gradient": "gradient_available",
    "detached preprocessing": "gradient_available",
    "random backward pass": "gradient_foretells_the_loss",
    "optimised at test time": "nothing_learned_at_test_time",
    "shattered gradient": "gradient_foretells_the_loss",
    "thermometer code": "gradient_available",
    "dropout left on": "repeatable_outputs",
    "reversed backward pass": "gradient_foretells_the_loss",
    "rounded output": "gradient_available",
    "drifting state": "nothing_learned_at_test_time",
    "depends on the batch": "same_alone_and_in_a_batch",
}
pytestmark = pytest.mark.filterwarnings("ignore:.*returns probabilities")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").take(slice(0, 1300))


@pytest.fixture(scope="module")
def net(digits):
    """A network that is right on most, in a second: the whole set in each step."""
    x, y = torch.as_tensor(digits.x[:1200]).float(), torch.as_tensor(digits.y[:1200])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def test(digits):
    return digits.take(slice(1200, 1300))


def linear(classes=3, d=6, dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(d, classes).to(dtype)


def points(model, n=48, d=6, dtype=torch.float64):
    x = torch.rand(n, d, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, rl.wrap(model)(x).argmax(1)


def probes(model, x, y, threat, **given):
    keys = _tensor.fold(torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
    model = rl.wrap(model)
    model.settle(x, y)
    return Probes(model, x, y, threat, pool=x, keys=keys, **given)


def check(name, seen):
    with torch.no_grad():
        return CHECKS[name].function(seen)


# ---------------------------------------------------------------------- detections, false alarms


@pytest.mark.parametrize("name", CULPRITS)
def test_a_broken_defence_is_found_by_the_check_that_is_for_it(net, test, name):
    broken = (defences.DEVELOPMENT | defences.HELD_OUT)[name](net)
    threat = THREAT
    verdict = diagnose(broken, test.x, test.y, threat, samples=32, checks=[CULPRITS[name]])
    assert not verdict.trustworthy
    (finding,) = verdict.failed
    assert finding.evidence
    assert f"because {finding.reason} → {finding.remedy}" in str(verdict)


def test_every_defence_has_its_culprit():
    assert set(CULPRITS) == {*defences.DEVELOPMENT, *defences.HELD_OUT}


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_a_sound_network_is_trusted_within_the_budget(net, test, p):
    threat = rl.LpBall(p, {1: 2.0, 2: 0.5}.get(p, 0.05), lower=0.0, upper=1.0)
    verdict = diagnose(net, test.x, test.y, threat)
    assert verdict.trustworthy, str(verdict)
    assert str(verdict).startswith("trustworthy: ")
    assert verdict.samples == 64
    assert 0 < verdict.backwards <= 60
    assert 0 < verdict.forwards <= 300
    assert [finding.check for finding in verdict.findings] == list(CHECKS)


def test_black_boxes_are_judged_by_their_scores(test):
    x, y = test.x.reshape(len(test.x), -1), test.y
    forest = RandomForestClassifier(20, random_state=0).fit(x, y)
    verdict = diagnose(forest, x, y, THREAT, samples=24)
    assert verdict.trustworthy, str(verdict)
    skipped = {f.check: f.reason for f in verdict.findings if f.passed is None}
    assert skipped["gradient_available"] == "the model is a black box: it has no gradient"
    assert verdict.backwards == 0
    generator = np.random.default_rng(0)

    def noisy(rows):
        return forest.predict_proba(rows) + 0.1 * generator.standard_normal((len(rows), 10))

    verdict = diagnose(rl.wrap(noisy, output="logits"), x, y, THREAT, samples=24)
    assert "repeatable_outputs" in [finding.check for finding in verdict.failed]


def test_regressors_are_judged_by_what_applies():
    x, _ = points(linear())
    y = x[:, 0] - 2 * x[:, 1] + 0.1 * x[:, 2].cos()
    verdict = diagnose(Ridge().fit(x, y), x, y, rl.LpBall(2, 0.1))
    assert verdict.trustworthy, str(verdict)
    reasons = {f.check: f.reason for f in verdict.findings if f.passed is None}
    assert reasons["no_silent_success"] == "it is for classification"
    wavy = lambda z: z + 0.3 * torch.sin(1e4 * z)  # noqa: E731
    broken = rl.wrap(defences.After(nn.Linear(6, 1).double(), wavy), task="regression")
    failed = [f.check for f in diagnose(broken, x, y, rl.LpBall(2, 0.1)).failed]
    assert "gradient_foretells_the_loss" in failed


def test_one_logit_and_budgets_per_sample():
    net = linear(classes=1)
    x, _ = points(linear())
    y = (net(x)[:, 0] > 0).long()
    threat = rl.LpBall(math.inf, torch.linspace(0.01, 0.1, len(x)))
    assert diagnose(rl.wrap(net, task="classification"), x, y, threat).trustworthy


def test_a_verdict_is_plain_data_and_leaves_nothing_behind(net, test, untouched):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    verdict = diagnose(net, test.x, test.y, THREAT, samples=16)
    again = diagnose(net, test.x, test.y, THREAT, samples=16)
    assert verdict == again
    plain = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert plain["trustworthy"] is True
    assert set(plain["findings"][0]) == {"check", "passed", "reason", "evidence", "remedy"}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_what_cannot_be_judged_is_told(net, test):
    other = diagnose(net, test.x, test.y, rl.LpBall(3, 0.1), samples=8)
    assert not other.trustworthy
    assert other.to_dict()["trustworthy"] is None
    assert str(other).startswith("no verdict: the checks that compare attacks know the norms")
    with pytest.raises(rl.InputError, match="there is no check named"):
        diagnose(net, test.x, test.y, THREAT, checks=["luck"])
    model = linear()
    x, y = points(model)
    verdict = diagnose(model, x, (y + 1) % 3, rl.LpBall(2, 0.1))
    assert not verdict.trustworthy
    assert str(verdict) == "no verdict: the model gets no sample right"


# ---------------------------------------------------------------------- the evaluation's own facts


def test_an_evaluation_that_missed_what_probes_find_is_told():
    model = linear()
    x, y = points(model)
    threat = rl.LpBall(math.inf, 0.5)
    broken = losses.misclassified(model(ATTACKS["linear_exact"].function(model, x, y, threat)), y)
    assert broken.any()
    name = "evaluation_finds_what_probes_find"
    for masks, passed in (({"pgd": broken}, True), ({"pgd": torch.zeros_like(broken)}, False)):
        (finding,) = diagnose(model, x, y, threat, broken=masks, checks=[name]).findings
        assert finding.passed is passed
    assert finding.evidence["missed"] == pytest.approx(float(broken.float().mean()))


@pytest.mark.parametrize(("late", "passed"), [(1, True), (12, False)])
def test_scores_that_break_what_gradients_left_speak_of_masking(late, passed):
    model = linear()
    x, y = points(model)
    masks = {
        "pgd:steps=40": torch.arange(48) < 10,
        "square:queries=1000": (torch.arange(48) >= 10) & (torch.arange(48) < 10 + late),
    }
    checks = ["scores_add_little_to_gradients"]
    given = {"broken": masks, "outputs": model(x).detach(), "checks": checks, "samples": 5}
    (finding,) = diagnose(model, x, y, rl.LpBall(2, 0.1), **given).findings
    assert finding.passed is passed
    assert finding.evidence == {"share": late / 38, "broken": late}


@pytest.mark.parametrize(
    ("loss", "classes", "passed"),
    [
        ("dlr", 2, False),
        ("dlr", 3, True),
        ("dlr:targets=9", 3, False),
        ("dlr:targets=9", 4, True),
        ("dlr:targets=0", 3, True),
        ("targeted_dlr", 3, False),
    ],
)
def test_dlr_needs_classes(loss, classes, passed):
    model = linear(classes)
    x, y = points(model)
    masks = {f"pgd:loss={loss}": torch.zeros(48, dtype=torch.bool)}
    checks = ["enough_classes_for_dlr"]
    (finding,) = diagnose(model, x, y, rl.LpBall(2, 0.1), broken=masks, checks=checks).findings
    assert finding.passed is passed


def test_a_prefix_that_is_all_wrong_is_no_reason_to_give_up():
    """4 · samples rows that the model gets wrong come first."""
    model = linear()
    x, y = points(model, 60)
    y[:50] = (y[:50] + 1) % 3
    verdict = diagnose(model, x, y, rl.LpBall(2, 0.01), samples=8, checks=["gradient_available"])
    assert (verdict.samples, verdict.trustworthy) == (8, True)
    assert unit_test(model, x, y, rl.LpBall(2, 0.01), samples=8).samples == 8


# ---------------------------------------------------------------------- checks with known answers


def test_on_a_linear_model_the_gradient_foretells_everything():
    model = linear(classes=2)
    x, y = points(model)
    seen = probes(model, x, y, rl.LpBall(math.inf, 0.2, lower=0.0, upper=1.0))
    with torch.no_grad():
        change, told = seen.foreseen(x, seen.slope)
    torch.testing.assert_close(change, told, rtol=0, atol=1e-12)
    assert change.abs().min() > 0
    passed, numbers, _ = check("gradient_foretells_the_loss", seen)
    assert passed
    assert numbers["explained"] == pytest.approx(1)


def test_the_break_point_is_one_for_an_elbow_and_none_for_a_line():
    line = torch.linspace(0, 1, 101)
    elbow = torch.ones(101)
    elbow[0] = 0
    bend = _bend(torch.stack([line, elbow], 1).double())
    assert bend[0] == pytest.approx(0, abs=1e-6)
    assert bend[1] == pytest.approx(1, abs=0.011)


def test_everything_in_the_box_is_allowed_to_the_unconstrained_attack():
    x = torch.rand(4, 6, dtype=torch.float64)
    for p in (1, 2, math.inf):
        corners = (torch.rand(4, 6) < 0.5).double()
        assert everywhere(rl.LpBall(p, 0.1, lower=0, upper=1), x, x).contains(x, corners).all()
        free = everywhere(rl.LpBall(p, 0.1), x, x)
        assert free.contains(x, x.flip(0)).all()
        assert not free.contains(x, x + 10).any()


@pytest.mark.parametrize("lost", [True, False])
def test_silent_success(lost):
    model = linear()
    x, y = points(model)
    threat = rl.LpBall(2, 9.0)
    seen = probes(model, x, y, threat)
    found = ATTACKS["linear_exact"].function(model, x, y, threat)
    path = torch.stack([seen.clean, torch.ones(48), torch.ones(48)]).detach()
    seen.__dict__["climbed"] = Reached(x if lost else found, seen.clean.detach(), path)
    passed, numbers, _ = check("no_silent_success", seen)
    assert passed is not lost
    assert numbers["lost"] == float(lost)


@pytest.mark.parametrize(("end", "tail"), [(-0.1, 0.1), (-0.9, 0.9)])
def test_an_attack_that_would_go_on_is_incomplete(end, tail):
    """From −1.1 to −0.1 with all steps, of which the few reach the first part."""
    model = linear()
    x, y = points(model)
    seen = probes(model, x, y, rl.LpBall(2, 0.1))
    whole = torch.full((48,), -0.1)
    few = whole - tail
    seen.__dict__["clean"] = torch.full((48,), -1.1)
    seen.__dict__["climbed"] = Reached(x, whole, torch.stack([whole - 1, few, whole]))
    seen.__dict__["climbed_briefly"] = Reached(x, few)
    passed, numbers, _ = check("optimisation_completes", seen)
    assert numbers["tail"] == pytest.approx(tail)
    assert passed is (tail <= 0.25)


@pytest.mark.parametrize(("last", "passed"), [(-0.2, True), (-0.8, False)])
def test_an_attack_that_ends_below_its_best_point_diverges(last, passed):
    model = linear()
    x, y = points(model)
    seen = probes(model, x, y, rl.LpBall(2, 0.1))
    level = torch.ones(48)
    seen.__dict__["clean"] = -1.1 * level
    path = torch.stack([-1.1 * level, -0.1 * level, last * level])
    seen.__dict__["climbed"] = Reached(x, -0.1 * level, path)
    found, numbers, _ = check("optimisation_does_not_diverge", seen)
    assert found is passed
    assert numbers["lost"] == pytest.approx(-0.1 - last)


def test_what_cancels_in_float32_is_told(net, test):
    name = "same_in_double_precision"
    for size, passed in ((0.0, True), (1e8, False)):
        model = defences.After(net, lambda z, size=size: (z + size) - size)
        (finding,) = diagnose(model, test.x, test.y, THREAT, checks=[name]).findings
        assert finding.passed is passed


def test_breaks_below_the_grid_of_eight_bits_are_told():
    """Margins that half a step of 1/255 turns; on the grid nothing is left of the change."""
    model = nn.Linear(6, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0] * 6, [-1.0] * 6]))
        model.bias.copy_(torch.tensor([0.0, 2 * (6 * 100 - 1e-3) / 255]))
    x, y = torch.full((8, 6), 100 / 255, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    name = "survives_eight_bits"
    for eps, passed in ((0.5 / 255, False), (1.5 / 255, True)):
        threat = rl.LpBall(math.inf, eps, lower=0, upper=1)
        (finding,) = diagnose(model, x, y, threat, checks=[name]).findings
        assert finding.passed is passed, finding


# ---------------------------------------------------------------------- the unit test


def test_a_sound_attack_finds_what_is_planted_and_chance_does_not(net, test):
    found = unit_test(net, test.x, test.y, THREAT, samples=12)
    assert found.passed
    assert found.samples == found.planted == found.found == 12
    assert found.by_chance < 6
    assert str(found).startswith("passed: pgd finds 12 of 12")
    assert json.dumps(found.to_dict(), allow_nan=False)


def test_an_attack_that_does_nothing_or_leaves_the_threat_fails(net, test):
    def idle(model, x, y, threat):
        return x.clone()

    def cheat(model, x, y, threat):
        wide = rl.LpBall(math.inf, 1.0, lower=0.0, upper=1.0)
        return ATTACKS["pgd"].function(model, x, y, wide, stop_when_broken=False)

    for attack in (idle, cheat):
        found = unit_test(net, test.x, test.y, THREAT, samples=8, attack=attack)
        assert found.found == 0
        assert found.passed is False
        assert "too high" in str(found)


@pytest.mark.parametrize("name", ["quantised input", "detached preprocessing"])
def test_masked_gradients_hide_what_is_planted(net, test, name):
    broken = defences.DEVELOPMENT[name](net)
    assert unit_test(broken, test.x, test.y, THREAT, samples=8).passed is False


def test_other_readouts_norms_and_black_boxes(net, test):
    two = rl.LpBall(2, 1.0, lower=0.0, upper=1.0)
    last = unit_test(net, test.x, test.y, two, samples=6, features="last linear")
    assert last.planted == 6
    assert last.found >= 5  # of 60, pgd misses about one in ten here
    x, y = test.x.reshape(len(test.x), -1), test.y
    model = LogisticRegression(max_iter=2000).fit(x, y)
    given = {"samples": 6, "attack": "square:queries=400"}
    found = unit_test(rl.wrap(model.decision_function), x, y, THREAT, **given)
    assert found.planted >= 5
    with pytest.raises(rl.InputError, match="features must be auto, outputs or last linear"):
        unit_test(net, test.x, test.y, THREAT, features="hidden")
    with pytest.raises(rl.InputError, match="is for classifiers"):
        unit_test(Ridge().fit(x, x[:, 5]), x, x[:, 5], THREAT)
    constant = lambda a: np.tile(np.arange(10.0), (len(a), 1))  # noqa: E731
    none = unit_test(constant, x, np.full(len(x), 9), THREAT, samples=6)
    assert (none.planted, none.passed) == (0, None)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.ReLU(),\n"
        "                               torch.nn.Linear(20, 10))\n"
    )
    from sklearn.datasets import load_breast_cancer

    x = load_breast_cancer().data
    x = ((x - x.min(0)) / np.ptp(x, axis=0)).astype(np.float32)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 20), nn.ReLU(), nn.Linear(20, 10))
    np.savez("d.npz", x=x, y=net(torch.as_tensor(x)).argmax(1).numpy())
    command = ["unit-test", "--model", "mine.py:build", "--data", "d.npz", "--eps", "0.02"]
    more = ["--lower", "0", "--upper", "1", "--tests", "10", "--limit", "64"]
    assert run([*command, *more, "--json", "--verdict"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unit_test"]["passed"] is True
    assert told["verdict"]["trustworthy"] is True
    assert run([*command, *more]) == 0
    assert "passed: pgd finds" in capsys.readouterr().out
    for attack, said in (
        ("nothing", "there is no attack named"),
        ("quick", "quick is a preset: name an attack"),
        ("pgd@audit", "leave out the scope"),
    ):
        assert run([*command, *more, "--attack", attack]) == 2
        assert said in capsys.readouterr().err
