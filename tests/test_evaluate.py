"""The two-sided answer: what it says, how it is checked, and that it survives a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_diabetes, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from torch import nn

import robustlearn as rl
from robustlearn import data, losses
from robustlearn.attacks import ATTACKS, attack
from robustlearn.cli.demo import DigitsNet, trained
from robustlearn.errors import AttackError, ContradictionError, InputError
from robustlearn.evaluate import Estimate, plan

BOX = {"lower": 0.0, "upper": 1.0}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def network(digits):
    return trained(digits.take(slice(0, 1200)), 0, lambda *told: None)


@pytest.fixture(scope="module")
def held_out(digits):
    return digits.take(slice(1200, 1350))


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


@pytest.fixture(scope="module")
def linear(iris):
    return LogisticRegression(max_iter=1000).fit(*iris)


def test_the_bracket_of_a_linear_model_closes(linear, iris):
    x, y = iris
    threat = rl.LpBall(2, 0.4)
    report = rl.evaluate(linear, x, y, threat)
    assert report.clean.value == pytest.approx(linear.score(x, y))
    assert report.certified.value == report.attacked.value < report.clean.value
    radius = rl.certify(linear, x, threat).radius
    for sample in report.samples:
        assert sample.clean_correct == (linear.predict(x[[sample.index]])[0] == sample.label)
        if sample.broken_by is not None:
            assert not sample.certified
            assert sample.radius <= sample.distance * (1 + 1e-9) <= 0.4 * (1 + 1e-9)
        elif sample.clean_correct:
            assert sample.certified
            assert sample.radius == pytest.approx(radius[sample.index])
        else:
            assert (sample.distance, sample.radius, sample.certified) == (0, 0, False)


def test_a_certificate_may_be_given_seconds(network, held_out):
    threat = rl.LpBall(math.inf, 0.02, **BOX)
    found = {
        asked: rl.evaluate(
            network, held_out.x[:20], held_out.y[:20], threat, attacks="fgsm", certify=asked
        )
        for asked in ("ibp", "auto:seconds=0.3")
    }
    methods = [report.certificate["method"] for report in found.values()]
    assert methods == ["ibp", "complete"]
    proven = [report.certified.value for report in found.values()]
    assert proven[0] < proven[1]


def test_a_network_from_above(network, held_out, untouched):
    kept = held_out.x.copy()
    threat = rl.LpBall(math.inf, 0.1, **BOX)
    report = rl.evaluate(network, held_out.x, held_out.y, threat, classes=held_out.class_names)
    assert report.certificate["method"] == "crown"
    assert report.certificate["open"] == report.attacked.value - report.certified.value
    statuses = [s.status for s in report.samples]
    assert statuses.count("certified") == round(len(statuses) * report.certified.value)
    assert statuses.count("open") == round(len(statuses) * report.certificate["open"])
    assert 0.2 < report.attacked.value < 0.7 < report.clean.value
    np.testing.assert_array_equal(held_out.x, kept)
    assert network.training
    # every claim holds for somebody else: the plain network, in float64 arithmetic of the check
    broken = np.array([s.broken_by is not None for s in report.samples])
    x_adv = torch.as_tensor(report.x_adv)
    predicted = network(x_adv).argmax(1).numpy()
    assert (predicted[broken] != held_out.y[broken]).all()
    moved = x_adv.double() - torch.as_tensor(held_out.x).float().double()
    assert moved.abs().max() <= 0.1
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert report.attacked.value == np.mean(
        [s.clean_correct and not s.broken_by for s in report.samples]
    )
    total = sum(run.broken for run in report.attacks)
    assert total == broken.sum()
    assert all(s.distance <= 0.1 for s in report.samples if s.broken_by)


def test_the_first_evaluation_of_a_process_draws_no_random_number_either():
    """Libraries draw as they are imported."""
    code = (
        "import random, torch, robustlearn as rl; before = random.getstate();"
        "rl.evaluate(torch.nn.Linear(2, 2), torch.rand(4, 2), torch.arange(4) % 2,"
        " rl.LpBall(2, 0.1), attacks='fgsm'); assert random.getstate() == before"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_results_do_not_depend_on_batches_or_company(network, held_out):
    threat = rl.LpBall(math.inf, 0.05, **BOX)
    given = {"attacks": ["fgsm", ("pgd", {"steps": 10})], "seed": 5}
    network = network.double()
    whole = rl.evaluate(network, held_out.x, held_out.y, threat, **given)
    small = rl.evaluate(network, held_out.x, held_out.y, threat, batch_size=17, **given)
    assert [s.broken_by for s in whole.samples] == [s.broken_by for s in small.samples]
    np.testing.assert_allclose(whole.x_adv, small.x_adv, atol=1e-9)
    some = np.arange(40, 60)
    part = rl.evaluate(network, held_out.x[some], held_out.y[some], threat, indices=some, **given)
    np.testing.assert_allclose(whole.x_adv[some], part.x_adv, atol=1e-9)
    assert [s.index for s in part.samples] == list(some)
    network.float()


def test_regressors_have_both_bounds():
    x, y = load_diabetes(return_X_y=True)
    ridge, threat = Ridge(0.1).fit(x, y), rl.LpBall(2, 0.02)
    report = rl.evaluate(ridge, x, y, threat)
    r = np.abs(ridge.predict(x) - y)
    truth = (r + 0.02 * np.linalg.norm(ridge.coef_)) ** 2
    assert report.clean.value == pytest.approx((r**2).mean())
    assert report.attacked.value == pytest.approx(truth.mean(), rel=1e-9)
    assert report.certified.value == pytest.approx(truth.mean(), rel=1e-9)
    assert report.attacked.low < report.attacked.value < report.attacked.high
    assert report.task == "regression"
    skipped = {run.name: run.skipped for run in report.attacks if run.skipped}
    assert "is a regressor" in skipped["fmn:steps=25"]


def test_a_black_box_is_attacked_by_its_scores(iris):
    x, y = iris
    forest = make_pipeline(FunctionTransformer(), RandomForestClassifier(20, random_state=0))
    report = rl.evaluate(forest.fit(x, y), x, y, rl.LpBall(math.inf, 0.5), attacks="quick")
    assert report.certified is None
    assert report.attacked.value < report.clean.value - 0.1
    by = {s.broken_by for s in report.samples} - {None}
    assert by <= {"square:queries=200@audit", "retreat:queries=200@masked"}
    run = next(run for run in report.attacks if run.name.startswith("square"))
    assert run.attempted == report.clean.value * 150  # a black box has no gradients: no audit
    moved = np.array([s.broken_by is not None for s in report.samples])
    assert (forest.predict(report.x_adv[moved]) != y[moved]).all()


def test_words_as_labels_and_tables_as_input(iris):
    x, y = load_iris(return_X_y=True, as_frame=True)
    words = np.array(["setosa", "versicolor", "virginica"])[y]
    model = LogisticRegression(max_iter=1000).fit(x, words)
    report = rl.evaluate(model, x, pd.Series(words), rl.LpBall(2, 0.3), attacks="quick")
    assert report.samples[0].label == "setosa"
    assert report.samples[0]["label"] == "setosa"
    assert report.feature_names == tuple(x.columns)
    assert report.certified.value == report.attacked.value
    with pytest.raises(InputError, match=r"labels that LogisticRegression does not know: rose"):
        rl.evaluate(model, x[:2], ["rose", "setosa"], rl.LpBall(2, 0.3))


def test_every_report_has_a_verdict(network, held_out, linear, iris):
    """Also where a norm is unknown to the checks, and where nothing is left to doubt."""
    some = slice(0, 30)
    x, y, box = held_out.x[some], held_out.y[some], rl.LpBall(math.inf, 0.02, **BOX)
    doubted = rl.evaluate(network, x, y, box, attacks="fgsm", certify="none")
    assert isinstance(doubted.verdict["trustworthy"], bool)
    assert f"verdict: {doubted.verdict['text']}".splitlines()[0] in str(doubted)
    assert len(doubted.verdict["ascent"]) > 1
    unknown = rl.evaluate(network, x, y, rl.LpBall(3, 0.02, **BOX), attacks="fgsm", certify="none")
    assert "no verdict" in str(unknown)
    closed = rl.evaluate(linear, *iris, rl.LpBall(2, 0.2))
    assert "verdict: certain: the certificate meets the attack" in str(closed)
    for report in (doubted, unknown, closed):
        assert report.to_dict()["verdict"] == report.verdict
    assert network.training


def test_nearest_points_are_as_near_as_they_come(linear, iris):
    """Points from minimal-norm attacks are nearer, and change nothing else."""
    threat, given = rl.LpBall(2, 0.5), {"attacks": "pgd:steps=5,fmn:steps=10", "certify": "none"}
    plain = rl.evaluate(linear, *iris, threat, **given)
    near = rl.evaluate(linear, *iris, threat, nearest=True, **given)
    radius = rl.certify(linear, iris[0], threat).radius
    assert near.attacked == plain.attacked
    assert [s.broken_by for s in near.samples] == [s.broken_by for s in plain.samples]
    for before, after in zip(plain.samples, near.samples, strict=True):
        if after.broken_by:
            assert radius[after.index] * (1 - 1e-9) <= after.distance <= before.distance
            assert after.distance <= radius[after.index] * 1.01


def test_the_rest_of_the_options(linear, iris):
    x, y = iris
    threat = rl.LpBall(2, 0.3)
    report = rl.evaluate(linear, x, y, threat, attacks="fgsm,pgd:steps=5", certify="none")
    assert [run.name for run in report.attacks] == ["fgsm", "pgd:steps=5"]
    assert report.certified is None
    assert report.certificate["reason"] == "not asked for"
    assert report.samples[0].radius is None
    told = []
    rl.evaluate(linear, x, y, threat, attacks=["fgsm"], progress=lambda *t: told.append(t))
    assert ("clean", 150, 150) in told
    assert any(stage == "fgsm" for stage, _, _ in told)
    with pytest.raises(InputError, match="no attack named 'shallowfool'"):
        rl.evaluate(linear, x, y, threat, attacks="shallowfool")
    with pytest.raises(InputError, match="no certificate named 'magic'"):
        rl.evaluate(linear, x, y, threat, certify="magic")
    with pytest.raises(InputError, match="linear_exact needs a linear model"):
        rl.evaluate(DigitsNet(), np.zeros((2, 1, 8, 8)), [0, 1], threat, attacks="linear_exact")
    with pytest.raises(InputError, match=r"device 'cuda:77' cannot be used|cannot be used"):
        rl.evaluate(linear, x, y, threat, device="cuda:77")
    assert plan("pgd:steps=3:loss=dlr:step_size=0.5:random_start=false")[0].options == {
        "steps": 3,
        "loss": "dlr",
        "step_size": 0.5,
        "random_start": False,
    }
    with pytest.raises(InputError, match="name:key=value"):
        plan("pgd:steps")
    for wrong, message in (
        ("pgd:foo=3", "pgd has no option 'foo'; it has loss, steps"),
        ("pgd:steps=abc", "pgd: steps must be like 40; got 'abc'"),
        ("pgd:steps=2.5", "steps must be like 40"),
        ("pgd:random_start=2", "random_start must be like True"),
    ):
        with pytest.raises(InputError, match=message):
            plan(wrong)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (480, 500)])
def test_intervals_are_clopper_and_pearsons(k, n):
    found = Estimate.proportion(k, n)
    truth = stats.binomtest(k, n).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high))
    assert (found.value, found.n) == (k / n, n)


def test_mean_intervals_are_students():
    values = np.random.default_rng(0).random(20)
    found = Estimate.mean(values)
    truth = stats.ttest_1samp(values, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high))
    assert Estimate.mean(values[:1]).high == math.inf


# ---------------------------------------------------------------------- checks on attacks


@pytest.fixture
def cheating():
    """Register attacks that break the contract, and take them out again."""

    @attack(needs="scores")
    def too_far(model, x, y, threat):
        """Leave the threat."""
        return x + 10

    @attack(needs="scores")
    def half(model, x, y, threat):
        """Return another dtype."""
        return x.half()

    @attack(needs="scores")
    def lazy(model, x, y, threat):
        """Claim nothing."""
        return x.clone()

    yield
    for name in ("too_far", "half", "lazy"):
        del ATTACKS._entries[name]


def test_an_attack_that_cheats_is_an_error_not_a_success(cheating, linear, iris):
    x, y = iris
    threat = rl.LpBall(2, 0.3)
    with pytest.raises(AttackError, match=r"too_far left the threat in \d+ of \d+ samples"):
        rl.evaluate(linear, x, y, threat, attacks=["too_far"])
    with pytest.raises(AttackError, match=r"half returned torch\.float16"):
        rl.evaluate(linear, x, y, threat, attacks=["half"])
    report = rl.evaluate(linear, x, y, threat, attacks=["lazy"])
    assert report.attacked == report.clean


def test_a_success_that_does_not_repeat_does_not_count(iris):
    """A model that errs on moved points, but only in batches of the attack's size."""
    x, _ = iris  # multiples of 0.1
    x = np.tile(x[:50], (2, 1))

    def shy(batch):
        moved = (np.abs(batch * 10 - np.round(batch * 10)) > 1e-6).any(1)
        return np.stack([np.where(moved & (len(batch) == 50), -1.0, 1.0), np.zeros(len(batch))], 1)

    report = rl.evaluate(
        rl.wrap(shy, output="logits"),
        x,
        np.zeros(100, int),
        rl.LpBall(2, 0.3),
        attacks=[("square", {"queries": 3})],
        batch_size=50,
    )
    assert report.attacked.value == 1
    assert report.attacks[0].unstable == 100


@pytest.mark.parametrize("certified", [True, False])
def test_a_contradiction_is_never_reported_as_a_number(certified, linear, iris, monkeypatch):
    """A radius says so too: every break is nearer than 1."""
    from robustlearn.certify import CERTIFICATES
    from robustlearn.certify.base import Certificate

    def wrong(model, x, threat, y, seconds):
        n = len(x)
        safe = np.full(n, certified)
        return Certificate(
            "linear", exact=True, radius=np.ones(n), certified=safe, margin=np.ones(n)
        )

    monkeypatch.setattr(CERTIFICATES["linear"].__class__, "__setattr__", object.__setattr__)
    monkeypatch.setattr(CERTIFICATES["linear"], "function", wrong)
    with pytest.raises(ContradictionError, match="certified by linear and broken by an attack"):
        rl.evaluate(linear, *iris, rl.LpBall(2, 1.0), attacks="fgsm")


# ---------------------------------------------------------------------- memory and interruption


class Hungry(nn.Module):
    """Runs out of memory on more than 20 samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()
        self.sizes = []

    def forward(self, x):
        if len(x) > 20:
            raise torch.OutOfMemoryError("out of memory")
        self.sizes.append(len(x))
        return self.layer(x)


def test_a_batch_that_does_not_fit_is_halved(iris):
    hungry = Hungry()
    x, y = iris
    threat = rl.LpBall(2, 0.3)
    given = {"attacks": [("pgd", {"steps": 5})]}
    report = rl.evaluate(hungry, x, y, threat, batch_size=128, **given)
    assert max(hungry.sizes) <= 20
    other = rl.evaluate(hungry, x, y, threat, batch_size=10, **given)
    np.testing.assert_allclose(report.x_adv, other.x_adv, atol=1e-10)


SCRIPT = """
import sys, time, numpy as np, torch
import robustlearn as rl
from robustlearn import data
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    def forward(self, x):
        time.sleep(float(sys.argv[2]))
        return self.layers(x)

d = data.load("digits")
y = Slow()(torch.as_tensor(d.x[:120]).float()).argmax(1)
report = rl.evaluate(
    Slow(), d.x[:120], y, rl.LpBall(float("inf"), 0.03), attacks=["fgsm", "pgd:steps=8"],
    batch_size=10, resume=sys.argv[1], certify="none",
)
np.save(sys.argv[3], report.x_adv)
print(report.attacked.value, sum(run.backwards for run in report.attacks))
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_evaluation_goes_on(tmp_path, how):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)

    def command(folder, delay):
        return [sys.executable, script, tmp_path / folder, str(delay), tmp_path / f"{folder}.npy"]

    undisturbed = subprocess.run(command("whole", 0), capture_output=True, text=True, check=True)
    process = subprocess.Popen(
        command("cut", 0.02),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell that runs the tests in the background leaves Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cut").rglob("0*.npz"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, how)
    process.communicate()
    assert process.returncode != 0
    finished = len(list((tmp_path / "cut").rglob("0*.npz")))
    assert finished >= 5
    resumed = subprocess.run(command("cut", 0), capture_output=True, text=True, check=True)
    assert resumed.stdout == undisturbed.stdout  # same accuracy, same total cost
    np.testing.assert_array_equal(np.load(tmp_path / "cut.npy"), np.load(tmp_path / "whole.npy"))


def test_resume_refuses_another_question(tmp_path, linear, iris):
    x, y = iris
    threat = rl.LpBall(2, 0.3)
    rl.evaluate(linear, x, y, threat, attacks="fgsm", resume=tmp_path)
    again = rl.evaluate(linear, x, y, threat, attacks="fgsm", resume=tmp_path)
    assert again.attacked.value < again.clean.value
    with pytest.raises(InputError, match="threat changed since"):
        rl.evaluate(linear, x, y, rl.LpBall(2, 0.31), attacks="fgsm", resume=tmp_path)
    with pytest.raises(InputError, match="data, samples changed since"):
        rl.evaluate(linear, x[:100], y[:100], threat, attacks="fgsm", resume=tmp_path)
    other = LogisticRegression(C=1e-3).fit(x, y)
    with pytest.raises(InputError, match="model changed since"):
        rl.evaluate(other, x, y, threat, attacks="fgsm", resume=tmp_path)
    (tmp_path / "question.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        rl.evaluate(linear, x, y, threat, attacks="fgsm", resume=tmp_path)


class Lifted(nn.Module):
    """f(x) + lift · g(x): with a lift of 0 and 1e-5 nearly the same clean outputs."""

    def __init__(self, lift):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3))
        self.lift = lift

    def forward(self, x):
        return self.layers((x * 10).round() / 10) + self.lift * self.layers(x)


@pytest.mark.parametrize("weight", [False, True])
def test_resume_refuses_a_model_that_is_nearly_the_same(tmp_path, iris, weight):
    """One has a gradient that the other lacks, or one weight that no clean output shows."""
    x, threat = torch.as_tensor(iris[0]).float(), rl.LpBall(math.inf, 0.3)
    first, second = Lifted(0.0), Lifted(0.0 if weight else 1e-5)
    if weight:
        for net, size in ((first, 1.0), (second, 2.0)):
            net.layers[0].bias.data[0], net.layers[2].weight.data[:, 0] = -1e6, size
    y = first(x).argmax(1)
    given = {"attacks": "pgd:steps=3", "resume": tmp_path}
    rl.evaluate(first, x, y, threat, **given)
    with pytest.raises(InputError, match="model changed since"):
        rl.evaluate(second, x, y, threat, **given)
    again = rl.evaluate(Lifted(0.0) if not weight else first, x, y, threat, batch_size=7, **given)
    assert again.attacks[0].attempted == 150


def test_resume_takes_a_model_that_is_random_or_a_pipeline(tmp_path, iris):
    x, y = iris
    noisy = nn.Sequential(nn.Linear(4, 3).double(), nn.Dropout(0.0))
    noisy.register_forward_hook(lambda module, given, out: out + 0.1 * torch.randn_like(out))
    forest = make_pipeline(
        FunctionTransformer(lambda a: a + 0.0), RandomForestClassifier(5, random_state=0)
    ).fit(x, y)
    for number, model in enumerate((noisy, forest)):
        given = {"attacks": "square:queries=5", "resume": tmp_path / str(number)}
        first, again = (rl.evaluate(model, x, y, rl.LpBall(2, 0.1), **given) for _ in range(2))
        assert first.samples == again.samples


def test_damaged_batches_are_done_again(tmp_path, linear, iris):
    x, y = iris
    threat = rl.LpBall(2, 0.3)
    first = rl.evaluate(linear, x, y, threat, attacks="fgsm", resume=tmp_path, batch_size=40)
    files = sorted((tmp_path / "fgsm").glob("*.npz"))
    files[0].write_bytes(b"garbage")
    again = rl.evaluate(linear, x, y, threat, attacks="fgsm", resume=tmp_path, batch_size=40)
    assert again.samples == first.samples


# ---------------------------------------------------------------------- the saved report


def test_the_report_on_disk(tmp_path, linear, iris):
    x, y = iris
    report = rl.evaluate(linear, x, y, rl.LpBall(2, 0.3), attacks="quick")
    report.save(tmp_path / "r", command="robustlearn evaluate")
    names = {path.name for path in (tmp_path / "r").iterdir()}
    assert names == {"report.html", "report.json", "samples.csv", "adversarial.npz"}
    document = json.loads((tmp_path / "r" / "report.json").read_text())
    stored = document["evaluations"][0]
    assert stored["attacked"]["value"] == report.attacked.value
    table = pd.read_csv(tmp_path / "r" / "samples.csv")
    right = table.clean_correct & table.broken_by.isna()
    assert right.mean() == report.attacked.value
    with np.load(tmp_path / "r" / "adversarial.npz") as file:
        found = rl.wrap(linear)(torch.as_tensor(file["x_adv"]))
        assert losses.margin.broken(found, torch.as_tensor(y[file["index"]])).all()
    assert "certified" in str(report)
