"""A proof of optimality: what no linear model can go below, from any guess of multipliers.

Let a ≥ |s| be one pair of numbers a row (s = −y·a in classification) with

    Σ s·x = 0 for the columns that cost nothing,   ‖Xᵀs / D‖_p ≤ ε·Σ a for those that do.

Then every (w, b) has Σ ω·loss ≥ −Σ s·y − Σ ω·ψ*(a/ω) in regression, ≥ −Σ ω·ψ*(a/ω) in
classification, because ψ(e) ≥ a·e − ψ*(a), and a·e is linear in (w, c) up to |z|. Multipliers of
an approximate solution nearly satisfy the conditions; here they are made to, so that the bound
holds whatever method found them and however far it got. O(nd), and in classification one least
squares problem.
"""

import numpy as np
from numpy.typing import NDArray

from robustlearn.linear._design import Design
from robustlearn.linear._losses import Loss

Array = NDArray[np.float64]
SLACK = 1e-14  # relative room for the rounding of the sums


def lower_bound(
    design: Design,
    y: Array,
    weight: Array,
    scale: Array,
    eps: float,
    q: float,
    loss: Loss,
    v: Array,
    multipliers: Array,
    lifts: Array | None = None,
) -> float:
    """Return a lower bound of Σ ω·loss over all models.

    Parameters
    ----------
    scale : (m,) D of each column, 0 where it costs nothing.
    v : (m,) about a minimum.
    multipliers : (n,) about ω·∂loss/∂z there.
    lifts : (n,) about ω·∂loss/∂c there, the a; by default those of v.
    """
    costly = (scale > 0) & (eps > 0)
    p = {1.0: np.inf, 2.0: 2.0, np.inf: 1.0}[q]

    def reach(s: Array) -> float:
        """‖Xᵀs / D‖_p / ε."""
        return float(np.linalg.norm(design.tdot(s)[costly] / scale[costly], p)) / eps

    if loss.classifies:
        a = _feasible(design, y, weight, costly, scale, eps, p, loss.limit, -y * multipliers)
        return 0.0 if a is None else max(0.0, -float(weight @ loss.conjugate(a / weight)))
    s = _balanced(design, weight, np.flatnonzero(~costly), multipliers)
    pulled = reach(s) * (1 + SLACK) if costly.any() else 0.0
    height = loss.height(design.dot(v), eps * float(np.linalg.norm(scale * v, q)), y)
    guesses = [weight * loss.slope(height)] + ([] if lifts is None else [lifts])
    return max(_worth(loss, y, weight, s, a, pulled) for a in guesses)


def _worth(loss: Loss, y: Array, weight: Array, s: Array, a: Array, pulled: float) -> float:
    """Return the bound of s and an a that is first made to fit: |s| ≤ a and Σa ≥ pulled."""
    a = np.maximum(a, np.abs(s))
    missing = pulled - float(a.sum())
    if missing > 0 and np.isinf(loss.limit):
        a = a + weight * (missing / weight.sum())
    elif missing > 0:
        s = s * (a.sum() / pulled)
    # the conditions are homogeneous: take the best multiple
    drop, price = -float(s @ y), float(weight @ loss.conjugate(a / weight))
    if drop <= 0:
        return 0.0
    most = loss.limit / float((a / weight).max())
    best = min(most, drop / (2 * price)) if price > 0 else most
    return max(0.0, best * drop - best**2 * price)


def _balanced(design: Design, weight: Array, free: NDArray[np.intp], s: Array) -> Array:
    """Take from s what is not orthogonal to the columns without cost."""
    if len(free) == 0:
        return s
    if len(free) == 1 and design.intercept:
        for _ in range(2):
            s = s - weight * (s.sum() / weight.sum())
        return s
    columns = design.take()[:, free]
    heavy = np.sqrt(weight)[:, None] * columns
    for _ in range(2):
        fit = np.linalg.lstsq(heavy, s / np.sqrt(weight), rcond=None)[0]
        s = s - weight * (columns @ fit)
    return s


def _feasible(
    design: Design,
    y: Array,
    weight: Array,
    costly: NDArray[np.bool_],
    scale: Array,
    eps: float,
    p: float,
    limit: float,
    a: Array,
) -> Array | None:
    """Return 0 ≤ a ≤ limit·ω near the given one that meets the conditions, or None.

    What is too much of Xᵀ(y·a) is taken off by least squares, in the rows' own room.
    """
    top = limit * weight
    a = np.clip(a, 0.0, top)
    for _ in range(6):
        pull, allowed = design.tdot(y * a), eps * float(a.sum()) * (1 - SLACK)
        size = float(np.linalg.norm(pull[costly] / scale[costly], p)) if costly.any() else 0.0
        wanted = pull * min(1.0, allowed / size if size > 0 else 1.0)
        wanted[~costly] = 0.0
        free = np.abs(pull[~costly]).max(initial=0.0)
        if size <= allowed and free <= 1e-12 * float(a.sum()) * (1 + np.abs(pull).max()):
            return a
        room = np.minimum(a, top - a)
        wanted[costly] *= 1 - 1e-13
        if design.rows >= design.columns:
            matrix, _ = design.gram(room, np.zeros_like(a))
            step = np.linalg.lstsq(matrix, wanted - pull, rcond=None)[0]
            change = room * design.dot(np.asarray(step, dtype=np.float64))
        else:
            root = np.sqrt(room)
            heavy = (design.take() * root[:, None]).T
            change = root * np.linalg.lstsq(heavy, wanted - pull, rcond=None)[0]
        a = np.clip(a + y * change, 0.0, top)
    return None
