"""Attacks with a fixed budget, where the truth is known, and what they cost."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn.attacks import apgd, mi_fgsm, pgd, transfer, universal
from robustlearn.attacks.apgd import _Above, _checkpoints, _Ratio
from robustlearn.certify import CERTIFICATES
from robustlearn.models import Expectation, Guided

CLASSES = (2, 3, 10)
GAINS = {  # of the logits, by classes: all with three, and the hardest with many
    2: ((1, torch.float32),),
    3: ((0.1, torch.float64), (1, torch.float32), (100, torch.float32)),
    10: ((100, torch.float32),),
}


def linear_problem(seed, p, classes, gain, n=24, d=24, dtype=torch.float64):
    """A linear model with uneven weights, points at the walls, and 1.02 × their exact radius."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    net = nn.Linear(d, classes).double()
    with torch.no_grad():
        net.weight.copy_(gain * normal(classes, d) * normal(d).exp())
        net.bias.copy_(gain * 0.3 * normal(classes))
    x = torch.rand(n, d, generator=generator, dtype=torch.float64)
    x[torch.rand(n, d, generator=generator) < 0.3] = 0
    x[torch.rand(n, d, generator=generator) < 0.2] = 1
    model, x = rl.wrap(net.to(dtype)), x.to(dtype)
    y = model(x).argmax(1)
    threat = rl.LpBall(p, 1.0, lower=0.0, upper=1.0)
    found = CERTIFICATES["linear"].function(model, x, threat, y)
    radius = torch.as_tensor(np.asarray(found.radius, dtype=float))
    there = radius.isfinite() & (radius > 1e-4)
    assert there.sum() > n / 2
    return model, x[there], y[there], replace(threat, eps=radius[there])


def scaled(threat, factor):
    return replace(threat, eps=threat.eps * factor)


EVERYTHING = {
    "pgd": lambda k: (pgd, {"restarts": k}),
    "pgd, cross-entropy": lambda k: (pgd, {"restarts": k, "loss": "cross_entropy"}),
    "pgd, constant": lambda k: (pgd, {"restarts": k, "schedule": "constant", "step_size": 0.3}),
    "apgd": lambda k: (apgd, {"restarts": k}),
    "apgd, cross-entropy": lambda k: (apgd, {"restarts": k, "loss": "cross_entropy"}),
    "apgd, dlr": lambda k: (apgd, {"restarts": k, "loss": "dlr"}),
    "apgd, targets": lambda k: (apgd, {"targets": k - 1}),
    "apgd, dlr targets": lambda k: (apgd, {"targets": k - 1, "loss": "dlr"}),
    "mi_fgsm": lambda k: (mi_fgsm, {"restarts": k}),
}


@pytest.mark.parametrize("p", [1, 2, math.inf])
@pytest.mark.parametrize("name", EVERYTHING)
def test_every_adversarial_example_of_a_linear_model_is_found(name, p):
    """None is missed at 1.02 times the exact radius, and none exists at 0.98 times."""
    if p != math.inf and name in ("mi_fgsm", "pgd, constant"):
        pytest.skip("steps of fixed length end in a corner for p = inf only")
    for classes in CLASSES:
        attack, options = EVERYTHING[name](classes)
        for gain, dtype in GAINS[classes]:
            seed = 7 * classes + int(gain)
            model, x, y, exact = linear_problem(seed, p, classes, gain, dtype=dtype)
            x_adv = attack(model, x, y, scaled(exact, 1.02), **options)
            missed = (model(x_adv).argmax(1) == y).sum()
            assert missed == 0, f"K = {classes}, gain {gain}: {missed} of {len(y)} missed"
            assert scaled(exact, 1.02).contains(x, x_adv).all()
    x_adv = attack(model, x, y, scaled(exact, 0.98), **options)
    assert (model(x_adv).argmax(1) == y).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_single_logits_and_regressors_get_their_worst_case(p):
    generator = torch.Generator().manual_seed(0)
    net = nn.Linear(8, 1).double()
    x = torch.rand(20, 8, generator=generator, dtype=torch.float64)
    threat = rl.LpBall(p, 0.3, lower=0.0, upper=1.0)
    target = torch.linspace(-1, 1, 20, dtype=torch.float64)
    for task, y in (("regression", target), ("classification", torch.arange(20) % 2)):
        model = rl.wrap(net, task=task)
        worst = rl.attacks.linear_exact(model, x, y, threat)
        loss = losses.get(None, task)
        for attack, more in ((pgd, {}), (apgd, {})):
            x_adv = attack(model, x, y, threat, restarts=3, stop_when_broken=False, **more)
            reached = loss.objective(model(x_adv), y)
            best = loss.objective(model(worst), y)
            torch.testing.assert_close(reached, best, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------- apgd by itself


def test_the_checkpoints_are_those_of_the_papers():
    assert list(_checkpoints(100, sparse=False)) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert list(_checkpoints(100, sparse=True)) == list(range(4, 100, 4))
    assert list(_checkpoints(1, sparse=False)) == []
    assert all(stretch >= 1 for stretch in _checkpoints(3, sparse=False).values())


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
@pytest.mark.parametrize("form", [_Above, _Ratio])
def test_slopes_of_the_targeted_forms(form, classes):
    torch.manual_seed(0)
    output = torch.randn(12, classes, dtype=torch.float64, requires_grad=True)
    y = torch.arange(12) % classes
    climb = form((y + 1) % classes)
    value, slope = climb.look(output.detach(), y)
    gap = output.gather(1, (y[:, None] + 1) % classes) - output.gather(1, y[:, None])
    top = output.sort(1, descending=True).values
    spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2 if classes > 3 else 1 + top[:, 0] - top[:, -1]
    truth = gap.squeeze(1) / (spread if form is _Ratio else 1)
    (expected,) = torch.autograd.grad(truth.sum(), output)
    torch.testing.assert_close(value, truth.detach())
    torch.testing.assert_close(slope, expected)
    if form is _Ratio:
        torch.testing.assert_close(climb.look(3.7 * output.detach(), y)[0] > 0, value > 0)


def network(seed=0, d=12, classes=5):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(d, 32), nn.Tanh(), nn.Linear(32, classes)).double()


def points(n=50, d=12):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, d, generator=generator, dtype=torch.float64)


def test_apgd_counts_a_gradient_a_step_and_drops_what_is_broken():
    x, model = points(), rl.wrap(network())
    y = model(x).argmax(1)
    model.forwards = model.backwards = 0
    apgd(model, x, y, rl.LpBall(2, 1e-3), steps=15, stop_when_broken=False)
    assert (model.forwards, model.backwards) == (16 * 50, 15 * 50)
    model.backwards = 0
    x_adv = apgd(model, x, y, rl.LpBall(2, 9.0), steps=50)
    assert (model(x_adv).argmax(1) != y).all()
    assert model.backwards < 25 * 50


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_apgd_adapts_its_step_to_a_peak(p):
    """A concave objective: half-steps lead to its peak, which fixed steps of 2ε jump over."""
    torch.manual_seed(0)
    peak = 0.2 * torch.rand(6, dtype=torch.float64)
    net = nn.Identity()

    def near(output, y):
        return -((output - peak) ** 2).sum(1)

    x = torch.zeros(4, 6, dtype=torch.float64)
    y = torch.zeros(4).long()
    threat = rl.LpBall(p, {1: 3.0, 2: 1.0, math.inf: 1.0}[p])
    x_adv = apgd(net, x, y, threat, loss=near, steps=100, stop_when_broken=False)
    bound = {1: 1e-2, 2: 1e-3, math.inf: 1e-3}[p]
    assert (-near(x_adv, y) < bound).all()


def test_apgd_returns_the_best_point_of_all_its_runs():
    x, model = points(), rl.wrap(network())
    y = model(x).argmax(1)
    threat = rl.LpBall(2, 0.2)

    def margins(**given):
        x_adv = apgd(model, x, y, threat, steps=20, stop_when_broken=False, **given)
        return losses.margin(model(x_adv), y)

    once = margins()
    assert (margins(restarts=4) <= once + 1e-9).all()
    aimed = margins(targets=4)
    assert aimed.mean() <= once.mean() + 1e-6


def test_targets_come_in_the_order_of_closeness():
    """With one target a sample heads for the second largest logit, wherever that is."""
    x, model = points(), rl.wrap(network())
    output = model(x)
    y = output.argmax(1)
    second = output.argsort(1, descending=True)[:, 1]
    x_adv = apgd(model, x, y, rl.LpBall(2, 1e-2), targets=1, steps=20)
    moved = model(x_adv) - output
    gain = moved.gather(1, second[:, None]) - moved.gather(1, y[:, None])
    assert (gain > 0).all()
    with pytest.raises(rl.InputError, match="targets= goes with the losses margin and dlr"):
        apgd(model, x, y, rl.LpBall(2, 0.1), targets=2, loss="cross_entropy")
    with pytest.raises(rl.InputError, match=r"apgd: steps must be a whole number in \[1, inf\)"):
        apgd(model, x, y, rl.LpBall(2, 0.1), steps=0)


def test_a_start_is_moved_into_the_threat_and_used():
    x, model = points(), rl.wrap(network())
    y = model(x).argmax(1)
    threat = rl.LpBall(2, 0.1, lower=0.0, upper=1.0)
    x_adv = apgd(model, x, y, threat, start=x + 50, steps=5)
    assert threat.contains(x, x_adv).all()
    found = apgd(model, x, y, replace(threat, eps=1.0))
    broken = model(found).argmax(1) != y
    assert broken.any()
    model.backwards = 0
    apgd(model, x[broken], y[broken], replace(threat, eps=1.0), start=found[broken])
    assert model.backwards == broken.sum()  # broken where they start


@pytest.mark.parametrize("loss", ["cross_entropy", "log_odds"])
def test_saturated_logits_change_nothing(loss):
    """Cross-entropy in float32 at a gain of 10⁵ leads where it leads at a gain of 1."""
    quiet = network().float()
    loud = nn.Sequential(quiet, nn.Linear(5, 5, bias=False))
    with torch.no_grad():
        loud[1].weight.copy_(1e5 * torch.eye(5))
    x = points().float()
    y = rl.wrap(quiet)(x).argmax(1)
    threat = rl.LpBall(math.inf, 0.03)
    for attack in (apgd, pgd, rl.attacks.fgsm):
        calm, shout = (
            losses.margin(rl.wrap(quiet)(attack(net, x, y, threat, loss=loss)), y).mean()
            for net in (quiet, loud)
        )
        clean = losses.margin(rl.wrap(quiet)(x), y).mean()
        assert shout - calm < 0.15 * (clean - calm)


# ---------------------------------------------------------------------- circles


class OneByOne(nn.Module):
    """A network whose rounding does not depend on the batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.cat([self.inner(row) for row in x.split(1)])


def circling(x, y, model, remembers, monkeypatch, steps):
    """Constant sign steps with or without the memory: points and gradients."""
    from robustlearn.attacks import gradient

    with monkeypatch.context() as patch:
        if not remembers:
            patch.setattr(
                gradient._Walk, "returned", lambda self, point: torch.zeros(len(point)).bool()
            )
        model.backwards = 0
        x_adv = pgd(
            model,
            x,
            y,
            rl.LpBall(math.inf, 0.1, lower=0.0, upper=1.0),
            loss="margin",
            steps=steps,
            schedule="constant",
            step_size=0.25,
            stop_when_broken=False,
        )
    return x_adv, model.backwards


def test_a_path_that_circles_is_stopped_with_the_same_result(monkeypatch):
    x = points(n=12)
    torch.manual_seed(0)
    for net in (network(), nn.Linear(12, 3).double()):
        model = rl.wrap(OneByOne(net))
        y = model(x).argmax(1)
        short, few = circling(x, y, model, True, monkeypatch, 100)
        full, all_of_them = circling(x, y, model, False, monkeypatch, 100)
        assert torch.equal(short, full)
        assert all_of_them == 100 * 12
        assert few < all_of_them / 2


def test_no_circle_is_seen_where_steps_or_losses_change():
    x, model = points(), rl.wrap(nn.Linear(12, 3).double())
    y = model(x).argmax(1)
    for given in ({"schedule": "cosine"}, {"schedule": "constant", "momentum": 0.5}):
        model.backwards = 0
        pgd(model, x, y, rl.LpBall(math.inf, 1e-3), steps=30, stop_when_broken=False, **given)
        assert model.backwards == 30 * 50
    model.backwards = 0  # by default the loss changes half-way: the memory begins there
    constant = {"schedule": "constant", "step_size": 0.5}
    pgd(model, x, y, rl.LpBall(math.inf, 1e-3), steps=30, stop_when_broken=False, **constant)
    assert 15 * 50 < model.backwards < 25 * 50


# ---------------------------------------------------------------------- mi_fgsm


def test_mi_fgsm_is_the_formula():
    """Against a plain loop with the cross-entropy of the paper."""
    x, net = points(), network()
    y = net(x).argmax(1)
    eps, n = 0.05, 7
    point, velocity = x.clone(), torch.zeros_like(x)
    for _ in range(n):
        point.requires_grad_()
        loss = nn.functional.cross_entropy(net(point), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, point)
        velocity = 0.9 * velocity + gradient / gradient.abs().sum(1, keepdim=True)
        point = (point.detach() + eps / n * velocity.sign()).clamp(0, 1)
    threat = rl.LpBall(math.inf, eps, lower=0.0, upper=1.0)
    given = {"loss": "cross_entropy", "decay": 0.9, "steps": n, "stop_when_broken": False}
    x_adv = mi_fgsm(net, x, y, threat, **given)
    last = (x_adv - point).abs().amax(1) < 1e-12
    assert last.double().mean() > 0.8  # elsewhere an earlier point was better
    worth = nn.functional.cross_entropy
    reached, plain = (worth(net(p), y, reduction="none") for p in (x_adv, point))
    assert (reached >= plain - 1e-12).all()


# ---------------------------------------------------------------------- around other models


class Noisy(nn.Module):
    """A linear model of a randomly shifted input."""

    def __init__(self, inner, size):
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, x):
        return self.inner(x + self.size * torch.randn_like(x))


def test_expectation_averages_gradients_and_counts_them():
    net = network(classes=3)
    x, y = points(), torch.arange(50) % 3
    sure = rl.wrap(net).gradient(x, y, losses.margin)[0]

    def error(k):
        model = Expectation(rl.wrap(Noisy(net, 0.3)), k)
        gradient, value, output = model.gradient(x, y, losses.margin)
        torch.testing.assert_close(value, losses.margin.objective(output, y))
        assert (model.forwards, model.backwards) == (50 * k, 50 * k)
        return float((gradient - sure).norm())

    assert error(64) < error(1) / 2
    same = Expectation(rl.wrap(net), 3).gradient(x, y, losses.margin)[0]
    torch.testing.assert_close(same, sure)
    with pytest.raises(rl.InputError, match="k must be at least 1"):
        Expectation(rl.wrap(net), 0)


def test_every_attack_takes_an_expectation():
    model = Expectation(rl.wrap(Noisy(network(), 0.05)), 8)
    x = points()
    y = model(x).argmax(1)
    threat = rl.LpBall(2, 0.5, lower=0.0, upper=1.0)
    x_adv = apgd(model, x, y, threat, steps=20)
    assert (model(x_adv).argmax(1) != y).float().mean() > 0.5
    report = rl.evaluate(model, x, y, threat, attacks=["pgd", ("square", {"queries": 20})])
    assert report.attacked.value < report.clean.value


def test_transfer_to_a_black_box():
    victim = network(0)
    x = points()
    y = victim(x).argmax(1)
    threat = rl.LpBall(2, 0.4, lower=0.0, upper=1.0)

    def black_box(a):
        with torch.no_grad():
            return victim(torch.as_tensor(a)).numpy()

    def standing(x_adv):
        return (victim(x_adv).argmax(1) == y).double().mean()

    white = standing(pgd(victim, x, y, threat))
    twin = transfer(black_box, x, y, threat, surrogate=victim, attack="pgd")
    assert torch.equal(twin, pgd(victim, x, y, threat))
    stranger = transfer(black_box, x, y, threat, surrogate=network(5), attack="pgd")
    assert threat.contains(x, stranger).all()
    assert white <= standing(stranger)
    with pytest.raises(rl.InputError, match="a surrogate needs gradients"):
        transfer(victim, x, y, threat, surrogate=black_box)
    with pytest.raises(rl.InputError, match="they must be for the same task"):
        transfer(victim, x, y, threat, surrogate=network(classes=3))
    guided = Guided(rl.wrap(black_box), rl.wrap(victim))
    report = rl.evaluate(guided, x, y, threat, attacks=["pgd"])
    assert report.attacked.value == pytest.approx(float(white), abs=0.021)


def test_transfer_never_trusts_the_surrogate():
    """What breaks the surrogate alone is not success: the point is chosen by the target."""
    generator = torch.Generator().manual_seed(0)
    target, surrogate = nn.Linear(12, 2).double(), nn.Linear(12, 2).double()
    with torch.no_grad():
        surrogate.weight.copy_(-target.weight)  # its gradient leads the wrong way
    x = torch.rand(30, 12, generator=generator, dtype=torch.float64)
    model = rl.wrap(target)
    y = model(x).argmax(1)
    x_adv = transfer(model, x, y, rl.LpBall(2, 0.2), surrogate=surrogate)
    assert (losses.margin(model(x_adv), y) <= losses.margin(model(x), y) + 1e-12).all()


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_universal_is_the_exact_one_of_a_linear_model(p):
    """All samples of one class of two: the best δ for one is the best for all."""
    model, x, _, _ = linear_problem(3, p, 2, 1.0)
    x = 0.4 + 0.2 * x
    y = model(x).argmax(1)
    y[:] = y.mode().values
    threat = rl.LpBall(p, 0.1)
    delta = universal(model, x, y, threat)
    assert delta.shape == (1, 24)
    assert threat.contains(torch.zeros_like(delta), delta).all()
    worst = rl.attacks.linear_exact(model, x, y, threat)
    torch.testing.assert_close(
        losses.margin(model(x + delta), y).mean(), losses.margin(model(worst), y).mean()
    )
    again = universal(model, x, y, threat)
    assert torch.equal(delta, again)


def test_universal_beats_noise_and_says_what_it_needs():
    x, model = points(n=200), rl.wrap(network())
    y = model(x).argmax(1)
    threat = rl.LpBall(math.inf, 0.3, lower=0.0, upper=1.0, mask=torch.arange(12) > 1)
    delta = universal(model, x[:100], y[:100], threat)
    assert not delta[:, :2].any()

    def broken(change):
        return (model(threat.restrict(x[100:], change)).argmax(1) != y[100:]).double().mean()

    noise = threat.sample(x[100:], torch.arange(100))
    assert broken(delta.expand(100, -1)) > 2 * broken(noise)
    with pytest.raises(rl.InputError, match="a universal change has one budget"):
        universal(model, x[:2], y[:2], rl.LpBall(2, [0.1, 0.2]))
    with pytest.raises(rl.InputError, match=r"universal: step_size must be a number in \(0, inf\)"):
        universal(model, x, y, threat, step_size=math.nan)
    rows = rl.Tabular(1, 1.0, integer=[True] * 12)
    with pytest.raises(rl.InputError, match="attack each row by itself"):
        universal(model, x.round(), y, rows)


# ---------------------------------------------------------------------- low precision


def test_a_low_precision_never_decides_alone():
    """Gradients in bfloat16; every point that counts as broken is so in float32."""
    net, x = network().float(), points(n=200).float()
    model = rl.wrap(net)
    y = model(x).argmax(1)
    threat = rl.LpBall(math.inf, 0.05, lower=0.0, upper=1.0)
    rough = model.gradient(x, y, losses.margin, "bfloat16")
    exact = model.gradient(x, y, losses.margin)
    assert not torch.equal(rough[0], exact[0])
    assert all(part.dtype == torch.float32 for part in rough)
    torch.testing.assert_close(rough[0], exact[0], rtol=0.1, atol=0.05)
    for attack in (pgd, apgd):
        for restarts in (1, 3):
            full, low = (
                attack(model, x, y, threat, restarts=restarts, steps=20, precision=precision)
                for precision in (None, "bfloat16")
            )
            standing = [int((model(x_adv).argmax(1) == y).sum()) for x_adv in (full, low)]
            assert 0 < standing[0] < 200
            assert abs(standing[0] - standing[1]) <= 1
    with pytest.raises(rl.InputError, match="precision must be bfloat16 or float16"):
        pgd(model, x, y, threat, precision="int8")


def test_samples_that_only_seem_broken_go_on():
    """A model whose low precision calls everything broken: nothing is lost by that."""

    class Liar(nn.Linear):
        def forward(self, x):
            output = super().forward(x)
            lies = torch.is_autocast_enabled(x.device.type)
            return output.flip(1) * 1.0 + 5 * lies * torch.tensor([-1.0, 1.0]) if lies else output

    torch.manual_seed(0)
    net = Liar(6, 2)
    model = rl.wrap(net)
    x = torch.rand(30, 6)
    y = torch.zeros(30).long()
    threat = rl.LpBall(math.inf, 1e-3)
    right = model(x).argmax(1) == y
    for attack in (pgd, apgd):
        model.backwards = 0
        attack(model, x[right], y[right], threat, steps=10, precision="bfloat16")
        assert model.backwards == 10 * right.sum()


# ---------------------------------------------------------------------- networks of others


@pytest.fixture(scope="module")
def zoo(data_folder):
    spec = importlib.util.spec_from_file_location("zoo", data_folder / "models" / "zoo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "eps"), [("wong2018_mnist_eps0.1", 0.1), ("eran_mnist_6_100", 0.03)]
)
def test_apgd_and_pgd_agree_on_networks_of_others(zoo, data_folder, name, eps):
    with np.load(data_folder / "images" / "mnist.npz") as file:
        x = torch.as_tensor(file["x_test"][:200, None] / np.float32(255))
        y = torch.as_tensor(file["y_test"][:200].astype(np.int64))
    model, threat = rl.wrap(zoo.load(name)), rl.LpBall(math.inf, eps, lower=0.0, upper=1.0)

    def standing(attack, **given):
        return int((model(attack(model, x, y, threat, steps=40, **given)).argmax(1) == y).sum())

    ours = standing(pgd)
    theirs = standing(apgd)
    assert abs(theirs - ours) <= 3
    assert abs(standing(apgd, precision="bfloat16") - theirs) <= 1
    assert standing(apgd, targets=9) <= theirs
