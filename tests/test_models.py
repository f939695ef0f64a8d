"""Wrapping: exact twins, outputs of every form, and no trace left behind."""

import copy
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import (
    datasets,
    decomposition,
    discriminant_analysis,
    ensemble,
    feature_selection,
    linear_model,
    neural_network,
    preprocessing,
    random_projection,
    svm,
)
from sklearn.exceptions import ConvergenceWarning
from sklearn.pipeline import make_pipeline
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn.errors import InputError, ModelError
from robustlearn.models import EstimatorModel, FunctionModel, TorchModel

WINE = datasets.load_wine()
X, Y = WINE.data / WINE.data.max(0), WINE.target
TWO = Y < 2
TARGET = X @ np.arange(X.shape[1]) + np.sin(9 * X[:, 0])

CLASSIFIERS = [
    linear_model.LogisticRegression(),
    linear_model.LogisticRegressionCV(Cs=3, use_legacy_attributes=False, l1_ratios=(0.0,)),
    linear_model.RidgeClassifier(),
    linear_model.RidgeClassifierCV(),
    linear_model.SGDClassifier(random_state=0),
    linear_model.Perceptron(),
    discriminant_analysis.LinearDiscriminantAnalysis(),
    svm.LinearSVC(),
    neural_network.MLPClassifier((9, 7), max_iter=30, random_state=0),
    neural_network.MLPClassifier((9,), "tanh", max_iter=30, random_state=0),
    neural_network.MLPClassifier((9,), "logistic", max_iter=30, random_state=0),
    neural_network.MLPClassifier((9,), "identity", max_iter=30, random_state=0),
]
REGRESSORS = [
    linear_model.ARDRegression(),
    linear_model.BayesianRidge(),
    linear_model.ElasticNet(0.01),
    linear_model.HuberRegressor(max_iter=1000),
    linear_model.Lars(n_nonzero_coefs=5),
    linear_model.Lasso(0.01),
    linear_model.LassoLarsIC(),
    linear_model.LinearRegression(),
    linear_model.LinearRegression(fit_intercept=False),
    linear_model.OrthogonalMatchingPursuit(),
    linear_model.QuantileRegressor(alpha=0.0),
    linear_model.Ridge(),
    linear_model.SGDRegressor(random_state=0),
    linear_model.TheilSenRegressor(max_subpopulation=50, random_state=0),
    svm.LinearSVR(max_iter=10_000),
    neural_network.MLPRegressor(hidden_layer_sizes=(9,), max_iter=30, random_state=0),
]
STEPS = [
    preprocessing.StandardScaler(),
    preprocessing.StandardScaler(with_mean=False),
    preprocessing.MinMaxScaler((-1, 2)),
    preprocessing.MinMaxScaler(clip=True),
    preprocessing.MaxAbsScaler(),
    preprocessing.RobustScaler(),
    preprocessing.RobustScaler(with_centering=False, with_scaling=False),
    decomposition.PCA(5),
    decomposition.PCA(5, whiten=True),
    decomposition.TruncatedSVD(4),
    decomposition.IncrementalPCA(4),
    decomposition.FastICA(4, random_state=0, tol=0.1),
    random_projection.GaussianRandomProjection(6, random_state=0),
    feature_selection.SelectKBest(k=4),
    feature_selection.VarianceThreshold(0.005),
    "passthrough",
]


def named(estimators):
    return [pytest.param(e, id=f"{i}-{type(e).__name__}") for i, e in enumerate(estimators)]


def fitted(estimator, x=X, y=Y):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(estimator).fit(x, y)


def rows(n=200):
    return X.mean(0) + 2 * X.std(0) * np.random.default_rng(1).standard_normal((n, X.shape[1]))


def scores(estimator, x):
    if hasattr(estimator, "decision_function"):
        return estimator.decision_function(x)
    return None


@pytest.mark.parametrize("estimator", named(CLASSIFIERS))
@pytest.mark.parametrize("binary", [False, True])
def test_classifier_twins_are_exact(estimator, binary):
    keep = TWO if binary else slice(None)
    estimator = fitted(estimator, X[keep], Y[keep])
    model = rl.wrap(estimator)
    assert isinstance(model, TorchModel)
    assert model.differentiable
    assert model.task == "classification"
    logits = model(torch.as_tensor(rows())).numpy()
    assert logits.shape == (200, 2 if binary else 3)
    np.testing.assert_array_equal(model.classes[logits.argmax(1)], estimator.predict(rows()))
    if hasattr(estimator, "decision_function"):
        expected = estimator.decision_function(rows())
        found = logits[:, 1] if binary else logits
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    else:
        probabilities = torch.as_tensor(logits).softmax(1)
        expected = estimator.predict_proba(rows())
        np.testing.assert_allclose(probabilities, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", named(REGRESSORS))
def test_regressor_twins_are_exact(estimator):
    estimator = fitted(estimator, X, TARGET)
    model = rl.wrap(estimator)
    assert isinstance(model, TorchModel)
    assert model.task == "regression"
    np.testing.assert_allclose(
        model(torch.as_tensor(rows())), estimator.predict(rows()), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("step", named(STEPS))
def test_pipelines_of_affine_steps_are_exact(step):
    pipeline = fitted(
        make_pipeline(preprocessing.StandardScaler(), step, linear_model.LogisticRegression())
    )
    model = rl.wrap(pipeline)
    assert isinstance(model, TorchModel)
    logits = model(torch.as_tensor(rows())).numpy()
    np.testing.assert_allclose(logits, pipeline.decision_function(rows()), rtol=1e-10, atol=1e-10)
    affine = model.affine((X.shape[1],))
    if getattr(step, "clip", False):
        assert affine is None  # clipped: piecewise affine only
    else:
        weight, bias = affine
        np.testing.assert_allclose(rows() @ weight.numpy().T + bias.numpy(), logits, atol=1e-10)


def test_a_scaler_that_does_not_center():
    scaler = preprocessing.StandardScaler(with_mean=False)
    pipeline = fitted(make_pipeline(scaler, linear_model.RidgeClassifier()))
    model = rl.wrap(pipeline)
    assert isinstance(model, TorchModel)
    expected = pipeline.decision_function(X)
    np.testing.assert_allclose(model(torch.as_tensor(X)), expected, rtol=1e-10, atol=1e-10)


def test_one_feature_as_a_row_of_numbers():
    model = rl.wrap(fitted(linear_model.RidgeClassifier(), X[:, :1], Y))
    assert model(torch.as_tensor(X[:, 0])).shape == (178, 3)


def test_other_estimators_are_black_boxes_with_their_own_predictions():
    polynomial = make_pipeline(preprocessing.PolynomialFeatures(2), linear_model.RidgeClassifier())
    for estimator in (
        ensemble.RandomForestClassifier(20, random_state=0),
        ensemble.GradientBoostingClassifier(n_estimators=5),
        svm.SVC(),
        polynomial,
    ):
        estimator = fitted(estimator)
        model = rl.wrap(estimator)
        assert isinstance(model, EstimatorModel)
        assert not model.differentiable
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # probabilities are announced
            logits = model(torch.as_tensor(X))
        np.testing.assert_array_equal(logits.argmax(1), estimator.predict(X))
        with pytest.raises(InputError, match="black box: it has no gradient"):
            model.gradient(torch.as_tensor(X), torch.as_tensor(Y), losses.margin)
    forest = fitted(ensemble.RandomForestRegressor(5), X, TARGET)
    np.testing.assert_allclose(rl.wrap(forest)(torch.as_tensor(X)), forest.predict(X))


def test_an_estimator_that_only_predicts_labels():
    tree = fitted(ensemble.VotingClassifier([("a", linear_model.RidgeClassifier())]))
    model = rl.wrap(tree)
    assert model.method == "predict"
    np.testing.assert_array_equal(model(torch.as_tensor(X)).argmax(1), tree.predict(X))


def test_labels_that_are_words_and_columns_that_have_names():
    frame = pd.DataFrame(X, columns=WINE.feature_names)
    words = np.array(["red", "rosé", "white"])[Y]
    for estimator in (linear_model.RidgeClassifier(), ensemble.RandomForestClassifier(5)):
        model = rl.wrap(fitted(estimator, frame, words), output="logits")
        assert list(model.classes) == ["red", "rosé", "white"]
        assert model(torch.as_tensor(X)).shape == (178, 3)


def test_a_subclass_is_not_trusted_to_be_linear():
    class Odd(linear_model.RidgeClassifier):
        def decision_function(self, x):
            return -super().decision_function(x)

    assert isinstance(rl.wrap(fitted(Odd())), EstimatorModel)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (linear_model.Ridge(), "fit the Ridge before"),
        (np.zeros(3), "cannot wrap a array|cannot wrap an array"),
        (nn.Linear, "Linear is a class"),
        (linear_model.Ridge().fit(X, np.c_[Y, Y]), "several outputs"),
    ],
)
def test_what_cannot_be_wrapped(thing, message):
    with pytest.raises(InputError, match=message):
        rl.wrap(thing)


# ---------------------------------------------------------------------- outputs


def net(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(13, 8), nn.ReLU(), *layers)


def test_softmax_and_sigmoid_heads_are_bypassed():
    x = torch.rand(32, 13)
    for plain, head, single in (
        (net(nn.Linear(8, 3)), nn.Softmax(1), False),
        (net(nn.Linear(8, 1)), nn.Sigmoid(), True),
    ):
        model = rl.wrap(nn.Sequential(plain, head), task="classification")
        with pytest.warns(UserWarning, match="the logits before it are used"):
            logits = model(x)
        expected = plain(x).detach()
        expected = torch.cat([torch.zeros(32, 1), expected], 1) if single else expected
        torch.testing.assert_close(logits, expected)
        assert len(model.notes) == 1
        assert not head._forward_hooks


def test_probabilities_become_logits():
    class Soft(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net(nn.Linear(8, 3))

        def forward(self, x):
            return torch.softmax(self.net(x), 1)

    soft, x = Soft(), torch.rand(32, 13)
    model = rl.wrap(soft)
    with pytest.warns(UserWarning, match="returns probabilities"):
        logits = model(x)
    torch.testing.assert_close(logits, soft.net(x).log_softmax(1).detach())
    assert torch.equal(rl.wrap(soft, output="logits")(x), soft(x).detach())


def test_one_output_is_settled_by_the_labels():
    x = torch.rand(32, 13)
    single = net(nn.Linear(8, 1))
    model = rl.wrap(single)
    with pytest.raises(InputError, match="the model has one output: say wrap"):
        model(x)
    for labels, task in (([0, 1], "classification"), ([0.5, 1.0], "regression")):
        model = rl.wrap(single)
        model.settle(x, torch.tensor(labels))
        assert model.task == task
    with pytest.raises(InputError, match="whole numbers other than 0 and 1"):
        rl.wrap(single).settle(x, torch.tensor([3, 4]))
    logits = rl.wrap(single, task="classification")(x)
    torch.testing.assert_close(logits[:, 1], single(x)[:, 0].detach())
    assert (logits[:, 0] == 0).all()


class Hugging(nn.Module):
    """Returns an object with logits, as transformers do."""

    def forward(self, x):
        return type("Output", (), {"logits": x[:, :3]})()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x[:-1], "returned shape"),
        (lambda x: x[None], "returned shape"),
        (lambda x: "cat", "not an array of outputs|returned shape"),
        (lambda x: x.argmax(1), "how many classes there are"),
    ],
)
def test_unusable_outputs_are_named(function, message):
    with pytest.raises(ModelError, match=message):
        rl.wrap(function)(torch.rand(5, 3))


def test_wrong_input_shape_is_told_with_the_shape():
    with pytest.raises(ModelError, match=r"batch of shape \(2, 7\).*shape of input it expects"):
        rl.wrap(nn.Linear(3, 2))(torch.rand(2, 7))
    assert rl.wrap(Hugging())(torch.rand(2, 7)).shape == (2, 3)
    inner = Hugging()
    inner.attention = nn.Softmax(1)  # a softmax inside, and an output that is not a tensor
    assert rl.wrap(inner)(torch.rand(2, 7)).shape == (2, 3)


def test_callables_on_numpy_and_on_torch_and_labels():
    weight = np.random.default_rng(0).standard_normal((4, 3))
    x = torch.rand(6, 4, dtype=torch.float64)
    on_numpy = rl.wrap(lambda a: np.tanh(a @ weight))
    layer = nn.Linear(4, 3)
    on_torch = rl.wrap(lambda t: layer(t.float()))
    assert isinstance(on_numpy, FunctionModel)
    np.testing.assert_allclose(on_numpy(x), np.tanh(x.numpy() @ weight))
    torch.testing.assert_close(on_torch(x), layer(x.float()).detach())
    labels = rl.wrap(lambda a: (a @ weight).argmax(1), num_classes=3)
    np.testing.assert_array_equal(labels(x).argmax(1), (x.numpy() @ weight).argmax(1))
    with pytest.raises(InputError, match=r"as numpy: .*as torch: .*as torch float32: "):
        rl.wrap(lambda a: a.nothing())(x)
    with pytest.raises(ModelError, match="labels from 0 to 3, but num_classes is 3"):
        rl.wrap(lambda a: np.arange(4), num_classes=3)(x[:4])


# ---------------------------------------------------------------------- no trace


class Careless(nn.Module):
    """Batch norm, dropout that is always on, global randomness, and a write into the input."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(13, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)
        )
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        x -= 0.5
        noise = torch.rand(1).item() + np.random.rand()  # noqa: NPY002
        return self.layers(torch.nn.functional.dropout(x, 0.1)) * (1 + 0.01 * noise)


def test_a_call_leaves_no_trace(untouched):
    with torch.random.fork_rng():
        module = Careless()
        module.train()
        module.layers[2].eval()  # a mixed state must come back mixed
        module.layers[0].weight.grad = torch.full((8, 13), 7.0)
        x, y = torch.rand(20, 13), torch.randint(0, 3, (20,))
    state = copy.deepcopy(module.state_dict())
    modes = [m.training for m in module.modules()]
    learning = [p.requires_grad for p in module.parameters()]
    kept = x.clone()
    model = rl.wrap(module)
    first, again = model(x), model(x)
    gradient, _, output = model.gradient(x, y, losses.margin)
    with pytest.raises(ModelError):
        model(torch.rand(20, 5, generator=torch.Generator()))
    assert torch.equal(first, again)  # its own randomness is pinned
    assert gradient.shape == x.shape
    assert gradient.abs().sum() > 0
    assert not output.requires_grad
    assert torch.equal(x, kept)
    assert not x.requires_grad
    assert [m.training for m in module.modules()] == modes
    assert [p.requires_grad for p in module.parameters()] == learning
    assert (module.layers[0].weight.grad == 7).all()
    assert module.layers[4].weight.grad is None
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_gradients_are_right_and_counted():
    module = net(nn.Linear(8, 3)).double()
    x, y = torch.rand(5, 13, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    model = rl.wrap(module)
    gradient, _, _ = model.gradient(x, y, losses.margin)
    step = 1e-6
    for j in (0, 7):
        bumped = x.clone()
        bumped[:, j] += step
        change = -(losses.margin(model(bumped), y) - losses.margin(model(x), y)) / step
        torch.testing.assert_close(gradient[:, j], change, atol=1e-5, rtol=1e-4)
    assert (model.forwards, model.backwards) == (25, 5)


def test_a_detached_network_is_told():
    model = rl.wrap(nn.Sequential(nn.Flatten(), Detached(), nn.Linear(13, 3)))
    with pytest.raises(ModelError, match="no gradient flows"):
        model.gradient(torch.rand(4, 13), torch.zeros(4).long(), losses.margin)


class Detached(nn.Module):
    def forward(self, x):
        return x.detach().round()


# ---------------------------------------------------------------------- affine networks


def test_affine_chains_are_found_and_only_those():
    torch.manual_seed(0)
    chain = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.AvgPool2d(2),
        nn.Dropout(),
        nn.Sequential(nn.Flatten(), nn.Linear(12, 4)),
    )
    chain[1].running_mean.uniform_()
    chain[1].running_var.uniform_(0.5, 2)
    x = torch.rand(5, 2, 4, 4)
    weight, bias = rl.wrap(chain).affine((2, 4, 4))
    expected = rl.wrap(chain)(x).double()
    torch.testing.assert_close(x.double().flatten(1) @ weight.T + bias, expected, atol=1e-6, rtol=0)
    assert chain[4][1].weight.dtype == torch.float32
    assert rl.wrap(net(nn.Linear(8, 3))).affine((13,)) is None

    class Mine(nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()

    assert rl.wrap(Mine(3, 2)).affine((3,)) is None
    hooked = nn.Sequential(nn.Linear(3, 2))
    hooked[0].register_forward_hook(lambda m, i, o: o.relu())
    assert rl.wrap(hooked).affine((3,)) is None
    untracked = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))
    assert rl.wrap(untracked).affine((3,)) is None
    one = rl.wrap(nn.Linear(3, 1), task="classification").affine((3,))
    assert one[0].shape == (2, 3)
