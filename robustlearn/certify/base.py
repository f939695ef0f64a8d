"""What a certificate says, and the registry of methods."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.models import Model, wrap
from robustlearn.models import labels as labels_of
from robustlearn.registry import NATURAL, TIME, Entry, Registry, check_options, parsed
from robustlearn.threats import LpBall

Rows = Tensor | np.ndarray
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
        distance to the decision boundary, less some for rounding.
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

    @staticmethod
    def joined(parts: Sequence[tuple[np.ndarray, "Certificate"]]) -> "Certificate":
        """Return one certificate, made by one method of parts with the numbers of their samples.

        It is exact if all parts are.
        """
        every, found = np.concatenate([numbers for numbers, _ in parts]), parts[0][1]
        _, order = np.unique(every, return_index=True)
        whole: dict[str, Any] = {}
        for field in fields(Certificate):
            if isinstance(getattr(found, field.name), np.ndarray):
                values = [getattr(part, field.name) for _, part in parts]
                whole[field.name] = np.concatenate(values)[order]
        return replace(found, exact=all(part.exact for _, part in parts), **whole)


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
    passes : instead of seconds, and for ``"auto"`` alone: what a sample is attacked with, in passes
        through the model, so that the result is the same on any machine. Of networks intervals,
        and CROWN where it costs a sample a few times as much; of trees so many boxes.

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
    given, limit = (model, points, threat, labels), options.get("seconds", seconds)
    check_options("certify", {"seconds": limit}, {"seconds": TIME})
    found: Certificate
    if name != "auto":
        found = CERTIFICATES[name].function(*given, limit)
    elif not (names := applicable(model, threat, points)):
        found = _as_a_network(*given, limit)
    elif passes is None or options:
        found = CERTIFICATES[names[0]].function(*given, limit)
    else:
        found = _without_a_clock(CERTIFICATES[names[0]], *given, passes)
    return found


def _without_a_clock(entry: Entry, *given: Any) -> Certificate:
    """Certify by what a method files as ``within=``, or else without a limit."""
    found: Certificate
    if "within" in entry.facts:
        found = entry.facts["within"](*given)
    else:
        found = entry.function(*given[:-1], math.inf)
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


def bisected(holds: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, halvings: int) -> Tensor:
    """Return the largest budget between low, which holds, and high, at which it was seen to."""
    for _ in range(halvings):
        middle = (low + high) / 2
        good = holds(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return low


def certified_radius(
    model: Any,
    x: Any,
    threat: LpBall,
    *,
    y: Any = None,
    method: str = "auto",
    seconds: float = SECONDS,
    halvings: int = 8,
) -> np.ndarray:
    """Return the largest budget, up to that of the threat, at which each sample is certified (n,).

    By bisection between 0 and ε, in ``halvings`` runs of a method; below the truth by its gap and
    ε·2^−halvings at most.

    Parameters
    ----------
    model, x, threat, y, method : as for `certify`; seconds : for all runs on a sample.

    Raises
    ------
    InputError for a regressor: there is no class to keep.

    Examples
    --------
    >>> from robustlearn.certify import certified_radius
    >>> net = torch.nn.Linear(1, 2, bias=False)
    >>> _ = net.weight.data.copy_(torch.tensor([[1.0], [-1.0]]))
    >>> certified_radius(net, [[0.5]], LpBall(2, 1.0), halvings=3)  # up to 0.5, not itself
    array([0.375])
    """
    check_options("certified_radius", {"halvings": halvings}, {"halvings": NATURAL})
    eps = torch.as_tensor(threat.eps, dtype=torch.float64).expand(len(x))

    def holds(budget: Tensor) -> Tensor:
        within, share = replace(threat, eps=budget), seconds / (halvings + 1)
        found = certify(model, x, within, y=y, method=method, seconds=share)
        if found.certified is None:
            raise InputError(
                "a certified radius is a classifier's; certify bounds a regressor's prediction"
            )
        return torch.from_numpy(found.certified)

    low = torch.where(holds(eps), eps, 0.0)
    return bisected(holds, low, eps, halvings).numpy()


def classified(
    method: str,
    right: Rows,
    radius: Rows,
    certified: Rows,
    margin: Rows | None = None,
    *,
    exact: bool = False,
    alpha: float = 0.0,
) -> Certificate:
    """State a classifier's certificate: where the prediction is wrong as it is, nothing is safe.

    Parameters
    ----------
    right : (n,) bool, whether the class that must hold is predicted; radius, certified, margin :
        (n,) what was proven, right or not.
    """
    right = rows(right)
    return Certificate(
        method,
        exact=exact,
        radius=np.where(right, rows(radius), 0.0),
        certified=right & rows(certified),
        margin=None if margin is None else rows(margin),
        alpha=alpha,
    )


def interval(
    method: str,
    lower: Rows,
    upper: Rows,
    y: Tensor | None,
    *,
    exact: bool = False,
    alpha: float = 0.0,
) -> Certificate:
    """State a regressor's certificate: l ≤ f(x + δ) ≤ u, with targets max(|u − y|, |l − y|)²."""
    lower, upper = rows(lower), rows(upper)
    loss = None
    if y is not None:
        target = rows(y)
        loss = np.maximum(np.abs(upper - target), np.abs(lower - target)) ** 2
    return Certificate(method, exact=exact, lower=lower, upper=upper, loss=loss, alpha=alpha)


def rows(values: Rows) -> np.ndarray:
    """Return a result as a numpy array in float64 (or bool)."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    return array if array.dtype == bool else array.astype(np.float64)
