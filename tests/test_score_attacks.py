"""Attacks on outputs and on labels: what they spend, what they find, and moves against loops."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from test_third_party import images, zoo  # noqa: F401
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn.attacks import hop_skip_jump, nes, retreat, score, square

BUDGET = {1: 6.0, 2: 2.0, math.inf: 0.3}


def pictures(n=12, shape=(2, 9, 8)):
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x - 0.3).clamp(0, 1)  # a good part of them stands at the wall


@pytest.mark.parametrize("shape", [(30,), (2, 9, 8), (9, 8)])
@pytest.mark.parametrize("p", [0, *BUDGET])
def test_square_spends_its_queries_and_not_one_more(p, shape):
    x = pictures(shape=shape)
    model = rl.wrap(lambda a: np.stack([a.reshape(len(a), -1).sum(1) * 0 + 1] * 2, 1) * [3, 0])
    threat = rl.LpBall(p, BUDGET.get(p, 5), lower=0.0, upper=1.0)
    y = torch.zeros(len(x), dtype=torch.int64)
    model.settle(x, y)
    model.forwards = 0
    square(model, x, y, threat, queries=25)
    assert model.forwards - len(x) <= 25 * len(x)  # one more look at what the outputs are


@pytest.mark.parametrize("p", BUDGET)
def test_every_move_keeps_the_threat_and_changes_what_it_should(p):
    """The L2 exchange uses up the budget; the L∞ square is never idle; frozen features stay."""
    x = pictures()
    mask = torch.rand(x.shape[1:], generator=torch.Generator().manual_seed(1)) < 0.7
    threat = rl.LpBall(p, BUDGET[p], lower=0.0, upper=1.0, mask=mask)
    start, move = score.moves(threat, x)
    keys = torch.arange(len(x))
    present = (
        threat.restrict(x, start(threat, x, threat.span(x), torch.zeros_like(x), keys, 0.8)) - x
    )
    for turn in range(40):
        share = 0.8 / 2 ** (turn // 5)
        wish = move(threat, x, threat.span(x), present, keys + 1000 * turn, share)
        point = threat.restrict(x, wish)
        assert threat.contains(x, point).all()
        assert not (point - x)[:, ~mask].any()
        if p == 2:
            assert (threat.norm(wish) <= 2.0).all()  # paid for, before any projection
        present = point - x
    assert (present != 0).any()


@pytest.mark.parametrize("shape", [(30,), (2, 9, 8)])
def test_sparse_moves_spend_the_budget_at_the_walls(shape):
    """Each changed feature stands at a wall, a share of them is exchanged, frozen ones stay."""
    x = pictures(shape=shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.7
    threat = rl.LpBall(0, 6.9, lower=0.0, upper=1.0, mask=mask)
    start, move = score.moves(threat, x)
    present = start(threat, x, threat.span(x), torch.zeros_like(x), torch.arange(len(x)), 0.8)
    for turn in range(30):
        assert (threat.norm(present) == 6).all()
        assert not present[:, ~mask].any()
        assert ((x + present)[present != 0] % 1 == 0).all()
        before = present
        present = move(threat, x, threat.span(x), before, torch.arange(len(x)) + 1000 * turn, 0.3)
        changed = (present != before).reshape(len(x), -1).sum(1)
        assert changed.min() >= 1
        assert changed.max() <= 4  # round(.3·6) = 2 leave, and 2 come


def test_sparse_square_finds_what_a_list_of_all_corners_finds():
    """A forest of nine features, two of which may change: every corner is listed."""
    generator = np.random.default_rng(0)
    x = generator.random((400, 9))
    forest = RandomForestClassifier(10, random_state=0).fit(x, (x.sum(1) > 3).astype(int))
    model, points = rl.wrap(forest), torch.from_numpy(x[:40])
    y = model(points).argmax(1)
    truth = torch.zeros(len(y), dtype=torch.bool)
    for chosen in itertools.combinations(range(9), 2):
        for walls in itertools.product([0.0, 1.0], repeat=2):
            moved = points.clone()
            moved[:, chosen] = torch.tensor(walls, dtype=moved.dtype)
            truth |= model(moved).argmax(1) != y
    threat = rl.LpBall(0, 2, lower=0.0, upper=1.0)
    found = model(square(model, points, y, threat, queries=300)).argmax(1) != y
    assert 0.2 < truth.double().mean() < 0.9
    assert not (found & ~truth).any()
    assert (found == truth).double().mean() > 0.95
    with pytest.raises(rl.InputError, match="give the threat lower and upper"):
        square(model, points, y, rl.LpBall(0, 2, lower=0.0), queries=3)


def test_no_square_is_idle_where_a_pixel_can_move():
    x = pictures(40)
    threat = rl.LpBall(math.inf, 0.1, lower=0.0, upper=1.0)
    start, move = score.moves(threat, x)
    keys = torch.arange(len(x))
    present = (
        threat.restrict(x, start(threat, x, threat.span(x), torch.zeros_like(x), keys, 0.8)) - x
    )
    for turn in range(20):
        wish = move(threat, x, threat.span(x), present, keys + 1000 * turn, 0.002)
        changed = (wish != present).reshape(len(x), -1).any(1)
        assert changed.all()


def test_an_exchange_by_hand():
    """u₁ ← a·t/‖t‖ with t = hills + u₁/‖u₁‖ and a² = ‖u₁ ∪ u₂‖² + ε² − ‖u‖², in plain numpy."""
    x = torch.full((1, 1, 9, 9), 0.5, dtype=torch.float64)
    threat, keys = rl.LpBall(2, 1.0), torch.tensor([3])
    present = torch.randn(
        1, 1, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    present = 0.8 * present / present.norm()
    moved = score._exchange(threat, x, threat.span(x), present, keys, 9 / 81)[0, 0].numpy()
    before = present[0, 0].numpy()
    changed = moved != before
    emptied = changed & (moved == 0)
    square_ = changed & (moved != 0)
    assert 9 <= square_.sum() <= 9
    assert emptied.sum() <= 9
    size = np.sqrt((before[changed] ** 2).sum() + 1 - (before**2).sum())
    rows, columns = np.nonzero(square_)
    block = moved[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    old = before[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.sqrt((block**2).sum()) == pytest.approx(size, rel=1e-5)
    hill = score._hills(3, x).numpy() / np.linalg.norm(score._hills(3, x).numpy())
    wanted = [s * h + old / np.linalg.norm(old) for s in (1, -1) for h in (hill, hill.T)]
    wanted = [t / np.linalg.norm(t) * size for t in wanted]
    assert min(np.abs(block - t).max() for t in wanted) < 1e-5


@pytest.mark.parametrize("p", BUDGET)
def test_rows_respect_boxes_units_and_masks_of_each_feature(p):
    """A forest; only features that can move are ever chosen, so few queries go far."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 40)) * np.linspace(1, 50, 40)
    y = (x[:, 38] > 0).astype(int)
    forest = RandomForestClassifier(20, random_state=0).fit(x, y)
    mask = np.arange(40) >= 37
    lower, upper = x.min(0), x.max(0)
    threat = rl.LpBall(p, 0.5, lower=lower, upper=upper, mask=mask, scale=x.std(0))
    points, labels = torch.from_numpy(x[:40]), torch.from_numpy(y[:40])
    model = rl.wrap(forest)
    found = square(model, points, labels, threat, queries=25)
    assert threat.contains(points, found).all()
    assert (found != points).any(0).nonzero().min() >= 37
    near = (points[:, 38].abs() < 0.4 * x.std(0)[38]) & (model(points).argmax(1) == labels)
    broken = model(found).argmax(1) != labels
    assert near.sum() >= 5
    assert broken[near].double().mean() > 0.8


def linear(p, n=12, d=40, classes=3):
    torch.manual_seed(0)
    net = nn.Linear(d, classes).double()
    x = 0.2 + 0.6 * torch.rand(n, d, dtype=torch.float64)
    with torch.no_grad():
        net.bias.copy_(-net.weight @ torch.full((d,), 0.5, dtype=torch.float64))
        y = net(x).argmax(1)
    exact = rl.certify(net, x, rl.LpBall(p, 1.0, lower=0.0, upper=1.0)).radius
    return net, x, y, torch.as_tensor(exact)


@pytest.mark.parametrize(
    ("attack", "p", "median"),
    [
        (retreat, math.inf, 1.1),
        (retreat, 2, 1.6),
        (retreat, 1, 2.0),
        (hop_skip_jump, 2, 1.25),
        (hop_skip_jump, math.inf, 1.6),
    ],
)
def test_labels_alone_come_near_the_exact_distance(attack, p, median):
    net, x, y, exact = linear(p)
    far = rl.LpBall(p, {1: 60.0, 2: 10.0, math.inf: 1.0}[p], lower=0.0, upper=1.0)
    model = rl.wrap(net)
    x_adv = attack(model, x, y, far, queries=600, stop_when_broken=False)
    assert model.forwards <= 601 * len(x) + 256
    assert losses.margin.broken(model(x_adv), y).all()
    ratio = far.norm(x_adv - x) / exact
    assert ratio.min() >= 1 - 1e-9  # never nearer than the truth
    assert ratio.median() < median


def test_labels_alone_break_what_lies_within_the_budget():
    net, x, y, exact = linear(math.inf)
    labels_only = rl.wrap(lambda a: np.asarray(net(torch.from_numpy(a)).argmax(1)), num_classes=3)
    threat = rl.LpBall(math.inf, 1.5 * exact, lower=0.0, upper=1.0)
    x_adv = retreat(labels_only, x, y, threat, queries=600)
    broken = losses.margin.broken(rl.wrap(net)(x_adv), y)
    assert threat.contains(x, x_adv).all()
    assert broken.double().mean() > 0.9
    inside = replace(threat, eps=0.9 * exact)
    assert not losses.margin.broken(rl.wrap(net)(retreat(labels_only, x, y, inside)), y).any()


@pytest.mark.parametrize("noise", ["normal", "signs"])
@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_estimated_gradients_break_linear_models_near_the_exact_distance(noise, p):
    net, x, y, exact = linear(p)
    black_box = rl.wrap(lambda a: net(torch.from_numpy(a)).detach().numpy())
    threat = rl.LpBall(p, {1: 1.6}.get(p, 1.25) * exact, lower=0.0, upper=1.0)
    x_adv = nes(black_box, x, y, threat, queries=1000, noise=noise)
    assert threat.contains(x, x_adv).all()
    assert losses.margin.broken(rl.wrap(net)(x_adv), y).double().mean() > 0.9
    inside = replace(threat, eps=0.99 * exact)
    x_adv = nes(black_box, x, y, inside, queries=200, noise=noise)
    assert not losses.margin.broken(rl.wrap(net)(x_adv), y).any()


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda *a: square(*a, queries=0), "square: queries must be"),
        (lambda *a: retreat(*a, queries=0), "retreat: queries must be"),
        (lambda *a: nes(*a, queries=20), "a step takes 21 queries"),
        (lambda *a: nes(*a, noise="uniform"), "normal or signs"),
    ],
)
def test_they_tell_what_is_wrong(run, said):
    net, x, y, _ = linear(2)
    with pytest.raises(rl.InputError, match=said):
        run(net, x, y, rl.LpBall(2, 1.0))


@pytest.mark.data
def test_square_is_no_weaker_than_a_released_one(zoo, data_folder):  # noqa: F811
    """The same images, queries, loss and schedule; a few samples are left to chance."""
    torchattacks = pytest.importorskip("torchattacks")
    x, y = images(data_folder, "mnist", 100)
    net = zoo.load("eran_mnist_6_100").eval()
    peer = torchattacks.Square(
        net, norm="Linf", eps=0.05, n_queries=150, p_init=0.8, loss="margin", seed=0
    )(x, y)
    threat = rl.LpBall(math.inf, 0.05, lower=0.0, upper=1.0)
    ours = square(net, x, y, threat, queries=150)
    with torch.no_grad():
        left = [(net(points).argmax(1) == y).sum() for points in (ours, peer)]
    assert left[0] <= left[1] + 1
