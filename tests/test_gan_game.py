"""What is played: losses, labels and packs, step by step."""

import math

import pytest
import torch
from gans import fitted, networks
from torch import nn

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.gan import (
    GanGame,
    Judgement,
    game,
    losses,
)
from robustlearn.gan.mixtures import perceptron, ring
from robustlearn.loop import play


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


@pytest.mark.parametrize("order", game.ORDERS)
def test_began_moves_its_balance_once_a_step(order):
    """k = λ(γ·E L(x) − E L(G(z))) after one step of players that stay where they are."""
    generator, critic, x = *networks()[:1], perceptron(2, 2, width=16), 3 * ring().sample(64)
    options = {"loss": "began:rate=0.01:gamma=1.0", "penalty": "", "lr": 0.0}
    result = fitted(generator, critic, data=x, order=order, **options)
    keys = _tensor.fold(play_keys(next(iter(play_order(x)))), game.CRITIC_NOISE)
    with torch.no_grad():
        fake = generator(_tensor.normal(keys, (2,), torch.float32))
        errors = [(critic(part) - part).abs().mean() for part in (x, fake)]
    assert result.game.loss.state == pytest.approx(0.01 * float(errors[0] - errors[1]), rel=1e-5)
    assert result.game.loss.state > 1e-4


def test_a_batch_that_is_left_out_does_not_move_the_balance_of_began():
    generator, critic, x = *networks()[:1], perceptron(2, 2, width=16), 3 * ring().sample(64)
    x[5] = math.nan
    result = fitted(generator, critic, data=x, loss="began:rate=0.01", penalty="", epochs=2)
    assert result.game.loss.state == 0.0


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


def test_penalties_fall_to_their_own_weight():
    critic = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        critic.weight.copy_(torch.tensor([[3.0, 4.0]]))
    result = fitted(
        networks()[0], critic, penalty="r1:weight=0.1", anneal=16.0, epochs=5, batch_size=256,
        optimizer="sgd", lr=1e-12,
    )  # fmt: skip
    costs = [row["metrics"]["penalty"] for row in result.history.rows]
    assert costs == pytest.approx([1.25 * factor for factor in (16, 8, 4, 2, 1)])
    assert result.game.settled == 4


def test_packs_reach_the_critic():
    generator, critic = networks(packing=3)
    seen = []
    critic.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    x = ring().sample(64)
    fitted(generator, critic, data=x, packing=3, penalty="")
    batch = x[next(iter(play_order(x)))]
    assert any(
        part.equal(torch.cat([batch, batch.roll(-1, 0), batch.roll(-2, 0)], 1)) for part in seen
    )
    with pytest.raises(RuntimeError):  # torch: the critic's input is too small
        fitted(*networks(packing=1), packing=3)


def test_images_are_data_too():
    generator = nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4)))
    critic = nn.Sequential(nn.Flatten(), nn.Linear(2 * 16, 1))
    data = torch.rand(100, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    result = fitted(generator, critic, data=data, packing=2)
    assert result.sample(3).shape == (3, 1, 4, 4)
    assert math.isfinite(result.figures["mmd"])


@pytest.mark.parametrize("label", [0, 1])
def test_a_critic_learns_the_classes_of_generated_samples_too(label):
    """Real samples of one class and generated ones at a point: the gradient is the sum of both."""
    x, y = torch.ones(32, 1), torch.full((32,), label)
    generator, critic = nn.Linear(2, 1), nn.Linear(1, 2)
    for weight in (generator.weight, generator.bias, critic.weight, critic.bias):
        nn.init.constant_(weight, 0.0)
    nn.init.constant_(generator.bias, 5.0)

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.classes = critic

        def forward(self, x):
            return Judgement(scores=0 * x[:, 0], classes=self.classes(x))

    options = {"auxiliary": 2.0, "penalty": "", "optimizer": "sgd", "lr": 0.0, "critic_lr": 0.1}
    fitted(generator, Told(), data=(x, y), **options)
    pull = 0.1 * 2.0 * 0.5 * (1.0 + 5.0)  # rate · weight · share of the other class · (x + G)
    sign = 1 if label == 0 else -1
    assert critic.weight.flatten().tolist() == pytest.approx([sign * pull, -sign * pull])
