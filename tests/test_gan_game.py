"""Games with known orbits through the same code as all others, and what the trainer promises."""

import contextlib
import doctest
import math
import warnings

import pytest
import torch
from torch import nn

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.gan import (
    GanGame,
    Judgement,
    Watch,
    diagnostics,
    fit_gan,
    game,
    losses,
    mixtures,
    regularizers,
    training,
    updates,
)
from robustlearn.gan.mixtures import grid, perceptron, ring
from robustlearn.gan.updates import optimistic
from robustlearn.loop import play


class Point(nn.Module):
    """A generator of one point, whatever the noise."""

    def __init__(self, start=1.0):
        super().__init__()
        self.place = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, z):
        return self.place.expand(len(z), 1)


class Slope(nn.Module):
    """A linear critic of one number."""

    def __init__(self, start=1.0):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def forward(self, x):
        return (x * self.slope)[:, 0]


def duel(loss, *, lr, steps, optimizer=torch.optim.SGD, penalty="", **options):
    """Play a point against a slope, the truth at 0; return the way (steps, 2) of (x, y)."""
    modules = {"generator": Point(), "critic": Slope()}
    way = []

    class Recorded(GanGame):
        def step(self, batch, turn):
            found = super().step(batch, turn)
            way.append([float(m.detach()) for m in (modules["generator"].place, slope())])
            return found

    def slope():
        return modules["critic"].slope

    played = Recorded(
        modules=modules,
        optimizers={name: optimizer(m.parameters(), lr=lr) for name, m in modules.items()},
        noise=1,
        loss=losses.get(loss),
        penalties=regularizers.penalties(penalty),
        **options,
    )
    play(played, torch.zeros(steps, 1, dtype=torch.float64), epochs=1, batch_size=1)
    return torch.tensor(way)


# ------------------------------------------------------------------ games with known orbits


@pytest.mark.parametrize(
    ("order", "optimizer", "steps", "ratio", "tolerance"),
    [
        ("simultaneous", torch.optim.SGD, 200, 1.01**100, 1e-3),
        ("alternating", torch.optim.SGD, 200, 1.0, 0.06),
        ("extragradient", torch.optim.SGD, 200, (0.99**2 + 0.01) ** 100, 1e-3),
        ("simultaneous", optimistic(torch.optim.SGD), 500, 0.080, 1e-2),
    ],
)
def test_the_bilinear_game_has_its_rates(order, optimizer, steps, ratio, tolerance):
    """min_x max_y xy: the Wasserstein loss of a point and a slope; ‖z_T‖/‖z₀‖ at η = 0.1."""
    way = duel("wasserstein", lr=0.1, steps=steps, order=order, optimizer=optimizer)
    assert float(way[-1].norm()) / math.sqrt(2) == pytest.approx(ratio, rel=tolerance)


@pytest.mark.parametrize(
    ("penalty", "converges"),
    [("", False), ("r1:weight=1", True), ("gradient_penalty:weight=0.5", False)],
)
def test_the_dirac_game_converges_with_r1_alone(penalty, converges):
    """Real at 0, generated at θ, D(x) = ψx (Mescheder et al. 2018)."""
    way = duel("non_saturating", lr=0.2, steps=250, order="simultaneous", penalty=penalty)
    if converges:
        assert float(way[-50:].norm(dim=1).max()) < 1e-5
    else:
        assert float(way[-50:, 0].abs().max()) > 0.1


def test_an_unrolled_critic_bends_the_generators_gradient():
    """y' = y + kηx: the generator descends −x(y + kηx), y counted after the critic's own step."""
    eta, k = 0.1, 3
    way = duel("wasserstein", lr=eta, steps=1, unroll=k)
    y = 1 - eta * 1
    assert way[0].tolist() == pytest.approx([1 + eta * (y - 2 * k * eta), y])


def test_unrolling_stops_the_circles():
    plain = duel("wasserstein", lr=0.1, steps=120)
    ahead = duel("wasserstein", lr=0.1, steps=120, unroll=5)
    assert float(plain[-1].norm()) > 0.9
    assert float(ahead[-1].norm()) < 0.01


# ------------------------------------------------------------------ moves


def problem():
    torch.manual_seed(0)
    net = nn.Linear(3, 1)
    return net, torch.randn(8, 3)


def test_optimistic_steps_have_the_formula():
    net, x = problem()
    other, _ = problem()
    optimizer = optimistic(torch.optim.SGD)(net.parameters(), lr=0.1)
    last = None
    for _ in range(4):
        for model in (net, other):
            model.zero_grad()
            model(x).square().mean().backward()
        optimizer.step()
        slopes = [p.grad.clone() for p in other.parameters()]
        with torch.no_grad():
            for parameter, new, old in zip(other.parameters(), slopes, last or slopes, strict=True):
                parameter -= 0.1 * (2 * new - old)
        last = slopes
        for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_looking_ahead_leaves_no_trace_but_gradients():
    net, x = problem()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        before = {k: v.clone() for k, v in net.state_dict().items()}
        memory = {k: dict(v) for k, v in optimizer.state_dict()["state"].items()}
        memory = {k: {n: t.clone() for n, t in v.items()} for k, v in memory.items()}
        with updates.looking_ahead([optimizer]):
            assert not torch.equal(net.weight, before["weight"])
            assert net.weight.grad is None
            net(x).square().mean().backward()
        assert net.weight.grad is not None
        assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
        after = optimizer.state_dict()["state"]
        assert after.keys() == memory.keys()
        assert all(t.equal(after[k][n]) for k, v in memory.items() for n, t in v.items())
        optimizer.step()


def test_frozen_weights_thaw_as_they_were():
    net = nn.Linear(2, 1)
    net.bias.requires_grad_(False)
    with updates.frozen(net):
        assert not net.weight.requires_grad
    assert net.weight.requires_grad
    assert not net.bias.requires_grad


# ------------------------------------------------------------------ the game


def networks(*, packing=1, zero=True, width=16, inputs=2, noise=2):
    torch.manual_seed(0)
    generator = perceptron(noise, 2, width=width)
    return generator, perceptron(inputs * packing, 1, width=width, zero=zero)


def fitted(*pair, data=None, **options):
    given = {"noise": 2, "epochs": 1, "batch_size": 64, "compare": 200, **options}
    pair = pair or networks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit_gan(*pair, ring().sample(256) if data is None else data, **given)


def test_at_the_start_both_losses_stand_at_log_2():
    for loss, critic in (("relativistic_paired", 1), ("non_saturating", 2)):
        result = fitted(loss=loss, lr=0.0, penalty="r1 + r2")
        found = result.history.rows[0]["metrics"]
        assert found["critic"] == pytest.approx(critic * math.log(2), rel=1e-6)
        assert found["generator"] == pytest.approx(math.log(2), rel=1e-6)
        assert found["accuracy"] == 0.5
        assert found["penalty"] == 0.0
        assert result.figures["accuracy"] == 0.5


def test_each_player_moves_alone():
    """The gradient of one never reaches the other: with one rate at 0 it stays where it was."""
    for still, options in (
        ("critic", {"critic_lr": 0.0, "penalty": ""}),
        ("generator", {"lr": 0.0, "critic_lr": 1e-2}),
    ):
        for order in game.ORDERS:
            pair = networks(zero=False)
            before = [{k: v.clone() for k, v in m.state_dict().items()} for m in pair]
            fitted(*pair, order=order, optimizer="sgd", **{"lr": 1e-2, **options})
            for name, module, old in zip(("generator", "critic"), pair, before, strict=True):
                same = all(torch.equal(v, old[k]) for k, v in module.state_dict().items())
                assert same == (name == still)


def test_a_step_is_that_of_a_plain_loop():
    """One alternating step with R1, written out by hand."""
    pair, bare = networks(zero=False), networks(zero=False)
    x = ring().sample(64)
    fitted(*pair, data=x, optimizer="sgd", lr=0.1, penalty="r1:weight=2", loss="non_saturating")
    generator, critic = bare
    index = next(iter(play_order(x)))
    keys = _tensor.fold(play_keys(index), game.CRITIC_NOISE)
    fake = generator(_tensor.normal(keys, (2,), torch.float32)).detach()
    real = x[index].requires_grad_()
    scores = critic(real)
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    cost = nn.functional.softplus(-scores).mean() + nn.functional.softplus(critic(fake)).mean()
    (cost + slope.square().sum(1).mean()).backward()
    descend(critic)
    keys = _tensor.fold(play_keys(index), game.GENERATOR_NOISE)
    fake = generator(_tensor.normal(keys, (2,), torch.float32))
    generator.zero_grad()
    nn.functional.softplus(-critic(fake)).mean().backward()
    descend(generator)
    for mine, theirs in zip(pair, bare, strict=True):
        for own, other in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own, other)


def play_order(x):
    from robustlearn.loop import Samples

    return Samples(x).batches(0, 0, 64)


def play_keys(index):
    from robustlearn.loop import randomness

    return randomness.keys(0, "keys", 0, index)


@torch.no_grad()
def descend(module):
    for parameter in module.parameters():
        parameter -= 0.1 * parameter.grad


def test_critic_steps_are_on_batches_of_their_own():
    result = fitted(critic_steps=4, data=ring().sample(512), batch_size=64)  # 8 batches
    metrics = result.history.rows[0]["metrics"]
    assert {"critic", "generator"} <= set(metrics)
    moved = []

    class Counting(GanGame):
        def step(self, batch, turn):
            found = super().step(batch, turn)
            moved.append("generator" in found)
            return found

    generator, critic = networks()
    optimizers = {
        "generator": torch.optim.SGD(generator.parameters(), 0.1),
        "critic": torch.optim.SGD(critic.parameters(), 0.1),
    }
    counting = Counting(
        {"generator": generator, "critic": critic},
        optimizers,
        2,
        losses.get("hinge"),
        critic_steps=3,
    )
    play(counting, ring().sample(64), epochs=1, batch_size=10)
    assert moved == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_is_played(name):
    pair = losses.get(name)
    generator, critic = networks(zero=False)
    if pair.critic_on == "features":
        critic = perceptron(2, 3, width=16)
    elif pair.critic_on == "errors":
        critic = perceptron(2, 2, width=16)
    elif pair.generator_on == "features":
        critic = Judging()
    before = generator[0].weight.detach().clone()
    penalty = "" if pair.critic_on == "features" else "r1:weight=0.01"
    result = fitted(generator, critic, loss=name, penalty=penalty, lr=1e-3)
    assert not torch.equal(generator[0].weight, before)
    assert all(math.isfinite(v) for v in result.history.rows[0]["metrics"].values())
    assert ("accuracy" in result.figures) == (pair.generator_on == "scores" == pair.critic_on)


class Judging(nn.Module):
    """A critic with scores, features and classes."""

    def __init__(self, classes=4):
        super().__init__()
        self.body = perceptron(2, 8, width=16)
        self.score, self.classes = nn.Linear(8, 1), nn.Linear(8, classes)

    def forward(self, x):
        features = self.body(x).tanh()
        return Judgement(self.score(features), features, self.classes(features))


def test_began_takes_its_balance_from_step_to_step():
    generator, critic = networks()[0], perceptron(2, 2, width=16)
    result = fitted(generator, critic, loss="began:rate=0.1:gamma=0.9", penalty="", epochs=3)
    assert 0 < result.game.loss.state <= 1


class Labelled(nn.Module):
    """A network of x and a label."""

    def __init__(self, inputs, outputs, classes):
        super().__init__()
        self.classes = classes
        self.net = perceptron(inputs + classes, outputs, width=32)

    def forward(self, x, y):
        return self.net(torch.cat([x, nn.functional.one_hot(y, self.classes).to(x)], 1))


def halves(n=512):
    """Label 0 around −1, label 1 around +1."""
    source = torch.Generator().manual_seed(0)
    y = torch.randint(2, (n,), generator=source)
    x = (2.0 * y - 1)[:, None] + 0.1 * torch.randn(n, 1, generator=source)
    return x, y


def test_a_conditional_generator_obeys_its_label():
    torch.manual_seed(0)
    pair = Labelled(2, 1, 2), Labelled(1, 1, 2)
    result = fitted(*pair, data=halves(), conditional=True, epochs=12, lr=1e-2)
    y = torch.tensor([0, 1]).repeat(100)
    sign = result.sample(200, y=y)[:, 0].sign()
    assert float((sign == 2 * y - 1).float().mean()) > 0.95
    with pytest.raises(InputError, match="one label a sample"):
        result.sample(3)


class Classifying(nn.Module):
    """A critic of numbers that also tells the class."""

    def __init__(self):
        super().__init__()
        self.net = perceptron(1, 3, width=32)

    def forward(self, x):
        found = self.net(x)
        return Judgement(scores=found[:, 0], classes=found[:, 1:])


class Told(nn.Module):
    """A critic that is handed a label and does not look at it."""

    def __init__(self):
        super().__init__()
        self.critic = Classifying()

    def forward(self, x, y):
        return self.critic(x)


def test_an_auxiliary_classifier_makes_labels_count():
    """The critic's scores ignore the label: only its classes teach the generator to obey it."""
    obeyed = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        pair = Labelled(2, 1, 2), Told()
        result = fitted(
            *pair, data=halves(), conditional=True, auxiliary=weight, epochs=12, lr=1e-2
        )
        y = torch.tensor([0, 1]).repeat(100)
        sign = result.sample(200, y=y)[:, 0].sign()
        obeyed.append(float((sign == 2 * y - 1).float().mean()))
    assert obeyed[1] > 0.95
    assert obeyed[0] < 0.8


def test_packs_reach_the_critic():
    result = fitted(*networks(packing=3), packing=3)
    assert result.history.rows[0]["metrics"]["critic"] > 0
    with pytest.raises(RuntimeError):  # torch: the critic's input is too small
        fitted(*networks(packing=1), packing=3)


# ------------------------------------------------------------------ exact resume


def stopping(at):
    """A progress bar that stops training."""

    def progress(moment):
        if moment.epoch * moment.steps + moment.step == at:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("loss", "optimizer", "order"),
    [
        ("relativistic_paired", "adam", "extragradient"),
        ("began:rate=0.1", "optimistic_adam", "alternating"),
        ("wasserstein", "optimistic_sgd", "simultaneous"),
    ],
)
def test_a_resumed_run_ends_with_equal_bits(tmp_path, loss, optimizer, order):
    def run(out=None, **more):
        torch.manual_seed(0)
        pair = networks(zero=False)
        if loss.startswith("began"):
            pair = pair[0], perceptron(2, 2, width=16)
        given = {"loss": loss, "optimizer": optimizer, "order": order, "epochs": 3, "ema": 0.9}
        given |= {"penalty": "r1:weight=0.01 + gradient_penalty:weight=0.1", "lr": 1e-3}
        return fitted(*pair, out=out, **given, **more)

    whole = run()
    with contextlib.suppress(KeyboardInterrupt):
        run(tmp_path, progress=stopping(6), save_every=0.0)
    resumed = run(tmp_path, resume=True)
    for name, weights in whole.history.weights.items():
        again = resumed.history.weights[name]
        assert all(torch.equal(value, again[key]) for key, value in weights.items())
    assert resumed.game.loss.state == whole.game.loss.state
    for mine, theirs in zip(whole.history.rows, resumed.history.rows, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_the_last_weights_are_kept_or_the_best():
    for keep in ("last", "best"):
        result = fitted(keep=keep, epochs=4, lr=0.02, ema=0.5)
        rows = [row["validation"] for row in result.history.rows]
        closest = min(range(4), key=lambda i: rows[i]["sliced_wasserstein"])
        assert result.history.best == (3 if keep == "last" else closest)
        assert result.figures == rows[result.history.best]
        weights = result.history.weights["generator"]
        assert all(torch.equal(v, weights[k]) for k, v in result.generator.state_dict().items())


def test_samples_are_those_of_their_seed():
    result = fitted()
    assert result.sample(5).equal(result.sample(8)[:5])
    assert not result.sample(5, seed=1).equal(result.sample(5))


# ------------------------------------------------------------------ diagnostics


def watching(critic, generator=None, *, loss="minimax", epochs=1, known=None, real=None):
    generator = networks()[0] if generator is None else generator
    modules = {"generator": generator, "critic": critic}
    played = GanGame(modules, {}, 2, losses.get(loss))
    real = ring().sample(300) if real is None else real
    return Watch(played, real, torch.empty(len(real), 0), epochs=epochs, known=known), modules


class Sure(nn.Module):
    """A critic that knows the ring: +10 on it, −10 elsewhere."""

    def forward(self, x):
        return torch.where((x.norm(dim=1) - 1).abs() < 0.1, 10.0, -10.0)


class Still(nn.Module):
    """A generator whose samples are given."""

    def __init__(self, points):
        super().__init__()
        self.points = nn.Parameter(points)

    def forward(self, z):
        return self.points[torch.arange(len(z)) % len(self.points)]


@pytest.mark.parametrize("loss", ["minimax", "non_saturating", "relativistic_paired"])
def test_a_vanishing_gradient_is_told_with_its_remedy(loss):
    """Against one and the same sure critic only the saturating loss is at a loss."""
    watch, modules = watching(Sure(), loss=loss, epochs=9)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        figures = watch(modules)
    assert figures["accuracy"] > 0.95
    assert figures["pull"] == pytest.approx(4.5e-5 if loss == "minimax" else 1.0, rel=0.05)
    assert [str(w.message) for w in told if "vanishes" in str(w.message)] == [
        str(w.message) for w in told
    ]
    assert len(told) == (loss == "minimax")
    if told:
        assert "non_saturating" in str(told[0].message)
        assert not watch.warned ^ {"vanishing"}


def test_collapse_is_told_in_the_second_half():
    mixture = ring()
    lost = Still(mixture.centres[:3] + 0.001)
    for known, said in ((mixture, "3 of 8 modes"), (None, "of the real samples lie")):
        for epochs, warned in ((1, True), (10, False)):
            watch, modules = watching(networks()[1], lost, loss="hinge", epochs=epochs, known=known)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                watch(modules)
                watch(modules)
            assert len(told) == warned
            assert all(said in str(w.message) and "packing" in str(w.message) for w in told)
    good, modules = watching(networks()[1], Still(mixture.sample(300, seed=5)), known=mixture)
    figures = good(modules)  # no warning, or the test fails
    assert (figures["modes"], figures["accuracy"]) == (8, 0.5)
    assert figures["high_quality"] > 0.95
    assert abs(figures["mmd"]) < 0.01


@pytest.mark.parametrize("far", [100.0, math.nan])
def test_divergence_is_told(far):
    watch, modules = watching(networks()[1], epochs=9)
    modules["generator"] = Still(torch.full((5, 2), far))
    with pytest.warns(UserWarning, match="diverges.*Lower the learning rates"):
        watch(modules)


def test_gradients_of_both_players_are_in_the_rows():
    """A critic at 0 with a flat last layer gives the generator no gradient at first."""
    found = fitted(lr=0.0, penalty="").history.rows[0]["metrics"]
    assert found["generator_gradient"] == 0.0
    assert found["critic_gradient"] > 0.01


# ------------------------------------------------------------------ what cannot be


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"order": "random"}, "order is one of"),
        ({"critic_steps": 0}, "at least 1"),
        ({"critic_steps": 2, "order": "simultaneous"}, "only where players alternate"),
        ({"packing": 2, "loss": "began"}, "packing=1"),
        ({"keep": "first"}, "keep is one of"),
        ({"optimizer": "newton"}, "optimizer is one of"),
        ({"precision": "fp16"}, "bf16"),
        ({"accumulate": 2, "critic_steps": 2}, "accumulate=1"),
        ({"loss": "began"}, "reconstruction"),
        ({"auxiliary": 1.0}, "Judgement with classes"),
        ({"penalty": "r7"}, "no penalty"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, said):
    with pytest.raises(InputError, match=said):
        fitted(**options)


@pytest.mark.parametrize("module", [updates, game, mixtures, training])
def test_the_examples_of_the_docstrings(module):
    assert doctest.testmod(module, raise_on_error=True).attempted


def test_mixtures_have_their_modes():
    for mixture, modes in ((ring(), 8), (grid(), 25)):
        assert mixture.centres.shape == (modes, 2)
        x = mixture.sample(5000)
        away = torch.cdist(x, mixture.centres).min(1).values
        assert float(away.square().mean()) == pytest.approx(2 * mixture.std**2, rel=0.1)
    assert diagnostics.SURE < 1
