"""`unit_test`: whether an attack finds adversarial examples that were planted."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.svm import SVC
from torch import Tensor, nn

from robustlearn import _tensor
from robustlearn._tensor import column, flat
from robustlearn.attacks import ATTACKS
from robustlearn.errors import InputError, ModelError
from robustlearn.evaluate import draws
from robustlearn.evaluate.plans import PRESETS, plan
from robustlearn.evaluate.results import Estimate
from robustlearn.models import Model, TorchModel, wrap
from robustlearn.models import labels as labels_of
from robustlearn.threats import LpBall

INNER = 511  # points that stay on the side of the sample
ENDS = 64  # of the threat, of which the one farthest from them is planted
RADIUS = 0.9  # of the ball that they are drawn from, in units of ε
TIGHT = 0.9  # where between them and the planted point the boundary lies
FOUND, LUCKY, LEAST = 0.9, 0.5, 5  # shares that pass, and make a test void; tests that count
MANY = 8  # outputs that make a planted point separable as a rule

Head = tuple[Tensor, float]


@dataclass(frozen=True)
class UnitTest:
    """How many planted adversarial examples were found: by the attack, and by random search.

    ``planted`` of ``samples`` tests could be made: elsewhere no linear head separates the planted
    point from the inner ones.
    """

    attack: str
    samples: int
    planted: int
    found: int
    by_chance: int

    @property
    def passed(self) -> bool | None:
        """Whether the attack finds nine of ten; None if chance does too, or few were planted."""
        if self.planted < LEAST:
            return None
        if self.found < FOUND * self.planted:
            return False
        return True if self.by_chance <= LUCKY * self.planted else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, ready for JSON."""
        share = asdict(Estimate.proportion(self.found, self.planted)) if self.planted else None
        return {**asdict(self), "passed": self.passed, "share": share}

    def __str__(self) -> str:
        said = {True: "passed", False: "failed", None: "no verdict"}[self.passed]
        lines = [
            f"{said}: {self.attack} finds {self.found} of {self.planted} planted adversarial "
            f"examples, random search {self.by_chance} (tests for {self.samples} samples)"
        ]
        if self.passed is False:
            lines.append(
                "  robust accuracy measured with this attack is too high: more steps and "
                "restarts, another loss, attacks by scores, or a way around what hides the gradient"
            )
        if self.passed is None:
            lines.append("  too few tests could be made, or they are too easy to tell")
        return "\n".join(lines)


def unit_test(
    model: Any,
    x: Any,
    y: Any,
    threat: LpBall,
    *,
    attack: str | Callable[..., Tensor] = "pgd",
    features: str | nn.Module = "auto",
    samples: int = 32,
    queries: int = 200,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> UnitTest:
    """Plant adversarial examples in the model's own threat, and count which the attack finds.

    For each sample a head h(x') = ⟨w, features(x')⟩ + b replaces the last layer: it separates one
    random end of the threat (h > 0) from x and from random points and ends of the ball of radius
    0.9 ε (h < 0), so that an adversarial example exists for certain. An attack that misses more
    than one in ten does not measure robustness.

    Parameters
    ----------
    model : a `Model`, or anything that `robustlearn.wrap` takes.
    x, y : samples (N, *shape) and labels (N,); tests are made of random ones that the model gets
        right.
    threat : what the adversary may do.
    attack : what is tested: a name, with options as in ``"pgd:steps=100"``, or a function
        ``(model, x, y, threat) -> x_adv``.
    features : what the head reads. ``"outputs"`` tests all of the model, ``"last linear"`` (the
        input of its last `nn.Linear`) or a module of it (its input) what comes before; ``"auto"``
        is the outputs where there are at least 8 of them, and else the last linear layer.
    samples : tests to make.
    queries : random points that stand for chance; half of them ends of the threat.
    seed : of everything random.
    progress : called as ``progress(stage, done, total)``.

    Returns
    -------
    A `UnitTest`. What counts as found was measured again, and lies in the threat.

    Notes
    -----
    Source: Zimmermann, Brendel, Tramèr and Carlini (2022), Increasing Confidence in Adversarial
    Robustness Evaluations. The head is the hard-margin separator; its boundary lies nine tenths of
    the way from the inner points to the planted one, which keeps random search from finding it.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(50, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))
    >>> x = torch.rand(8, 50)
    >>> unit_test(net, x, net(x).argmax(1), LpBall(float("inf"), 0.05)).passed
    True
    """
    model = wrap(model)
    name, run = _chosen(attack)
    points = threat.cast(_tensor.as_tensor(x).cpu(), model.dtype)
    targets = labels_of(model, points, y)
    if model.task != "classification":
        raise InputError("the unit test by binarisation is for classifiers")
    with model.session(), torch.no_grad():
        order = draws.shuffled(seed, torch.arange(len(points)), use=1)
        rows = draws.right(model, points, targets, order, samples)
        layer = _layer(model, features)
        planted = found = lucky = 0
        for done, row in enumerate(rows.tolist()):
            if progress is not None:
                progress("unit test", done, len(rows))
            one = points[row : row + 1].to(model.device)
            held = threat.select(torch.tensor([row]))
            key = _tensor.fold(torch.tensor([seed], device=one.device), row)
            binary = _planted(model, layer, one, held, key)
            if binary is None:
                continue
            planted += 1
            found += _breaks(binary, run, one, held)
            lucky += _by_chance(binary, one, held, _tensor.fold(key, 2), queries)
    if progress is not None:
        progress("unit test", len(rows), len(rows))
    return UnitTest(name, len(rows), planted, found, lucky)


def _chosen(attack: str | Callable[..., Tensor]) -> tuple[str, Callable[..., Tensor]]:
    if callable(attack):
        return getattr(attack, "__name__", "attack"), attack
    if attack in PRESETS:
        raise InputError(f"one attack is tested at a time; {attack} is a preset: name an attack")
    (step,) = plan([attack])
    if step.scope != "all":
        raise InputError(f"{step.label}: an attack that is tested meets all; leave out the scope")
    return step.label, lambda *given: ATTACKS[step.name].function(*given, **step.options)


# ---------------------------------------------------------------------- what the head reads


def _layer(model: Model, features: str | nn.Module) -> nn.Module | None:
    """Return the module whose input the head reads; None for the outputs of the model."""
    if isinstance(features, nn.Module):
        return features
    if features not in ("auto", "outputs", "last linear"):
        raise InputError(f"features must be auto, outputs or last linear; got {features!r}")
    if features == "outputs" or (features == "auto" and int(model.num_classes or 2) >= MANY):
        return None
    modules = model.module.modules() if isinstance(model, TorchModel) else ()
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    if not linear and features == "last linear":
        raise InputError(f"{model.name} has no linear layer: say features='outputs'")
    return linear[-1] if linear else None


class _Features:
    """What the head reads, (n, *shape) -> (n, d)."""

    def __init__(self, model: Model, layer: nn.Module | None) -> None:
        self.model, self.layer = model, layer

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of a batch."""
        if self.layer is None:
            return self.model(x)
        seen: list[Tensor] = []
        hook = self.layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            self.model.raw(x)
        finally:
            hook.remove()
        return flat(seen[-1])


class _Readout(nn.Module):
    """A network with a head in place of its last layer."""

    def __init__(self, model: TorchModel, layer: nn.Module | None, head: Head) -> None:
        super().__init__()
        self.net, (self.weight, self.bias) = model.module, head
        self.features = _Features(model, layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return (0, h(x)), (n, 2)."""
        return _scores(self.features(x), (self.weight, self.bias))


def _scores(features: Tensor, head: Head) -> Tensor:
    value = features @ head[0].to(features) + head[1]
    return torch.stack([torch.zeros_like(value), value], 1)


def _binary(model: Model, layer: nn.Module | None, head: Head) -> Model:
    """Return the model with the head: class 1 is the side of the planted point."""
    if isinstance(model, TorchModel):
        return wrap(_Readout(model, layer, head), task="classification", output="logits")

    def scores(x: Tensor) -> Tensor:
        return _scores(model(torch.as_tensor(x)), head)

    return wrap(scores, task="classification", output="logits")


# ---------------------------------------------------------------------- one test


def _planted(
    model: Model, layer: nn.Module | None, x: Tensor, threat: LpBall, key: Tensor
) -> Model | None:
    """Return the model with a head that separates one random end of the threat from x.

    x (1, *shape), key (1,). None if there is no such head, or none in the model's arithmetic.
    """
    features = _Features(model, layer)
    inner = torch.cat([x, _inner(x, threat, key)])
    several = x.expand(ENDS, *x.shape[1:])
    keys = _tensor.fold(key.expand(ENDS), torch.arange(ENDS, device=key.device))
    ends = _ends(_for_each(threat, ENDS), several, _tensor.fold(keys, 1))
    known, far = (features(points).double().cpu().numpy() for points in (inner, ends))
    farthest = int(_distance(known, far).argmax())
    head = _head(known, far[farthest])
    if head is None:
        return None
    binary = _binary(model, layer, head)
    pair = torch.cat([x, ends[farthest, None]])
    return binary if binary(pair).argmax(1).tolist() == [0, 1] else None


def _inner(x: Tensor, threat: LpBall, key: Tensor) -> Tensor:
    """Return random points and ends of the threat at 0.9 ε, (INNER, *shape)."""
    keys = _tensor.fold(key.expand(INNER), torch.arange(INNER, device=key.device))
    around = x.expand(INNER, *x.shape[1:])
    close = _for_each(threat, INNER)
    close = replace(close, eps=close.eps * RADIUS)
    drawn = close.restrict(around, close.sample(around, keys))
    ends = _ends(close, around, _tensor.fold(keys, 1))
    half = torch.arange(INNER, device=x.device) % 2 == 0
    return torch.where(column(half, drawn), drawn, ends)


def _distance(known: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return Mahalanobis distances of points (m, d) from the rows of ``known`` (n, d)."""
    centred = known - known.mean(0)
    spread = centred.T @ centred / len(known)
    spread += (1e-6 * np.trace(spread) / len(spread) + 1e-300) * np.eye(len(spread))
    away = points - known.mean(0)
    return (away * np.linalg.solve(spread, away.T).T).sum(1)


def _head(known: np.ndarray, end: np.ndarray) -> Head | None:
    """Separate the features of one point from those of others; None if that cannot be."""
    whole = np.concatenate([known, end[None]])
    shift, unit = known.mean(0), known.std(0)
    unit = np.where(unit > 0, unit, 1.0)
    rows = (whole - shift) / unit
    if not np.isfinite(rows).all() or (rows[-1] == rows[0]).all():
        return None
    last = np.arange(len(rows)) == len(known)
    slope = SVC(kernel="linear", C=1e6, max_iter=100_000).fit(rows, last).coef_[0]
    score = rows @ slope
    gap = score[-1] - score[:-1].max()
    if not gap > 1e-3 * (score[:-1].max() - score[:-1].min()):
        return None
    level = score[:-1].max() + TIGHT * gap
    weight = torch.as_tensor(slope / unit / gap)  # the planted point gets 1 − TIGHT
    return weight, float(-(level + (shift / unit) @ slope) / gap)


def _breaks(binary: Model, attack: Callable[..., Tensor], x: Tensor, threat: LpBall) -> bool:
    """Tell whether the attack finds an allowed point of class 1."""
    y = torch.zeros(1, dtype=torch.int64, device=x.device)
    try:
        x_adv = attack(binary, x, y, threat)
    except ModelError:  # no gradient flows: nothing is found
        return False
    return bool(threat.contains(x, x_adv)) and bool(binary(x_adv).argmax(1) == 1)


def _by_chance(binary: Model, x: Tensor, threat: LpBall, key: Tensor, queries: int) -> bool:
    """Tell whether one of some random points is of class 1."""
    keys = _tensor.fold(key.expand(queries), torch.arange(queries, device=key.device))
    around = x.expand(queries, *x.shape[1:])
    wide = _for_each(threat, queries)
    half = queries // 2
    inside = _for_each(threat, half)
    drawn = inside.restrict(around[:half], inside.sample(around[:half], keys[:half]))
    ends = _ends(_for_each(wide, queries - half), around[half:], keys[half:])
    return bool((binary(torch.cat([drawn, ends])).argmax(1) == 1).any())


def _ends(threat: LpBall, x: Tensor, keys: Tensor) -> Tensor:
    """Return the ends of the threat in random directions, (n, *shape)."""
    direction = _tensor.normal(keys, tuple(x.shape[1:]), x.dtype)
    return threat.restrict(x, threat.argmax(direction, x))


def _for_each(threat: LpBall, n: int) -> LpBall:
    """Return the threat to one sample as the threat to n copies of it."""
    return threat.select(torch.zeros(n, dtype=torch.int64))
