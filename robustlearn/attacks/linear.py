"""The worst case of a linear model in closed form."""

import torch
from torch import Tensor

from robustlearn._tensor import column, flat
from robustlearn.attacks.base import attack
from robustlearn.models import Model
from robustlearn.threats import LpBall


@attack(needs="affine")
def linear_exact(model: Model, x: Tensor, y: Tensor, threat: LpBall) -> Tensor:
    """The worst point of a linear model, exactly.

    Classifier: x + argmax of ⟨w_j − w_y, δ⟩ for the rival j with the largest worst-case
    (w_j − w_y)ᵀ(x + δ) + b_j − b_y. Regressor: x ± argmax of ⟨w, δ⟩, whichever makes |r| larger,
    r = wᵀx + b − y; without walls the squared loss there is (|r| + ε‖w‖_q)².

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels or targets.

    Returns
    -------
    (n, *shape), in the threat without tolerance. No point of the threat has a smaller margin (or
    a larger error), to rounding in float64.

    Raises
    ------
    InputError for a model that is not known to be affine.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 1)
    >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]])), net.bias.data.zero_()
    >>> from robustlearn import wrap
    >>> model = wrap(net, task="regression")
    >>> linear_exact(model, torch.zeros(1, 2), torch.tensor([-1.0]), LpBall(2, 1.0))
    tensor([[0.6000, 0.8000]])
    """
    affine = model.affine(tuple(x.shape[1:]))
    if affine is None:  # the decorator has refused this
        return x.clone()
    weight, bias = (part.to(x.device) for part in affine)
    wide = x.double()
    if model.task == "regression":
        up = weight[0].expand(len(x), -1)
        error = flat(wide) @ weight[0] + bias[0] - y.double()
        push, start = [up, -up], [error, -error]
    else:
        push, start = _rivals(weight, bias, flat(wide), y)
    best, delta = torch.full((len(x),), -torch.inf, dtype=wide.dtype, device=x.device), wide * 0
    for direction, level in zip(push, start, strict=True):
        direction = direction.reshape(x.shape)
        step = threat.argmax(direction, wide)
        reached = level + flat(direction * step).sum(1)
        better = reached > best
        best = torch.where(better, reached, best)
        delta = torch.where(column(better, x), step, delta)
    return threat.restrict(x, delta)


def _rivals(
    weight: Tensor, bias: Tensor, x: Tensor, y: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return w_j − w_y and the present z_j − z_y for each rival j; −∞ for j = y itself."""
    scores = x @ weight.T + bias
    own = scores.gather(1, y[:, None]).squeeze(1)
    push = [weight[j] - weight[y] for j in range(len(weight))]
    gap = [torch.where(y == j, -torch.inf, scores[:, j] - own) for j in range(len(weight))]
    return push, gap
