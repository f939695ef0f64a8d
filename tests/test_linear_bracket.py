"""Linear models, where the bracket closes: certificate = closed form = attack."""

import math

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import robustlearn as rl
from robustlearn import losses
from robustlearn.attacks import fgsm, linear_exact, pgd

NORMS = [1, 2, math.inf]
EPS = {1: 1.0, 2: 0.5, math.inf: 0.15, 3.0: 0.4}


def linear_model(classes, gain=1.0, d=20, seed=0, task="classification", dtype=torch.float64):
    """A linear network with non-uniform weights, and points in the unit box, some on its walls."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(d, classes)).to(dtype)
    with torch.no_grad():
        weight = torch.randn(classes, d, generator=generator) * torch.rand(d, generator=generator)
        net[1].weight.copy_(gain * weight)
        net[1].bias.copy_(gain * 0.1 * torch.randn(classes, generator=generator))
    x = torch.rand(60, d, generator=generator, dtype=dtype)
    x = torch.where(torch.rand(60, d, generator=generator) < 0.2, x.round(), x)
    model = rl.wrap(net, task=task)
    y = model(x)
    return model, x, (y.argmax(1) if task == "classification" else y + torch.randn(60).to(dtype))


def threats(p, d=20):
    """The plain ball, an active box, and a box with mask and units."""
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(d, generator=generator) < 0.8
    scale = 0.5 + torch.rand(d, generator=generator)
    box = {"lower": 0.0, "upper": 1.0}
    return [
        rl.LpBall(p, EPS[p]),
        rl.LpBall(p, EPS[p], **box),
        rl.LpBall(p, EPS[p], **box, mask=mask, scale=scale),
    ]


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("p", [*NORMS, 3.0])
def test_the_closed_form_is_reached_and_not_passed(p, gain, classes):
    model, x, y = linear_model(classes, gain)
    clean = losses.margin(model(x), y)
    for threat in threats(p):
        certificate = rl.certify(model, x, threat)
        assert certificate.exact
        worst = torch.as_tensor(certificate.margin)
        exact = losses.margin(model(linear_exact(model, x, y, threat)), y)
        torch.testing.assert_close(exact, worst, rtol=1e-9, atol=1e-9 * gain)
        if p not in NORMS:
            continue
        x_adv = pgd(model, x, y, threat, restarts=classes, stop_when_broken=False)
        reached = losses.margin(model(x_adv), y)
        assert (reached >= worst - 1e-9 * gain).all()
        assert ((clean - reached) >= 0.99 * (clean - worst)).all()
        single = losses.margin(model(fgsm(model, x, y, threat)), y)
        assert (single >= worst - 1e-9 * gain).all()


@pytest.mark.parametrize("p", [*NORMS, 3.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_the_radius_is_where_the_attack_begins_to_succeed(p, classes):
    model, x, y = linear_model(classes)
    for threat in threats(p):
        radius = torch.as_tensor(rl.certify(model, x, threat).radius)
        reachable = radius.isfinite()
        assert (radius > 0).all()
        for factor, broken in ((1 - 1e-6, False), (1 + 1e-6, True)):
            budget = torch.where(reachable, radius * factor, 1.0)
            near = rl.LpBall(
                p,
                budget,
                lower=threat.lower,
                upper=threat.upper,
                mask=threat.mask,
                scale=threat.scale,
            )
            margin = losses.margin(model(linear_exact(model, x, y, near)), y)
            assert ((margin < 0) == (broken & reachable)).all()
        far = rl.LpBall(p, 1e6, lower=0.0, upper=1.0, mask=threat.mask)
        if threat.lower is not None and threat.mask is not None:
            margin = losses.margin(model(linear_exact(model, x, y, far)), y)
            assert torch.equal(margin < 0, reachable)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(NORMS), st.integers(0, 10_000), st.booleans())
def test_the_radius_against_cvxpy(p, seed, boxed):
    rng = np.random.default_rng(seed)
    d = int(rng.integers(1, 9))
    weight = rng.standard_normal((3, d)) * (rng.random(d) < 0.9)
    bias, x = 0.3 * rng.standard_normal(3), rng.random(d)
    net = nn.Linear(d, 3).double()
    with torch.no_grad():
        net.weight.copy_(torch.as_tensor(weight))
        net.bias.copy_(torch.as_tensor(bias))
    box = {"lower": 0.0, "upper": 1.0} if boxed else {}
    radius = rl.certify(net, x[None], rl.LpBall(p, 1.0, **box)).radius[0]
    k = int((weight @ x + bias).argmax())
    found = []
    for j in set(range(3)) - {k}:
        delta = cp.Variable(d)
        moved = [x + delta >= 0, x + delta <= 1] if boxed else []
        gap = (weight[k] - weight[j]) @ (x + delta) + bias[k] - bias[j]
        norm = cp.norm(delta, "inf" if math.isinf(p) else p)
        value = cp.Problem(cp.Minimize(norm), [*moved, gap <= 0]).solve(solver="CLARABEL")
        found.append(math.inf if value is None else value)
    assert radius == pytest.approx(min(found), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("p", NORMS)
def test_the_squared_loss_of_regression(p):
    """(|wᵀx + b − y| + ε‖w‖_q)², reached by the closed form, by pgd, and certified."""
    model, x, y = linear_model(1, task="regression")
    weight, bias = model.affine((20,))
    q = {1: math.inf, 2: 2, math.inf: 1}[p]
    r = (x @ weight[0] + bias[0] - y).abs()
    formula = (r + EPS[p] * torch.linalg.vector_norm(weight[0], q)) ** 2
    plain, boxed, _ = threats(p)
    certificate = rl.certify(model, x, plain, y=y)
    torch.testing.assert_close(torch.as_tensor(certificate.loss), formula, rtol=1e-9, atol=0)
    for threat, truth in (
        (plain, formula),
        (boxed, torch.as_tensor(rl.certify(model, x, boxed, y=y).loss)),
    ):
        exact = losses.squared_error(model(linear_exact(model, x, y, threat)), y)
        torch.testing.assert_close(exact, truth, rtol=1e-9, atol=1e-12)
        reached = losses.squared_error(model(pgd(model, x, y, threat, restarts=3)), y)
        assert (reached <= truth * (1 + 1e-9)).all()
        assert (reached >= 0.99 * truth).all()
    certificate = rl.certify(model, x, boxed)
    assert certificate.radius is None
    for sign, edge in ((1.0, certificate.upper), (-1.0, certificate.lower)):
        far = model(linear_exact(model, x, torch.full_like(y, -sign * 1e6), boxed))
        np.testing.assert_allclose(far, edge, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certified_is_never_broken_in_the_models_own_arithmetic(dtype):
    """At the very edge of the radius, where float32 rounds either way."""
    model, x, y = linear_model(3, d=50, dtype=dtype)
    radius = torch.as_tensor(rl.certify(model, x, rl.LpBall(2, 1.0)).radius)
    for offset in (-1e-5, -1e-6, -1e-7, -1e-8, 0.0, 1e-8):
        threat = rl.LpBall(2, radius * (1 + offset))
        certified = torch.as_tensor(rl.certify(model, x, threat).certified)
        broken = losses.margin.broken(model(linear_exact(model, x, y, threat)), y)
        assert not (certified & broken).any()
    threat = rl.LpBall(2, radius * 0.98)
    assert rl.certify(model, x, threat).certified.all()


def test_labels_other_than_the_prediction():
    model, x, y = linear_model(3)
    certificate = rl.certify(model, x, rl.LpBall(2, 0.01), y=(y + 1) % 3)
    assert (certificate.radius == 0).all()
    assert not certificate.certified.any()
    assert (certificate.margin < 0).all()


def test_a_pipeline_is_certified_in_the_units_of_its_input():
    from sklearn.datasets import load_wine
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = load_wine(return_X_y=True, as_frame=True)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(x, y)
    threat = rl.LpBall(2, 0.5, scale=x.std().to_numpy())
    certificate = rl.certify(pipeline, x, threat)
    weight = pipeline[-1].coef_ * (x.std() / pipeline[0].scale_).to_numpy()
    z = pipeline.decision_function(x)
    expected = np.full(len(x), np.inf)
    k = z.argmax(1)
    for j in range(3):
        v = np.linalg.norm(weight[k] - weight[j], axis=1)
        gap = z[np.arange(len(x)), k] - z[:, j]
        expected = np.where(k == j, expected, np.minimum(expected, gap / np.where(v > 0, v, 1)))
    np.testing.assert_allclose(certificate.radius, expected, rtol=1e-9)


def test_no_certificate_is_an_answer_with_a_reason():
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    with pytest.raises(rl.InputError, match="the network uses gelu"):
        rl.certify(net, torch.rand(2, 3), rl.LpBall(2, 0.1))
    with pytest.raises(rl.InputError, match="there is no certificate named 'magic'"):
        rl.certify(net, torch.rand(2, 3), rl.LpBall(2, 0.1), method="magic")
    with pytest.raises(rl.InputError, match="one output: say wrap"):
        rl.certify(nn.Linear(3, 1), torch.rand(2, 3), rl.LpBall(2, 0.1))
    with pytest.raises(rl.InputError, match=r"NaN or infinity in 1 of 2 samples \(first: \[1\]\)"):
        rl.certify(nn.Linear(1, 2), [[1.0], [math.nan]], rl.LpBall(2, 0.1))


def test_two_thousand_images_are_certified_in_seconds():
    import time

    torch.manual_seed(0)
    net, x = nn.Linear(784, 10).double(), torch.rand(2000, 784, dtype=torch.float64)
    start = time.process_time()
    rl.certify(net, x, rl.LpBall(2, 0.1, lower=0.0, upper=1.0))
    assert time.process_time() - start < 6  # CPU seconds of both cores, with room for noise


def test_the_radius_leaves_room_for_the_rounding_of_float32():
    """On the boundary the model itself predicts another class than real numbers do."""
    torch.manual_seed(0)
    net = nn.Linear(200, 2)
    weight, bias = (part.detach().double() for part in net.parameters())
    normal, offset = weight[0] - weight[1], bias[0] - bias[1]
    x = torch.randn(500, 200).double()
    x = (x - ((x @ normal + offset) / normal.norm() ** 2)[:, None] * normal).float()
    y = (x.double() @ weight.T + bias).argmax(1)
    found = rl.certify(net, x, rl.LpBall(math.inf, 1e-3), y=y.numpy())
    broken = (net(x).argmax(1) != y).numpy()
    assert broken.sum() > 50
    assert (found.radius[broken] == 0).all()
