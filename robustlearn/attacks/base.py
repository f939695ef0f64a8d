"""The contract of an attack, and the registry of all."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.models import Model, check_range, wrap
from robustlearn.registry import COUNT, NATURAL, POSITIVE, SHARE, Range, Registry, check_options
from robustlearn.threats import LpBall

Attack = Callable[..., Tensor]
Needs = Literal["gradient", "scores", "labels", "affine", "trees"]

ATTACKS = Registry("attack")


OPTIONS = {
    **dict.fromkeys(("steps", "restarts", "searches", "rivals"), COUNT),
    **dict.fromkeys(("queries", "directions", "probes"), COUNT),
    **dict.fromkeys(("targets", "polish"), NATURAL),
    "step_size": POSITIVE,
    "share": SHARE,
    "gamma": Range(0, 1, "()"),
}


def attack(
    *, needs: Needs, norms: str = "any", minimal: bool = False, **ranges: Range
) -> Callable[[Attack], Attack]:
    """File a function as an attack, and surround it with what every attack owes its caller.

    Around the function the input is checked against the threat, the model is held ready and put
    back afterwards, and autograd is off but for `Model.gradient`. The function itself takes
    tensors on one device, keeps to mathematics, and returns points of the threat.

    Parameters
    ----------
    needs : ``"gradient"``, ``"scores"`` (outputs only, so it takes black boxes too),
        ``"labels"`` (predicted classes only), ``"affine"`` (a model that is affine and says so)
        or ``"trees"`` (a model of which the leaves are known).
    norms : ``"any"``, or the p of the threats it takes, as in ``"1, 2, inf"``.
    minimal : whether it looks for the nearest misclassified point, so that its distances are to
        be believed; a regressor has none.
    ranges : of numeric options; those in ``OPTIONS`` mean the same in every attack and need none.
    """

    def decorate(function: Attack) -> Attack:
        name = function.__name__

        @functools.wraps(function)
        def run(model: Any, x: Tensor, y: Tensor, threat: LpBall, **options: Any) -> Tensor:
            check_options(name, options, {**OPTIONS, **ranges})
            model = wrap(model)
            if not (isinstance(x, Tensor) and x.is_floating_point() and isinstance(y, Tensor)):
                raise InputError(f"{name} takes x as a tensor of floats and y as a tensor")
            if len(x) != len(y):
                raise InputError(f"x has {len(x)} samples, y has {len(y)}")
            if len(x) == 0:
                return x.clone()
            _tensor.check_points(x)
            threat.check(x)
            reason = unsuitable(name, model, threat, tuple(x.shape[1:]))
            if reason is not None:
                raise InputError(reason)
            with model.session(), torch.no_grad():
                model.settle(x, y)
                labels = y
                if model.task == "classification":
                    labels = y.long()
                    check_range(model, labels)
                return function(model, x.detach(), labels, threat, **options)

        ATTACKS.register(name, needs=needs, norms=norms, minimal=minimal)(run)
        return run

    return decorate


def unsuitable(name: str, model: Model, threat: LpBall, shape: tuple[int, ...]) -> str | None:
    """Say why an attack cannot run on this model and threat; None if it can."""
    facts = ATTACKS[name].facts
    if facts["needs"] == "gradient" and not model.differentiable:
        return f"{name} needs gradients, and {model.name} is a black box"
    if facts["needs"] == "affine" and model.affine(shape) is None:
        return f"{name} needs a linear model, and {model.name} is not known to be one"
    if facts["needs"] == "trees" and (model.trees is None or type(threat) is not LpBall):
        return f"{name} needs trees whose leaves are known, and a plain ball"
    if facts["minimal"] and model.task == "regression":
        return f"{name} looks for the nearest misclassified point, and {model.name} is a regressor"
    if facts["needs"] == "labels" and model.task == "regression":
        return f"{name} needs predicted classes, and {model.name} predicts numbers"
    known = facts["norms"]
    if known != "any" and threat.p not in {float(p) for p in known.split(",")}:
        norm = "inf" if math.isinf(threat.p) else f"{threat.p:g}"
        return f"{name} knows the norms {known}, not {norm}"
    return None
