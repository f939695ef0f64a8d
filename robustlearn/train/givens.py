"""What `fit` is given: judged, cast and split before the first step."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.loop import Samples
from robustlearn.models import Model, TorchModel, check_range, wrap
from robustlearn.threats import LpBall
from robustlearn.train.objectives import OBJECTIVES, Criterion

MOST_HELD_OUT = 2000
LOOKED_AT = 8  # samples that the network is tried on
APART = "held out, apart from those that chose the epoch"
CHOSE = "held out, those that chose the epoch: biased upwards"
Held = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Givens:
    """Data in the types that training computes in.

    Attributes
    ----------
    samples : what is trained on.
    choosing : what the best epoch is chosen on; ``telling`` what the report is about, and
        ``told`` its name there.
    """

    samples: Samples
    choosing: Held | None
    telling: Held | None
    told: str
    criterion: Criterion


def network_of(net: Any) -> nn.Module:
    """Return the torch network itself, which may be wrapped, if it can be trained."""
    if type(net) is TorchModel and net.source is net.module:
        net = net.module
    if isinstance(net, Model) or not isinstance(net, nn.Module):
        kind = net.name if isinstance(net, Model) else type(net).__name__
        raise InputError(f"training needs a torch network, and {kind} is none: give an nn.Module")
    parameters = list(net.parameters())
    if any(is_lazy(parameter) for parameter in parameters):
        raise InputError(
            f"{type(net).__name__} has lazy layers, whose weights have no shape yet: send a batch "
            "through it first"
        )
    if not any(parameter.requires_grad for parameter in parameters):
        raise InputError(f"{type(net).__name__} has no parameter to train: give one that has")
    return net


def judged(net: nn.Module, criterion: Criterion) -> Model:
    """Wrap a network for what the criterion takes its outputs for: logits, or predictions."""
    task = "classification" if criterion.classifies else "regression"
    return wrap(net, task=task, output="logits")  # type: ignore[arg-type]


def check_threat(threat: Any, objective: str, *, validated: bool) -> None:
    """Raise an InputError for a threat that there is no training against."""
    if not isinstance(threat, LpBall):
        raise InputError(
            f"a threat is expected, as robustlearn.LpBall(math.inf, 0.1); got {threat!r}"
        )
    if isinstance(threat.eps, Tensor):
        raise InputError("give one budget for all samples: those held out have none of their own")
    if threat.p not in (1, 2, math.inf) and (validated or OBJECTIVES[objective].facts["climbs"]):
        raise InputError(
            f"training and its validation walk by parts of ε and project, which is known "
            f"for p = 1, 2 and ∞; got p = {threat.p:g}: train for one of these, and evaluate for "
            "the other"
        )


def givens(
    net: nn.Module,
    train: Any,
    validation: Any,
    test: Any,
    threat: LpBall,
    criterion: Criterion | str | None,
    seed: int,
) -> Givens:
    """Check all that was given, and put it into the types that training computes in."""
    dtype = next(net.parameters()).dtype
    whole = _paired(train, "train", threat, net) if _is_pair(train) else None
    samples = Samples.of(train if whole is None else whole).typed(dtype)
    x, y = _first(samples, threat, checked=whole is not None)
    output = _output(net, x)
    judge = _criterion(criterion, samples, y, output)
    _check_output(net, x, output, judge)
    choosing, telling = (
        None
        if data is None or isinstance(data, Real)
        else _typed(_paired(_fetched(data, dtype), name, threat, net), judge, net)
        for name, data in (("validation", validation), ("test", test))
    )
    told = CHOSE if test is None else "test"
    if whole is not None:
        samples = Samples(_typed(whole, judge, net))
    elif judge.classifies:
        samples = samples.typed(dtype, classes=True)
    if isinstance(validation, Real):
        held = share("validation", float(validation))
        samples, choosing, rest = _split(samples, held, seed, halved=test is None)
        if choosing is not None:
            choosing = _typed(_paired(choosing, "train", threat, net), judge, net)
        if rest is not None:
            telling, told = _typed(_paired(rest, "train", threat, net), judge, net), APART
    if judge.classifies:
        labels = [*samples.labels(), *(pair[1] for pair in (choosing, telling) if pair is not None)]
        _check_labels(judged(net, judge), x, labels)
    return Givens(samples, choosing, choosing if telling is None else telling, told, judge)


def fingerprint(held: Held | None) -> str | None:
    """Return a hash of held-out samples."""
    if held is None:
        return None
    digest = hashlib.sha256()
    for values in held:
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def in_full(threat: LpBall) -> dict[str, Any]:
    """Return a threat as plain values that differ if the sets do; arrays are hashed."""
    return {
        name: _hashed(value) if isinstance(value, list) else value
        for name, value in threat.describe().items()
    }


def _hashed(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def share(name: str, value: float) -> float:
    """Return a share of a whole."""
    if not 0 <= value < 1:
        raise InputError(f"{name} is a share, at least 0 and under 1; got {value:g}")
    return value


# ---------------------------------------------------------------------- what the network gives


def _output(net: nn.Module, x: Tensor) -> Tensor:
    """Return the raw outputs (n, K), as in evaluation."""
    model = wrap(net, task="classification", output="logits")
    with model.session(), torch.no_grad():
        output = model.raw(x)
    return output.reshape(len(x), -1)


def _criterion(
    chosen: Criterion | str | None, samples: Samples, first: Tensor, output: Tensor
) -> Criterion:
    """Return the criterion: by default cross-entropy for classes, the squared error for targets.

    Whole numbers in a floating type are classes of a network of several outputs, and 0 and 1
    those of a single logit.
    """
    if isinstance(chosen, Criterion):
        return chosen
    if chosen is not None:
        return Criterion(chosen)
    labels = samples.labels() or [first]
    if not any(y.is_floating_point() for y in labels):
        return Criterion("cross_entropy")
    single = output.shape[1] == 1
    classes = all(_whole(y) and (not single or bool((y * (y - 1) == 0).all())) for y in labels)
    return Criterion("cross_entropy" if classes else "squared")


def _check_output(net: nn.Module, x: Tensor, output: Tensor, criterion: Criterion) -> None:
    """Raise an InputError for outputs that the criterion would misunderstand."""
    name = type(net).__name__
    if not criterion.classifies:
        if output.shape[1] != 1:
            raise InputError(
                f"{name} predicts {output.shape[1]} targets, and {criterion.kind} is for one: give "
                "a network with one output, or class numbers as y"
            )
        return
    head = _head(net, x)
    if head is not None:
        raise InputError(
            f"{name} ends in {head}, and training takes its outputs for logits: remove that layer"
        )
    shares = bool(((output >= 0) & (output <= 1)).all())
    if output.shape[1] > 1 and shares and bool(((output.sum(1) - 1).abs() < 1e-3).all()):
        raise InputError(
            f"{name} returns probabilities, and training takes its outputs for logits: return "
            "what stands before the softmax"
        )


def _head(net: nn.Module, x: Tensor) -> str | None:
    """Return the name of the softmax or sigmoid whose output is the network's."""
    ends: list[tuple[str, Tensor]] = []
    hooks = [
        part.register_forward_hook(lambda m, i, out: ends.append((type(m).__name__, out)))
        for part in net.modules()
        if isinstance(part, nn.Softmax | nn.Sigmoid)
    ]
    try:
        output = _output(net, x)
    finally:
        for hook in hooks:
            hook.remove()
    last = ends[-1:]
    same = [name for name, end in last if torch.equal(end.reshape(len(x), -1), output)]
    return same[0] if same else None


def _check_labels(model: Model, x: Tensor, labels: Sequence[Tensor]) -> None:
    """Raise an InputError unless the labels that are in memory are classes of the network."""
    with model.session(), torch.no_grad():
        model(x)
    for y in labels:
        check_range(model, y)


# ---------------------------------------------------------------------- what the data holds


def _is_pair(data: Any) -> bool:
    return isinstance(data, tuple | list)


def _fetched(data: Any, dtype: torch.dtype) -> Any:
    """Return all of a data set as a pair; what is one already stays as it is."""
    if not isinstance(data, Dataset | DataLoader | Samples):
        return data
    samples = Samples.of(data).typed(dtype)
    parts = torch.arange(len(samples)).split(MOST_HELD_OUT)
    x, y = zip(*samples.fetch(list(parts), 0, 0), strict=True)
    return torch.cat(x), torch.cat(y)


def _paired(data: Any, name: str, threat: LpBall, net: nn.Module) -> Held:
    """Return x, in the threat and in the network's dtype, and y (n,)."""
    if not _is_pair(data) or len(data) != 2:
        what = f"{len(data)} parts" if _is_pair(data) else type(data).__name__
        raise InputError(f"{name} is a pair (x, y) of arrays; got {what}")
    if data[1] is None:
        raise InputError(f"{name} has no labels or targets: give a pair (x, y)")
    x, y = _tensor.as_tensor(data[0]), _column(_tensor.as_tensor(data[1], "y"), name)
    dtype = next(net.parameters()).dtype
    if len(x) != len(y):
        raise InputError(f"{name}: x has {len(x)} samples, y has {len(y)}; expected as many")
    _tensor.check_points(x)
    if y.is_floating_point() and not bool(y.isfinite().all()):
        raise InputError(f"y of {name} holds NaN or infinity; drop those samples")
    if x.dtype is not dtype:
        return threat.cast(x, dtype), y
    threat.check(x)
    return x, y


def _column(y: Tensor, name: str) -> Tensor:
    if y.dim() == 2 and y.shape[1] == 1:
        return y[:, 0]
    if y.dim() != 1:
        raise InputError(
            f"y of {name} has shape {tuple(y.shape)}; expected one class or target a sample, (n,): "
            "of one-hot labels give y.argmax(1)"
        )
    return y


def _whole(y: Tensor) -> bool:
    return bool((y == y.round()).all()) if y.is_floating_point() else True


def _typed(pair: Held, criterion: Criterion, net: nn.Module) -> Held:
    """Return y as classes (int64), or as targets in the network's dtype."""
    x, y = pair
    if not criterion.classifies:
        return x, y.to(next(net.parameters()).dtype)
    if not _whole(y):
        raise InputError(
            f"{criterion.kind} needs class numbers, and y holds fractions like "
            f"{float(y[y != y.round()][0]):g}: give classes, or criterion='squared'"
        )
    return x, y.long()


def _first(samples: Samples, threat: LpBall, *, checked: bool) -> Held:
    """Return some samples, and check all that are in memory against the threat."""
    some = min(LOOKED_AT, len(samples))
    count = some if checked or not samples.labels() else len(samples)
    x, y = next(samples.fetch([torch.arange(count)], 0, 0))
    if y.dim() != 1:
        raise InputError(
            f"a batch of y has shape {tuple(y.shape)}; expected one class or target a sample, (n,)"
        )
    threat.check(x)
    return x[:LOOKED_AT], y[:LOOKED_AT]


def _split(
    samples: Samples, held: float, seed: int, *, halved: bool
) -> tuple[Samples, Held | None, Held | None]:
    """Return what is trained on, what chooses, and what tells: None where there is too little."""
    count = min(MOST_HELD_OUT, int(held * len(samples)))
    if count == 0:
        return samples, None, None
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    cut = -(-count // 2) if halved else count
    choosing, telling = order[:cut].sort().values, order[cut:count].sort().values
    kept, (x, y) = samples.split(torch.cat([choosing, telling]))
    return kept, (x[:cut], y[:cut]), (x[cut:], y[cut:]) if count > cut else None
