"""What is minimised: pure functions ``(model, x, y, threat) -> Outcome``, one row a sample."""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlearn import _tensor, losses
from robustlearn.errors import InputError
from robustlearn.registry import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    Range,
    Registry,
    check_options,
    parsed,
)
from robustlearn.threats import LpBall
from robustlearn.train.inner import Craft, Divergence, ascend, evaluating, statistics_held

OBJECTIVES = Registry("objective")
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Outcome:
    """What an objective says of a mini-batch.

    Attributes
    ----------
    loss : (n,) to be minimised in the mean; it carries the graph of the parameters.
    points : (n, *shape) the points in the threat that it was measured at.
    metrics : (n,) each, detached.
    """

    loss: Tensor
    points: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """The loss of a prediction: what the model minimises and the adversary raises.

    Parameters
    ----------
    kind : ``"cross_entropy"``, ``"squared"`` or ``"huber"``.
    smoothing : share of the label that is spread over all classes.
    weights : (K,) weights of the classes, finite and not negative; None for equal ones. They
        weigh all that an objective asks of a sample: its divergence and its margin too.
    knee : |error| from which ``"huber"`` is linear.

    Raises
    ------
    InputError for a value out of its range, and for weights that are not one per class.

    Examples
    --------
    >>> rare = Criterion(weights=[1.0, 9.0])
    >>> [round(float(loss), 2) for loss in rare(torch.zeros(2, 2), torch.tensor([0, 1]))]
    [0.69, 6.24]
    """

    kind: str = "cross_entropy"
    smoothing: float = 0.0
    weights: Tensor | Sequence[float] | None = None
    knee: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("cross_entropy", "squared", "huber"):
            raise InputError(f"a criterion is cross_entropy, squared or huber; got {self.kind!r}")
        if not 0 <= self.smoothing < 1:
            raise InputError(f"label smoothing is at least 0 and under 1; got {self.smoothing}")
        if not (self.knee > 0 and math.isfinite(self.knee)):
            raise InputError(f"the knee of the Huber loss is positive; got {self.knee}")
        if self.weights is not None:
            object.__setattr__(self, "weights", _class_weights(self.weights, self.kind))

    @property
    def classifies(self) -> bool:
        """Whether y are classes."""
        return self.kind == "cross_entropy"

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample (n,), times the weight of its class."""
        return self.weighed(self.plain(output, y), output, y)

    def plain(self, output: Tensor, y: Tensor) -> Tensor:
        """Return the loss of each sample (n,), whatever its class."""
        if not self.classifies:
            error = output.reshape(len(y)) - y.to(output.dtype)
            return error.square() if self.kind == "squared" else _huber(error, self.knee)
        return functional.cross_entropy(
            losses.two_columns(output), y, reduction="none", label_smoothing=self.smoothing
        )

    def weighed(self, loss: Tensor, output: Tensor, y: Tensor) -> Tensor:
        """Return losses (n,) times the weights of their classes."""
        if self.weights is None:
            return loss
        classes = losses.two_columns(output).shape[1]
        if len(self.weights) != classes:
            raise InputError(
                f"weights must hold one number per class, {classes} by the network's output; got "
                f"{len(self.weights)}"
            )
        return loss * torch.as_tensor(self.weights).to(loss)[y]

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the adversary raises, and its derivative: log-odds, or the squared error."""
        if self.classifies:
            return losses.log_odds.look(output, y)
        return losses.squared_error.look(output, y.to(output.dtype))


OWN = {  # options of objectives
    "steps": COUNT,
    "step_size": POSITIVE,
    "noise": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
    "weight": NOT_NEGATIVE,
    "width": POSITIVE,
    "replays": COUNT,
}
CROSS_ENTROPY, PLAIN = Criterion(), Craft()


def _class_weights(weights: Tensor | Sequence[float], kind: str) -> Tensor:
    if kind != "cross_entropy":
        raise InputError(f"weights are of classes, and {kind!r} has none: leave them out")
    values = torch.as_tensor(weights).detach()
    if not values.is_floating_point():
        values = values.double()
    if values.dim() != 1 or not bool((values >= 0).all() & values.isfinite().all() & values.any()):
        raise InputError(
            "weights must hold one number per class, finite, not negative and not all zero; got "
            f"{values.tolist()}"
        )
    return values


def _huber(error: Tensor, knee: float) -> Tensor:
    """e² up to the knee k, 2k|e| − k² beyond."""
    size = error.abs()
    return torch.where(size <= knee, size.square(), 2 * knee * size - knee**2)


def options_of(text: str) -> tuple[str, dict[str, Any]]:
    """Read an objective as text.

    Raises
    ------
    InputError for an objective or an option that there is not.

    Examples
    --------
    >>> options_of("trades:beta=5:steps=3")
    ('trades', {'beta': 5, 'steps': 3})
    """
    name, options = parsed(text)
    known = inspect.signature(OBJECTIVES[name].function).parameters
    own = [key for key in known if key in OWN]
    for key in options:
        if key not in own:
            raise InputError(f"{name} has no option {key!r}; it has {', '.join(own) or 'none'}")
    check_options(name, options, OBJECTIVES[name].facts["ranges"])
    return name, options


def replays_of(name: str, options: Mapping[str, Any]) -> int:
    """Return how often an objective plays each mini-batch, with its perturbations kept.

    Examples
    --------
    >>> replays_of("free", {}), replays_of("free", {"replays": 8}), replays_of("pgd_at", {})
    (4, 8, 1)
    """
    known = inspect.signature(OBJECTIVES[name].function).parameters
    return int(options.get("replays", known["replays"].default if "replays" in known else 1))


def objective(
    *,
    classes_only: bool = False,
    climbs: bool = True,
    keeps: bool = True,
    **ranges: Range,
) -> Callable[[Function], Function]:
    """File a function as an objective.

    Parameters
    ----------
    classes_only : whether it is for classifiers alone.
    climbs : whether it takes projected steps, which are known for p = 1, 2 and ∞.
    keeps : whether an ascent can start where the sample's perturbation stood an epoch ago.
    ranges : of options that are not those in ``OWN``.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(model: nn.Module, x: Tensor, y: Tensor, threat: LpBall, **options: Any) -> Outcome:
            criterion = options.get("criterion", CROSS_ENTROPY)
            if classes_only and not criterion.classifies:
                raise InputError(f"{function.__name__} is for classifiers, not for regressors")
            try:
                return function(model, x, y, threat, **options)
            except (IndexError, RuntimeError) as error:
                if criterion.classifies and "out of bounds" in str(error):
                    raise _no_class(y) from error
                raise

        OBJECTIVES.register(
            function.__name__,
            classes_only=classes_only,
            climbs=climbs,
            keeps=keeps and climbs,
            ranges={**OWN, **ranges},
        )(run)
        return run  # type: ignore[return-value]

    return decorate


def _no_class(y: Tensor) -> InputError:
    low, high = (int(value) for value in y.aminmax())
    return InputError(
        "labels are classes of the network, from 0 to one less than its outputs; in a batch the "
        f"labels are {low} to {high}: number them anew, or give the network as many outputs"
    )


def _crafted(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    criterion: Criterion,
    craft: Craft,
    steps: int,
    step_size: float | None,
) -> Tensor:
    """Return points that raise the criterion; α is 1.25ε for one step, 2.5ε/k for k of them."""
    if craft.points is not None:
        return craft.points
    size = step_size if step_size is not None else 1.25 if steps == 1 else 2.5 / steps
    start = craft.begin(x, threat) if criterion.classifies else x  # which knows the higher hill
    return ascend(
        model, x, y, threat, criterion, start=start, steps=steps, step_size=size, craft=craft
    )


def _told(loss: Tensor, points: Tensor, output: Tensor, y: Tensor, criterion: Criterion) -> Outcome:
    """Return the outcome with what the adversary did to the predictions."""
    metrics = {"loss": loss.detach()}
    if criterion.classifies:
        metrics["robust"] = (~losses.misclassified(output, y)).float()
    return Outcome(loss, points, metrics)


@objective(climbs=False)
def standard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x), y): no adversary.

    Parameters
    ----------
    model : in training mode; x : (n, *shape); y : (n,).
    """
    output = craft.forward(model, x)
    return _told(criterion(output, y), x, output, y, criterion)


@objective(climbs=False)
def gaussian(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    noise: float = 0.25,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x + σξ), y), ξ ~ N(0, I): what a smoothed model votes among; σ is ``noise``, as x.

    Neither threat nor box is asked. Source: Cohen, Rosenfeld and Kolter (2019).
    """
    points = craft.points
    if points is None:
        keys = _tensor.fold(_tensor.keys(craft.keys, x), 2)
        points = x + noise * _tensor.normal(keys, tuple(x.shape[1:]), x.dtype)
    output = craft.forward(model, points)
    return _told(criterion(output, y), points, output, y, criterion)


@objective()
def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    step_size: float = 1.25,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x'), y) after one step of 1.25ε from a random point: fast adversarial training.

    Source: Wong, Rice and Kolter (2020).
    """
    points = _crafted(model, x, y, threat, criterion, craft, 1, step_size)
    output = craft.forward(model, points)
    return _told(criterion(output, y), points, output, y, criterion)


@objective(keeps=False)
def n_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    noise: float = 2.0,
    step_size: float = 1.0,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x + η + ε·steepest), y) with η from 2 threats' reach, and no projection into the threat.

    The points keep to the box, but lie up to 3ε from x. Source: de Jorge et al. (2022).
    """
    points = craft.points
    if points is None:
        wide = replace(threat, eps=threat.eps * (noise + step_size))
        begun = x + replace(threat, eps=threat.eps * noise).sample(x, _tensor.keys(craft.keys, x))
        points = ascend(
            model,
            x,
            y,
            wide,
            criterion,
            start=begun,
            steps=1,
            step_size=step_size / (noise + step_size),
            craft=craft,
        )
    output = craft.forward(model, points)
    return _told(criterion(output, y), points, output, y, criterion)


@objective(keeps=False)
def free(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    replays: int = 4,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x + δ), y), where δ is stepped by ε along the same backward pass that trains the weights.

    The points are leaves that require a gradient: after the backward pass the trainer steps them
    and plays the mini-batch again, ``replays`` (m) times in all: an epoch is m updates a mini-batch
    and m gradients a sample. Source: Shafahi et al. (2019), where a mini-batch takes over
    the δ that the one before left behind; here its δ begins at random, so that what a sample
    meets depends on none but itself.
    """
    points = craft.points if craft.points is not None else craft.begin(x, threat)
    points = points.detach().requires_grad_()
    output = craft.forward(model, points)
    return _told(criterion(output, y), points, output, y, criterion)


@objective()
def pgd_at(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    steps: int = 2,
    step_size: float | None = None,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x'), y) with x' from ``steps`` of projected ascent. Source: Madry et al. (2018)."""
    points = _crafted(model, x, y, threat, criterion, craft, steps, step_size)
    output = craft.forward(model, points)
    return _told(criterion(output, y), points, output, y, criterion)


@objective(weight=Range(0, 1, "[]"))
def adversarial_cross_entropy(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    weight: float = 0.5,
    steps: int = 2,
    step_size: float | None = None,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """(1 − w)·L(f(x), y) + w·L(f(x'), y): clean and adversarial loss mixed.

    Source: Goodfellow, Shlens and Szegedy (2015), there with one step.
    """
    points = _crafted(model, x, y, threat, criterion, craft, steps, step_size)
    clean, output = craft.forward(model, torch.cat([x, points])).split(len(x))
    loss = (1 - weight) * criterion(clean, y) + weight * criterion(output, y)
    return _told(loss, points, output, y, criterion)


@objective(classes_only=True)
def trades(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    beta: float = 6.0,
    steps: int = 2,
    step_size: float | None = None,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x), y) + β·KL(f(x) ‖ f(x')), where x' raises the divergence.

    The clean logits are computed once and held fixed while x' is sought.
    Source: Zhang et al. (2019), there from x + 0.001·N(0, 1); here from `Craft.begin`.
    """
    points = craft.points
    if points is None:
        points = _diverging(model, x, y, threat, craft, steps, step_size)
    clean, output = craft.forward(model, torch.cat([x, points])).split(len(x))
    loss = criterion.plain(clean, y) + beta * _divergence(clean, output)
    loss = criterion.weighed(loss, output, y)
    return _told(loss, points, output, y, criterion)


@objective(classes_only=True)
def mart(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    weight: float = 5.0,
    steps: int = 2,
    step_size: float | None = None,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """BCE(f(x'), y) + λ·KL(f(x) ‖ f(x'))·(1 − f_y(x)): misclassified samples weigh more.

    BCE = −log p_y − log(1 − max_{k≠y} p_k). Source: Wang et al. (2020).
    """
    points = _crafted(model, x, y, threat, criterion, craft, steps, step_size)
    clean, output = craft.forward(model, torch.cat([x, points])).split(len(x))
    z = losses.two_columns(output)
    rival = z.log_softmax(1).scatter(1, y[:, None], -torch.inf).amax(1)
    boosted = criterion.plain(output, y) - torch.log1p(-rival.exp().clamp(max=1 - 1e-6))
    doubt = 1 - losses.two_columns(clean).softmax(1).gather(1, y[:, None]).squeeze(1)
    loss = criterion.weighed(boosted + weight * _divergence(clean, output) * doubt, output, y)
    return _told(loss, points, output, y, criterion)


@objective(classes_only=True)
def margin(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    width: float = 2.0,
    weight: float = 1.0,
    steps: int = 2,
    step_size: float | None = None,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """L(f(x), y) + w·softplus(m − (z_y − max_{j≠y} z_j)(x')): a margin m, and no divergence."""
    points = _crafted(model, x, y, threat, criterion, craft, steps, step_size)
    clean, output = craft.forward(model, torch.cat([x, points])).split(len(x))
    gap = losses.margin(output, y)
    loss = criterion.plain(clean, y) + weight * functional.softplus(width - gap)
    loss = criterion.weighed(loss, output, y)
    return _told(loss, points, output, y, criterion)


@objective()
def grad_align(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    weight: float = 0.2,
    step_size: float = 1.25,
    criterion: Criterion = CROSS_ENTROPY,
    craft: Craft = PLAIN,
) -> Outcome:
    """`fgsm` + λ·(1 − cos(∇ₓu(x), ∇ₓu(x + η))): gradients that agree within the threat.

    u are the log-odds, whose slope has the direction of the cross-entropy's and does not vanish
    on confident samples; for regressors the squared error. A sample without a slope is left out.
    Costs a second derivative. Source: Andriushchenko and Flammarion (2020), there of the
    cross-entropy.
    """
    points = _crafted(model, x, y, threat, criterion, craft, 1, step_size)
    output = craft.forward(model, points)
    other = x + threat.sample(x, _tensor.fold(_tensor.keys(craft.keys, x), 1))
    here, there = (_differentiable_slope(model, p, y, criterion, craft) for p in (x, other))
    sloped = here.any(1) & there.any(1)
    apart = torch.where(sloped, 1 - functional.cosine_similarity(here, there, dim=1), 0.0)
    loss = criterion.weighed(criterion.plain(output, y) + weight * apart, output, y)
    return _told(loss, points, output, y, criterion)


def _diverging(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    craft: Craft,
    steps: int,
    step_size: float | None,
) -> Tensor:
    network = craft.network(model)
    with torch.no_grad(), evaluating(network):
        target = losses.two_columns(craft.forward(network, x, climbs=True)).softmax(1)
    size = step_size if step_size is not None else 1.25 if steps == 1 else 2.5 / steps
    start = craft.begin(x, threat)
    aim = Divergence(target)
    return ascend(model, x, y, threat, aim, start=start, steps=steps, step_size=size, craft=craft)


def _divergence(clean: Tensor, output: Tensor) -> Tensor:
    """KL(softmax(clean) ‖ softmax(output)) of each sample."""
    one, two = (losses.two_columns(z).log_softmax(1) for z in (clean, output))
    return (one.exp() * (one - two)).sum(1)


def _differentiable_slope(
    model: nn.Module, point: Tensor, y: Tensor, criterion: Criterion, craft: Craft
) -> Tensor:
    """∇ₓ of log-odds or squared error over its largest entry (n, d), with the weights' graph."""
    leaf = point.detach().requires_grad_()
    raised = losses.log_odds if criterion.classifies else losses.squared_error
    with statistics_held(model):
        value = raised(craft.forward(model, leaf), y)
    (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    rows = _tensor.flat(gradient)
    top = rows.detach().abs().amax(1, keepdim=True)
    return rows / torch.where(top > 0, top, 1)
