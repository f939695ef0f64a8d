"""The worst case of an ensemble of trees."""

import numpy as np
import torch
from torch import Tensor

from robustlearn._leaves import Aim, Space, distances, least, prediction, rivals
from robustlearn._tensor import column, flat
from robustlearn.attacks.base import COUNT, attack
from robustlearn.models import Model
from robustlearn.models.trees import Trees
from robustlearn.threats import LpBall


@attack(needs="trees", boxes=COUNT)
def tree_exact(model: Model, x: Tensor, y: Tensor, threat: LpBall, *, boxes: int = 4_000) -> Tensor:
    """The worst point of an ensemble of trees: where its worst leaves meet, nearest to x.

    Classifier: the point of least Σ_t (v_y − v_j)(leaf of t) over all rivals j; regressor: of the
    least or the largest prediction, whichever errs more. By branch and bound over boxes of input
    space, which any p takes, with walls, mask and scale.

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels or targets.
    boxes : to look at for each sample, times its rivals. Where they do not suffice the point is
        the worst that was met, or x.

    Returns
    -------
    (n, *shape), in the threat without tolerance. Where the boxes suffice no point of the threat
    has a smaller margin (or a larger error), to rounding of the library's sums.

    Raises
    ------
    InputError for a model whose trees are not known.

    Examples
    --------
    >>> from sklearn.tree import DecisionTreeClassifier
    >>> stump = DecisionTreeClassifier().fit([[0.0], [1.0]], [0, 1])
    >>> x = torch.tensor([[0.25]], dtype=torch.float64)
    >>> tree_exact(stump, x, torch.tensor([0]), LpBall(2, 0.5)).round(decimals=4)
    tensor([[0.5000]], dtype=torch.float64)
    """
    trees = model.trees
    if trees is None:  # the decorator has refused this
        return x.clone()
    rows = flat(x.cpu().double()).numpy()
    space = Space.of(threat, rows)
    far = distances(trees, space)
    eps = np.broadcast_to(np.asarray(threat.eps, dtype=np.float64), (len(rows),))
    worst = rows.copy()
    for row, label in enumerate(y.tolist()):
        aims = _aims(model, trees, label)
        found = least(trees, space.at(row), far[row], float(eps[row]), aims, boxes * len(aims))
        if found.point is not None:
            worst[row] = found.point
    point = torch.from_numpy(worst).to(x.device, x.dtype).reshape(x.shape)
    return torch.where(column(threat.contains(x, point), x), point, threat.enclose(x, point))


def _aims(model: Model, trees: Trees, y: float) -> list[Aim]:
    """Return what the adversary lowers: margins, or ± the error of a regressor."""
    if model.task == "classification":
        return rivals(trees, int(y))
    weight, offset = prediction(trees)
    return [(weight, offset - y), (-weight, y - offset)]
