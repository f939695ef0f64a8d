"""p-values of scores against those of normal rows that the score had not seen."""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def p_values(calibration: Array, scores: Array) -> Array:
    """p(x) = (1 + #{calibration scores ≤ s(x)}) / (n + 1), higher scores being more normal.

    Parameters
    ----------
    calibration : (n,) scores of normal rows, in ascending order.
    scores : (m,).

    Returns
    -------
    (m,) in (0, 1]. If a new row and the calibration rows are exchangeable and the score was
    learnt from others, P(p ≤ α) ≤ α for every α.

    Notes
    -----
    Source: Vovk, Gammerman and Shafer (2005); for anomalies Bates et al. (2023).

    Examples
    --------
    >>> p_values(np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.0]))
    array([0.25, 0.75])
    """
    lower = np.searchsorted(calibration, scores, side="right")
    return np.asarray((1 + lower) / (len(calibration) + 1), float)


def threshold(calibration: Array, false_alarm: float) -> float:
    """Return the score below which p(x) ≤ α: the k-th smallest, k = ⌊α(n + 1)⌋, at least one.

    With fewer than 1/α − 1 rows no p-value is as small as α; the threshold is then the smallest
    calibration score, and the rate of false alarms 1/(n + 1).

    Examples
    --------
    >>> threshold(np.arange(99.0), 0.05)
    4.0
    """
    k = math.floor(false_alarm * (len(calibration) + 1) + 1e-9)
    return float(calibration[min(max(k, 1), len(calibration)) - 1])
