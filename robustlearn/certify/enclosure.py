"""Models that bound their own output over a threat, such as detectors by distance."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from robustlearn.certify.base import CERTIFICATES, Certificate, rows
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
    right = accepted == label
    return Certificate(
        method="enclosure",
        exact=False,
        radius=rows(torch.where(right, radius, 0)),
        certified=rows(right & (margin > 0)),
        margin=rows(margin),
    )


def _margin(model: Model, x: Tensor, threat: LpBall, label: Tensor) -> Tensor:
    """Return a lower bound on the margin of the label over the threat, less some for rounding."""
    low, high = model.module.enclosed(x, threat)  # type: ignore[attr-defined]
    bound = torch.where(label, low, -high)
    return bound - SLACK * (1 + bound.abs().nan_to_num(posinf=0.0))


def _radius(model: Model, x: Tensor, threat: LpBall, label: Tensor) -> Tensor:
    """Return the largest ε at which the margin is proven, up to 2⁻²⁰ of it; infinite if all are."""

    def proven(eps: Tensor) -> Tensor:
        return _margin(model, x, replace(threat, eps=eps), label) > 0

    high = torch.full((len(x),), 1e-6, dtype=torch.float64, device=x.device)
    for _ in range(DOUBLINGS):
        high = torch.where(proven(high), 2 * high, high)
    unbounded, low = proven(high), torch.zeros_like(high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        good = proven(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(unbounded, torch.inf, low)
