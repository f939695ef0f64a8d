"""The contract of a check, the registry of all, and the thresholds."""

from collections.abc import Callable
from typing import Any

from robustlearn.evaluate.probes import NORMS, Probes
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


def check(
    *, needs: str, task: str = "any", norms: str = "1, 2 and inf", remedy: str
) -> Callable[[Any], Any]:
    """File a function as a check, under its name.

    It takes the `Probes` and returns whether the model passes, its numbers, and a reason that reads
    on after "suspicious because"; or None where it has nothing to look at.

    Parameters
    ----------
    needs : ``"scores"``, ``"gradient"`` (one that flows), ``"differentiable"`` (a model that
        should have one), or ``"evaluation"`` (the masks of broken samples of one).
    task : ``"classification"``, or ``"any"``.
    norms : ``"any"`` where it runs no attack that knows only some.
    remedy : what to do where it fails.
    """

    def decorate(function: Callable[[Probes], Outcome]) -> Callable[[Probes], Outcome]:
        name = function.__name__
        return CHECKS.register(name, needs=needs, task=task, norms=norms, remedy=remedy)(function)

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
    if facts["norms"] != "any" and probes.threat.p not in NORMS:
        return f"it knows the norms {facts['norms']}, not {probes.threat.p:g}"
    if facts["needs"] == "evaluation" and probes.record is None:
        return "no evaluation was given"
    return None
