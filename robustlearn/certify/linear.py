"""Linear models: the exact worst case and the exact distance to the decision boundary."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from robustlearn._geometry import conjugate, level, row_norm
from robustlearn._tensor import flat
from robustlearn.certify.base import CERTIFICATES, Certificate, classified, interval
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.threats import LpBall

FELT = 1e-9  # of a margin, that rounding may take without a second look at the radius
CHUNK = 2**22  # numbers in a working array


def _applies(model: Model, threat: LpBall, x: Tensor) -> bool:
    return model.affine(tuple(x.shape[1:])) is not None


@CERTIFICATES.register("linear", applies=_applies)
def linear(
    model: Model, x: Tensor, threat: LpBall, y: Tensor | None, seconds: float = math.inf
) -> Certificate:
    """Exact radii, margins, prediction intervals and losses of affine models.

    Classifier, with m_j = z_k − z_j at x and v_j = w_j − w_k: the worst margin is
    min_j m_j − support(v_j); the radius is the smallest ε at which one of them is 0, that is
    min_j m_j / ‖scale·v_j‖_q without walls. Regressor, r = wᵀx + b − y: the prediction stays in
    [f − support(−w), f + support(w)] and the squared error below max(|r ± support(±w)|)², which
    is (|r| + ε‖w‖_q)² without walls. All in float64, O(d log d) a sample and rival class;
    all but the margin leave room for what the rounding of the model itself may do within the
    threat (`Model.rounding`).

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels or targets, or None for the predicted class.
    """
    affine = model.affine(tuple(x.shape[1:]))
    if affine is None:
        raise InputError(f"{model.name} is not known to be linear")
    weight, bias = affine
    x = x.detach().cpu().double()
    slack = _rounding(model, x, threat)
    if model.task == "regression":
        lower, upper = _ends(weight[0], bias[0], x, threat)
        return interval("linear", lower - slack, upper + slack, y, exact=threat.tight)
    if len(weight) < 2:
        raise InputError(
            "the model has one output: say wrap(model, task='regression') or "
            "wrap(model, task='classification')"
        )
    scores = flat(x) @ weight.T + bias
    label = scores.argmax(1) if y is None else y.detach().cpu().long()
    gap = scores.gather(1, label[:, None]) - scores
    unwalled = _pairwise_norms(weight, threat)[label]
    eps = torch.as_tensor(threat.eps, dtype=torch.float64).expand(len(x))
    own = torch.nn.functional.one_hot(label, len(weight)).bool()

    def worst(row: Tensor, rival: Tensor) -> Tensor:
        direction = (weight[rival] - weight[label[row]]).reshape(len(row), *x.shape[1:])
        return gap[row, rival] - threat.select(row).support(direction, x[row])

    def distances(room: Tensor, rows: Tensor) -> Tensor:
        """Return the least ε at which a rival has used up its room, (k,)."""

        def distance(row: Tensor, rival: Tensor) -> Tensor:
            direction = (weight[rival] - weight[label[rows[row]]]).reshape(len(row), *x.shape[1:])
            given = threat.select(rows[row])
            return _radius(given, direction, room[row, rival], x[rows[row]])

        bound = torch.where(room > 0, room / unwalled[rows], 0)
        return _least(distance, bound.masked_fill(own[rows], torch.inf), x)

    margin = _least(worst, (gap - eps[:, None] * unwalled).masked_fill(own, torch.inf), x)
    spare, certified = 2 * slack, margin > 2 * slack  # a margin is the difference of two outputs
    felt = spare > FELT * gap.masked_fill(own, torch.inf).amin(1)
    radius = distances(gap - torch.where(felt, 0, spare)[:, None], torch.arange(len(x)))
    if bool(felt.any()):  # what counts is the rounding within the radius, not within the threat
        at = torch.where(radius.isfinite(), radius, eps)
        spare, few = 2 * _rounding(model, x, replace(threat, eps=at)), felt.nonzero().squeeze(1)
        radius[few] = distances(gap[few] - spare[few, None], few)
    radius = radius.clamp_min(1.0) if threat.p == 0 else radius  # under one change is no change
    right = scores.argmax(1) == label
    return classified("linear", right, radius, certified, margin, exact=threat.tight)


def _ends(weight: Tensor, bias: Tensor, x: Tensor, threat: LpBall) -> tuple[Tensor, Tensor]:
    """Return the least and the largest prediction over the threat, (n,) each."""
    prediction = flat(x) @ weight + bias
    direction = weight.reshape(1, *x.shape[1:]).expand_as(x)
    low, high = -threat.support(-direction, x), threat.support(direction, x)
    return prediction + low, prediction + high


def _pairwise_norms(weight: Tensor, threat: LpBall) -> Tensor:
    """‖scale·mask·(w_k − w_j)‖_q for all pairs of classes: what ε buys where there is no wall."""
    reach = torch.ones(weight.shape[1], dtype=torch.float64)
    if threat.scale is not None:
        reach = reach * torch.as_tensor(threat.scale, dtype=torch.float64).reshape(-1)
    if threat.mask is not None:
        reach = reach * threat.mask.reshape(-1)
    if threat.p == 0:  # one feature may gain anything
        differs = torch.stack([((row - weight) * reach != 0).any(1) for row in weight])
        return differs.double() * torch.finfo(torch.float64).max
    q = conjugate(threat.p)
    return torch.stack([row_norm(((row - weight) * reach).abs(), q) for row in weight])


def _least(value: Callable[[Tensor, Tensor], Tensor], bound: Tensor, x: Tensor) -> Tensor:
    """min over rivals j of value(i, j) ≥ bound[i, j], computing only what can be the least.

    The rivals of a sample come in the order of their bounds, and those whose bound exceeds the
    best value so far are skipped.
    """
    order = bound.argsort(1)
    best = torch.full((len(bound),), torch.inf, dtype=torch.float64)
    step = max(1, CHUNK // max(1, flat(x).shape[1]))
    for rank in range(bound.shape[1]):
        rival = order[:, rank]
        open_rows = (bound.gather(1, rival[:, None]).squeeze(1) < best).nonzero().squeeze(1)
        if len(open_rows) == 0:
            break
        for row in open_rows.split(step):
            best[row] = torch.minimum(best[row], value(row, rival[row]))
    return best


def _radius(threat: LpBall, direction: Tensor, gap: Tensor, x: Tensor) -> Tensor:
    """Return the smallest ε with support(direction) = gap: the inverse of the worst case.

    With gains c = |v|·scale and rooms r (see `LpBall`) the loss of margin is Σ cₖuₖ, where u is
    the knapsack for p = 1 (for p = 0 whole features in the order of cₖrₖ) and
    min(rₖ, t·cₖ^(1/(p−1))) otherwise (exponent 0 for p = ∞): piecewise linear in the budget or in
    t, so it is inverted in one pass.
    """
    gain, room = threat.gain(direction), threat.room(direction, x)
    if threat.p == 0:
        room = torch.full_like(gain, torch.inf) if room is None else room
        worth = torch.where(gain > 0, gain * room, 0)
        taken = worth.sort(1, descending=True).values.cumsum(1)
        count = 1.0 + (taken < gap[:, None]).sum(1)
        count = torch.where(taken[:, -1] >= gap, count, torch.inf)
        return torch.where(gap > 0, count, 0)
    if room is None:
        norm = row_norm(gain, conjugate(threat.p))
        return torch.where(gap > 0, gap / norm, 0)
    if threat.p == 1:
        gain, order = gain.sort(1, descending=True)
        room = room.gather(1, order)
        taken = torch.where(gain > 0, gain * room, 0).cumsum(1)
        enough, k = (taken >= gap[:, None]).max(1, keepdim=True)
        before = torch.nn.functional.pad(torch.stack([taken, room.cumsum(1)])[:, :, :-1], (1, 0))
        lost, spent = (part.gather(1, k).squeeze(1) for part in before)
        left = (gap - lost) / gain.gather(1, k).squeeze(1)
        radius = torch.where(enough.squeeze(1), spent + left, torch.inf)
        return torch.where(gap > 0, radius, 0)
    slope = torch.ones_like(gain) if math.isinf(threat.p) else threat.slope(gain)
    slope = torch.where(gain > 0, slope, 0)
    cap = torch.where(slope > 0, room / slope, torch.inf)
    t = level(gain * slope, cap, gap.clamp(min=0))[:, None]
    moved = torch.where(slope > 0, torch.minimum(t * slope, room), 0)
    radius = row_norm(moved, threat.p)
    return torch.where(t.squeeze(1).isinf(), torch.inf, radius)


def _rounding(model: Model, x: Tensor, threat: LpBall) -> Tensor:
    """Bound how far the model's own arithmetic may move an output over the threat."""
    low, high = threat.span(x)
    return model.rounding(torch.maximum(low.abs(), high.abs()))
