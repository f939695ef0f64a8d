"""Contracts that every registered attack keeps, whatever it does inside."""

import copy
import inspect
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn.attacks import ATTACKS, pgd, unsuitable

BUDGET = {0: 3.0, 1: 2.0, 2: 0.6, math.inf: 0.15}
FEW = {
    "pgd": {"steps": 6},
    "apgd": {"steps": 12},
    "ddn": {"steps": 10},
    "fmn": {"steps": 10},
    "fab": {"steps": 5},
    "carlini_wagner": {"steps": 10, "searches": 2},
    "sigma_zero": {"steps": 10},
    "square": {"queries": 12},
    "nes": {"queries": 127},
    "retreat": {"queries": 60},
    "hop_skip_jump": {"queries": 60},
}
SHAPES = {"1-D": (), "2-D": (6,), "3-D": (4, 5), "4-D": (2, 5, 5)}


class Row(nn.Module):
    """Flatten anything, a batch of numbers included."""

    def forward(self, x):
        return x.reshape(len(x), -1)


def network(shape, needs, dtype=torch.float64, classes=3):
    """A small network, or a linear one for attacks that need it."""
    torch.manual_seed(0)
    d = max(1, math.prod(shape))
    if needs == "affine":
        if shape == ():
            return nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, classes)).to(dtype)
        return nn.Sequential(nn.Flatten(), nn.Linear(d, classes)).to(dtype)
    net = nn.Sequential(
        Row(), nn.Linear(d, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, classes)
    ).to(dtype)
    if needs == "labels":  # every class is met, or there would be nothing to find
        with torch.no_grad():
            net[-1].bias.sub_(net.eval()(batch(shape, dtype)[0]).mean(0))
    return net.train()


def batch(shape, dtype=torch.float64, n=9):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(n, *shape, generator=generator, dtype=torch.float64).to(dtype)
    x.reshape(n, -1)[0] = 0.0
    return x, torch.arange(n) % 3


@pytest.fixture(params=[n for n, e in ATTACKS.items() if e.facts["needs"] != "trees"])
def entry(request):
    return ATTACKS[request.param]


@pytest.fixture(params=[0, 1, 2, math.inf])
def threat(request, entry):
    norms = entry.facts["norms"]
    if norms != "any" and request.param not in {float(p) for p in norms.split(",")}:
        pytest.skip(f"{entry.name} knows {norms}")
    return rl.LpBall(request.param, BUDGET[request.param], lower=0.0, upper=1.0)


def options(entry, **more):
    return {**FEW.get(entry.name, {}), **more}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_dtype_and_feasibility_without_tolerance(entry, threat, shape, dtype):
    model, (x, _) = rl.wrap(network(shape, entry.facts["needs"], dtype)), batch(shape, dtype)
    y = model(x).argmax(1)
    threat = replace(threat, mask=torch.rand(shape) < 0.8 if shape else None)
    x_adv = entry.function(model, x, y, threat, **options(entry))
    assert x_adv.shape == x.shape
    assert x_adv.dtype == dtype
    assert x_adv.device == x.device
    assert not x_adv.requires_grad
    assert threat.contains(x, x_adv).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    if shape:
        moved = (x_adv != x).reshape(len(x), -1)
        assert not moved[:, ~threat.mask.reshape(-1)].any()
    before = losses.margin(model(x), y)
    after = losses.margin(model(x_adv), y)
    assert (after < before - 1e-6).float().mean() > 0.5  # it does attack


def test_eps_zero_changes_nothing(entry, threat):
    x, y = batch((6,))
    model = network((6,), entry.facts["needs"])
    x_adv = entry.function(model, x, y, replace(threat, eps=0.0), **options(entry))
    assert torch.equal(x_adv, x)


def test_same_seed_same_result_and_no_neighbours(entry, threat):
    """One seed, one result; alone, among others, and in another order."""
    shape = (2, 5, 5)
    x, y = batch(shape)
    model = rl.wrap(network(shape, entry.facts["needs"]))
    takes = "generator" in inspect.signature(entry.function).parameters
    keys = torch.arange(len(x)) * 7919

    def attacked(rows):
        more = {"generator": keys[rows]} if takes else {}
        held = threat.select(rows)
        return entry.function(model, x[rows], y[rows], held, **options(entry, **more))

    everyone = torch.arange(len(x))
    whole = attacked(everyone)
    assert torch.equal(whole, attacked(everyone))
    order = torch.tensor([4, 1, 8, 0, 2, 6, 3, 7, 5])
    torch.testing.assert_close(attacked(order), whole[order], rtol=0, atol=1e-10)
    for row in (0, 5):
        alone = attacked(torch.tensor([row]))
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-10)
    if takes:
        other = entry.function(model, x, y, threat, **options(entry, generator=1))
        assert not torch.equal(other, whole)


def test_no_side_effects(entry, threat, untouched):
    shape = (6,)
    with torch.random.fork_rng():
        module = network(shape, entry.facts["needs"])
    module.train()
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    state = copy.deepcopy(module.state_dict())
    x, y = batch(shape)
    kept = (x.clone(), y.clone())
    entry.function(module, x, y, threat, **options(entry))
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])
    assert all(part.training for part in module.modules())
    assert all(p.requires_grad and (p.grad == 1).all() for p in module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_one_budget_per_sample(entry, threat):
    x, y = batch((6,))
    eps = torch.linspace(0, threat.eps, len(x))
    held = replace(threat, eps=eps)
    x_adv = entry.function(network((6,), entry.facts["needs"]), x, y, held, **options(entry))
    assert held.contains(x, x_adv).all()
    assert torch.equal(x_adv[0], x[0])
    assert (held.norm(x_adv - x) <= eps).all()


def test_regressors_and_single_logits(entry, threat):
    x, _ = batch((6,))
    net = network((6,), entry.facts["needs"], classes=1)
    target = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    model = rl.wrap(net, task="regression")
    refused = {"minimal": "nearest misclassified point", "labels": "needs predicted classes"}
    why = "minimal" if entry.facts["minimal"] else entry.facts["needs"]
    if why in refused:
        with pytest.raises(rl.InputError, match=refused[why]):
            entry.function(model, x, target, threat)
    else:
        x_adv = entry.function(model, x, target, threat, **options(entry))
        clean, found = (losses.squared_error(model(p), target) for p in (x, x_adv))
        assert (found >= clean - 1e-12).float().mean() > 0.8
        assert found.mean() > clean.mean()
    labels = torch.arange(len(x)) % 2
    model = rl.wrap(net, task="classification")
    x_adv = entry.function(model, x, labels, threat, **options(entry))
    assert losses.margin(model(x_adv), labels).mean() < losses.margin(model(x), labels).mean()


def test_empty_batches_and_bad_input(entry, threat):
    x, y = batch((6,))
    model = rl.wrap(network((6,), entry.facts["needs"]))
    assert entry.function(model, x[:0], y[:0], threat).shape == (0, 6)
    with pytest.raises(rl.InputError, match="data outside the box"):
        entry.function(model, x + 5, y, threat)
    if entry.facts["needs"] not in ("scores", "labels"):
        black_box = rl.wrap(lambda a: a[:, :3], task="classification")
        reason = unsuitable(entry.name, black_box, threat, (6,))
        assert f"{entry.name} needs" in reason
        with pytest.raises(rl.InputError, match=reason):
            entry.function(black_box, x, y, threat)


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, True, "1"])
def test_every_numeric_option_has_a_range(entry, wrong):
    x, y = batch((6,))
    norm = entry.facts["norms"].split(",")[0].replace("any", "2")
    threat = rl.LpBall(float(norm), 1.0, lower=0.0, upper=1.0)
    model = network((6,), entry.facts["needs"])
    numeric = [
        name
        for name, option in inspect.signature(entry.function).parameters.items()
        if isinstance(option.default, int | float) and not isinstance(option.default, bool)
        if name != "generator"  # any number is a seed
    ]
    for name in [*numeric, *(["step_size"] if entry.name in ("pgd", "fmn") else [])]:
        with pytest.raises(
            rl.InputError, match=f"{entry.name}: {name} must be a .*; got {wrong!r}"
        ):
            entry.function(model, x, y, threat, **{name: wrong})


def test_options_keep_to_their_ranges_and_take_numbers_of_any_type():
    x, y = batch((6,))
    net, threat = network((6,), "gradient"), rl.LpBall(2, 0.1)
    for name, option, wrong in (
        ("nes", "radius", 0),
        ("square", "share", 7),
        ("retreat", "share", 0),
        ("fmn", "step_size", 0),
        ("fab", "steps", 0),
        ("pgd", "steps", 2.5),
        ("ddn", "gamma", 1.0),
    ):
        with pytest.raises(rl.InputError, match=f"{name}: {option} must be a .*; got {wrong}"):
            ATTACKS[name].function(net, x, y, threat, **{option: wrong})
    given = {"steps": np.int64(3), "step_size": np.float32(0.5), "momentum": 1}
    assert torch.equal(
        pgd(net, x, y, threat, **given),
        pgd(net, x, y, threat, steps=3, step_size=0.5, momentum=1.0),
    )


def test_every_attack_says_what_it_is(entry):
    assert entry.summary.endswith(".")
    assert len(entry.summary) < 90
    doc = entry.function.__doc__
    for part in ("Parameters", "Returns", "Examples"):
        assert part in doc


# ---------------------------------------------------------------------- pgd by itself


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_pgd_improves_with_steps_and_restarts(p):
    x, y = batch((2, 5, 5), n=64)
    model = rl.wrap(network((2, 5, 5), "gradient"))
    y = model(x).argmax(1)
    threat = rl.LpBall(p, BUDGET[p], lower=0.0, upper=1.0)

    def reached(**given):
        x_adv = pgd(model, x, y, threat, stop_when_broken=False, **given)
        return losses.margin(model(x_adv), y)

    once = reached(steps=10)
    assert (reached(steps=10, restarts=3) <= once + 1e-9).all()  # the best restart counts
    assert reached(steps=40, restarts=3).mean() <= reached(steps=3).mean()
    assert reached(steps=40, momentum=0.75).mean() < losses.margin(model(x), y).mean()
    assert reached(steps=40, schedule="constant", step_size=0.1).mean() < once.mean() * 1.2 + 0.1


def test_pgd_counts_one_gradient_a_step_and_drops_what_is_broken():
    x, y = batch((6,), n=40)
    model = rl.wrap(network((6,), "gradient"))
    y = model(x).argmax(1)
    model.forwards = 0
    threat = rl.LpBall(math.inf, 0.02)
    pgd(model, x, y, threat, steps=7, stop_when_broken=False)
    assert (model.forwards, model.backwards) == (8 * 40, 7 * 40)
    model.forwards = model.backwards = 0
    pgd(model, x, y, rl.LpBall(math.inf, 5.0), steps=30)
    assert model.backwards < 15 * 40


def test_pgd_returns_the_best_point_of_its_path():
    """A loss whose best point lies in the middle of the path."""
    net = nn.Linear(1, 2).double()
    x, y = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([0])

    with torch.no_grad():
        net.weight.copy_(torch.tensor([[1.0], [0.0]]))
        net.bias.zero_()

    def peak(output, y):  # highest at x + δ = 0.3
        return -((output[:, 0] - 0.3) ** 2)

    x_adv = pgd(
        net,
        x,
        y,
        rl.LpBall(2, 1.0),
        loss=peak,
        steps=50,
        random_start=False,
        stop_when_broken=False,
    )
    assert abs(x_adv.item() - 0.3) < 0.05


def test_saturated_logits_do_not_stop_the_default_loss():
    torch.manual_seed(0)
    x, y = batch((6,), torch.float32, n=30)
    net = network((6,), "gradient", torch.float32)
    loud = nn.Sequential(net, nn.Linear(3, 3, bias=False))
    with torch.no_grad():
        loud[1].weight.copy_(1e6 * torch.eye(3))
    threat = rl.LpBall(math.inf, 0.15)
    y = rl.wrap(net)(x).argmax(1)
    quiet = pgd(net, x, y, threat, steps=10, stop_when_broken=False)
    shouted = pgd(loud, x, y, threat, steps=10, stop_when_broken=False)
    quiet, shouted = (losses.margin(rl.wrap(net)(x_adv), y) for x_adv in (quiet, shouted))
    torch.testing.assert_close(quiet.mean(), shouted.mean(), atol=0.01, rtol=0)


def test_a_targeted_attack_is_another_loss():
    x, _ = batch((6,), n=30)
    model = rl.wrap(network((6,), "affine"))
    goal = (model(x).argmax(1) + 1) % 3
    for loss in ("targeted_margin", "targeted_cross_entropy", "targeted_dlr"):
        x_adv = pgd(model, x, goal, rl.LpBall(math.inf, 20.0), loss=loss)
        assert (model(x_adv).argmax(1) == goal).float().mean() > 0.9


class Watched(nn.Module):
    """A network that notes the points it is asked about."""

    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_every_second_mixed_start_is_a_corner_of_patches(p):
    x, y = batch((2, 8, 8))
    y = torch.zeros_like(y)
    threat = rl.LpBall(p, BUDGET[p], lower=0.0, upper=1.0)
    watched = Watched(network((2, 8, 8), "gradient").eval())
    x_adv = pgd(
        rl.wrap(watched), x, y, threat, steps=1, restarts=4, starts="mixed", stop_when_broken=False
    )
    assert bool(threat.contains(x, x_adv).all())
    starts = [seen - x for seen in watched.seen if len(seen) == len(x)]
    starts = [starts[-8 + 2 * run] for run in range(4)]  # each run: its start, and its last point
    corner = [bool(torch.allclose(threat.argmax(d, x), d, atol=1e-12)) for d in starts]
    assert corner == [False, True, False, True] or p == 1
    for delta in starts[1::2]:
        signs = delta.sign().unflatten(2, (4, 2)).unflatten(4, (4, 2))
        for patch in signs.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(0, 3):
            assert not (bool((patch > 0).any()) and bool((patch < 0).any()))
    assert not torch.equal(starts[1], starts[3])


def test_mixed_starts_of_rows_are_corners():
    x, y = batch((6,))
    threat = rl.LpBall(math.inf, 0.3)
    watched = Watched(network((6,), "gradient").eval())
    pgd(rl.wrap(watched), x, y, threat, steps=1, restarts=2, starts="mixed", stop_when_broken=False)
    start = [seen - x for seen in watched.seen if len(seen) == len(x)][-2]
    torch.testing.assert_close(start.abs(), torch.full_like(x, 0.3))
    assert 0.2 < (start > 0).double().mean() < 0.8


def test_pgd_tells_what_is_wrong():
    x, y = batch((6,))
    net = network((6,), "gradient")
    with pytest.raises(rl.InputError, match="schedule must be cosine or constant"):
        pgd(net, x, y, rl.LpBall(2, 0.1), schedule="linear")
    with pytest.raises(rl.InputError, match="starts must be uniform or mixed"):
        pgd(net, x, y, rl.LpBall(2, 0.1), starts="corners")
    with pytest.raises(rl.InputError, match="pgd knows the norms 1, 2, inf, not 3"):
        pgd(net, x, y, rl.LpBall(3, 0.1))
