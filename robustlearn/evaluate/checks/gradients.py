"""Gradients that are missing or false, and attacks that stop too early."""

import torch
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.evaluate.checks.base import (
    CLOSE,
    FORETOLD,
    SCORES,
    SHARE,
    TAIL,
    THROUGH,
    Outcome,
    check,
)
from robustlearn.evaluate.probes import Probes


@check(needs="differentiable", norms="any", remedy=f"{THROUGH} (BPDA); {SCORES}")
def gradient_available(probes: Probes) -> Outcome:
    """∇f flows, and is not zero: at x and at the end of an ascent (or a step) from there.

    Source: the indicator of unavailable gradients of Pintor et al. (2022).
    """
    if probes.gradient_fault is not None:
        return False, {"zero": 1.0}, "no gradient flows from the output to the input"
    end = probes.model.gradient(probes.best.point, probes.y, probes.loss)[0]
    zero = torch.stack([flat(g).abs().amax(1) == 0 for g in (probes.slope, end)])
    stands = probes.best.value <= 0 if probes.classifies else torch.ones_like(zero[0])
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


def _stands(probes: Probes) -> Tensor:
    """The samples that ascent did not break, (n,) bool."""
    return probes.climbed.value <= 0


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
