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
from robustlearn.linear._norms import dual_norm

Array = NDArray[np.float64]
SLACK = 1e-14  # relative room for the rounding of the sums
NOISE = 1e-10  # share of the multipliers below which their balanced part is rounding
NEARLY = 1e-6  # relative distance from binding that counts as binding
BEYOND = 1e-13  # how far a condition is taken beyond its edge
TRIES = 8


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
    p = dual_norm(q)

    def reach(s: Array) -> float:
        """‖Xᵀs / D‖_p / ε."""
        return float(np.linalg.norm(design.tdot(s)[costly] / scale[costly], p)) / eps

    if loss.classifies:
        for nearly in (NEARLY, 0.0):
            guess = -y * multipliers
            a = _feasible(design, y, weight, costly, scale, eps, p, loss.limit, guess, nearly)
            if a is not None:
                return max(0.0, -float(weight @ loss.conjugate(a / weight)))
        return 0.0
    s = _balanced(design, weight, np.flatnonzero(~costly), multipliers)
    if np.abs(s).sum() <= NOISE * np.abs(multipliers).sum():
        return 0.0  # rounding is all that is left of them
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
    nearly: float,
) -> Array | None:
    """Return 0 ≤ a ≤ limit·ω near the given one that meets the conditions, or None.

    The conditions that bind, or are so near to it, are met as equations by least squares, in the
    room that the rows have.
    """
    top = limit * weight
    a = np.clip(a, 0.0, top)
    unpaid_columns = np.flatnonzero(~costly)
    free = design.pick(unpaid_columns) * y[:, None]
    sizes = np.abs(free).sum(0)
    for _ in range(TRIES):
        whole = design.tdot(y * a)  # Xᵀ(y·a)
        pull, unpaid = whole[costly] / scale[costly], whole[~costly]
        allowed = eps * float(a.sum()) * (1 - SLACK)
        over = float(np.linalg.norm(pull, p)) - allowed if costly.any() else 0.0
        if (
            over <= 0
            and np.isfinite(over)
            and (np.abs(unpaid) <= SLACK * sizes * a.max(initial=0.0)).all()
        ):
            return a
        matrix, wanted = free, -unpaid
        if costly.any() and over > -nearly * allowed:
            binding, gap = _binding(design, y, costly, scale, pull, allowed, eps, p)
            matrix, wanted = np.column_stack([free, binding]), np.append(-unpaid, gap)
        root = np.sqrt(np.minimum(a, top - a))
        matrix = matrix * root[:, None]
        change = root * np.linalg.lstsq(matrix.T, wanted, rcond=None)[0]
        a = np.clip(a + change, 0.0, top)
    return None


def _binding(
    design: Design,
    y: Array,
    costly: NDArray[np.bool_],
    scale: Array,
    pull: Array,
    allowed: float,
    eps: float,
    p: float,
) -> tuple[Array, Array]:
    """Return the gradients (n, k) of the conditions that bind, and what they must change by.

    p = ∞: |pullⱼ| − ε·Σa for the largest; p = 2: their norm; p = 1: the sum of those that are not
    next to nothing, and the others, which must be nothing.
    """
    place = np.flatnonzero(costly)
    sign, size = np.sign(pull), np.abs(pull)

    def along(direction: Array) -> Array:
        v = np.zeros(len(costly))
        v[place] = direction / scale[place]
        return y * design.dot(v) - eps

    def single(some: NDArray[np.bool_]) -> Array:
        return design.pick(place[some]) * y[:, None] / scale[place[some]]

    if p == 2:
        length = float(np.linalg.norm(pull))
        return along(pull / length)[:, None], np.array([allowed - length - BEYOND * allowed])
    large = size >= (1 - NEARLY) * size.max() if np.isinf(p) else size > NEARLY * size.max()
    if np.isinf(p):
        return single(large) * sign[large] - eps, allowed - size[large] - BEYOND * allowed
    gap = allowed - size[large].sum() - BEYOND * allowed
    whole = along(np.where(large, sign, 0.0))
    return np.column_stack([whole, single(~large)]), np.append(gap, -pull[~large])
