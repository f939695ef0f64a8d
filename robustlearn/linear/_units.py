"""The units of y: targets are centred and scaled before they are solved for, and given back after.

A far mean costs digits, and squares of very large or small numbers leave the range of floating
point numbers. The factor is a power of two, so that scaling rounds nothing; a mean is taken off
only where it exceeds the spread, as for the columns of X.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._design import FAR
from robustlearn.linear._losses import Huber
from robustlearn.linear._problem import Problem

Array = NDArray[np.float64]
SHARP = 1e-12  # least knee that is solved for, in mean |y|: smaller ones are a multiple of it


@dataclass(frozen=True)
class Units:
    """y = shift + factor·y', and losses of ``power`` of the factor."""

    shift: float = 0.0
    factor: float = 1.0
    power: int = 0

    def value(self, inner: float) -> float:
        """Return a loss in the user's units; ∞ or 0 where these cannot hold it."""
        for _ in range(self.power):
            inner *= self.factor
        return inner

    def model(self, coef: Array, intercept: float) -> tuple[Array, float]:
        """Return w and b in the user's units."""
        with np.errstate(over="ignore"):
            return coef * self.factor, intercept * self.factor + self.shift


def normalised(problem: Problem) -> tuple[Units, Problem]:
    """Return the same problem with mean |y'| about 1 and no far mean, and how to get back."""
    y, weight, loss = problem.y, problem.weight, problem.loss
    peak = float(np.abs(y).max())
    if loss.classifies or peak == 0:
        return Units(), problem
    first = _exponent(peak)
    y = np.ldexp(y, -first)
    total, shift = float(weight.sum()), 0.0
    if problem.design.intercept:
        mean = float(weight @ y) / total
        centred = y - (y[0] if y.min() == y.max() else mean)
        if abs(mean) > FAR * np.sqrt(float(weight @ centred**2) / total):
            y, shift = centred, float(np.ldexp(y[0] - centred[0], first))
    size = float(weight @ np.abs(y)) / total
    second = _exponent(size) if size > 0 else 0
    factor = float(np.ldexp(1.0, first + second))
    y = np.ldexp(y, -second)
    inner = replace(problem, y=y, loss=loss.scaled(factor), known={})
    return Units(shift, factor, loss.power), inner


def tamed(problem: Problem) -> tuple[Problem, float]:
    """Return the problem with a knee of the Huber loss that can be solved for, and a ratio.

    A knee above any height that the best model can have may be lowered; below the digits of the
    heights H_k is k·|e|, whatever k. The loss given is nowhere below the ratio times the loss
    returned, so that a bound goes over, and next to equal at the minimum.
    """
    loss, weight = problem.loss, problem.weight
    if not isinstance(loss, Huber):
        return problem, 1.0
    # Σ ω·e²/2 is not above that of w = 0, Σ ω·y²/2
    highest = 2.0 * float(np.sqrt(weight @ problem.y**2 / weight.min()))
    if loss.knee < SHARP:
        return replace(problem, loss=Huber(SHARP), known={}), loss.knee / SHARP
    if loss.knee > highest > SHARP:
        return replace(problem, loss=Huber(highest), known={}), 1.0
    return problem, 1.0


def robust_scale(y: Array, weight: Array, *, intercept: bool) -> float:
    """1.4826·median |y − median(y)|, the standard deviation of normal y; from 0 if not intercept.

    Where that is 0, the mean instead of the median; where that is 0 too, 1.
    """
    peak = float(np.abs(y).max())
    if peak == 0:
        return 1.0
    y = y / peak
    away = np.abs(y - _median(y, weight) if intercept else y)
    size = 1.4826 * _median(away, weight) or float(weight @ away / weight.sum())
    return size * peak if size > 0 else 1.0


def _median(values: Array, weight: Array) -> float:
    """Return the weighted median; the middle of two where half of the weight is on either side."""
    order = np.argsort(values)
    values, share = values[order], np.cumsum(weight[order]) / weight.sum()
    low = min(int(np.searchsorted(share, 0.5 - 1e-12)), len(values) - 1)
    high = min(int(np.searchsorted(share, 0.5 + 1e-12)), len(values) - 1)
    return float(0.5 * (values[low] + values[high]))


def _exponent(size: float) -> int:
    """Return e with 2^e ≤ size < 2^(e + 1)."""
    return int(np.frexp(size)[1]) - 1
