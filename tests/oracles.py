"""Answers from somewhere else: cvxpy for convex sets, plain loops for the rest."""

import math

import cvxpy as cp
import numpy as np


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
