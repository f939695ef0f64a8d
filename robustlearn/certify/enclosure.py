"""Models that bound their own output over a threat, such as detectors by distance."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from robustlearn.certify.base import CERTIFICATES, Certificate, bisected, classified
from robustlearn.models import Model, TorchModel
from robustlearn.threats import LpBall

SLACK = 1e-7  # of the decision, for rounding in float64
DOUBLINGS, HALVINGS = 40, 20


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    encloses = isinstance(model, TorchModel) and hasattr(model.module, "enclosed")
    return encloses and threat.p >= 1 and x.dim() == 2


@CERTIFICATES.register("enclosure", applies=_applies)
def enclosure(
    model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
) -> Certificate:
    """Bounds that a module gives of its own decision: l ≤ z(x + δ) ≤ u for every δ of the threat.

    A module with one logit z, of class 1 against class 0, may have a method
    ``enclosed(x, threat) -> (l, u)``, (n,) each. The margin of class 1 is at least l and that of
    class 0 at least −u. The radius is the largest ε, by bisection, at which that bound is positive:
    a lower bound on the distance to the decision boundary, not the distance.

    Parameters
    ----------
    x : (n, d); y : (n,) labels 0 or 1, or None for the predicted class.
    """
    x = x.detach()
    with torch.no_grad():
        accepted = model(x).argmax(1) == 1
        label = accepted if y is None else y.to(x.device) == 1
        margin = _margin(model, x, threat, label)
        radius = _radius(model, x, threat, label)
    return classified("enclosure", accepted == label, radius, margin > 0, margin)


def _margin(model: Model, x: Tensor, threat: LpBall, label: Tensor) -> Tensor:
    """Return a lower bound on the margin of the label over the threat, less some for rounding."""
    low, high = model.module.enclosed(x, threat)  # type: ignore[attr-defined]
    bound = torch.where(label, low, -high)
    return bound - SLACK * (1 + bound.abs().nan_to_num(posinf=0.0))


def _radius(model: Model, x: Tensor, threat: LpBall, label: Tensor) -> Tensor:
    """Return the largest ε at which the margin is proven, up to 2⁻²⁰ of it.

    Infinite if all of the box is proven; without walls the largest ε that was looked at.
    """

    def proven(eps: Tensor) -> Tensor:
        return _margin(model, x, replace(threat, eps=eps), label) > 0

    low = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    high = torch.full_like(low, 1e-6)
    for _ in range(DOUBLINGS):
        good = proven(high)
        low, high = torch.where(good, high, low), torch.where(good, 2 * high, high)
        if not good.any():
            break
    low = bisected(proven, low, high, HALVINGS)
    corner = _corner(threat, x)
    walled = corner.isfinite()
    everywhere = walled & proven(torch.where(walled, 2 * corner, 0))
    return torch.where(everywhere, torch.inf, low)


def _corner(threat: LpBall, x: Tensor) -> Tensor:
    """Return the distance of the farthest corner of the box (n,), infinite without walls."""
    ends = (-math.inf if threat.lower is None else threat.lower, threat.upper)
    low, high = (torch.as_tensor(math.inf if end is None else end).to(x.device) for end in ends)
    way = torch.maximum(x.double() - low, high - x.double())
    frozen = torch.as_tensor(False) if threat.mask is None else ~threat.mask
    return threat.norm(way.masked_fill(frozen.to(x.device), 0.0))
