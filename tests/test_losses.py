"""Losses against their definitions, finite differences, and the meaning of success."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustlearn import losses
from robustlearn.errors import InputError

CLASSIFICATION = [n for n in losses.LOSSES if not n.endswith("_error")]


def draw(seed, classes, n=50, ties=False):
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, classes, dtype=torch.float64, generator=generator)
    y = torch.randint(0, max(2, classes), (n,), generator=generator)
    return (z.round() if ties else z), y


def test_a_loss_tells_whether_it_is_targeted():
    told = {name for name in losses.LOSSES if losses.LOSSES[name].targeted}
    assert told == {"targeted_margin", "targeted_cross_entropy", "targeted_dlr"}
    assert not losses.get(lambda z, y: z[:, 0]).targeted


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 10]), st.booleans())
def test_margin_is_negative_exactly_on_success(seed, classes, ties):
    z, y = draw(seed, classes, ties=ties)
    predicted = (z[:, 0] > 0).long() if classes == 1 else torch.as_tensor(z.numpy().argmax(1))
    assert torch.equal(losses.margin(z, y) < 0, predicted != y)
    assert torch.equal(losses.targeted_margin(z, y) < 0, predicted == y)
    assert torch.equal(losses.margin.broken(z, y), predicted != y)
    assert torch.equal(losses.targeted_dlr.broken(z, y), predicted == y)
    assert (losses.log_odds(z, y) >= -losses.margin(z, y) - 1e-12).all()
    clear = losses.margin(z, y).abs() > 1e-12
    assert torch.equal((losses.dlr(z, y) > 0)[clear], (predicted != y)[clear])
    assert torch.equal((losses.scaled_margin(z, y) < 0)[clear], (predicted != y)[clear])


def test_a_constant_output_breaks_every_class_but_the_first():
    z, y = torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
    assert (losses.margin(z, y) < 0).tolist() == [False, True, True, False]


def test_nan_predicts_nothing():
    z = torch.tensor([[torch.nan, 0.0], [2.0, torch.nan]])
    y = torch.tensor([0, 0])
    assert losses.margin.broken(z, y).all()
    assert (losses.margin(z, y) == -torch.inf).all()
    assert not losses.targeted_margin.broken(z, y).any()


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_gradients_match_finite_differences(name, classes):
    z, y = draw(1, classes, n=6)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: losses.LOSSES[name](v, y), z)
    value = losses.LOSSES[name](z, y)
    assert value.shape == (6,)
    objective = losses.LOSSES[name].objective(z, y)
    (slope,) = torch.autograd.grad(objective.sum(), z)
    looked = losses.LOSSES[name].look(z.detach(), y)
    torch.testing.assert_close(looked, (objective.detach(), slope))
    odds = losses.log_odds.look(z.detach(), y)[1]
    torch.testing.assert_close(losses.soft_margin.look(z.detach(), y)[1], odds)
    sign = 1 if losses.LOSSES[name].ascend else -1
    assert torch.equal(losses.LOSSES[name].objective(z, y), sign * value)


def test_values_from_the_definitions():
    z = torch.tensor([[1.0, 4.0, 2.0, -1.0]])
    y = torch.tensor([2])
    np.testing.assert_allclose(losses.margin(z, y), [-2])
    np.testing.assert_allclose(losses.dlr(z, y), [2 / 3])
    np.testing.assert_allclose(losses.scaled_margin(z, y), [-2 / 6])
    np.testing.assert_allclose(losses.targeted_dlr(z, y), [-2 / (4 - (1 - 1) / 2)])
    np.testing.assert_allclose(losses.cross_entropy(z, y), -z.log_softmax(1)[:, 2])
    odds = losses.log_odds(z, y)
    torch.testing.assert_close(odds.exp().log1p(), losses.cross_entropy(z, y))


def test_one_logit_is_binary_cross_entropy():
    z, y = draw(0, 1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits(
        z[:, 0], y.double(), reduction="none"
    )
    torch.testing.assert_close(losses.cross_entropy(z, y), bce)
    torch.testing.assert_close(losses.cross_entropy(z[:, 0], y), bce)


def test_dlr_ignores_gain_and_the_margin_survives_saturation():
    z, y = draw(0, 5)
    torch.testing.assert_close(losses.dlr(z, y), losses.dlr(100 * z, y))
    saturated = (1e4 * z).float().requires_grad_()
    (gradient,) = torch.autograd.grad(losses.margin(saturated, y).sum(), saturated)
    assert (gradient.abs().sum(1) == 2).all()


def test_regression_errors():
    output, y = torch.tensor([[1.0], [-2.0]]), torch.tensor([0.5, 1.0])
    assert losses.squared_error(output, y).tolist() == [0.25, 9.0]
    assert losses.absolute_error(output[:, 0], y).tolist() == [0.5, 3.0]
    assert not losses.squared_error.broken(output, y).any()


def test_losses_by_name():
    assert losses.get("dlr") is losses.dlr
    assert losses.get(None) is losses.margin
    assert losses.get(None, "regression") is losses.squared_error
    plain = losses.get(lambda output, y: output.sum(1))
    assert plain.objective(torch.ones(1, 2), torch.tensor([0])).tolist() == [2.0]
    with pytest.raises(InputError, match="no loss named 'hinge'"):
        losses.get("hinge")
    with pytest.raises(InputError, match="margin is a loss for classification, not for regression"):
        losses.get("margin", "regression")
