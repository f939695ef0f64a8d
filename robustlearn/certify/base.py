"""What a certificate says, and the registry of methods."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.models import Model, wrap
from robustlearn.models import labels as labels_of
from robustlearn.registry import Registry, parsed
from robustlearn.threats import LpBall

CERTIFICATES = Registry("certificate")
SECONDS = 1.0  # that a sample may take
NETWORKS = "complete"  # tells why a model cannot be bounded, if nothing else applies


@dataclass(frozen=True, eq=False)
class Certificate:
    """A proof about each of n samples, as float64 arrays of shape (n,).

    Attributes
    ----------
    method : name of the method in `CERTIFICATES`.
    exact : whether the bounds are attained: True for linear models, where ``radius`` is *the*
        distance to the decision boundary.
    radius : classifier: no point of the threat's norm, box, mask and scale at a smaller distance
        changes the prediction (with y: makes it differ from y; 0 where it does already);
        infinite where none in the box does. None for a regressor.
    certified : classifier: whether the whole threat is proven harmless, with room for the
        rounding of the model's own arithmetic. None for a regressor.
    margin : classifier: lower bound on z_label − max_{j≠label} z_j over the threat.
    lower, upper : regressor: bounds on the prediction over the threat.
    loss : regressor with y: upper bound on the squared error over the threat.
    status : classifier: ``"certified"``, ``"falsified"`` or ``"open"``.
    by : what proved or disproved each sample, where a method tries several things.
    witness : (n, *shape) a member of the threat that changes the prediction, where falsified;
        NaN elsewhere.
    alpha : probability, at most, that the statement about a sample is wrong; 0 for a proof.
    """

    method: str
    exact: bool
    radius: np.ndarray | None = None
    certified: np.ndarray | None = None
    margin: np.ndarray | None = None
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None
    loss: np.ndarray | None = None
    status: np.ndarray | None = None
    by: np.ndarray | None = None
    witness: np.ndarray | None = None
    alpha: float = 0.0


def applicable(model: Model, threat: LpBall, x: Tensor) -> list[str]:
    """Return the methods that can say something about this model, the strongest first.

    Left out are those that are for asking by name: filed with ``auto=False``.
    """
    return [
        name
        for name, entry in CERTIFICATES.items()
        if entry.facts.get("auto", True) and entry.facts["applies"](model, threat, x)
    ]


def certify(
    model: Any,
    x: Any,
    threat: LpBall,
    *,
    y: Any = None,
    method: str = "auto",
    seconds: float = SECONDS,
    passes: int | None = None,
) -> Certificate:
    """Prove how far each sample is safe.

    Parameters
    ----------
    model : a `Model`, or anything that `robustlearn.wrap` takes.
    x : (n, *shape) array, tensor or data frame.
    threat : the set of changes; ``radius`` is measured in its norm and respects its box, mask
        and scale, ``certified`` and ``margin`` are about its eps.
    y : labels, as `robustlearn.evaluate` takes them (targets of a regressor); by default the
        prediction is what must hold.
    method : name in `CERTIFICATES`, or ``"auto"`` for the strongest that applies; seconds can be
        given with it, as ``"auto:seconds=10"``.
    seconds : the most that a sample may take in the mean; bounds of networks are left as good as
        they are then, which is sound.
    passes : instead of seconds, and for ``"auto"`` alone: what may be spent on all samples, in
        passes of one through a network, so that the result is the same on any machine. Intervals
        for all, then CROWN for those that promise most.

    Raises
    ------
    InputError where no certificate applies, naming what stands in the way, or x does not fit the
    threat.

    Examples
    --------
    >>> import numpy as np, robustlearn as rl
    >>> from sklearn.linear_model import RidgeClassifier
    >>> ridge = RidgeClassifier().fit([[0.0, 0.0], [1.0, 1.0]], [0, 1])
    >>> certificate = rl.certify(rl.wrap(ridge), [[1.0, 1.0]], rl.LpBall(2, 0.1))
    >>> bool(certificate.exact), float(certificate.radius[0].round(4))
    (True, 0.7071)
    """
    model = wrap(model)
    points = _tensor.as_tensor(x)
    _tensor.check_points(points)
    points = threat.cast(points, model.dtype).to(model.device)
    labels = None if y is None else labels_of(model, points, y).to(model.device)
    if y is None:
        model.settle(points)
    name, options = parsed(method)
    if set(options) - {"seconds"}:
        raise InputError(f"a certificate takes the option seconds alone; got {method!r}")
    given = (model, points, threat, labels, float(options.get("seconds", seconds)))
    found: Certificate
    if name != "auto":
        found = CERTIFICATES[name].function(*given)
    elif names := applicable(model, threat, points):
        entry = CERTIFICATES[names[0]]
        if passes is not None and "within" in entry.facts and "seconds" not in options:
            return entry.facts["within"](*given[:4], passes)
        found = entry.function(*given)
    else:
        found = _as_a_network(*given)
    return found


def _as_a_network(model: Model, *given: Any) -> Certificate:
    """Certify what no method knows as a network, or say what stands in the way."""
    try:
        found: Certificate = CERTIFICATES[NETWORKS].function(model, *given)
    except InputError as error:
        raise InputError(
            f"no certificate applies to {model.name}: there are {', '.join(CERTIFICATES)}, for "
            "linear models, ensembles of trees, torch networks of known layers, modules that bound "
            f"their own output, and anything smoothed. As a network: {error}"
        ) from error
    return found


def euclidean(threat: LpBall, shape: tuple[int, ...]) -> float:
    """Return the least c with ‖δ‖₂ ≤ c·‖δ‖ for all δ that mask and scale allow; box apart.

    max(scale)·d^(1/2 − 1/p) for p > 2, max(scale) for 1 ≤ p ≤ 2, d the features that may change
    (for p > 2 and unequal scales an upper bound); infinite for p = 0.
    """
    ones = torch.ones(shape, dtype=torch.float64)
    unit = ones if threat.scale is None else ones * torch.as_tensor(threat.scale)
    unit = unit if threat.mask is None else unit * threat.mask
    if threat.p == 0:
        return math.inf
    count = max(1, int((unit > 0).sum()))
    return float(unit.max()) * count ** max(0.0, 0.5 - 1 / threat.p)


def rows(tensor: Tensor) -> np.ndarray:
    """Return a result as a numpy array in float64 (or bool)."""
    array = tensor.detach().cpu().numpy()
    return array if array.dtype == bool else array.astype(np.float64)
