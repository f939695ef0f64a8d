"""Objectives of training against their formulas, and what crafting must leave alone."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import robustlearn as rl
from robustlearn import losses
from robustlearn.train.inner import Craft, ascend, statistics_held
from robustlearn.train.memory import Memory
from robustlearn.train.objectives import OBJECTIVES, Criterion
from robustlearn.train.weights import perturbed

BOX = {"lower": 0.0, "upper": 1.0}
REACH = {"n_fgsm": 3.0}  # in units of ε, where it is not the threat


def network(outputs=3, *, norm=True, seed=0):
    torch.manual_seed(seed)
    layers = [
        nn.Flatten(),
        nn.Linear(12, 16),
        nn.BatchNorm1d(16),
        nn.Tanh(),
        nn.Linear(16, outputs),
    ]
    return nn.Sequential(*(part for part in layers if norm or not isinstance(part, nn.BatchNorm1d)))


def batch(n=10, classes=3):
    x = torch.rand(n, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) % classes


def played(name, net, x, y, threat, **given):
    return OBJECTIVES[name].function(net, x, y, threat, **given)


# ---------------------------------------------------------------------- contracts


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("p", [2, math.inf])
def test_what_every_objective_returns(name, p):
    net, (x, y), threat = network(), batch(), rl.LpBall(p, 0.1, **BOX)
    net.train()
    outcome = played(name, net, x, y, threat)
    assert outcome.loss.shape == (10,)
    assert outcome.loss.requires_grad
    wide = rl.LpBall(p, 0.1 * REACH.get(name, 1.0) + 1e-6, **BOX)
    assert name == "gaussian" or bool(wide.contains(x, outcome.points.detach()).all())
    told = {"ibp": {"certified"}, "crown_ibp": {"certified"}, "mtl_ibp": {"certified", "robust"}}
    assert set(outcome.metrics) == {"loss"} | told.get(name, {"robust"})
    assert all(v.shape == (10,) for v in outcome.metrics.values())
    assert not any(v.requires_grad for v in outcome.metrics.values())
    assert all(w.grad is None for w in net.parameters())
    outcome.loss.mean().backward()
    assert all(w.grad is not None for w in net.parameters())
    assert all(part.training for part in net.modules())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_crafting_computes_no_gradient_of_a_parameter_and_moves_no_statistics(name):
    net, (x, y), threat = network(), batch(), rl.LpBall(math.inf, 0.1, **BOX)
    called = []
    for weight in net.parameters():
        weight.register_hook(lambda g: called.append(1))
    played(name, net, x, y, threat)
    assert not called
    once = int(net[2].num_batches_tracked)
    assert once == 1  # the one forward pass that is trained on


@pytest.mark.parametrize("name", ["fgsm", "pgd_at", "trades", "free", "adversarial_cross_entropy"])
def test_without_a_budget_it_is_standard_training(name):
    net, (x, y), threat = network(norm=False), batch(), rl.LpBall(math.inf, 0.0, **BOX)
    plain = played("standard", net, x, y, threat).loss
    torch.testing.assert_close(played(name, net, x, y, threat).loss, plain)


@pytest.mark.parametrize("name", ["gaussian", "fgsm", "n_fgsm", "pgd_at", "trades"])
def test_points_do_not_depend_on_the_neighbours(name):
    net, (x, y), threat = network(norm=False).double(), batch(), rl.LpBall(2, 0.3, **BOX)
    keys = torch.arange(10) * 7919
    whole = played(name, net, x.double(), y, threat, craft=Craft(keys=keys)).points
    rows = torch.tensor([7, 2])
    part = played(name, net, x[rows].double(), y[rows], threat, craft=Craft(keys=keys[rows])).points
    torch.testing.assert_close(part, whole[rows])


def test_points_that_are_given_are_taken():
    net, (x, y), threat = network(norm=False), batch(), rl.LpBall(2, 0.3, **BOX)
    points = (x + 0.01).clamp(0, 1)
    for name in set(OBJECTIVES) - {"standard", "ibp", "crown_ibp"}:  # which attack nothing
        outcome = played(name, net, x, y, threat, craft=Craft(points=points))
        assert torch.equal(outcome.points.detach(), points)


def test_regressors_and_single_logits():
    x, y = batch(classes=2)
    threat = rl.LpBall(2, 0.3, **BOX)
    for name, entry in OBJECTIVES.items():
        single = played(name, network(1), x, y, threat)
        assert single.loss.isfinite().all()
        if entry.facts["classes_only"]:
            with pytest.raises(rl.InputError, match="for classifiers"):
                played(name, network(1), x, y.float(), threat, criterion=Criterion("squared"))
            continue
        error = played(name, network(1), x, y.float(), threat, criterion=Criterion("huber"))
        assert error.loss.shape == (10,)
        assert set(error.metrics) == {"loss"}


# ---------------------------------------------------------------------- formulas


def test_gaussian_noise_has_the_deviation_that_is_asked_for():
    net, (x, y), threat = network(norm=False), batch(2000), rl.LpBall(2, 0.3, **BOX)
    keys = torch.arange(2000) * 7919
    outcome = played("gaussian", net, x, y, threat, noise=0.5, craft=Craft(keys=keys))
    noise = (outcome.points - x).flatten()
    assert float(noise.mean()) == pytest.approx(0, abs=0.015)
    assert float(noise.std()) == pytest.approx(0.5, abs=0.01)
    expected = functional.cross_entropy(net(outcome.points), y, reduction="none")
    torch.testing.assert_close(outcome.loss, expected)


@pytest.mark.parametrize("p", [2, math.inf])
def test_on_a_linear_model_the_inner_maximum_is_the_closed_form(p):
    x, y = batch(classes=2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    x = x.double()
    weight, eps = net[1].weight.detach().reshape(-1), 0.05
    dual = torch.linalg.vector_norm(weight, 1 if math.isinf(p) else 2)
    gap = (net(x).squeeze(1) * (2 * y - 1) - eps * dual).detach()
    loss = played("pgd_at", net, x, y, rl.LpBall(p, eps), steps=60, step_size=1.0).loss
    torch.testing.assert_close(loss.detach(), functional.softplus(-gap))


def test_the_adversarial_squared_loss_of_a_linear_model():
    x, _ = batch()
    x, y = x.double(), torch.linspace(-2, 2, 10, dtype=torch.float64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)).double()
    given = {"steps": 60, "step_size": 1.0, "criterion": Criterion("squared")}
    loss = played("pgd_at", net, x, y, rl.LpBall(2, 0.1), **given).loss
    error = (net(x).squeeze(1) - y).abs() + 0.1 * net[1].weight.norm()
    torch.testing.assert_close(loss, error**2)


def numpy_softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.fixture
def given():
    net, (x, y), threat = network(norm=False).double(), batch(), rl.LpBall(2, 0.3, **BOX)
    x = x.double()
    points = (x + 0.05).clamp(0, 1)
    with torch.no_grad():
        clean, moved = (numpy_softmax(net(part).numpy()) for part in (x, points))
    return net, x, y, threat, points, clean, moved


def test_trades_by_hand(given):
    net, x, y, threat, points, clean, moved = given
    own = clean[np.arange(10), y]
    expected = -np.log(own) + 3.0 * (clean * np.log(clean / moved)).sum(1)
    loss = played("trades", net, x, y, threat, beta=3.0, craft=Craft(points=points)).loss
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-9)


def test_mart_by_hand(given):
    net, x, y, threat, points, clean, moved = given
    rows = np.arange(10)
    rival = np.where(np.arange(3)[None] == y.numpy()[:, None], -1, moved).max(1)
    boosted = -np.log(moved[rows, y]) - np.log(1 - rival)
    divergence = (clean * np.log(clean / moved)).sum(1)
    expected = boosted + 4.0 * divergence * (1 - clean[rows, y])
    loss = played("mart", net, x, y, threat, weight=4.0, craft=Craft(points=points)).loss
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-9)


def test_trades_points_raise_the_divergence():
    net, (x, y), threat = network(norm=False), batch(), rl.LpBall(2, 0.5, **BOX)
    clean = net(x).log_softmax(1)

    def divergence(points):
        return (clean.exp() * (clean - net(points).log_softmax(1))).sum(1).mean()

    points = played("trades", net, x, y, threat, steps=10).points
    assert divergence(points) > 3 * divergence(Craft().begin(x, threat))


def test_gradients_of_a_linear_model_are_aligned():
    x, y = batch(classes=2)
    net, threat = nn.Sequential(nn.Flatten(), nn.Linear(12, 1)), rl.LpBall(math.inf, 0.1, **BOX)
    plain = played("fgsm", net, x, y, threat).loss
    torch.testing.assert_close(played("grad_align", net, x, y, threat, weight=9.0).loss, plain)
    bent = network(norm=False)
    plain = played("fgsm", bent, x, y, threat).loss
    assert (played("grad_align", bent, x, y, threat, weight=9.0).loss > plain).all()


@pytest.mark.parametrize("gain", [1e2, 1e4])  # log-odds at which cross-entropy has no slope
def test_alignment_does_not_depend_on_the_confidence(gain):
    (x, _), threat = batch(classes=2), rl.LpBall(math.inf, 0.1, **BOX)
    net, x = network(1, norm=False).double(), x.double()
    y = (net(x) > 0).squeeze(1).long()

    def apart():
        given = {"craft": Craft(points=x)}
        return (
            played("grad_align", net, x, y, threat, **given).loss
            - played("standard", net, x, y, threat).loss
        )

    expected = apart()
    with torch.no_grad():
        net[3].weight.mul_(gain)
        net[3].bias.mul_(gain)
    found = apart()
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(found.sum(), net[1].weight)
    assert slope.abs().max() > 1e-4


def test_alignment_leaves_out_samples_without_a_slope():
    (x, y), threat = batch(classes=2), rl.LpBall(math.inf, 0.1, **BOX)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.ReLU(), nn.Linear(4, 2))
    nn.init.constant_(net[1].bias, -100.0)
    loss = played("grad_align", net, x, y, threat, weight=9.0).loss
    torch.testing.assert_close(loss, played("standard", net, x, y, threat).loss)


def test_batch_norm_in_evaluation_mode_uses_its_statistics_where_they_are_held():
    net, (x, _) = network(), batch()
    net(x)
    net[2].eval()
    expected = net(x)
    with statistics_held(net):
        torch.testing.assert_close(net(x), expected)
    net.train()
    expected = copy.deepcopy(net)(x)
    with statistics_held(net):
        torch.testing.assert_close(net(x), expected)
    assert int(net[2].num_batches_tracked) == 1
    assert net[2].track_running_stats


def test_smoothing_class_weights_and_knee():
    z, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([1.0, 2.0, 0.0])
    smooth = Criterion(smoothing=0.3, weights=weights)(z, y)
    target = torch.full((6, 3), 0.1).scatter(1, y[:, None], 0.8)
    torch.testing.assert_close(smooth, -(target * z.log_softmax(1)).sum(1) * weights[y])
    error = torch.tensor([0.5, -3.0])
    torch.testing.assert_close(
        Criterion("huber", knee=1.0)(error, torch.zeros(2)), torch.tensor([0.25, 5.0])
    )
    for wrong in ({"kind": "mae"}, {"smoothing": 1.0}, {"knee": 0.0}):
        with pytest.raises(rl.InputError):
            Criterion(**wrong)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_class_weights_weigh_the_whole_loss_of_a_sample(name):
    (x, y), threat = batch(), rl.LpBall(2, 0.3, **BOX)
    weights = torch.tensor([1.0, 4.0, 0.0])
    plain, weighed = (
        played(name, network(), x, y, threat, craft=Craft(points=x + 0.01), criterion=c).loss
        for c in (Criterion(), Criterion(weights=weights.tolist()))
    )
    torch.testing.assert_close(weighed, plain * weights[y])


@pytest.mark.parametrize("wrong", [[1.0, -1.0], [0.0, 0.0], [1.0, math.nan], 2.0])
def test_class_weights_that_are_none_are_refused(wrong):
    with pytest.raises(rl.InputError, match="one number per class"):
        Criterion(weights=wrong)


def test_class_weights_are_one_per_class_of_a_classifier():
    with pytest.raises(rl.InputError, match="3 by the network's output; got 2"):
        Criterion(weights=[1.0, 2.0])(torch.zeros(4, 3), torch.tensor([0, 1, 1, 0]))
    with pytest.raises(rl.InputError, match="leave them out"):
        Criterion("huber", weights=[1.0, 2.0])


# ---------------------------------------------------------------------- the other pieces


def test_more_steps_of_ascent_raise_the_loss():
    net, (x, y), threat = network(norm=False), batch(), rl.LpBall(math.inf, 0.2, **BOX)
    given = {"start": x, "step_size": 0.25, "craft": Craft()}
    reached = [
        losses.cross_entropy(net(ascend(net, x, y, threat, Criterion(), steps=k, **given)), y)
        for k in (0, 1, 8)
    ]
    assert (reached[1] > reached[0]).all()
    assert (reached[2] >= reached[1] - 1e-4).all()


def test_a_kept_perturbation_is_where_the_ascent_starts():
    net, (x, y), threat = network(norm=False), batch(), rl.LpBall(math.inf, 0.2, **BOX)
    start = torch.full_like(x, 5.0)
    begun = Craft(start=start).begin(x, threat)
    torch.testing.assert_close(begun, (x + 0.2).clamp(0, 1))
    points = played("pgd_at", net, x, y, threat, steps=1, step_size=0.0, craft=Craft(start=start))
    torch.testing.assert_close(points.points, begun)


def test_where_nothing_is_kept_yet_the_ascent_starts_at_random():
    (x, _), threat = batch(), rl.LpBall(math.inf, 0.2, **BOX)
    start = torch.zeros_like(x)
    start[3] = 0.05
    begun = Craft(start=start).begin(x, threat)
    torch.testing.assert_close(begun[3], (x[3] + 0.05).clamp(0, 1))
    others = torch.arange(10) != 3
    assert torch.equal(begun[others], Craft().begin(x, threat)[others])


def test_weights_move_by_their_share_and_come_back():
    net, (x, y) = network(), batch()
    before = copy.deepcopy(net.state_dict())
    loss = functional.cross_entropy(net.eval()(x), y)
    value = float(loss.detach())
    with perturbed(net, lambda weights: torch.autograd.grad(loss, weights), 0.02):
        for part in (net[1], net[4]):
            name = "1.weight" if part is net[1] else "4.weight"
            moved = (part.weight.detach() - before[name]).norm() / before[name].norm()
            assert float(moved) == pytest.approx(0.02, rel=1e-4)
        assert torch.equal(net[1].bias, before["1.bias"])
        assert float(functional.cross_entropy(net(x), y).detach()) > value
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("on_disk", [False, True])
def test_memory(tmp_path, on_disk):
    memory = Memory(6, (2, 3), tmp_path / "kept.npy" if on_disk else None)
    delta = torch.randn(2, 2, 3) * torch.tensor([1e-9, 1.0, 1e9])
    memory.put(torch.tensor([4, 1]), delta)
    kept = memory.get(torch.tensor([1, 4, 0]), delta)
    torch.testing.assert_close(
        kept, torch.stack([delta[1], delta[0], 0 * delta[0]]), atol=0, rtol=4e-3
    )


def test_memory_on_disk_overwrites_nothing(tmp_path):
    file, row = tmp_path / "kept.npy", torch.ones(1, 2)
    Memory(6, (2,), file)
    assert not file.exists()  # a start that is refused later leaves nothing behind
    Memory(6, (2,), file).put(torch.tensor([3]), row)
    with pytest.raises(rl.InputError, match="would overwrite it"):
        Memory(6, (2,), file)
    again = Memory(6, (2,), file, resume=True)
    assert torch.equal(again.get(torch.tensor([3]), row), row)
    with pytest.raises(rl.InputError, match=r"shape \(6, 2\); expected .* \(7, 2\)"):
        Memory(7, (2,), file, resume=True)
    with pytest.raises(rl.InputError, match="no folder"):
        Memory(6, (2,), tmp_path / "missing" / "kept.npy")
    file.write_text("of the user")
    with pytest.raises(rl.InputError, match="holds no perturbations"):
        Memory(6, (2,), file, resume=True)
