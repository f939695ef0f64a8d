"""What an evaluation found already, and what is left of it on 8-bit images."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from robustlearn._tensor import flat
from robustlearn.attacks import ATTACKS
from robustlearn.evaluate.checks.base import (
    SCORES,
    SHARE,
    Outcome,
    check,
)
from robustlearn.evaluate.probes import NORMS, Probes


@check(
    needs="evaluation",
    task="classification",
    norms="any",
    remedy="run stronger attacks: a probe sufficed",
)
def evaluation_finds_what_probes_find(probes: Probes) -> Outcome:
    """No sample that the evaluation left standing is broken by a probe."""
    if probes.threat.p not in NORMS and not probes.has_gradient:
        return None
    rivals = [probes.best]
    if probes.threat.p in NORMS:
        rivals += [probes.noisy, *([probes.searched] if probes.has_gradient else [])]
    found = torch.stack([rival.value > 0 for rival in rivals]).any(0)
    for mask in _record(probes).values():
        found &= ~mask[: len(found)].to(found.device)
    share = float(found.float().mean())
    reason = f"cheap probes break {share:.0%} of the samples that the evaluation left standing"
    return not bool(found.any()), {"missed": share}, reason


@check(
    needs="evaluation",
    task="classification",
    norms="any",
    remedy=f"the gradient is masked: {SCORES}",
)
def scores_add_little_to_gradients(probes: Probes) -> Outcome:
    """Of what attacks by gradient left, those by scores or labels broke less than a tenth.

    All samples of the evaluation count that the model gets right.
    """
    after: dict[bool, Tensor] = {}
    for label, mask in _record(probes).items():
        name = re.split("[:@]", label)[0]
        blind = name in ATTACKS and ATTACKS[name].facts["needs"] in ("scores", "labels")
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
    walls = (probes.threat.lower, probes.threat.upper)
    unit = all(isinstance(wall, float) for wall in walls) and walls == (0.0, 1.0)
    if not unit or bool(((grid - grid.round()).abs() > 1e-3).any()):
        return None
    broken = probes.best.value > 0
    if int(broken.sum()) < 4:
        return None
    coarse = (probes.best.point * 255).round() / 255
    kept = float((probes.value(coarse) > 0)[broken].float().mean())
    reason = f"only {kept:.0%} of the broken samples stay broken on the grid of 8-bit images"
    return kept >= 0.5, {"kept": kept}, reason


@check(
    needs="evaluation",
    task="classification",
    norms="any",
    remedy="use the margin: dlr needs more classes",
)
def enough_classes_for_dlr(probes: Probes) -> Outcome:
    """dlr was used with 3 classes or more, its targeted form with 4. Source: AutoAttack's flag."""
    used = [need for need in map(_classes_for_dlr, _record(probes)) if need]
    if not used:
        return None
    classes = int(probes.model.num_classes or 2)
    return classes >= max(used), {"classes": classes}, f"dlr was used with {classes} classes"


def _classes_for_dlr(label: str) -> int:
    """Return how many classes the dlr of an attack needs, by its label; 0 if it has none."""
    options = dict(part.split("=") for part in re.split("[:@]", label) if part.count("=") == 1)
    if options.get("loss") not in ("dlr", "targeted_dlr"):
        return 0
    aimed = options["loss"] == "targeted_dlr" or options.get("targets", "0") != "0"
    return 4 if aimed else 3


def _record(probes: Probes) -> Mapping[str, Tensor]:
    """Return what each attack of the evaluation broke."""
    return probes.record or {}
