"""What must not help: weaker attacks win only where the stronger one fails."""

from robustlearn.evaluate.checks.base import BLIND, CLOSE, SCORES, SHARE, THROUGH, Outcome, check
from robustlearn.evaluate.probes import FEW, QUERIES, STEPS, Probes, Reached


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
