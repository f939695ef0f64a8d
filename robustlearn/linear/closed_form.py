"""What the worst input of a linear model is, what it costs, and where training changes its kind."""

from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from sklearn.utils.validation import check_array, check_X_y

from robustlearn._affine import affine, final_step, pieces
from robustlearn.errors import InputError
from robustlearn.linear import _losses
from robustlearn.linear._norms import dual_norm

Array = NDArray[np.float64]
ROUNDING = 4 * float(np.finfo(np.float64).eps)  # of a mean taken off


def units(feature_scale: Any, features: int) -> Array:
    """Return D: the budget of each feature in units of eps, 0 where it cannot change."""
    if feature_scale is None:
        return np.ones(features)
    scale = np.asarray(feature_scale, dtype=np.float64)
    if scale.shape != (features,) or not np.isfinite(scale).all() or (scale < 0).any():
        raise InputError(
            f"feature_scale must hold one number ≥ 0 for each of the {features} features (0 for "
            f"one that cannot change); its shape is {scale.shape}"
        )
    return scale


def worst_case_loss(
    w: Any,
    b: float,
    X: Any,
    y: Any,
    eps: float,
    norm: Any = 2,
    loss: str = "squared",
    *,
    feature_scale: Any = None,
    huber_threshold: float = 1.35,
) -> Array:
    """max over ‖δ / D‖_p ≤ ε of the loss of wᵀ(x + δ) + b, for each sample.

    Regression: φ(|wᵀx + b − y| + ε‖D·w‖_q), for the square (|wᵀx + b − y| + ε‖D·w‖_q)².
    Classification, y = ±1: ℓ(y(wᵀx + b) − ε‖D·w‖_q). Exact, because φ grows with the residual and
    ℓ falls with the margin.

    Parameters
    ----------
    w : (d,) coefficients; b : intercept; X : (n, d); y : (n,).
    eps : budget ≥ 0, in units of ``feature_scale``.
    norm : p of the attack: 1, 2 or inf.
    loss : ``"squared"``, ``"absolute"``, ``"huber"``; ``"logistic"``, ``"hinge"``,
        ``"squared_hinge"``.
    feature_scale : (d,) D, the unit of each feature, 0 for one that cannot change; 1 by default.
    huber_threshold : k of the Huber loss, in units of y.

    Returns
    -------
    (n,) float64.

    Raises
    ------
    InputError for a loss or norm that is not known, a negative eps, or labels other than ±1.

    Examples
    --------
    >>> worst_case_loss([3.0, 4.0], 0.0, [[1.0, 0.0]], [2.0], eps=0.1)  # (|3 − 2| + .1·5)²
    array([2.25])
    """
    X, y, w = _samples(X, y, w)
    chosen = _losses.get(loss, huber_threshold)
    if chosen.classifies and not np.isin(y, (-1, 1)).all():
        raise InputError(f"the labels of the {loss} loss are −1 and 1")
    c = budget(eps) * float(np.linalg.norm(units(feature_scale, len(w)) * w, dual_norm(norm)))
    return chosen.value(chosen.height(X @ w + b, c, y))


def worst_case_input(
    w: Any,
    b: float,
    X: Any,
    y: Any,
    eps: float,
    norm: Any = 2,
    *,
    classification: bool = False,
    feature_scale: Any = None,
) -> Array:
    """Return x + ε·sign·D·h for each sample, h the unit vector of norm p with hᵀDw = ‖D·w‖_q.

    sign is that of wᵀx + b − y in regression (+ at 0) and −y in classification. There the loss of
    `worst_case_loss` is attained.

    Parameters
    ----------
    w, b, X, y, eps, norm, feature_scale : as for `worst_case_loss`.
    classification : whether y holds the classes −1 and 1.

    Returns
    -------
    (n, d).

    Examples
    --------
    >>> worst_case_input([3.0, 4.0], 0.0, [[1.0, 0.0]], [2.0], eps=0.5, norm=2)
    array([[1.3, 0.4]])
    """
    X, y, w = _samples(X, y, w)
    scale = units(feature_scale, len(w))
    reach, q = scale * w, dual_norm(norm)
    if q == 1:
        best = np.sign(reach)
    elif q == 2:
        best = reach / (np.linalg.norm(reach) or 1.0)
    else:
        best = np.zeros_like(reach)
        first = int(np.argmax(np.abs(reach)))
        best[first] = np.sign(reach[first])
    sign = -y if classification else np.where(X @ w + b - y >= 0, 1.0, -1.0)
    return X + budget(eps) * sign[:, None] * (scale * best)


def certified_radius(estimator: Any, X: Any, norm: Any = 2, *, feature_scale: Any = None) -> Array:
    """min over j ≠ k of ((w_k − w_j)ᵀx + b_k − b_j) / ‖D(w_k − w_j)‖_q, k the predicted class.

    No change of norm p up to the radius changes the prediction, and some change just above it
    does: exact in real arithmetic.

    Parameters
    ----------
    estimator : a fitted linear classifier of scikit-learn or of ours, or a pipeline of affine
        steps (scalers, PCA, …) with one at its end.
    X : (n, d) inputs of the estimator, the pipeline's before its first step.
    norm : p of the change of X, 1, 2 or inf; ``feature_scale`` : D as for `worst_case_loss`.

    Returns
    -------
    (n,) float64, ∞ where no feature that can change matters.

    Raises
    ------
    InputError for a regressor, for what is not known to be affine, naming it, and for columns of X
    that have other names, or another order, than the first step was fitted with.

    Examples
    --------
    >>> from sklearn.linear_model import LogisticRegression
    >>> model = LogisticRegression().fit([[-1.0], [1.0]], [0, 1])
    >>> certified_radius(model, [[0.5]]).round(6)
    array([0.5])
    """
    if not hasattr(final_step(estimator), "classes_"):
        raise InputError("a radius is of a classifier; `worst_case_loss` is for regressors")
    model = affine(estimator)
    _check_names(pieces(estimator)[0], X)
    X = check_array(X, dtype=np.float64)
    if X.shape[1] != model.weight.shape[1]:
        raise InputError(f"X has {X.shape[1]} features; the model {model.weight.shape[1]}")
    scale, q = units(feature_scale, X.shape[1]), dual_norm(norm)
    weight, bias = model.weight, model.bias
    if len(weight) == 1:
        weight, bias = np.vstack([np.zeros_like(weight), weight]), np.append(0.0, bias)
    scores = X @ weight.T + bias
    predicted = scores.argmax(1)
    radius = np.full(len(X), np.inf)
    for j, (w, score) in enumerate(zip(weight, scores.T, strict=True)):
        reach = np.linalg.norm(scale * (weight[predicted] - w), q, axis=1)
        margin = scores[np.arange(len(X)), predicted] - score
        rival = (predicted != j) & (reach > 0)
        radius[rival] = np.minimum(radius[rival], margin[rival] / reach[rival])
    return radius


def _check_names(first: Any, X: Any) -> None:
    """Refuse named columns that are not those of the fit, in their order."""
    expected = getattr(first, "feature_names_in_", None)
    if expected is None or not hasattr(X, "columns") or list(X.columns) == list(expected):
        return
    raise InputError(
        f"the columns of X are {', '.join(map(str, X.columns))}; {type(first).__name__} was fitted "
        f"with {', '.join(map(str, expected))}, in this order"
    )


def eps_max(
    X: Any, y: Any, norm: Any = 2, *, fit_intercept: bool = True, feature_scale: Any = None
) -> float:
    """ε_max = ‖D⁻¹Xᵀy‖_p / ‖y‖₁ (y centred if there is an intercept): from there on w = 0 is best.

    For the squared loss, and features that can all change. Exact.

    Examples
    --------
    >>> eps_max([[1.0], [-1.0]], [2.0, -2.0])
    1.0
    """
    X, y = check_X_y(X, y, dtype=np.float64, y_numeric=True)
    scale = units(feature_scale, X.shape[1])
    if (scale == 0).any():
        raise InputError("eps_max needs features that can change: feature_scale holds zeros")
    if fit_intercept:
        X, y = X - X.mean(0), y - y.mean()
    total = float(np.abs(y).sum())
    if total == 0:
        return 0.0
    return float(np.linalg.norm(X.T @ y / scale, dual_norm(dual_norm(norm)))) / total


def interpolation_threshold(X: Any, y: Any, norm: Any = 2, *, fit_intercept: bool = True) -> float:
    """ε = 1 / (n·min ‖α‖_∞): up to there an interpolating model is best.

    α runs over the optima of max αᵀy with ‖Xᵀα‖_p ≤ 1 (and Σα = 0 if there is an intercept), the
    dual of the interpolation problem min ‖w‖_q subject to Xw + b = y. For the squared loss; exact
    to the accuracy of a linear program for p = 1 and ∞, of a least squares problem for p = 2.

    Returns
    -------
    0 where no linear model interpolates; ∞ where y is constant (zero without an intercept). Data
    far from the origin are centred first; digits that they have lost by then count for nothing.

    Raises
    ------
    RuntimeError where no method solves a linear program.
    """
    X, y = check_X_y(X, y, dtype=np.float64, y_numeric=True)
    q = dual_norm(norm)
    noise = ROUNDING * float(np.abs(X).max()), ROUNDING * float(np.abs(y).max())
    if fit_intercept:
        X, y = X - X.mean(0), y - y.mean()
    peak, size = float(np.abs(y).max()), float(np.abs(X).max())
    if peak <= noise[1]:
        return np.inf
    if size <= noise[0]:
        return 0.0
    X, y = X / size, y / peak
    left, values, right = np.linalg.svd(X, full_matrices=False)
    # rounding before X was centred is no rank: its norm is about noise·(√n + √d)
    least = max(1e-10 * values[0], noise[0] / size * sum(np.sqrt(X.shape)))
    left, values, right = (part[values > least] for part in (left.T, values, right))
    inside = left @ y
    if np.abs(y - left.T @ inside).max() > max(1e-8, noise[1] / peak):
        return 0.0
    if q == 2:  # Xᵀα = w/‖w‖: the optima differ by the null space of Xᵀ
        length = np.linalg.norm(inside / values)
        alpha = _smallest_peak(left, inside / values**2 / length, fit_intercept)
    else:
        alpha = _least_linear((left.T * values) @ right, y, q, fit_intercept)
    return size / (len(y) * alpha)


def _smallest_peak(matrix: Array, right: Array, balanced: bool) -> float:
    """min ‖α‖_∞ subject to matrix·α = right, its rows orthonormal (and Σα = 0)."""
    n = matrix.shape[1]
    size = np.abs(matrix.T @ right).max()  # of the shortest solution
    if len(matrix) + balanced >= n:
        return float(size)
    if balanced:
        matrix, right = np.vstack([matrix, np.full(n, n**-0.5)]), np.append(right, 0.0)
    both = np.eye(n)
    found = _program(
        np.append(np.zeros(n), 1.0),
        A_ub=np.block([[both, -np.ones((n, 1))], [-both, -np.ones((n, 1))]]),
        b_ub=np.zeros(2 * n),
        A_eq=np.column_stack([matrix, np.zeros(len(matrix))]),
        b_eq=right / size,
        bounds=[(None, None)] * n + [(0, None)],
    )
    return found * float(size)


def _program(cost: Array, **conditions: Any) -> float:
    """Return the least value of a linear program, by whichever method solves it."""
    for method in ("highs", "highs-ds", "highs-ipm"):
        found = linprog(cost, method=method, **conditions)
        if found.status == 0:
            return float(found.fun)
    raise RuntimeError(f"a linear program of the interpolation threshold failed: {found.message}")


def _least_linear(X: Array, y: Array, q: float, intercept: bool) -> float:
    """min ‖α‖_∞ over the dual optima for p = 1 and ∞: two linear programs."""
    n, d = X.shape
    # ‖Xᵀα‖_∞ ≤ 1, or ‖Xᵀα‖₁ ≤ 1 through t ≥ |Xᵀα|, Σt ≤ 1; unknowns α, t, peak
    zero, one = np.zeros((d, d)), np.eye(d)
    if q == 1:
        low = np.block([[X.T, zero], [-X.T, zero]])
        limit = np.ones(2 * d)
    else:
        low = np.block(
            [[X.T, -one], [-X.T, -one], [np.zeros((1, n)), np.ones((1, d))]],
        )
        limit = np.append(np.zeros(2 * d), 1.0)
    equal = [np.concatenate([np.ones(n), np.zeros(d)])] if intercept else []
    gain = np.concatenate([y, np.zeros(d)])
    bounds = [(None, None)] * n + [(0, None)] * d
    value = -_program(
        -gain,
        A_ub=low,
        b_ub=limit,
        A_eq=equal or None,
        b_eq=[0.0] if equal else None,
        bounds=bounds,
    )
    peak = np.column_stack([np.eye(n), np.zeros((n, d)), -np.ones(n)])
    rows = np.vstack(
        [
            np.column_stack([low, np.zeros(len(low))]),
            peak,
            np.column_stack([-np.eye(n), np.zeros((n, d)), -np.ones(n)]),
            np.append(-gain, 0.0)[None],
        ]
    )
    right = np.concatenate([limit, np.zeros(2 * n), [-value * (1 - 1e-10)]])
    fixed = [np.append(row, 0.0) for row in equal]
    return _program(
        np.append(np.zeros(n + d), 1.0),
        A_ub=rows,
        b_ub=right,
        A_eq=fixed or None,
        b_eq=[0.0] if fixed else None,
        bounds=[*bounds, (0, None)],
    )


def _samples(X: Any, y: Any, w: Any) -> tuple[Array, Array, Array]:
    X, y = check_X_y(X, y, dtype=np.float64, y_numeric=True)
    w = np.asarray(w, dtype=np.float64)
    if w.shape != (X.shape[1],):
        raise InputError(f"X has {X.shape[1]} features; w has shape {w.shape}")
    return X, y, w


def budget(eps: Any, name: str = "eps") -> float:
    """Return eps as a number, checked."""
    if isinstance(eps, bool) or not isinstance(eps, Real) or not 0 <= float(eps) < np.inf:
        raise InputError(f"{name} must be finite and not negative; got {eps!r}")
    return float(eps)
