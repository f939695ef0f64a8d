"""The checks behind a verdict: each looks at the probes and says what it found.

A new check is one function under the `check` decorator: `diagnose`, the report and the command
line find it in `CHECKS`. It returns whether the model passes, its numbers, and a reason that
reads on after "suspicious because"; or None where it has nothing to look at.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.attacks import ATTACKS
from robustlearn.evaluate.probes import FEW, QUERIES, STEPS, Probes, Reached
from robustlearn.models import TorchModel
from robustlearn.registry import Registry

Outcome = tuple[bool, dict[str, float], str] | None

CHECKS = Registry("check")

# Set on the development half of the models of benchmarks/diagnostics.py, wide of both sides.
SAME = 1e-4  # outputs that differ by less, in units of their spread, are the same
CLOSE = 0.01  # objectives that differ by less, in units of the median clean one, are equal
SHARE = 0.1  # of the samples: fewer exceptions are chance
BLIND = 0.3  # the same where the attack itself is a random search of a black box
FORETOLD = 0.5  # least share of the changes of the objective that the gradient explains
TAIL = 0.25  # of the way: what the last two thirds of the steps may add

SCORES = "attack by scores and decisions in full (square, hop_skip_jump)"
THROUGH = "replace what hides the gradient by its identity or a smooth stand-in"


def check(*, needs: str, task: str = "any", remedy: str) -> Callable[[Any], Any]:
    """File a function as a check, under its name.

    Parameters
    ----------
    needs : ``"scores"``, ``"gradient"`` (one that flows), ``"differentiable"`` (a model that
        should have one), or ``"evaluation"`` (the masks of broken samples of one).
    task : ``"classification"``, or ``"any"``.
    remedy : what to do where it fails.
    """

    def decorate(function: Callable[[Probes], Outcome]) -> Callable[[Probes], Outcome]:
        name = function.__name__
        return CHECKS.register(name, needs=needs, task=task, remedy=remedy)(function)

    return decorate


def unsuitable(name: str, probes: Probes) -> str | None:
    """Say why a check does not apply; None if it does."""
    facts = CHECKS[name].facts
    if facts["task"] != "any" and facts["task"] != probes.model.task:
        return f"it is for {facts['task']}"
    if facts["needs"] in ("gradient", "differentiable") and not probes.model.differentiable:
        return "the model is a black box: it has no gradient"
    if facts["needs"] == "gradient" and not probes.has_gradient:
        return "no gradient flows through the model"
    if facts["needs"] == "evaluation" and not probes.record:
        return "no evaluation was given"
    return None


# ---------------------------------------------------------------------- outputs


@check(
    needs="scores",
    remedy="average over the randomness (expectation), and measure success over many draws",
)
def repeatable_outputs(probes: Probes) -> Outcome:
    """f(x) twice is the same: max |f(x) − f(x)'| over the spread of the outputs.

    Source: the randomness flag of AutoAttack (Croce and Hein, 2020).
    """
    change = max(_difference(probes, probes.output, probes.model(probes.x)) for _ in range(2))
    reason = f"the same input gives outputs that differ by {change:.2g} of their spread"
    return change <= SAME, {"difference": change}, reason


@check(needs="scores", remedy="freeze the model, or attack through what it does at test time")
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


@check(needs="scores", remedy="evaluate sample by sample (batch_size=1): neighbours matter")
def same_alone_and_in_a_batch(probes: Probes) -> Outcome:
    """f(x_i) alone is f(x)_i in a batch."""
    alone = torch.cat([probes.model(one) for one in probes.x.split(1)])
    change = _difference(probes, alone, probes.output)
    reason = f"outputs depend on the batch, by {change:.2g} of their spread"
    return change <= 10 * SAME, {"difference": change}, reason


@check(needs="scores", remedy="evaluate the model in float64, and look for what cancels in it")
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


@check(needs="scores", task="classification", remedy="look at the outputs: the model is constant")
def outputs_depend_on_the_input(probes: Probes) -> Outcome:
    """Not all samples get the same output."""
    if len(probes.x) < 2:
        return None
    spread = float((probes.output - probes.output[:1]).abs().max())
    return spread > 0, {"spread": spread}, "every sample gets the same output"


# ---------------------------------------------------------------------- the gradient


@check(needs="differentiable", remedy=f"{THROUGH} (BPDA); {SCORES}")
def gradient_available(probes: Probes) -> Outcome:
    """∇f flows, and is not zero: at x and at the end of an ascent from there.

    Source: the indicator of unavailable gradients of Pintor et al. (2022).
    """
    if probes.gradient_fault is not None:
        return False, {"zero": 1.0}, "no gradient flows from the output to the input"
    end = probes.model.gradient(probes.climbed.point, probes.y, probes.loss)[0]
    zero = torch.stack([flat(g).abs().amax(1) == 0 for g in (probes.slope, end)])
    stands = probes.climbed.value <= 0 if probes.classifies else torch.ones_like(zero[0])
    shares = [float((row & stands).float().mean()) for row in zero]
    reason = f"the gradient is zero for {max(shares):.0%} of the samples"
    return max(shares) <= SHARE / 2, {"zero_at_x": shares[0], "zero_at_end": shares[1]}, reason


@check(needs="gradient", remedy=f"{THROUGH}, or average gradients over noise; {SCORES}")
def gradient_foretells_the_loss(probes: Probes) -> Outcome:
    """R² = 1 − Σ (Δ − ⟨∇f, step⟩)² / Σ Δ² over short steps, about x and the end of an ascent.

    Each sample counts by its median over directions: 1 for a smooth objective, 0 or less where
    it jumps, oscillates, or the gradient is not its own. Our form of the indicator of unstable
    predictions of Pintor et al. (2022).
    """
    explained = []
    for point in (probes.x, probes.climbed.point):
        slope = probes.model.gradient(point, probes.y, probes.loss)[0]
        seen, told = probes.foreseen(point, slope)
        error, size = ((seen - told) ** 2).sum(0), (seen**2).sum(0)
        moved = size > (CLOSE * 1e-2 * probes.scale) ** 2
        if bool(moved.any()):
            explained.append(float((1 - error / size)[moved].median()))
    if not explained:
        return None
    reason = f"the gradient explains {max(min(explained), 0):.0%} of how the loss changes nearby"
    return min(explained) >= FORETOLD, {"explained": min(explained)}, reason


# ---------------------------------------------------------------------- what must not help


@check(needs="gradient", remedy=f"more restarts and smaller steps; {SCORES}")
def iterative_beats_single_step(probes: Probes) -> Outcome:
    """PGD does not lose to FGSM. Source: Carlini et al. (2019)."""
    return _beaten(probes, probes.single, "a single step")


@check(needs="gradient", remedy="more steps, other step sizes, more restarts")
def more_steps_do_not_hurt(probes: Probes) -> Outcome:
    """PGD with three times the steps does not lose. Source: Carlini et al. (2019)."""
    return _beaten(probes, probes.climbed_briefly, f"{FEW} steps instead of {STEPS}")


@check(needs="scores", remedy=f"the attack fails, not the threat: {SCORES}, more restarts")
def larger_budget_does_not_hurt(probes: Probes) -> Outcome:
    """The attack does not do worse at 2ε. Source: Carlini et al. (2019)."""
    wider = probes.wider.value
    lost = (wider < probes.best.value - CLOSE * probes.scale) & (wider <= 0)
    if _counts_breaks(probes):
        lost &= probes.best.value > 0
    share = float(lost.float().mean())
    reason = f"twice the budget does worse on {share:.0%} of the samples"
    return share <= _chance(probes), {"share": share}, reason


@check(
    needs="gradient",
    task="classification",
    remedy=f"the gradient does not lead to what exists: {THROUGH}; {SCORES}",
)
def unconstrained_attack_succeeds(probes: Probes) -> Outcome:
    """Where all of the box is allowed, ascent breaks at least as many as chance.

    Source: Carlini et al. (2019), and Pintor et al. (2022): unconstrained attack failure.
    """
    if probes.threat.mask is not None or probes.threat.scale is not None:
        return None
    right = float((probes.unbounded.value <= 0).float().mean())
    chance = 1 / int(probes.model.num_classes or 2)
    reason = f"{right:.0%} of the samples stand although any point is allowed"
    return right <= max(chance, SHARE), {"standing": right, "chance": chance}, reason


@check(needs="scores", remedy=f"the attack of choice fails: {SCORES}, more restarts")
def random_noise_does_worse(probes: Probes) -> Outcome:
    """Random members of the threat do not beat the attack. Source: Carlini et al. (2019)."""
    return _beaten(probes, probes.noisy, "random noise")


@check(needs="gradient", remedy=f"the gradient is masked: {SCORES}, {THROUGH}")
def white_box_beats_black_box(probes: Probes) -> Outcome:
    """Random search by scores does not beat ascent. Source: Carlini et al. (2019)."""
    return _beaten(probes, probes.searched, f"a search without gradients ({QUERIES} queries)")


@check(needs="gradient", remedy=f"the gradient is masked: transfer from more models; {SCORES}")
def white_box_beats_transfer(probes: Probes) -> Outcome:
    """Points found on another model do not beat ascent.

    Source: Carlini et al. (2019); transfer failure in Pintor et al. (2022).
    """
    return _beaten(probes, probes.transferred, "what was found on another model")


# ---------------------------------------------------------------------- the attack itself


@check(needs="gradient", task="classification", remedy="return the best point of the path")
def no_silent_success(probes: Probes) -> Outcome:
    """The returned point is adversarial wherever the path met one that is.

    Source: the indicator of silent success of Pintor et al. (2022).
    """
    met = (_path(probes) > 0).any(0)
    lost = met & ~probes.loss.broken(probes.model(probes.climbed.point), probes.y)
    share = float(lost.float().mean())
    reason = f"the attack met adversarial points for {share:.0%} of the samples and lost them"
    return share <= SHARE / 2, {"lost": share}, reason


@check(
    needs="gradient",
    task="classification",
    remedy="more steps and restarts, until the loss no longer grows",
)
def optimisation_completes(probes: Probes) -> Outcome:
    """(best of STEPS − best of FEW) / (best of STEPS − clean), median over what stands.

    Beside it the break-point of the path, 1 − |cos β|, β the angle at the point of the best-so-far
    curve farthest from its chord, in the unit square: 1 for an elbow, 0 for a straight line.
    Source: the indicators of incomplete optimisation of Pintor et al. (2022).
    """
    stands = _stands(probes)
    if int(stands.sum()) < 2:
        return None
    whole = (probes.climbed.value - probes.clean)[stands]
    rest = (probes.climbed.value - probes.climbed_briefly.value)[stands].clamp_min(0)
    moved = whole > CLOSE * probes.scale
    if not bool(moved.any()):
        return None
    tail = float((rest[moved] / whole[moved]).median())
    bend = float(_bend(_path(probes)[:, stands][:, moved]).median())
    reason = f"the last steps still add {tail:.0%} of what the attack reaches"
    return tail <= TAIL, {"tail": tail, "break_point": bend}, reason


@check(
    needs="gradient",
    task="classification",
    remedy="smaller steps; average gradients over noise",
)
def optimisation_does_not_diverge(probes: Probes) -> Outcome:
    """(best − last) / (best − clean) along the path, median over what stands, is below one half.

    Source: Pintor et al. (2022), on losses that grow worse along the path.
    """
    stands = _stands(probes)
    path = _path(probes)[:, stands]
    if path.shape[1] < 2:
        return None
    best = path.amax(0)
    way = (best - probes.clean[stands]).clamp_min(CLOSE * float(probes.scale))
    lost = float(((best - path[-1]) / way).median())
    reason = f"the attack ends {lost:.0%} of its way below the best point that it passed"
    return lost <= 0.5, {"lost": lost}, reason


# ---------------------------------------------------------------------- the evaluation


@check(needs="evaluation", task="classification", remedy="run stronger attacks: a probe sufficed")
def evaluation_finds_what_probes_find(probes: Probes) -> Outcome:
    """No sample that the evaluation left standing is broken by a probe."""
    standing = ~torch.stack(list(probes.record.values())).any(0)[: len(probes.x)].to(
        probes.x.device
    )
    rivals = [probes.best, probes.noisy, *([probes.searched] if probes.has_gradient else [])]
    found = torch.stack([rival.value > 0 for rival in rivals]).any(0)
    share = float((standing & found).float().mean())
    reason = f"cheap probes break {share:.0%} of the samples that the evaluation left standing"
    return not bool((standing & found).any()), {"missed": share}, reason


@check(needs="evaluation", task="classification", remedy=f"the gradient is masked: {SCORES}")
def scores_add_little_to_gradients(probes: Probes) -> Outcome:
    """Of what attacks by gradient left, those by scores alone broke less than a tenth.

    All samples of the evaluation count that the model gets right.
    """
    after: dict[bool, Tensor] = {}
    for label, mask in probes.record.items():
        name = label.split(":")[0]
        blind = name in ATTACKS and ATTACKS[name].facts["needs"] == "scores"
        after[blind] = after[blind] | mask if blind in after else mask
    if len(after) < 2:
        return None
    left = int((~after[False]).sum())
    more = int((after[True] & ~after[False]).sum())
    share = more / max(left, 1)
    reason = f"attacks without gradients broke {more} of {left} that those with gradients left"
    return share <= SHARE or more < 3, {"share": share, "broken": more}, reason


@check(
    needs="scores", task="classification", remedy="report robust accuracy on 8-bit images besides"
)
def survives_eight_bits(probes: Probes) -> Outcome:
    """Share of broken samples that are so still with features rounded to the nearest k/255.

    Only where the box is [0, 1] and x itself lies on that grid.
    """
    grid = flat(probes.x) * 255
    unit = probes.threat.lower == 0.0 and probes.threat.upper == 1.0
    if not unit or bool(((grid - grid.round()).abs() > 1e-3).any()):
        return None
    broken = probes.best.value > 0
    if int(broken.sum()) < 4:
        return None
    coarse = (probes.best.point * 255).round() / 255
    kept = float((probes.value(coarse) > 0)[broken].float().mean())
    reason = f"only {kept:.0%} of the broken samples stay broken on the grid of 8-bit images"
    return kept >= 0.5, {"kept": kept}, reason


@check(needs="evaluation", task="classification", remedy="use the margin: dlr needs more classes")
def enough_classes_for_dlr(probes: Probes) -> Outcome:
    """dlr was used with 3 classes or more, its targeted form with 4. Source: AutoAttack's flag."""
    used = [label for label in probes.record if "dlr" in label]
    if not used:
        return None
    least = 4 if any("targeted_dlr" in label for label in used) else 3
    classes = int(probes.model.num_classes or 2)
    return classes >= least, {"classes": classes}, f"dlr was used with {classes} classes"


# ---------------------------------------------------------------------- measures


def _difference(probes: Probes, one: Tensor, other: Tensor) -> float:
    """Largest difference of outputs in units of their spread; NaN at the same place is none."""
    spread = (probes.output.max() - probes.output.min()).clamp_min(1e-30)
    change = torch.where(one == other, 0, (one - other).abs())
    return float(change.nan_to_num(0).max() / spread)


def _stands(probes: Probes) -> Tensor:
    """The samples that ascent did not break, (n,) bool."""
    return probes.climbed.value <= 0


def _beaten(probes: Probes, rival: Reached, name: str) -> Outcome:
    """Share of the samples that the attack of choice did not break and the rival did better on."""
    best = probes.best.value
    better = rival.value > best + CLOSE * probes.scale
    if probes.classifies:
        better &= best <= 0
    if _counts_breaks(probes):
        better &= rival.value > 0
    share = float(better.float().mean())
    reason = f"{name} does better than the attack on {share:.0%} of the samples"
    return share <= _chance(probes), {"share": share}, reason


def _counts_breaks(probes: Probes) -> bool:
    """Tell whether only breaks compare: scores of a black box come in steps of any size."""
    return probes.classifies and not probes.has_gradient


def _chance(probes: Probes) -> float:
    """The share of exceptions that says nothing."""
    return SHARE if probes.has_gradient else BLIND


def _path(probes: Probes) -> Tensor:
    """The objective along the ascent, (steps + 1, n)."""
    path = probes.climbed.path
    return probes.clean[None] if path is None else path


def _bend(path: Tensor) -> Tensor:
    """1 − |cos β| at the point of each best-so-far curve that is farthest from its chord, (n,)."""
    curve = path.cummax(0).values
    height = (curve - curve[:1]) / (curve[-1] - curve[0]).clamp_min(1e-30)
    along = torch.linspace(0, 1, len(curve), dtype=curve.dtype, device=curve.device)[:, None]
    place = (height - along).abs().argmax(0)
    rise, run = height.gather(0, place[None])[0], along[:, 0][place]
    first = torch.stack([-run, -rise])
    last = torch.stack([1 - run, 1 - rise])
    cosine = (first * last).sum(0) / (first.norm(dim=0) * last.norm(dim=0)).clamp_min(1e-30)
    return 1 - cosine.abs()
