"""Outputs that are random, learn, depend on neighbours or on the arithmetic."""

import torch
from torch import Tensor

from robustlearn.evaluate.checks.base import (
    SAME,
    SHARE,
    Outcome,
    check,
)
from robustlearn.evaluate.probes import Probes
from robustlearn.models import TorchModel


@check(
    needs="scores",
    norms="any",
    remedy="average over the randomness (expectation), and measure success over many draws",
)
def repeatable_outputs(probes: Probes) -> Outcome:
    """f(x) twice is the same: max |f(x) − f(x)'| over the spread of the outputs.

    Source: the randomness flag of AutoAttack (Croce and Hein, 2020).
    """
    change = max(_difference(probes, probes.output, probes.model(probes.x)) for _ in range(2))
    reason = f"the same input gives outputs that differ by {change:.2g} of their spread"
    return change <= SAME, {"difference": change}, reason


@check(
    needs="scores",
    norms="any",
    remedy="freeze the model, or attack through what it does at test time",
)
def nothing_learned_at_test_time(probes: Probes) -> Outcome:
    """A forward pass changes no weight or buffer, and takes no derivative itself.

    Source: the flag of AutoAttack for optimisation at test time.
    """
    if not isinstance(probes.model, TorchModel):
        return None
    state = probes.model.module.state_dict()
    before = {name: value.clone() for name, value in state.items()}
    kept: list[int] = []
    with torch.no_grad(), probes.optimising(kept):
        probes.model(probes.x)
    after = probes.model.module.state_dict()
    changed = sum(not torch.equal(value, after[name]) for name, value in before.items())
    reason = f"a forward pass changed {changed} tensors and kept {len(kept)} values to derive by"
    return not changed and not kept, {"changed": changed, "kept": len(kept)}, reason


@check(
    needs="scores",
    norms="any",
    remedy="evaluate sample by sample (batch_size=1): neighbours matter",
)
def same_alone_and_in_a_batch(probes: Probes) -> Outcome:
    """f(x_i) alone is f(x)_i in a batch."""
    alone = torch.cat([probes.model(one) for one in probes.x.split(1)])
    change = _difference(probes, alone, probes.output)
    reason = f"outputs depend on the batch, by {change:.2g} of their spread"
    return change <= 10 * SAME, {"difference": change}, reason


@check(
    needs="scores",
    norms="any",
    remedy="evaluate the model in float64, and look for what cancels in it",
)
def same_in_double_precision(probes: Probes) -> Outcome:
    """f in float32 is f in float64, up to a thousandth of the spread of the outputs."""
    double = probes.in_double()
    if double is None:
        return None
    change = _difference(probes, double.to(probes.output.dtype), probes.output)
    reason = f"float64 changes the outputs by {change:.2g} of their spread"
    return change <= 10 * SAME, {"difference": change}, reason


@check(
    needs="differentiable",
    task="classification",
    norms="any",
    remedy="give logits: return what enters the softmax",
)
def logits_rather_than_probabilities(probes: Probes) -> Outcome:
    """Outputs are logits, or probabilities of which few are rounded to 1.

    Source: the flag of AutoAttack for probabilities.
    """
    if not probes.model._probabilities:
        return True, {"saturated": 0.0}, "the outputs are logits"
    top = probes.output.exp().amax(1)
    saturated = float((top >= 1 - 1e-6).float().mean())
    reason = f"the model gives probabilities, of which {saturated:.0%} are rounded to 1"
    return saturated <= SHARE, {"saturated": saturated}, reason


@check(
    needs="scores",
    task="classification",
    norms="any",
    remedy="look at the outputs: the model is constant",
)
def outputs_depend_on_the_input(probes: Probes) -> Outcome:
    """Not all samples get the same output."""
    if len(probes.x) < 2:
        return None
    spread = float((probes.output - probes.output[:1]).abs().max())
    return spread > 0, {"spread": spread}, "every sample gets the same output"


def _difference(probes: Probes, one: Tensor, other: Tensor) -> float:
    """Largest difference of outputs in units of their spread; NaN at the same place is none."""
    spread = (probes.output.max() - probes.output.min()).clamp_min(1e-30)
    change = torch.where(one == other, 0, (one - other).abs())
    return float(change.nan_to_num(0).max() / spread)
