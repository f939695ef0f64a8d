"""What is told of solutions that are not proven: one warning, at the line of the user's code."""

import sys
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

from sklearn.exceptions import ConvergenceWarning

from robustlearn.linear._solve import Solution

INNER = ("robustlearn", "sklearn", "joblib")


@dataclass(frozen=True)
class Doubt:
    """A solution that is not proven to the tolerance."""

    eps: float
    objective: float
    gap: float
    reason: str

    @property
    def size(self) -> float:
        """The gap as a share of the objective."""
        return self.gap / self.objective if self.objective > 0 else float("inf")


def doubts(found: Iterable[Solution], tol: float, *, classifies: bool) -> list[Doubt]:
    """Return what is not proven to within ``tol``."""
    return [
        Doubt(one.eps, one.objective, one.gap, _reason(one, classifies))
        for one in found
        if not one.proven(tol)
    ]


def _reason(one: Solution, classifies: bool) -> str:
    if one.contradicted:
        return (
            "the bound exceeds the objective, so that rounding has spoilt one of them; scale the "
            "features and the target"
        )
    if classifies and one.vanishing:
        return (
            "the classes are separable at this eps, so that no minimum is attained; use a larger "
            "eps"
        )
    return "raise max_iter or tol, or scale the features"


def tell(name: str, found: list[Doubt], tol: float, of: int) -> None:
    """Warn of what is not proven among ``of`` solutions, once."""
    if not found:
        return
    worst = max(found, key=lambda one: one.size)
    which = (
        ""
        if of == 1
        else f"{len(found)} of {of} solutions are not proven to the tolerance; the furthest from "
        f"it, at eps={worst.eps:.4g}: "
    )
    warnings.warn(
        f"{name}: {which}the objective {worst.objective:.6g} is proven to within {worst.gap:.2g}, "
        f"not to {tol:g} of itself: {worst.reason}",
        ConvergenceWarning,
        stacklevel=_level(),
    )


def tell_range(name: str, found: Iterable[Solution]) -> None:
    """Warn where the model is right, but its loss is too large or too small for a float64."""
    if any(one.unheld for one in found):
        warnings.warn(
            f"{name}: the loss is beyond the range of float64 in the units of y, so that objective "
            "and gap are inf or 0; the model is not concerned",
            RuntimeWarning,
            stacklevel=_level(),
        )


def _level() -> int:
    """Return the stack level, seen from the caller, of the first frame of the user's own code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        frame, level = frame.f_back, level + 1
        if frame.f_globals.get("__name__", "").partition(".")[0] not in INNER:
            break
    return level
