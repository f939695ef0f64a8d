"""What `evaluate` runs on which samples, what it may cost, and that the report tells the truth."""

import json
import math
from pathlib import Path

import defences
import jsonschema
import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn import report as rendering
from robustlearn.attacks import ATTACKS, attack, unsuitable
from robustlearn.errors import InputError
from robustlearn.evaluate import PRESETS, document, judgement, plan
from robustlearn.evaluate.diagnostics import Diagnosis
from robustlearn.evaluate.plans import Budget, Step
from robustlearn.evaluate.results import Audit
from robustlearn.report.comparison import MILD

N, D, EPS = 200, 6, 0.05
BOX = {"lower": 0.0, "upper": 1.0}
REG = "regression"
WEIGHT = torch.tensor([1.0, -2.0, 0.5, 1.5, -1.0, 3.0], dtype=torch.float64)


class Hidden(nn.Module):
    """z = (0, wᵀx + b), not known to be linear: there is no certificate and no exact attack."""

    def __init__(self, bias=-1.4):
        super().__init__()
        self.weight, self.bias = nn.Parameter(WEIGHT.clone()), bias

    def forward(self, x):
        z = x @ self.weight + self.bias
        return torch.stack([torch.zeros_like(z), z], 1)


@pytest.fixture(scope="module")
def x():
    return torch.rand(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def y(x):
    return Hidden()(x).argmax(1)


@pytest.fixture
def brief(monkeypatch):
    """Verdicts by the checks that matter here, which need no surrogate."""
    wanted = ["gradient_available", "scores_add_little_to_gradients"]
    asked = []

    class Brief(Diagnosis):
        def verdict(self, broken):
            asked.append(broken)
            return super().verdict(broken, wanted)

    monkeypatch.setattr(judgement, "Diagnosis", Brief)
    return asked


@pytest.fixture
def filed():
    """Register attacks for a test; they note the samples that they were given."""
    names = []

    def file(name, needs, find=lambda x, y: x.clone(), minimal=False):
        seen = []

        def function(model, x, y, threat):
            """Do what the test says."""
            seen.extend(map(tuple, x.tolist()))
            return threat.restrict(x, find(x, y) - x)

        function.__name__ = name
        attack(needs=needs, minimal=minimal)(function)
        names.append(name)
        return seen

    yield file
    for name in names:
        del ATTACKS._entries[name]


def margin(x):
    """Return |wᵀx + b|, which over ‖w‖_q is the exact distance."""
    return (x @ WEIGHT - 1.4).abs()


def across(x, y, beyond=1.01):
    """Return the point beyond the boundary on the way of the first feature alone."""
    gap = x @ WEIGHT - 1.4
    moved = x.clone()
    moved[:, 0] -= beyond * gap / WEIGHT[0]
    return moved


def rows_of(seen, x):
    place = {tuple(point): row for row, point in enumerate(x.tolist())}
    return sorted(place[point] for point in seen)


def run_of(report, name):
    (run,) = (run for run in report.attacks if run.name.startswith(name))
    return run


def told(report):
    """Return all that must not depend on how often an evaluation was interrupted."""
    costs = [(r.name, r.attempted, r.broken, r.forwards, r.backwards) for r in report.attacks]
    return report.samples, costs, report.verdict


# ---------------------------------------------------------------------- plans


@pytest.mark.parametrize("preset", PRESETS)
def test_labels_are_read_as_they_are_written(preset):
    for step in PRESETS[preset]:
        assert plan(step.label) == [step]
    assert plan(preset) == list(PRESETS[preset])


def test_scopes_and_options_of_a_step():
    near, audit = plan("fgsm@near,square:queries=500@audit")
    assert near == Step("fgsm", {}, "near")
    assert audit == Step("square", {"queries": 500}, "audit")
    assert plan([audit, ("fgsm", {}), "pgd"]) == [audit, Step("fgsm", {}), Step("pgd", {})]
    for wrong in ("fgsm@far", "fgsm@"):
        with pytest.raises(InputError, match="a scope is one of all, near, closest, audit, masked"):
            plan(wrong)
    with pytest.raises(InputError, match="at least one attack"):
        plan([])


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_targeted_dlr_gives_way_to_the_margin_under_four_classes(classes):
    step = Step("apgd", {"loss": "dlr", "targets": 9}).defined(classes)
    assert step.options["loss"] == ("dlr" if classes == 4 else "margin")


@pytest.mark.parametrize("classes", [2, 3])
def test_dlr_gives_way_to_the_margin_under_three_classes(classes):
    step = Step("apgd", {"loss": "dlr", "steps": 3}, "near").defined(classes)
    assert step.options["loss"] == {2: "margin", 3: "dlr"}[classes]
    assert (step.scope, step.options["steps"]) == ("near", 3)


# ---------------------------------------------------------------------- what a step costs

SHORT = {"steps": 4, "queries": 30, "restarts": 3, "targets": 2, "searches": 2, "rivals": 3}


def shortened(name):
    step = Step(name, {})
    return Step(name, {k: v for k, v in SHORT.items() if step.option(k) is not None})


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_exceeds_what_its_step_is_said_to_cost(name):
    """One sample at a time, standing or not: a mean would hide the one that costs most."""
    torch.manual_seed(3)
    classes, d = 4, 12
    net = rl.wrap(nn.Sequential(nn.Linear(d, 16), nn.Tanh(), nn.Linear(16, classes)))
    x = torch.rand(2, d)
    y = net(x).argsort(1)[:, -1]
    steps = [shortened(name), Step(name, shortened(name).options | {"rivals": 1})]
    if Step(name, {}).option("rivals") is None:
        steps = steps[:1]
    if name == "pgd":
        steps.append(Step(name, {"steps": 3, "precision": "bfloat16"}))  # all break for p = 2
    for p, eps in ((0, 1), (1, 0.01), (2, 0.5), (math.inf, 0.001)):
        threat = rl.LpBall(p, eps, lower=0.0, upper=1.0)
        if unsuitable(name, net, threat, (d,)):
            continue
        for step in steps:
            cost = step.cost(classes, 6 if p else d.bit_length())
            for row in range(len(x)):
                before = net.backwards, net.forwards
                ATTACKS[name].function(net, x[[row]], y[[row]], threat, **step.options)
                assert net.backwards - before[0] <= cost.gradients
                assert net.forwards - before[1] <= cost.forwards


def test_the_costs_of_steps_are_not_padded():
    """Gradients are exact where nothing ends early; passes exceed them by a few."""
    assert Step("fgsm", {}).cost() == Budget(1, 1)
    assert Step("linear_exact", {}).cost() == Budget(0, 0)
    assert Step("square", {"queries": 70}).cost() == Budget(0, 70)
    assert Step("pgd", {"steps": 20, "restarts": 4}).cost().gradients == 80
    assert Step("apgd", {"steps": 10, "targets": 9, "restarts": 2}).cost(10).gradients == 180
    assert Step("apgd", {"steps": 10, "targets": 9}).cost(3).gradients == 20
    assert Step("fab", {"steps": 10, "rivals": 9, "polish": 0}).cost(10).gradients == 91
    assert Step("fmn", {"steps": 10}).cost(10).gradients == 10 + 9 + 5 + 1
    assert Step("carlini_wagner", {"steps": 10, "searches": 3}).cost(2).gradients == 30 + 1 + 5 + 1
    assert Step("pgd", {"steps": 20}).cost().forwards <= 23


def test_quick_costs_sixty_gradients():
    steps = plan("quick")
    assert sum(step.cost(10).gradients for step in steps if step.scope == "all") == 60
    assert all(step.needs != "gradient" for step in steps if step.scope != "all")


# ---------------------------------------------------------------------- budgets


def test_budgets_as_text():
    assert Budget.parse("gradients=60,forwards=500") == Budget(60, 500)
    assert Budget.parse(" forwards=7") == Budget(None, 7)
    assert str(Budget(60, 500)) == "gradients=60,forwards=500"
    assert Budget.parse(str(Budget(3))) == Budget(3)
    for wrong in ("60", "gradients=", "gradients=-1", "steps=3", "gradients=²", ""):
        with pytest.raises(InputError, match="write a budget as gradients=60,forwards=500"):
            Budget.parse(wrong)


@pytest.mark.parametrize(
    ("step", "budget", "left"),
    [
        ("pgd:steps=20:restarts=4", Budget(80), "pgd:steps=20:restarts=4"),
        ("pgd:steps=20:restarts=4", Budget(79), "pgd:steps=20:restarts=3"),
        ("pgd:steps=20:restarts=4", Budget(12), "pgd:steps=12:restarts=1"),
        ("pgd:steps=20:restarts=4", Budget(0), None),
        ("fgsm", Budget(1), "fgsm"),
        ("fgsm", Budget(0), None),
        ("square:queries=500@audit", Budget(0, 70), "square:queries=70@audit"),
        ("square:queries=500", Budget(0, 0), None),
        ("linear_exact", Budget(0, 0), "linear_exact"),
        ("apgd:steps=100", Budget(60), "apgd:steps=60"),
        ("apgd:steps=50:targets=9", Budget(120), "apgd:steps=50:targets=2"),
        ("fmn:steps=100", Budget(40), "fmn:steps=25"),
        ("fmn:steps=100", Budget(15), None),
        ("nes:queries=500", Budget(0, 21), None),
        ("nes:queries=500", Budget(0, 30), "nes:queries=30"),
        ("nes:queries=500:directions=4", Budget(0, 11), "nes:queries=11:directions=4"),
    ],
)
def test_what_a_budget_leaves_of_a_step(step, budget, left):
    (step,) = plan(step)
    found = budget.trimmed(step, 10)
    assert (found and found.label) == left


@pytest.mark.parametrize("name", ATTACKS)
def test_a_trimmed_step_is_affordable_and_the_next_larger_is_not(name):
    step = shortened(name)
    for limit in range(0, 400, 7):
        budget = Budget(limit, 2 * limit)
        found = budget.trimmed(step, 4)
        if found is None:
            least = Step(name, step.options | {key: step.least(key) for key in step.counts})
            assert not budget.covers(least.cost(4))
            continue
        assert budget.covers(found.cost(4))
        cut = [key for key in step.counts if found.options.get(key) != step.options.get(key)]
        if cut:
            more = Step(name, found.options | {cut[-1]: found.options[cut[-1]] + 1})
            assert not budget.covers(more.cost(4))


def test_what_is_left_of_a_budget():
    assert Budget(60, 100).less(Budget(20, 130)) == Budget(40, 0)
    assert Budget(None, 100).less(Budget(20, 30)) == Budget(None, 70)
    assert Budget(0, 0).plus(Budget(3, 4)).plus(Budget(1, 1)) == Budget(4, 5)


def test_a_budget_caps_what_an_evaluation_costs(x, y, brief):
    """Nothing breaks, so that every sample pays for all; apgd stays what it is."""
    plain = (
        "pgd:steps=30,apgd:steps=100:loss=cross_entropy,fab,fmn,nes:queries=50,square:queries=50"
    )
    report = rl.evaluate(
        Hidden(), x[:8], y[:8], rl.LpBall(2, 1e-6), attacks=plain, budget="gradients=90"
    )
    backwards = sum(run.backwards for run in report.attacks)
    assert 60 * 8 < backwards <= 90 * 8
    assert run_of(report, "apgd").name == "apgd:steps=60:loss=cross_entropy"
    assert "the budget is spent: gradients=90" in run_of(report, "fab").skipped
    assert any("shortens apgd:steps=100" in note for note in report.notes)
    assert run_of(report, "nes").skipped is None
    capped = rl.evaluate(
        Hidden(), x[:8], y[:8], rl.LpBall(2, 1e-6), attacks=plain, budget=Budget(50, 100)
    )
    assert sum(run.forwards for run in capped.attacks) <= 100 * 8
    assert sum(run.backwards for run in capped.attacks) <= 50 * 8
    free = rl.evaluate(Hidden(), x[:5], y[:5], rl.LpBall(2, 1e-6), attacks="pgd:steps=7")
    assert not any("shortens" in note for note in free.notes)


# ---------------------------------------------------------------------- scopes


@pytest.mark.parametrize(("scope", "share"), [("near", 4), ("closest", 16)])
def test_the_share_near_the_boundary(x, y, brief, filed, scope, share):
    seen = filed("watching", "scores")
    given = {"attacks": ["pgd:steps=5", f"watching@{scope}"]}
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(math.inf, 0.02), **given)
    distance = margin(x) / WEIGHT.abs().sum()
    standing = distance > 0.02
    assert report.attacked.value == float(standing.double().mean())
    count = -(-int(standing.sum()) // share)
    nearest = torch.where(standing, distance, torch.inf).argsort()[:count]
    assert rows_of(seen, x) == sorted(nearest.tolist())
    assert run_of(report, "watching").attempted == count


def test_an_audit_that_breaks_nothing_bounds_what_it_left(x, y, brief, filed):
    filed("climbing", "gradient")
    seen = filed("watching", "scores")
    threat = rl.LpBall(2, 20.0)
    report = rl.evaluate(Hidden(), x, y, threat, attacks=["climbing", "watching@audit"])
    run = run_of(report, "watching")
    assert (run.attempted, run.broken) == (64, 0)
    assert run.audit == Audit(tried=64, left=N - 64)
    audited = rows_of(seen, x)
    assert len(set(audited)) == 64
    assert max(audited) > 64
    assert f"at most {run.audit.bound:.1%} of the {N - 64} others" in str(report)
    # one that is in the rest alone is missed, and the bound holds
    target = next(row for row in range(N) if row not in audited)
    lone = x[target]
    filed(
        "missing", "scores", lambda x, y: torch.where((x == lone).all(1)[:, None], across(x, y), x)
    )
    report = rl.evaluate(Hidden(), x, y, threat, attacks=["climbing", "missing@audit"])
    assert report.attacked.value == 1
    assert 1 / (N - 64) <= run_of(report, "missing").audit.bound
    # one of the audit is found, and then all that there are
    pair = x[[target, audited[5]]]

    def both(x, y):
        chosen = (x[:, None] == pair).all(2).any(1)
        return torch.where(chosen[:, None], across(x, y), x)

    filed("finding", "scores", both)
    report = rl.evaluate(Hidden(), x, y, threat, attacks=["climbing", "finding@audit"])
    run = run_of(report, "finding")
    assert (run.attempted, run.broken, run.audit) == (N, 2, None)
    broken = [sample.index for sample in report.samples if sample.broken_by]
    assert broken == sorted([target, audited[5]])


@pytest.mark.parametrize("n", [1, 64, 300])
def test_the_bound_of_an_audit_is_clopper_and_pearsons(n):
    truth = stats.binomtest(0, n, alternative="less").proportion_ci(0.95, "exact").high
    assert Audit(tried=n, left=10).bound == pytest.approx(truth)


def test_few_samples_are_all_attacked(x, y, brief, filed):
    filed("climbing", "gradient")
    filed("watching", "scores")
    given = {"attacks": ["climbing", "watching@audit", "watching@near"]}
    report = rl.evaluate(Hidden(), x[:128], y[:128], rl.LpBall(2, 0.1), **given)
    assert report.attacks[1].attempted == 128
    assert report.attacks[1].audit is None
    few = rl.evaluate(Hidden(), x[:8], y[:8], rl.LpBall(2, 0.1), **given)
    assert few.attacks[2].attempted == 8


@pytest.mark.parametrize("masked", [False, True])
def test_where_the_gradient_is_masked_black_boxes_run_in_full(x, y, brief, filed, masked):
    net = defences.Before(Hidden(), defences.rounded(64)) if masked else Hidden()
    y = net(x).argmax(1)
    filed("watching", "scores")
    given = {"attacks": ["pgd:steps=3", "watching@audit", "square:queries=3@masked"]}
    report = rl.evaluate(net, x, y, rl.LpBall(math.inf, 1e-4), **given)
    watching, square = report.attacks[1:]
    standing = round(report.attacked.value * N)
    if masked:
        assert report.verdict["trustworthy"] is False
        assert (watching.attempted, watching.audit) == (N - report.attacks[0].broken, None)
        assert square.attempted >= standing
    else:
        assert watching.audit is not None
        assert square.skipped == MILD[0]
        assert square.attempted == 0


def test_a_shortened_attack_by_gradient_is_one(x, y, brief, filed):
    """A budget changes the name of a step, not what the audits after it are."""
    filed("watching", "scores")
    given = {"attacks": ["pgd:steps=30", "watching@audit"], "budget": "gradients=10"}
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(math.inf, 1e-4), **given)
    assert report.attacks[0].name == "pgd:steps=10"
    assert run_of(report, "watching").audit == Audit(64, N - 64)


def test_where_the_bracket_is_closed_nothing_is_diagnosed(x, y, brief):
    model = LogisticRegression(C=100).fit(x.numpy(), y)
    given = {"attacks": ["pgd:steps=3", "linear_exact", "retreat:queries=5@masked"]}
    report = rl.evaluate(model, x, y, rl.LpBall(2, EPS), **given)
    assert report.certified.value == report.attacked.value
    assert run_of(report, "retreat").attempted == 0
    assert brief == []


@pytest.mark.parametrize("nearest", [False, True])
def test_certified_samples_are_attacked_once(x, y, brief, filed, nearest):
    model = LogisticRegression(C=100).fit(x.numpy(), y)
    seen = [filed(name, "gradient", minimal=True) for name in ("one", "two")]
    given = {"attacks": ["one", "two", "linear_exact"], "nearest": nearest}
    report = rl.evaluate(model, x, y, rl.LpBall(2, EPS), **given)
    right = sum(sample.clean_correct for sample in report.samples)
    certified = [sample.index for sample in report.samples if sample.certified]
    assert 0 < len(certified) < right
    assert len(seen[0]) == right
    assert len(seen[1]) == right - len(certified)
    assert not set(rows_of(seen[1], x)) & set(certified)
    assert report.verdict["text"] == "certain: the certificate meets the attack"
    assert run_of(report, "linear_exact").attempted == right - len(certified)


# ---------------------------------------------------------------------- nearest points


def test_nearest_points_of_broken_samples(x, y, brief, filed):
    """A sloppy attack breaks all in reach; what comes near afterwards changes distances only."""
    filed("sloppy", "scores", across)
    threat, given = rl.LpBall(2, 2.0), {"attacks": ["sloppy", "fmn:steps=30"]}
    exact = margin(x) / WEIGHT.norm()
    reports = {near: rl.evaluate(Hidden(), x, y, threat, nearest=near, **given) for near in (0, 1)}
    for near, report in reports.items():
        assert [s.clean_correct for s in report.samples] == [True] * N
        assert sum(run.broken for run in report.attacks) == N * (1 - report.attacked.value)
        distance = np.array([s.distance for s in report.samples], dtype=float)
        assert (distance >= exact.numpy() * (1 - 1e-9)).all()
        first = np.array([s.broken_by == "sloppy" for s in report.samples])
        off = np.median(distance[first] / exact.numpy()[first])
        assert off < 1.01 if near else off > 2
        for sample, gap in zip(report.samples, margin(x).tolist(), strict=True):
            if sample.broken_by == "sloppy":  # the lowest margin that was seen stays
                lowest = -min(0.01 * gap, 2.0 - gap)
                assert sample.attacked_margin == pytest.approx(lowest, rel=1e-6)
        moved = torch.as_tensor(report.x_adv)
        np.testing.assert_allclose((moved - x).norm(dim=1).numpy(), distance, rtol=1e-12)
        assert (Hidden()(moved).argmax(1) != y).all()
    plain, near = reports.values()
    assert [s.broken_by for s in plain.samples] == [s.broken_by for s in near.samples]
    assert near.attacked == plain.attacked
    assert near.attacks[1].attempted == N > plain.attacks[1].attempted
    lower, upper = (
        np.array([share for share in r.to_dict()["curve"]["attacked"] if share is not None])
        for r in (near, plain)
    )
    assert (lower <= upper).all()
    assert lower.sum() < upper.sum()


# ---------------------------------------------------------------------- verdicts


def test_a_verdict_is_of_all_attacks(x, y, brief, filed):
    """Score attacks that find much after the first diagnosis are evidence in the report's."""

    def most(points, labels):
        return torch.where((points == x[0]).all(1)[:, None], points, across(points, labels))

    filed("climbing", "gradient")
    filed("finding", "scores", most)
    given = {"attacks": ["climbing", "finding@audit"]}
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(2, 20.0), **given)
    assert report.attacked.value == 1 / N
    failed = [f["check"] for f in report.verdict["findings"] if f["passed"] is False]
    assert failed == ["scores_add_little_to_gradients"]
    assert str(report).count("suspicious (1 of") == 1
    filed("guessing", "labels", most)
    given = {"attacks": ["climbing", "guessing@audit"]}
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(2, 20.0), **given)
    assert report.verdict["trustworthy"] is False


def test_where_nothing_stands_nothing_is_suspicious(x, y, brief, filed):
    """An upper bound of 0 cannot be too high, whatever was masked."""
    filed("climbing", "gradient")
    filed("finding", "scores", across)
    attacks = ["climbing", "finding"]
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(2, 20.0), attacks=attacks)
    assert report.attacked.value == 0
    assert report.verdict["trustworthy"] is True
    assert report.verdict["text"] == "certain: every sample is broken, or wrong from the start"


def test_an_evaluation_without_attacks_is_not_trusted(x, y):
    """A sound model and a masked one, and no budget for any attack."""
    for net in (Hidden(), defences.Before(Hidden(), defences.rounded(8))):
        labels = net(x).argmax(1)
        given = {"budget": "gradients=0,forwards=0"}
        report = rl.evaluate(net, x, labels, rl.LpBall(math.inf, 1e-4, **BOX), **given)
        assert not any(run.attempted for run in report.attacks)
        sound = isinstance(net, Hidden)
        assert report.verdict["trustworthy"] is (None if sound else False)
        assert report.verdict["text"].startswith("no verdict: no attack" if sound else "suspicious")
    missed = rl.evaluate(Hidden(), x, y, rl.LpBall(math.inf, 0.1, **BOX), **given)
    failed = [f["check"] for f in missed.verdict["findings"] if f["passed"] is False]
    assert failed == ["evaluation_finds_what_probes_find"]


@pytest.mark.parametrize("mixed", [True, False])
def test_verdicts_do_not_depend_on_the_order_of_rows(x, mixed):
    """Half of the samples meet a masked gradient; a prefix of a sorted data set does not."""
    flag = torch.arange(N) % 2 if mixed else torch.arange(N) // (N // 2)
    points = torch.cat([x[:, :5], flag[:, None].double()], 1)

    class Half(Hidden):
        def forward(self, x):
            plain, masked = super().forward(x), super().forward((x * 64).round() / 64)
            return torch.where(x[:, 5:] > 0.5, masked, plain)

    labels = Half(-0.5)(points).argmax(1)
    frozen = torch.tensor([1, 1, 1, 1, 1, 0])
    threat = rl.LpBall(math.inf, 1e-3, **BOX, mask=frozen)
    report = rl.evaluate(Half(-0.5), points, labels, threat, attacks="pgd:steps=3")
    failed = [f["check"] for f in report.verdict["findings"] if f["passed"] is False]
    assert "gradient_available" in failed
    assert any("exactly zero for" in note for note in report.notes)


def test_probes_are_made_once(x, y, filed):
    """Breaks between two diagnoses change the record, not what the model is asked again."""

    def some(points, labels):
        odd = (points[:, 0] > 0.5)[:, None]
        return torch.where(odd, across(points, labels), points)

    filed("climbing", "gradient")
    filed("finding", "scores", some)
    attacks = ["climbing", "finding@audit"]
    model = rl.wrap(Hidden())
    report = rl.evaluate(model, x, y, rl.LpBall(2, 20.0), attacks=attacks)
    assert run_of(report, "finding").broken > 9
    assert 0 < report.verdict["backwards"] <= 60
    assert model.backwards <= (1 + 60) * 64


@pytest.mark.parametrize("p", [0, 3])
def test_checks_that_need_no_norm_run_for_every_p(x, y, p):
    """They tell a masked model, but that they find nothing is no reason for trust."""
    threat = rl.LpBall(p, {0: 1, 3: 0.01}[p], **BOX)
    report = rl.evaluate(Hidden(), x[:40], y[:40], threat, attacks="fgsm")
    assert report.verdict["trustworthy"] is None
    assert report.verdict["text"].startswith("no verdict: the checks that compare attacks")
    assert "no verdict" in str(report)
    masked = defences.Before(Hidden(), defences.rounded(4))
    labels = masked(x).argmax(1)
    report = rl.evaluate(masked, x[:40], labels[:40], threat, attacks="fgsm")
    failed = [f["check"] for f in report.verdict["findings"] if f["passed"] is False]
    assert "gradient_available" in failed


def test_a_binary_network_is_not_suspicious_for_want_of_a_third_class(x, y, monkeypatch):
    checks = ["enough_classes_for_dlr", "gradient_available"]
    whole = Diagnosis.verdict
    monkeypatch.setattr(Diagnosis, "verdict", lambda self, broken: whole(self, broken, checks))
    monkeypatch.setitem(PRESETS, "small", (Step("apgd", {"loss": "dlr", "steps": 5}),))
    report = rl.evaluate(Hidden(), x[:3], y[:3], rl.LpBall(2, 0.01), attacks="small")
    assert report.verdict["trustworthy"] is True
    assert run_of(report, "apgd").name == "apgd:loss=margin:steps=5"


class Hungry(Hidden):
    """Runs out of memory on more than a few samples."""

    most = 9

    def forward(self, x):
        if len(x) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(x)


def test_a_verdict_within_memory(x, y):
    report = rl.evaluate(Hungry(), x[:30], y[:30], rl.LpBall(2, 0.01), attacks="fgsm")
    assert report.verdict["trustworthy"] is not None
    assert 1 <= report.verdict["samples"] <= Hungry.most


# ---------------------------------------------------------------------- resume


def test_an_audit_that_was_interrupted_goes_on(x, y, brief, filed, tmp_path):
    filed("climbing", "gradient")
    calls = []

    def stumbling(x, y):
        calls.append(len(x))
        if len(calls) == stumble_at:
            raise KeyboardInterrupt
        return across(x, y)

    filed("stumbling", "scores", stumbling)
    given = {"attacks": ["climbing", "stumbling@audit"], "batch_size": 20}
    threat, stumble_at = rl.LpBall(2, 2.0), None
    whole = rl.evaluate(Hidden(), x, y, threat, **given)
    assert run_of(whole, "stumbling").attempted > 64
    batches = len(calls)
    for stumble_at in (2, batches - 1):  # in the audit, in the rest
        folder, calls = tmp_path / str(stumble_at), []
        with pytest.raises(KeyboardInterrupt):
            rl.evaluate(Hidden(), x, y, threat, resume=folder, **given)
        again = rl.evaluate(Hidden(), x, y, threat, resume=folder, **given)
        assert told(again) == told(whole)
        assert len(calls) < 2 * batches
        third = rl.evaluate(Hidden(), x, y, threat, resume=folder, **given)
        assert told(third) == told(whole)


def test_the_same_attack_twice_runs_and_costs_once(x, y, brief, tmp_path):
    given = {"attacks": "fgsm,pgd:steps=2,fgsm", "resume": tmp_path}
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(2, EPS), **given)
    assert report.attacks[0].backwards == N
    assert report.attacks[2].skipped == MILD[1]
    assert report.attacks[2].backwards == 0


def test_resume_refuses_what_would_count_other_samples(x, y, brief, tmp_path):
    given = {"attacks": "fgsm,fmn:steps=3", "resume": tmp_path}
    threat = rl.LpBall(2, EPS)
    rl.evaluate(Hidden(), x, y, threat, nearest=True, **given)
    with pytest.raises(InputError, match="nearest changed since"):
        rl.evaluate(Hidden(), x, y, threat, **given)
    with pytest.raises(InputError, match="budget, certify changed since"):
        rl.evaluate(
            Hidden(), x, y, threat, nearest=True, certify="none", budget="forwards=99", **given
        )


# ---------------------------------------------------------------------- kinds of threats and tasks


def test_budgets_per_sample(x, y, brief):
    """Each sample has its own ε, some of them 0; the exact answer is known."""
    distance = (margin(x) / WEIGHT.norm()).double()
    factor = torch.linspace(0, 2, N, dtype=torch.float64)
    threat = rl.LpBall(2, distance * factor)
    report = rl.evaluate(
        Hidden(), x, y, threat, attacks=["pgd:steps=3", "square:queries=3@audit"], nearest=True
    )
    found = np.array([s.broken_by is not None for s in report.samples])
    np.testing.assert_array_equal(found, factor.numpy() > 1)
    assert report.to_dict()["curve"] is None
    assert run_of(report, "square").audit == Audit(64, int((factor <= 1).sum()) - 64) or (
        run_of(report, "square").attempted == int((factor <= 1).sum())
    )


def test_changed_features_are_counted(x, y):
    """p = 0: the exact number is that of the largest gains that cross the margin."""
    threat = rl.LpBall(0, 1, **BOX)
    report = rl.evaluate(Hidden(), x, y, threat, attacks="fmn:steps=30,sigma_zero:steps=30")
    push = torch.where(y[:, None] == 1, -WEIGHT, WEIGHT)
    gain = torch.where(push > 0, push * (1 - x), -push * x).sort(1, descending=True).values
    most = gain.cumsum(1)
    breakable = (most[:, 0] > margin(x)).numpy()
    found = np.array([s.broken_by is not None for s in report.samples])
    assert not (found & ~breakable).any()
    assert found.sum() >= 0.98 * breakable.sum() > 20
    assert {s.distance for s in report.samples if s.broken_by} == {1.0}
    schema = json.loads((Path(rendering.__file__).parent / "schema.json").read_text())
    jsonschema.validate(document([report]), schema)


def wavy_regressor():
    """Return a smooth regressor and samples whose slopes, and so whose gains, differ."""
    model = rl.wrap(defences.After(nn.Linear(3, 1).double(), lambda z: (3 * z).exp()), task=REG)
    x = torch.rand(150, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return model, x, model(x).detach() + 0.1


def test_near_samples_of_a_regressor_are_those_whose_loss_grew_most(brief, filed):
    model, x, y = wavy_regressor()
    seen = filed("watching", "scores")
    attacks = ["pgd:steps=5", "watching@near"]
    report = rl.evaluate(model, x, y, rl.LpBall(2, 0.1), attacks=attacks)
    gain = np.array([s.attacked_loss - s.clean_loss for s in report.samples])
    assert rows_of(seen, x) == sorted(gain.argsort()[-38:].tolist())
    assert report.attacks[1].audit is None


def test_standard_costs_a_regressor_no_more_than_a_classifier(brief):
    model, x, y = wavy_regressor()
    report = rl.evaluate(model, x, y, rl.LpBall(2, 0.1))
    assert 0 < sum(run.backwards for run in report.attacks) <= 150 * 130
    assert report.attacked.value > report.clean.value


# ---------------------------------------------------------------------- what cannot be asked


@pytest.mark.parametrize(
    ("attacks", "said"),
    [
        ("pgd:loss=targeted_margin", "pushes towards y, .* targets=9, .* restarts="),
        ("square:loss=targeted_dlr", "pushes towards y"),
        ("pgd:loss=luck", "there is no loss 'luck'; there are margin"),
        ("pgd:step_size=abc", "pgd: step_size must be float; got 'abc'"),
        ("pgd:generator=abc", "generator must be like 0"),
        ("apgd:start=3", "apgd: start must be Tensor; got 3"),
        ("pgd:steps=3:steps=4", "gives steps twice"),
        ([("pgd", {"loss": losses.targeted_margin})], "pushes towards y"),
        ([("pgd", {"steps": np.float64(2.5)})], "steps must be like 40"),
        ([("pgd", {"steps": None})], "steps must be like 40"),
    ],
)
def test_options_that_mean_nothing_are_refused(attacks, said):
    with pytest.raises(InputError, match=said):
        plan(attacks)


def test_options_of_numpys_kinds_are_plain_numbers():
    (step,) = plan([("pgd", {"steps": np.int64(5), "step_size": np.float32(0.5)})])
    assert step == Step("pgd", {"steps": 5, "step_size": 0.5})
    assert type(step.options["steps"]) is int
    assert plan([("pgd", {"step_size": 1, "precision": None})])[0].option("step_size") == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": {"gradients": 5}}, "a budget is text as .*; got dict"),
        ({"budget": "gradients=5,gradients=6"}, "write a budget as"),
        ({"seed": None}, "seed must be a whole number .*; got None"),
        ({"seed": 2**63}, "fits into 64 bits"),
        ({"indices": range(5)}, r"one number for each of the 4 samples; got shape \(5,\)"),
        ({"indices": [0, 1, 2, 2]}, r"must differ.*\[2\] came more than once"),
        ({"indices": [0.0, 1.0, 2.0, 3.5]}, "must be whole numbers"),
    ],
)
def test_what_evaluate_cannot_use_is_refused(x, y, given, said):
    with pytest.raises(InputError, match=said):
        rl.evaluate(Hidden(), x[:4], y[:4], rl.LpBall(2, 0.1), attacks="fgsm", **given)


def test_budgets_are_whole_numbers():
    for wrong in (-1, 2.5, "3", True):
        with pytest.raises(InputError, match="gradients must be a whole number from 0"):
            Budget(wrong)
    assert Budget(np.int64(3)).gradients == 3


@pytest.mark.parametrize(("p", "eps"), [(0, 1), (1.5, 0.05)])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_attacks_under_unusual_norms(x, y, p, eps, preset, brief):
    report = rl.evaluate(Hidden(), x[:20], y[:20], rl.LpBall(p, eps, **BOX), attacks=preset)
    assert any(run.attempted for run in report.attacks)
    assert report.attacked.value < 1


def test_a_preset_without_any_attack_is_refused(x, y):
    box = rl.wrap(lambda rows: Hidden()(torch.as_tensor(rows)).detach().numpy(), output="logits")
    with pytest.raises(InputError, match=r"the preset has no attack for this model and L1\.5"):
        rl.evaluate(box, x[:20], y[:20], rl.LpBall(1.5, 0.05, **BOX))


def test_what_a_budget_leaves_out_is_told(x, y, brief):
    limits = "gradients=3,forwards=20"
    attacks = "pgd:steps=3,fab,retreat:queries=30@masked,square:queries=60@audit"
    given = {"attacks": attacks, "budget": limits}
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(2, 1e-6), **given)
    assert f"note: the budget {limits} leaves nothing for fab" in str(report)
    assert "nothing for retreat" not in str(report)  # it would not have run anyway
    run = run_of(report, "square")
    queries = run.forwards // run.attempted
    assert f"tried with {queries} queries each on 64 samples chosen at random" in str(report)


def test_the_curve_of_attacks_ends_where_they_searched(x, y, brief):
    report = rl.evaluate(Hidden(), x, y, rl.LpBall(2, EPS), attacks="pgd:steps=5")
    curve = report.to_dict()["curve"]
    known = [share for share in curve["attacked"] if share is not None]
    assert curve["attacked"][: len(known)] == known
    assert known[-1] == report.attacked.value
    assert curve["eps"][len(known) - 1] == pytest.approx(EPS, rel=1e-12)
    assert len(known) < len(curve["eps"])
    assert "Accuracy against" in rendering.page(document([report]))
