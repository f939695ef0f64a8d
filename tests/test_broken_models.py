"""Models and data broken in each known way: a clear error or a right answer."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import robustlearn as rl
from robustlearn import data
from robustlearn.cli.demo import trained
from robustlearn.errors import InputError, ModelError

THREAT = rl.LpBall(math.inf, 0.08, lower=0.0, upper=1.0)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").take(slice(0, 1300))


@pytest.fixture(scope="module")
def net(digits):
    return trained(digits.take(slice(0, 1200)), 0, lambda *told: None)


@pytest.fixture(scope="module")
def test(digits):
    return digits.take(slice(1200, 1300))


@pytest.fixture(scope="module")
def truth(net, test):
    """What the sound network gets."""
    return evaluated(net, test)


def evaluated(model, test, threat=THREAT, **given):
    return rl.evaluate(model, test.x, test.y, threat, **{"attacks": "quick", **given})


class Around(nn.Module):
    """A network with something done to its output or input."""

    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def test_softmax_module_output(net, test, truth):
    with pytest.warns(UserWarning, match="the logits before it are used"):
        report = evaluated(nn.Sequential(net, nn.Softmax(1)), test)
    assert report.attacked == truth.attacked
    assert any("Softmax" in note for note in report.notes)


def test_softmax_function_output(net, test, truth):
    with pytest.warns(UserWarning, match="returns probabilities"):
        report = evaluated(Around(net, after=lambda z: z.softmax(1)), test)
    assert abs(report.attacked.value - truth.attacked.value) <= 0.02
    assert report.clean == truth.clean


@pytest.mark.parametrize("gain", [1e-6, 100.0, 1e4])
def test_saturated_and_faint_logits(net, test, truth, gain):
    report = evaluated(Around(net, after=lambda z: gain * z), test)
    assert abs(report.attacked.value - truth.attacked.value) <= 0.02


def test_one_logit(test):
    even = (test.y % 2).astype(int)
    x = test.x.reshape(len(test.x), -1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(200):
        optimizer.zero_grad()
        z = net(torch.as_tensor(x).float())[:, 0]
        nn.functional.binary_cross_entropy_with_logits(z, torch.as_tensor(even).float()).backward()
        optimizer.step()
    report = rl.evaluate(net, x, even, THREAT)
    weight, bias = net[1].weight.detach().double().numpy()[0], net[1].bias.item()
    room = np.where(np.outer(2 * even - 1, weight) > 0, x, 1 - x)
    drop = (np.abs(weight) * np.minimum(0.08, room)).sum(1)
    margin = (2 * even - 1) * (x @ weight + bias)
    assert report.clean.value == np.mean(margin > 0)
    assert report.attacked.value == pytest.approx(np.mean(margin > drop), abs=0.011)
    assert report.certified.value == report.attacked.value


def test_zero_gradients_are_told_and_scores_still_work(net, test, truth):
    report = evaluated(Around(net, before=lambda x: (x * 16).round() / 16), test)
    assert any("gradient is exactly zero for" in note for note in report.notes)
    assert report.attacked.value < report.clean.value


def test_a_detached_input_is_told_and_scores_still_work(net, test):
    report = evaluated(Around(net, before=lambda x: x.detach()), test)
    assert any("no gradient flows" in note for note in report.notes)
    assert report.attacked.value < report.clean.value
    skipped = {run.name for run in report.attacks if run.skipped}
    assert {"fgsm", "pgd:steps=20"} <= skipped


def test_nan_for_some_inputs(net, test):
    def spoil(z):
        return torch.where(z.argmax(1, keepdim=True) == 3, torch.nan, z)

    with pytest.raises(ModelError, match=r"returned NaN for \d+ of 100 clean samples \(first:"):
        evaluated(Around(net, after=spoil), test)


def test_nan_under_attack_counts_as_broken(net, test):
    """Right on clean images, NaN on whatever is not a multiple of 1/16."""

    def spoil_moved(x):
        moved = ((x * 16).round() != x * 16).flatten(1).any(1)
        return torch.where(moved.reshape(-1, 1, 1, 1), torch.nan, x)

    report = evaluated(Around(net, before=spoil_moved), test)
    assert report.clean.value > 0.9
    assert report.attacked.value == 0


def test_wrong_input_shape(net, test):
    with pytest.raises(ModelError, match=r"failed on a batch of shape \(1, 64\)"):
        rl.evaluate(net, test.x.reshape(-1, 64), test.y, THREAT)
    with pytest.raises(ModelError, match="Is that the shape of input it expects"):
        rl.evaluate(nn.Linear(3, 2), np.zeros((4, 5)), [0, 1, 0, 1], THREAT)


def test_constant_output(test):
    report = evaluated(lambda x: np.zeros((len(x), 10)), test)
    assert any("the same output for every sample" in note for note in report.notes)
    assert report.clean.value == np.mean(test.y == 0)  # argmax of a tie is class 0
    assert report.attacked == report.clean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 5, "labels out of range: y spans 5 to 14, but DigitsNet has 10 classes"),
        (lambda y: y - 1, "labels out of range: y spans -1 to 8"),
        (lambda y: y + 0.5, "must hold class numbers .* but holds fractions like"),
        (lambda y: y[:-1], r"x has 100 samples, but y has shape \(99,\)"),
        (lambda y: np.eye(10)[y], r"for one-hot labels give y.argmax\(axis=1\)"),
        (lambda y: np.where(y == 3, np.nan, y), "y holds NaN"),
        (lambda y: y.astype(str), "y must hold class numbers"),
    ],
)
def test_labels_that_do_not_fit(net, test, change, message):
    with pytest.raises(InputError, match=message):
        rl.evaluate(net, test.x, change(test.y), THREAT)


def test_labels_as_whole_floats_are_labels(net, test, truth):
    report = rl.evaluate(net, test.x, test.y.astype(float), THREAT, attacks="quick")
    assert report.attacked == truth.attacked
    assert report.samples[0].label == int(test.y[0])


def test_integers_where_floats_are_due(net, test, truth):
    counts = (test.x * 16).astype(np.uint8)
    with pytest.raises(InputError, match="8-bit integers: divide by 255"):
        rl.evaluate(net, counts, test.y, rl.LpBall(math.inf, 0.08))
    with pytest.raises(InputError, match=r"data outside the box: x spans \[0, 16\]"):
        rl.evaluate(net, counts, test.y, THREAT)
    scaled = Around(net, before=lambda x: x / 16)  # honest units are fine
    threat = rl.LpBall(math.inf, 16 * 0.08, lower=0, upper=16)
    assert rl.evaluate(scaled, counts, test.y, threat, attacks="quick").clean == truth.clean


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x * 255, r"data outside the box: x spans \[0, 255\]"),
        (lambda x: np.where(x > 0.9, np.nan, x), "x holds NaN or infinity"),
        (lambda x: x[:0], "there is no sample"),
        (lambda x: x.astype(str), "x must hold numbers"),
        (lambda x: x.astype(object), "x must hold numbers"),
    ],
)
def test_data_that_does_not_fit(net, test, spoil, message):
    x = spoil(test.x)
    with pytest.raises(InputError, match=message):
        rl.evaluate(net, x, test.y[: len(x)], THREAT)


def test_a_single_output_with_unclear_labels(test):
    with pytest.raises(InputError, match="say wrap"):
        rl.evaluate(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), test.x, test.y, THREAT)


def test_a_model_that_raises_is_named(test):
    class Angry(nn.Module):
        def forward(self, x):
            raise KeyError("weights")

    with pytest.raises(ModelError, match=r"Angry failed on a batch of shape .*KeyError"):
        evaluated(Angry(), test)


def test_a_class_name_that_is_a_script(net, test, tmp_path):
    evil = '<script>alert("x")</script>'
    kind = type(evil, (Around,), {})
    report = rl.evaluate(
        kind(net),
        test.x,
        test.y,
        THREAT,
        attacks="fgsm",
        data=evil,
        classes=[evil] * 10,
        feature_names=[evil] * 64,
    )
    page = (report.save(tmp_path, command=evil) / "report.html").read_text()
    assert evil not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_batch_norm_and_dropout_left_in_training_mode(test):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Dropout(), nn.Linear(32, 10)
    )
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    labels = net.eval()(torch.as_tensor(test.x).float()).argmax(1)
    net.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = rl.evaluate(net, test.x, labels, THREAT, batch_size=33)
    assert report.clean.value == 1  # evaluated in evaluation mode
    assert net.training
    assert net[2].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert report.certified.value == report.attacked.value  # and recognised as linear
