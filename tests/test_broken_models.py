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
    assert {"pgd:steps=25", "fmn:steps=20"} <= skipped


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
    with pytest.raises(ModelError, match=r"failed on a batch of shape \(100, 64\)"):
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


# ---------------------------------------------------------------------- found by review


def table(n=60, d=3, seed=0):
    generator = np.random.default_rng(seed)
    x = generator.random((n, d))
    return x, (x[:, 0] > x[:, 1]).astype(int)


class Shared(nn.Module):
    """One sigmoid module for the hidden layer and for the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second, self.act = nn.Linear(3, 8), nn.Linear(8, 1), nn.Sigmoid()

    def forward(self, x):
        return self.act(3 * self.second(self.act(4 * self.first(x))))


def test_an_activation_that_is_also_the_head_is_not_bypassed():
    x, _ = table()
    net = Shared()
    labels = (net(torch.as_tensor(x).float())[:, 0] > 0.5).long()
    with pytest.raises(InputError, match=r"single output of Shared lies in \[0, 1\]"):
        rl.evaluate(net, x, labels, rl.LpBall(2, 0.01))
    model = rl.wrap(net, task="classification", output="probabilities")
    assert rl.evaluate(model, x, labels, rl.LpBall(2, 0.01), attacks="fgsm").clean.value == 1
    soft = nn.Softmax(1)
    chain = nn.Sequential(nn.Linear(3, 4), soft, nn.Linear(4, 3), soft)
    with pytest.warns(UserWarning, match="returns probabilities"):
        report = rl.evaluate(chain, x, np.zeros(60, int), rl.LpBall(2, 0.01), attacks="fgsm")
    assert report.certified is None


def test_a_regressor_may_end_in_a_sigmoid():
    x, _ = table()
    net = nn.Sequential(nn.Linear(3, 1), nn.Sigmoid())
    y = net(torch.as_tensor(x).float()).detach()
    report = rl.evaluate(net, x, y, rl.LpBall(2, 0.01), attacks="fgsm")
    assert report.task == "regression"
    assert report.clean.value == 0
    assert report.certified.value >= report.attacked.value


def test_a_softmax_head_on_a_linear_layer_is_certified_at_once():
    x, _ = table()
    net = nn.Sequential(nn.Linear(3, 3), nn.Softmax(1))
    threat = rl.LpBall(2, 0.01)
    with pytest.warns(UserWarning, match="the logits before it are used"):
        certificate = rl.certify(net, x, threat)
    np.testing.assert_allclose(certificate.radius, rl.certify(net[0], x, threat).radius)


def test_probabilities_are_recognised_on_many_rows():
    x, y = table()

    def scores(a):
        out = np.stack([2 * a[:, 1] - 2 * a[:, 0], 2 * a[:, 0] - 2 * a[:, 1]], 1)
        out[0] = [1.0, 0.0] if len(a) > 1 else out[0]
        return out

    report = rl.evaluate(scores, x, y, rl.LpBall(2, 0.01), attacks="quick")
    assert report.clean.value >= 0.98
    model = rl.wrap(lambda a: np.array([[1.0, 0.0]]) if len(a) == 1 else scores(a))
    with pytest.warns(UserWarning, match="returns probabilities"):
        model(torch.as_tensor(x[:1]))
    with pytest.raises(ModelError, match="was taken to return probabilities, and returned"):
        model(torch.as_tensor(x))


def test_black_boxes_get_the_score_that_they_give_themselves():
    from sklearn.datasets import load_iris
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import FixedThresholdClassifier
    from sklearn.svm import SVC

    x, y = load_iris(return_X_y=True)
    threshold = FixedThresholdClassifier(LogisticRegression(max_iter=1000), threshold=0.95)
    for estimator, labels in (
        (SVC(decision_function_shape="ovo"), y),
        (SVC(), y),
        (threshold, (y > 1).astype(int)),
    ):
        estimator.fit(x, labels)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # where it says that it uses labels
            report = rl.evaluate(estimator, x, labels, rl.LpBall(2, 0.01), attacks="quick")
        assert report.clean.value == pytest.approx(estimator.score(x, labels))
    with pytest.raises(InputError, match="knows one class only"):
        rl.wrap(RandomForestClassifier(2).fit(x, np.zeros(150)))


def test_certify_reads_labels_as_evaluate_does():
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression, Ridge

    x, y = load_iris(return_X_y=True)
    threat = rl.LpBall(2, 0.2)
    for names in (y + 1, np.array(["a", "b", "c"])[y]):
        model = LogisticRegression(max_iter=1000).fit(x, names)
        certified = rl.certify(model, x, threat, y=names).certified
        report = rl.evaluate(model, x, names, threat, attacks="quick")
        assert certified.mean() == report.certified.value
        page = report.to_dict()
        assert all(e["label"] != e["prediction"] for e in page["examples"])
        assert page["classes"] is None or page["classes"] == ["a", "b", "c"]
    column = rl.certify(Ridge().fit(x, y), x, threat, y=y[:, None].astype(float))
    assert column.loss.shape == (150,)


def test_rounding_inside_a_chain_is_not_certified_away():
    big = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        big[0].weight.copy_(torch.tensor([[1e6], [1e6 + 0.0625]]))
        big[1].weight.copy_(torch.tensor([[1.0, -1.0]]))
    x = torch.linspace(0.1, 0.9, 500)[:, None]
    model = rl.wrap(big, task="classification")
    certificate = rl.certify(model, x, rl.LpBall(2, 1e-6))
    assert not certificate.certified.any()  # float32 cannot tell what the exact sum is


def test_a_float32_regressor_stays_below_its_certificate():
    torch.manual_seed(0)
    net, x = nn.Linear(50, 1), torch.rand(300, 50)
    y = net(x).detach() + torch.randn(300, 1)
    report = rl.evaluate(rl.wrap(net, task="regression"), x, y, rl.LpBall(2, 0.1), attacks="quick")
    assert all(s.attacked_loss <= s.certified_loss for s in report.samples)
    assert report.attacked.value > 0.9999 * report.certified.value


def test_targets_far_from_the_predictions_are_no_contradiction():
    torch.manual_seed(0)
    net, x = nn.Linear(2, 1), torch.rand(200, 2)
    y = 1000 + torch.randn(200)
    report = rl.evaluate(rl.wrap(net, task="regression"), x, y, rl.LpBall(2, 0.01), attacks="quick")
    assert all(s.attacked_loss <= s.certified_loss for s in report.samples)


def test_nan_predictions_of_a_regressor_are_an_infinite_loss(tmp_path):
    def spoilt(x):
        return torch.log(1 - x.sum(1))

    net = Around(nn.Identity(), after=spoilt)
    x = torch.full((8, 2), 0.4)
    y = torch.full((8,), -1.6)
    report = rl.evaluate(net, x, y + 0.01, rl.LpBall(math.inf, 0.12), attacks=["fgsm", "pgd"])
    assert report.attacked.value == math.inf
    report.save(tmp_path)


def test_nan_under_attack_can_be_saved(net, test, tmp_path):
    def spoil_moved(x):
        moved = ((x * 16).round() != x * 16).flatten(1).any(1)
        return torch.where(moved.reshape(-1, 1, 1, 1), torch.nan, x)

    report = evaluated(Around(net, before=spoil_moved), test)
    report.save(tmp_path)
    assert report.samples[0].attacked_margin == -math.inf


def test_a_network_that_sums_its_input_first():
    class Sums(nn.Module):
        def forward(self, x):
            z = x.sum(1)
            return torch.stack([z, 1 - z], 1)

    x = torch.rand(10, 3)
    y = Sums()(x).argmax(1)
    report = rl.evaluate(Sums(), x, y, rl.LpBall(2, 0.3), attacks=["fgsm", "pgd"])
    assert report.attacked.value < 1


def test_a_box_from_the_data_in_another_dtype():
    x, y = table(200)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    threat = rl.LpBall(math.inf, 0.1, lower=x.min(0), upper=x.max(0))
    report = rl.evaluate(net, x, y, threat, attacks="quick")
    assert report.x.dtype == np.float32
    assert (report.x_adv >= x.min(0)).all()
    assert (report.x_adv <= x.max(0)).all()


def test_a_torch_function_on_float32():
    x, y = table()
    net = nn.Linear(3, 2)
    report = rl.evaluate(lambda a: net(a), x, y, rl.LpBall(2, 0.01), attacks="quick")
    predicted = net(torch.as_tensor(x).float()).argmax(1).numpy()
    assert report.clean.value == (predicted == y).mean()


def test_other_things_that_predict():
    class Other:
        def predict_proba(self, x):
            p = 1 / (1 + np.exp(9 * (x[:, 1] - x[:, 0])))
            return np.stack([1 - p, p], 1)

        classes_ = np.array([0, 1])

        def predict(self, x):
            return self.predict_proba(x).argmax(1)

    x, y = table()
    report = rl.evaluate(Other(), x, y, rl.LpBall(2, 0.01), attacks="quick")
    assert report.clean.value == 1
    with pytest.raises(InputError, match=r"computes in torch.bfloat16"):
        rl.wrap(nn.Linear(2, 2).bfloat16())


def test_attacks_called_by_hand_check_their_input():
    from robustlearn.attacks import fgsm

    net, threat = nn.Linear(3, 2), rl.LpBall(2, 0.1)
    x, y = torch.rand(4, 3), torch.tensor([0, 1, 0, 1])
    for bad, message in (
        ((x.int(), y), "takes x as a tensor of floats"),
        ((x.numpy(), y), "takes x as a tensor of floats"),
        ((x, y[:2]), "x has 4 samples, y has 2"),
        ((x, y + 5), "labels out of range"),
        ((x * torch.nan, y), "x holds NaN"),
    ):
        with pytest.raises(InputError, match=message):
            fgsm(net, *bad, threat)
