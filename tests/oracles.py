"""Answers from somewhere else: cvxpy for convex sets, plain loops for the rest."""

import itertools
import math
import warnings

import cvxpy as cp
import numpy as np
import pytest


def cases(*axes, broken):
    """The product of the axes; those that ``broken`` has a reason for are known to fail."""
    product = list(itertools.product(*axes))
    reasons = [broken(case) for case in product]
    marks = [[pytest.mark.xfail(strict=True, reason=why)] if why else [] for why in reasons]
    return [pytest.param(*case, marks=mark) for case, mark in zip(product, marks, strict=True)]


def _set(threat, delta, x):
    """Constraints of an `LpBall` for one flat sample."""
    d = delta.shape[0]
    eps = float(threat.eps)
    scale = np.ones(d) if threat.scale is None else np.broadcast_to(np.asarray(threat.scale), d)
    mask = np.ones(d, bool) if threat.mask is None else np.asarray(threat.mask).ravel()
    free = mask & (scale > 0)
    constraints = [delta[~free] == 0] if (~free).any() else []
    if free.any():
        p = "inf" if math.isinf(threat.p) else threat.p
        unit = cp.multiply(delta[free], 1 / scale[free])
        norm = cp.norm(unit, p) if threat.p in (1, 2, math.inf) else cp.pnorm(unit, p)
        constraints.append(norm <= eps)
    if threat.lower is not None:
        constraints.append(x + delta >= np.broadcast_to(np.asarray(threat.lower).ravel(), d))
    if threat.upper is not None:
        constraints.append(x + delta <= np.broadcast_to(np.asarray(threat.upper).ravel(), d))
    return constraints


def support(threat, g, x):
    """max ⟨g, δ⟩ over the threat around one flat point."""
    delta = cp.Variable(len(g))
    problem = cp.Problem(cp.Maximize(g @ delta), _set(threat, delta, x))
    return problem.solve(solver="CLARABEL")


def project(threat, wish, x):
    """Return the Euclidean projection of one flat ``wish`` on the threat."""
    delta = cp.Variable(len(wish))
    problem = cp.Problem(cp.Minimize(cp.sum_squares(delta - wish)), _set(threat, delta, x))
    problem.solve(solver="CLARABEL")
    return delta.value


def linear_model(x, y, eps, norm, loss, *, intercept=True, weight=None, scale=None, threshold=1.35):
    """Return (w, b, value) of the least mean worst-case loss, or None where cvxpy gives up."""
    n, d = x.shape
    weight = np.full(n, 1 / n) if weight is None else weight / weight.sum()
    scale = np.ones(d) if scale is None else scale
    w, b = cp.Variable(d), cp.Variable()
    cost = eps * cp.norm(cp.multiply(scale, w), {1: "inf", 2: 2, math.inf: 1}[norm])
    z = x @ w + b
    height = cp.abs(z - y) + cost if loss in ("squared", "absolute", "huber") else None
    value = {
        "squared": lambda: height,  # under a square root
        "absolute": lambda: height,
        "huber": lambda: cp.huber(height, threshold) / 2,
        "logistic": lambda: cp.logistic(cost - cp.multiply(y, z)),
        "hinge": lambda: cp.pos(1 + cost - cp.multiply(y, z)),
        "squared_hinge": lambda: cp.square(cp.pos(1 + cost - cp.multiply(y, z))),
    }[loss]()
    root = loss == "squared"
    total = cp.norm(cp.multiply(np.sqrt(weight), value)) if root else weight @ value
    problem = cp.Problem(cp.Minimize(total), [] if intercept else [b == 0])
    for tolerance in (1e-11, 1e-9, 1e-8):
        tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), tolerance)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an inaccurate solution, which is not used
            try:
                problem.solve(solver="CLARABEL", **tight)
            except cp.SolverError:
                continue
        if problem.status == "optimal":
            return w.value, float(b.value), problem.value ** (2 if root else 1)
    return None


def interpolator(x, y, norm, *, intercept=True):
    """min ‖w‖_q subject to Xw + b = y, and the least ‖α‖_∞ over the optima of its dual."""
    n, d = x.shape
    name = {1: "inf", 2: 2, math.inf: 1}
    w, b = cp.Variable(d), cp.Variable()
    fits = [x @ w + b == y] + ([] if intercept else [b == 0])
    size = cp.Problem(cp.Minimize(cp.norm(w, name[norm])), fits).solve(solver="CLARABEL")
    alpha = cp.Variable(n)
    p = "inf" if math.isinf(norm) else norm
    dual = [cp.norm(x.T @ alpha, p) <= 1, y @ alpha >= size * (1 - 1e-7)]
    dual += [cp.sum(alpha) == 0] if intercept else []
    peak = cp.Problem(cp.Minimize(cp.norm(alpha, "inf")), dual).solve(solver="CLARABEL")
    return size, peak
