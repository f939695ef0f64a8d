"""Attacks that follow the gradient of a loss: one step, or many with projection."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from robustlearn import _tensor, losses
from robustlearn._tensor import flat
from robustlearn.attacks.ascent import (
    Along,
    Path,
    Rows,
    best_of,
    confirmed,
    directions,
    sharp,
    stepper,
    unit,
)
from robustlearn.attacks.base import attack
from robustlearn.errors import InputError
from robustlearn.models import Model
from robustlearn.registry import NOT_NEGATIVE
from robustlearn.threats import LpBall

PATCHES = 4  # a side of the grid from which images start

# the points where a restart starts, from its number, x, the threat and the rows of x
Start = Callable[[int, Tensor, LpBall, Tensor], Tensor]


@attack(needs="gradient")
def fgsm(model: Model, x: Tensor, y: Tensor, threat: LpBall, *, loss: Any = None) -> Tensor:
    """One gradient, then the largest step that the threat allows along it.

    x_adv = x + argmax over the threat of ⟨∇ₓ loss, δ⟩, for p = ∞ x + ε·sign(∇ₓ loss).

    Parameters
    ----------
    x : (n, *shape); y : (n,) labels, targets of the prediction, or of a targeted loss.
    loss : name, `Loss` or function; by default the margin (squared error of a regressor).

    Returns
    -------
    (n, *shape), in the threat without tolerance. Cost: one gradient a sample.

    Notes
    -----
    Source: Goodfellow, Shlens and Szegedy (2015), there with cross-entropy and p = ∞.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> threat = LpBall(math.inf, 0.1)
    >>> fgsm(net, torch.zeros(1, 2), torch.tensor([0]), threat).abs()
    tensor([[0.1000, 0.1000]])
    """
    chosen = sharp(losses.get(loss, str(model.task)))
    gradient, _, _ = model.gradient(x, y, chosen)
    return threat.restrict(x, threat.argmax(gradient, x))


@attack(needs="gradient", norms="1, 2, inf", momentum=NOT_NEGATIVE)
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 40,
    step_size: float | None = None,
    schedule: str = "cosine",
    momentum: float = 0.0,
    random_start: bool = True,
    starts: str = "uniform",
    restarts: int = 1,
    stop_when_broken: bool = True,
    precision: str | None = None,
    generator: torch.Generator | Tensor | int = 0,
) -> Tensor:
    """Projected gradient ascent from random starts; the best point on the path counts.

    δ ← project(δ + α·steepest(m)), m ← momentum·m + ∇/‖∇‖₁, where steepest(m) is the step of
    length ε in the threat's norm that gains most without pushing at a wall.

    Parameters
    ----------
    x, y : as for `fgsm`.
    loss : name, `Loss` or function. By default a classifier is attacked by its log-odds in the
        first half of the steps and by its margin in the second: all rivals at first, then the
        closest; a regressor by its squared error.
    steps : gradients a sample and restart; the last point costs one more forward pass.
    step_size : the first α, in units of ε; by default 2, and 4 for p = 1.
    schedule : ``"constant"``, or ``"cosine"``: at step k of n α is scaled by (1 + cos(πk/n))/2,
        and the last step, which would be of no length, goes to the argmax of the threat along
        the last gradient. On a linear model that is the exact worst case.
    random_start : start from `LpBall.sample`; if False only restarts after the first do. The
        first run of a regressor starts at x, where the sign of the error is the better guess.
    starts : ``"uniform"`` in the threat; or ``"mixed"``: every second run starts at the threat's
        argmax along random signs, for images constant on the patches of a coarse grid. Ascents
        from there end elsewhere, so that many runs find more.
    restarts : runs; each goes on with the samples that stand, and the best is kept. The run
        after the first heads for the closest rival class, the next for the second closest, and
        so on (not for targeted losses and those of your own); with a regressor they head up and
        down in turn: an ascent seldom changes its direction on the way.
    stop_when_broken : drop a sample from the batch once it is misclassified; if False go on to
        the largest loss.
    precision : as for `Model.gradient`; a sample counts as broken only where full precision
        agrees, and the best points are measured again in it.
    generator : as for `LpBall.sample`. A seed or keys make the result independent of the batch.

    Returns
    -------
    (n, *shape), in the threat without tolerance; of no smaller loss than any point on its path,
    but for the rounding of `LpBall.restrict`.

    Notes
    -----
    Source: Madry et al. (2018); for the rival classes Gowal et al. (2019). Log-odds and margin
    keep their gradient where the logits are saturated and that of cross-entropy vanishes; so
    cross-entropy is climbed through the log-odds, which have the same order and directions.

    For p = ∞ and a constant step without momentum a path that is back at a point it has been at
    goes round from there on: such a sample is stopped, and the result is the same.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> threat = LpBall(2, 0.1, lower=0.0, upper=1.0)
    >>> x_adv = pgd(net, torch.full((1, 2), 0.5), torch.tensor([0]), threat)
    >>> bool(threat.contains(torch.full((1, 2), 0.5), x_adv))
    True
    """
    if schedule not in ("cosine", "constant"):
        raise InputError(f"schedule must be cosine or constant; got {schedule!r}")
    if starts not in ("uniform", "mixed"):
        raise InputError(f"starts must be uniform or mixed; got {starts!r}")
    final = sharp(losses.get(loss, str(model.task)))
    first = (4.0 if threat.p == 1 else 2.0) if step_size is None else step_size
    plan = _Plan(
        final=final,
        climbs=_climbs(loss, final, steps),
        sizes=_sizes(first, steps, schedule),
        momentum=momentum,
        stop=stop_when_broken,
        precision=precision,
    )
    random_from = 0 if random_start and model.task == "classification" else 1
    keys = _tensor.keys(generator, x)

    def start(restart: int, x: Tensor, threat: LpBall, rows: Tensor) -> Tensor:
        if restart < random_from:
            return x
        held = _tensor.fold(keys[rows], restart)
        patched = starts == "mixed" and restart % 2 == 1
        return x + (_patches(threat, x, held) if patched else threat.sample(x, held))

    return _run(model, x, y, threat, plan, restarts, start)


@attack(needs="gradient", norms="1, 2, inf", decay=NOT_NEGATIVE)
def mi_fgsm(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    *,
    loss: Any = None,
    steps: int = 10,
    decay: float = 1.0,
    restarts: int = 1,
    stop_when_broken: bool = True,
    precision: str | None = None,
) -> Tensor:
    """Steps of ε/n from x along the gathered gradient, which carries over to other models.

    m ← decay·m + ∇/‖∇‖₁, δ ← project(δ + steepest(m)/n), for p = ∞ x + δ + (ε/n)·sign(m).

    Parameters
    ----------
    x, y, loss, stop_when_broken, precision : as for `pgd`.
    steps : n, gradients a sample.
    decay : weight of the gradients before.
    restarts : runs; after the first each heads for the next closest rival class, as in `pgd`.
        All start at x, from where n steps reach all that the threat allows.

    Returns
    -------
    (n, *shape), in the threat without tolerance; the best point on the path.

    Notes
    -----
    Source: Dong et al. (2018), there with cross-entropy, 10 steps and decay 1.

    Examples
    --------
    >>> net = torch.nn.Linear(2, 2)
    >>> threat = LpBall(math.inf, 0.1)
    >>> mi_fgsm(net, torch.zeros(1, 2), torch.tensor([0]), threat, stop_when_broken=False).abs()
    tensor([[0.1000, 0.1000]])
    """
    final = sharp(losses.get(loss, str(model.task)))
    plan = _Plan(
        final=final,
        climbs=_climbs(loss, final, steps),
        sizes=_sizes(1 / steps, steps, "constant"),
        momentum=decay,
        stop=stop_when_broken,
        precision=precision,
    )
    return _run(model, x, y, threat, plan, restarts, lambda restart, x, threat, rows: x)


@dataclass(frozen=True)
class _Plan:
    """What every run of an ascent does.

    ``climbs`` are what each step follows (the goal of a path, if it has one, comes first), and
    ``final`` is what counts. A size of None is the step to the argmax of the threat.
    """

    final: losses.Loss
    climbs: list[losses.Loss]
    sizes: list[float | None]
    momentum: float
    stop: bool
    precision: str | None


def _climbs(loss: Any, final: losses.Loss, steps: int) -> list[losses.Loss]:
    """Return the loss of each step: by default the log-odds first and the margin then."""
    if loss is None and final is losses.margin:
        return [losses.soft_margin] * (steps // 2) + [final] * (steps - steps // 2)
    return [final] * steps


def _sizes(first: float, steps: int, schedule: str) -> list[float | None]:
    if schedule == "constant":
        return [first] * steps
    return [*(first * (1 + math.cos(math.pi * k / steps)) / 2 for k in range(steps - 1)), None]


def _run(
    model: Model,
    x: Tensor,
    y: Tensor,
    threat: LpBall,
    plan: _Plan,
    restarts: int,
    start: Start,
) -> Tensor:
    """Ascend from the starting points of each restart, and return the best points."""
    goals = directions(model, x, y, plan.final) if restarts > 1 else []

    def run(restart: int, rows: Tensor) -> list[Path]:
        held, around = threat.select(rows), x[rows]
        first = start(restart, around, held, rows)
        goal = goals[(restart - 1) % len(goals)][rows] if restart and goals else None
        return _climb(model, Path(rows, around, y[rows], first, goal), held, plan)

    return threat.enclose(x, best_of(x, restarts, run))


def _patches(threat: LpBall, x: Tensor, keys: Tensor) -> Tensor:
    """Return the threat's argmax along random signs, for images one for each patch of a grid."""
    shape = tuple(x.shape[1:])
    if len(shape) != 3:
        return threat.argmax(_tensor.uniform(keys, shape, x.dtype) - 0.5, x)
    signs = (_tensor.uniform(keys, (shape[0], PATCHES, PATCHES), x.dtype) - 0.5).sign()
    return threat.argmax(functional.interpolate(signs, shape[1:], mode="nearest"), x)


def _climb(model: Model, path: Path, threat: LpBall, plan: _Plan) -> list[Path]:
    """Ascend; return the samples in the groups in which they left."""
    left: list[Path] = []
    step, walk = stepper(threat, path.x), _Walk(path, threat, plan)
    for climb, size in zip(plan.climbs, plan.sizes, strict=True):
        goal = climb if path.goal is None else Along(path.goal, plan.final)
        seen = threat.land(path.x, path.point)
        gradient, value, output = model.gradient(seen, path.y, goal, plan.precision)
        _record(model, path, seen, plan, value, output, plan.precision)
        leaves = path.broken
        if walk.circles and climb is plan.climbs[-1]:
            leaves = leaves | walk.returned(path.point)
        if bool(leaves.any()):
            going = (~leaves).nonzero().squeeze(1)
            left.append(path.part(leaves))
            path, walk, gradient = path.part(going), walk.part(going), gradient[going]
            if len(going) == 0:
                break
            threat = threat.select(going)
            step = stepper(threat, path.x)
        path.point = step(path.point, walk.push(gradient), size)
    if plan.precision is not None:
        for done in (*left, path) if len(path.rows) else left:
            done.measure(model, plan.final, stop=plan.stop)
    if len(path.rows):
        seen = threat.land(path.x, path.point)
        output = model(seen)
        _record(model, path, seen, plan, plan.final.look(output, path.y)[0], output, None)
    return [*left, path]


def _record(
    model: Model,
    path: Path,
    seen: Tensor,
    plan: _Plan,
    value: Tensor,
    output: Tensor,
    precision: str | None,
) -> None:
    """Keep the better points seen; tell which samples are broken, if that is to stop them."""
    broken = None
    if plan.stop:
        margin = plan.final is losses.margin  # its sign tells
        broken = value > 0 if margin else plan.final.broken(output, path.y)
        broken = path.broken | confirmed(model, seen, path.y, plan.final, broken, precision)
    path.record(seen, value, broken)


class _Walk(Rows):
    """What an ascent remembers of the way so far: the velocity, and a point to come back to."""

    def __init__(self, path: Path, threat: LpBall, plan: _Plan) -> None:
        self.momentum = plan.momentum
        self.velocity = torch.zeros_like(path.x) if plan.momentum else None
        constant = len({*plan.sizes}) == 1 and None not in plan.sizes
        self.circles = constant and math.isinf(threat.p) and not plan.momentum
        self.anchor = torch.full_like(path.x, torch.nan)
        self.age, self.term = 0, 1

    def push(self, gradient: Tensor) -> Tensor:
        """Return the gradient, or with momentum a copy of the velocity that it adds to."""
        if self.velocity is None:
            return gradient
        self.velocity = self.momentum * self.velocity + unit(gradient)
        return self.velocity.clone()

    def returned(self, point: Tensor) -> Tensor:
        """Tell which samples are back at the remembered point, (n,).

        The point is renewed after 1, 2, 4, … steps, so that a circle of any length is found.
        Source: Brent (1980).
        """
        back = flat(point == self.anchor).all(1)
        self.age += 1
        if self.age == self.term:
            self.anchor, self.age, self.term = point, 0, 2 * self.term
        return back
