"""Radii from Lipschitz constants: exact for linear models, norms of layers from above."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn.attacks import fmn
from robustlearn.certify import lipschitz as module
from robustlearn.certify.lipschitz import constant_of, lipschitz
from robustlearn.errors import InputError


def seeded(seed=0):
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def convolutional():
    seeded()
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 3),
    ).double()
    with torch.no_grad():
        net[1].running_var.fill_(0.3)
        net[1].running_mean.fill_(0.4)
        net[1].weight.copy_(torch.tensor([-2.0, 1.0, 0.5, 1.5]))
    return net.eval()


@pytest.mark.parametrize("threat", [rl.LpBall(2, 0.1), rl.LpBall(2, 0.1, scale=0.5)])
def test_a_linear_model_gets_its_exact_radius(threat):
    seeded()
    model, x = rl.wrap(nn.Linear(5, 4).double()), torch.randn(30, 5, dtype=torch.float64)
    exact = rl.certify(model, x.numpy(), threat, method="linear")
    found = rl.certify(model, x.numpy(), threat, method="lipschitz")
    np.testing.assert_allclose(found.radius, exact.radius, rtol=1e-7)
    np.testing.assert_allclose(found.margin, exact.margin, rtol=1e-7)
    assert (found.radius <= exact.radius).all()


def test_a_regressor_and_the_logit_of_two_classes():
    seeded()
    net, x = nn.Linear(5, 1).double(), torch.randn(30, 5, dtype=torch.float64)
    threat, y = rl.LpBall(2, 0.3), np.zeros(30)
    for task in ("regression", "classification"):
        model = rl.wrap(net, task=task)
        given = y if task == "regression" else None
        exact, found = (
            rl.certify(model, x.numpy(), threat, y=given, method=m) for m in ("linear", "lipschitz")
        )
        for name in ("radius", "margin", "lower", "upper", "loss"):
            if getattr(exact, name) is not None:
                np.testing.assert_allclose(getattr(found, name), getattr(exact, name), rtol=1e-6)


@pytest.mark.parametrize("dense", [2**22, 0])
def test_the_constant_of_a_network_is_never_exceeded(dense, monkeypatch):
    """By the largest singular value of the Jacobian at many points: a lower bound."""
    monkeypatch.setattr(module, "DENSE", dense)
    net = convolutional()
    bound, generator = constant_of(net, (2, 8, 8)), seeded(1)
    largest = 0.0
    for _ in range(50):
        x = 3 * torch.randn(1, 2, 8, 8, dtype=torch.float64, generator=generator)
        jacobian = torch.autograd.functional.jacobian(net, x).reshape(3, -1)
        largest = max(largest, float(torch.linalg.matrix_norm(jacobian, 2)))
    assert 0 < largest <= bound
    assert bound <= (12 if dense else 100) * largest


@pytest.mark.parametrize("stride", [1, 2])
def test_the_norm_of_a_convolution_is_that_of_its_matrix_from_above(stride, monkeypatch):
    seeded()
    layer = nn.Conv2d(2, 3, 3, stride=stride, padding=1).double()
    jacobian = torch.autograd.functional.jacobian(
        layer, torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    )
    truth = float(torch.linalg.matrix_norm(jacobian.reshape(-1, 72), 2))
    assert constant_of(layer, (2, 6, 6)) == pytest.approx(truth, rel=1e-8)
    monkeypatch.setattr(module, "DENSE", 0)
    assert truth <= constant_of(layer, (2, 6, 6)) <= 4 * truth


def test_sums_that_are_negative_have_a_size(monkeypatch):
    monkeypatch.setattr(module, "DENSE", 0)
    net = nn.Sequential(nn.AvgPool2d(2, divisor_override=-1), nn.Flatten(), nn.Linear(4, 2))
    net[2].weight.data = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.1]])
    assert constant_of(net, (1, 4, 4)) >= 4  # of the first row, ‖(1, 1, 1, 1)‖ and four pixels each


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_no_attack_comes_nearer_than_the_radius(p):
    net, generator = convolutional(), seeded(2)
    x = torch.randn(20, 2, 8, 8, dtype=torch.float64, generator=generator)
    model = rl.wrap(net)
    y, threat = model(x).argmax(1), rl.LpBall(p, 100.0)
    certificate = rl.certify(model, x.numpy(), threat, method="lipschitz")
    broken = fmn(model, x, y, threat, steps=60)
    lost = losses.misclassified(model(broken), y)
    distance = threat.norm(broken - x).numpy()
    assert lost.any()
    assert (certificate.radius[lost] <= distance[lost]).all()
    assert (certificate.radius > 0).all()


def test_a_given_constant_serves_black_boxes():
    seeded()
    net, x = nn.Linear(5, 3).double(), torch.randn(20, 5, dtype=torch.float64)
    box = rl.wrap(lambda rows: net(torch.as_tensor(rows)).detach().numpy())
    constant = float(torch.linalg.matrix_norm(net.weight.detach(), 2))
    exact = rl.certify(rl.wrap(net), x.numpy(), rl.LpBall(2, 0.1))
    found = lipschitz(box, x, rl.LpBall(2, 0.1), None, constant=constant)
    assert (0 < found.radius).all()
    assert (found.radius <= exact.radius * (1 + 1e-12)).all()
    with pytest.raises(InputError, match="constant=L"):
        lipschitz(box, x, rl.LpBall(2, 0.1), None)
    with pytest.raises(InputError, match="positive and finite"):
        lipschitz(box, x, rl.LpBall(2, 0.1), None, constant=-1.0)


@pytest.mark.parametrize("layer", [nn.GELU(), nn.MaxPool2d(3, 1), nn.LayerNorm(8), nn.Softmax(1)])
def test_layers_that_are_not_known_are_refused(layer):
    net = nn.Sequential(nn.Conv2d(1, 2, 1), layer, nn.Flatten(), nn.LazyLinear(2))
    net(torch.zeros(1, 1, 8, 8))
    with pytest.raises(InputError, match="a layer is not known"):
        constant_of(net, (1, 8, 8))
    with pytest.raises(InputError, match="are not known"):
        rl.certify(net, np.zeros((1, 1, 8, 8)), rl.LpBall(2, 0.1), method="lipschitz")


def test_rows_that_are_nearly_equal_are_told_apart():
    """Of more than 25 classes cdist would multiply out, and lose ‖w_i − w_j‖ to cancellation."""
    generator = seeded()
    net = nn.Linear(3, 30, bias=False).double()
    with torch.no_grad():
        common = 1e5 * torch.randn(1, 3, generator=generator)
        net.weight.copy_(common + 1e-3 * torch.randn(30, 3, generator=generator))
    x = torch.randn(200, 3, dtype=torch.float64, generator=generator)
    found = rl.certify(net, x, rl.LpBall(2, 0.01), method="lipschitz")
    z, slope = net(x).detach(), (net.weight[:, None] - net.weight[None]).norm(dim=2).detach()
    truth = ((z.amax(1, keepdim=True) - z) / slope[z.argmax(1)]).nan_to_num(torch.inf).amin(1)
    assert (found.radius <= truth.numpy()).all()
    assert not found.certified[(truth < 0.01).numpy()].any()


def test_the_radius_leaves_the_room_for_rounding_that_certified_leaves():
    """At the radius itself, as ε, a sample is at the edge of being certified."""
    seeded()
    net, x = nn.Sequential(nn.Linear(50, 9), nn.ReLU(), nn.Linear(9, 3)), torch.randn(40, 50)
    radius = rl.certify(net, x, rl.LpBall(2, 0.1), method="lipschitz").radius
    for factor, safe in ((1 - 1e-12, True), (1 + 1e-12, False)):
        threat = rl.LpBall(2, torch.from_numpy(radius * factor))
        assert (rl.certify(net, x, threat, method="lipschitz").certified == safe)[radius > 0].all()
