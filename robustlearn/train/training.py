"""From a fragile network to a robust one: data, game, loop, and the figure at the end."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn.errors import InputError
from robustlearn.evaluate import Report, evaluate
from robustlearn.loop import History, Moment, Samples, play
from robustlearn.models import check_range, wrap
from robustlearn.registry import NOT_NEGATIVE, POSITIVE, check_options
from robustlearn.report import write_training
from robustlearn.tabular import Tabular
from robustlearn.threats import LpBall
from robustlearn.train.game import RobustGame
from robustlearn.train.memory import Memory
from robustlearn.train.objectives import OBJECTIVES, Criterion, options_of
from robustlearn.train.validation import Standing, validate

FIGURE = "robust"  # what decides which epoch is the best
KEPT, FRESH = "pgd_at:steps=1:step_size=0.5", "pgd_at:steps=2"  # see `fit`
MOST_HELD_OUT = 1000
LOOKED_AT = 8  # samples, to tell whether a data set draws them anew
ON_OVERFITTING = ("warn", "rollback")
Held = tuple[Tensor, Tensor]


@dataclass(eq=False)
class TrainingResult:
    """A trained network, how it came about, and what it is worth.

    Attributes
    ----------
    model : the network with the weights of the best epoch (their running mean, if ``ema``).
    history : rows per epoch; see `robustlearn.loop.History`.
    report : the two-sided figure on the samples that were held out; None if not asked for.
    settings : what training was asked for, as plain values.
    """

    model: nn.Module
    history: History
    report: Report | None
    settings: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return what training did as plain data: what is in training.json."""
        return {
            "model": type(self.model).__name__,
            "settings": self.settings,
            "rows": self.history.rows,
            "best": self.history.best,
            "stopped": self.history.stopped,
            "evaluated": self.report is not None,
        }

    def save(self, folder: str | Path) -> Path:
        """Write training.json and training.html, and the report of the evaluation beside it."""
        if self.report is not None:
            self.report.save(folder)
        return write_training(self.document(), Path(folder))

    def __str__(self) -> str:
        rows, best = self.history.rows, self.history.best
        seconds = sum(row["seconds"] for row in rows)
        lines = [f"{len(rows)} epochs in {seconds:.0f} s, {self.history.stopped}"]
        if best is not None and rows[best]["validation"]:
            figures = ", ".join(f"{k} {v:.3g}" for k, v in rows[best]["validation"].items())
            lines.append(f"best epoch {best + 1}: {figures}")
        return "\n".join([*lines, *([] if self.report is None else [str(self.report)])])


def fit(
    net: nn.Module,
    train: Any,
    threat: LpBall,
    *,
    objective: str | None = None,
    validation: Any = 0.1,
    epochs: int = 30,
    batch_size: int | None = None,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "one_cycle",
    ramp: float = 0.5,
    memory: bool | str | Path = True,
    awp: float = 0.0,
    criterion: Criterion | str | None = None,
    on_overfitting: str = "warn",
    seed: int = 0,
    out: str | Path | None = None,
    attacks: str | None = "standard",
    progress: Callable[[Moment], None] | None = None,
    **options: Any,
) -> TrainingResult:
    """min over weights of the mean over samples of max over the threat of a loss.

    Parameters
    ----------
    net : trained in place; ends with the weights of the best epoch.
    train : (x, y) as arrays or tensors, a torch ``Dataset``, a ``DataLoader``, or `loop.Samples`
        (weights of classes, extra data, augmentation).
    threat : what the adversary may do.
    objective : name of an objective with its options, as ``"trades:beta=6:steps=3"``; they are
        `robustlearn.train.OBJECTIVES`. By default ``"pgd_at"`` with one step of ε/2 where
        perturbations are kept, and with two steps of 1.25ε where they are not.
    validation : (x, y) to choose the best epoch on; or the share of ``train`` to hold out
        for that, at most 1,000 samples; or None.
    batch_size : 64 by default: small batches do better than large ones at equal cost.
    optimizer : ``"adamw"``, ``"sgd"`` (Nesterov, momentum 0.9), or ``parameters -> Optimizer``.
    schedule, seed, out, **options : as for `robustlearn.loop.play` (resume, patience, precision,
        compile, ema, clip, accumulate, trackers, on_nonfinite, save_every).
    ramp : share of the steps during which ε grows to its full size; without it training at a
        large ε may stay at chance.
    memory : whether each sample's perturbation of the epoch before is where the next ascent
        starts; the name of a file keeps them on disk, for one process. Not with augmentation,
        nor where features move in whole steps, which would round the next step away;
        and for regressors an ascent always starts at x, where the sign of the error is right.
    awp : γ of the adversarial weight perturbation; 0 for none.
    criterion : ``"cross_entropy"``, ``"squared"``, ``"huber"`` or a `Criterion`; by default the
        first for whole labels and the second for others.
    on_overfitting : when a single step finds little that stands under attack, warn; or roll back
        to the best weights and go on with four steps an ascent.
    attacks : of the evaluation at the end on the samples held out; None for none.

    Returns
    -------
    TrainingResult. The figures of its rows are upper bounds from a cheap attack, to choose an
    epoch by; that of its report is the one to tell.

    Raises
    ------
    InputError for options that do not fit each other.

    Examples
    --------
    >>> x = torch.rand(200, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] > 0.5).long()
    >>> net = nn.Linear(2, 2)
    >>> result = fit(net, (x, y), LpBall(2, 0.05), epochs=5, lr=0.1, attacks="quick")
    >>> result.report.attacked.value > 0.7
    True
    """
    numbers = {"lr": lr, "weight_decay": weight_decay, "awp": awp}
    check_options("fit", numbers, dict.fromkeys(numbers, NOT_NEGATIVE) | {"lr": POSITIVE})
    _check_rollback(on_overfitting, validation, options.get("ema"))
    if isinstance(threat.eps, Tensor):
        raise InputError("give one budget for all samples: those held out have none of their own")
    dtype = next(net.parameters()).dtype
    samples, held = _parts(train, validation, seed, dtype)
    judge = _criterion(criterion, samples)
    if _rounds(threat):
        memory = False
    resume = bool(options.get("resume"))
    objective = objective or (KEPT if memory and judge.classifies else FRESH)
    name, chosen = options_of(objective)
    if OBJECTIVES[name].facts["replays"] > 1 and options.get("accumulate", 1) > 1:
        raise InputError(f"{name} steps after each replay, and cannot accumulate: accumulate=1")
    game = RobustGame(
        modules={"model": net},
        optimizers={"model": _optimizer(optimizer, net, lr, weight_decay)},
        objective=name,
        options=chosen,
        threat=threat,
        criterion=judge,
        ramp=_share("ramp", ramp),
        memory=_memory(memory, samples, name, resume) if judge.classifies else None,
        awp=awp,
        guarded=on_overfitting == "rollback",
    )
    if game.criterion.classifies:
        _check_labels(net, samples)
    watch = None if held is None else _Watch(game, *held, seed)
    settings = {
        "objective": objective,
        "threat": str(threat),
        "epochs": epochs,
        "seed": seed,
        "ramp": ramp,
        "memory": game.memory is not None,
        "awp": awp,
        "criterion": game.criterion.kind,
        "on_overfitting": on_overfitting,
    }
    history = play(
        game,
        samples,
        epochs=epochs,
        batch_size=batch_size or samples.batch_size or 64,
        seed=seed,
        schedule=schedule,
        validate=watch,
        figure=None if watch is None else FIGURE,
        out=out,
        progress=progress,
        settings=settings,
        **options,
    )
    net.load_state_dict(history.weights["model"])
    report = None
    if held is not None and attacks is not None:
        judged = wrap(net, task="classification" if game.criterion.classifies else "regression")
        report = evaluate(judged, *held, threat, attacks=attacks, seed=seed, data="held out")
    result = TrainingResult(net.eval(), history, report, settings)
    if out is not None and history.first:
        result.save(out)
    return result


class _Watch:
    """Validates each epoch, and looks for catastrophic overfitting."""

    def __init__(self, game: RobustGame, x: Tensor, y: Tensor, seed: int) -> None:
        self.game, self.x, self.y, self.seed = game, x, y, seed

    def __call__(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the figures of an epoch."""
        net = modules["model"]
        device = next(net.parameters()).device
        x, y = self.x.to(device), self.y.to(device)
        found = validate(net, x, y, self.game.threat, seed=self.seed)
        best = self.game.best
        if self.game.grown and found.overfitted(best):  # before, the full ε is new to the network
            self._overfitted(found)
        if best is None or found.robust > best.robust:
            self.game.remember(found)
        return {"clean": found.clean, "single": found.single, "robust": found.robust}

    def _overfitted(self, found: Standing) -> None:
        said = (
            f"catastrophic overfitting: {found.single:.1%} stand after a single step, "
            f"{found.robust:.1%} after an attack of several and a search without gradients"
        )
        if self.game.roll_back():
            warnings.warn(f"{said}; back to the best weights, with more steps", stacklevel=2)
        else:
            warnings.warn(f"{said}; use more steps, or on_overfitting='rollback'", stacklevel=2)


def _parts(
    train: Any, validation: Any, seed: int, dtype: torch.dtype
) -> tuple[Samples, Held | None]:
    """Return the samples to train on, and those held out."""
    samples = Samples.of(train).typed(dtype)
    if validation is None or not isinstance(validation, float | int):
        return samples, None if validation is None else _pair(validation, dtype)
    share = _share("validation", float(validation))
    count = min(MOST_HELD_OUT, int(share * len(samples)))
    if count == 0:
        return samples, None
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))
    return samples.split(order[:count].sort().values)


def _pair(data: Any, dtype: torch.dtype) -> Held:
    """Return all x in the network's dtype, and y, whole labels as such."""
    samples = Samples.of(data).typed(dtype)
    indices = torch.arange(len(samples)).split(MOST_HELD_OUT)
    x, y = zip(*samples.fetch(list(indices), 0, 0), strict=True)
    return torch.cat(x), torch.cat(y)


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise InputError(f"{name} is a share, at least 0 and under 1; got {value:g}")
    return value


def _optimizer(
    chosen: str | Callable[..., torch.optim.Optimizer], net: nn.Module, lr: float, decay: float
) -> torch.optim.Optimizer:
    if callable(chosen):
        return chosen(net.parameters())
    if chosen == "adamw":
        return torch.optim.AdamW(net.parameters(), lr, weight_decay=decay)
    if chosen == "sgd":
        return torch.optim.SGD(
            net.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=decay
        )
    raise InputError(f"an optimizer is adamw, sgd or a function of parameters; got {chosen!r}")


def _criterion(chosen: Criterion | str | None, samples: Samples) -> Criterion:
    if isinstance(chosen, Criterion):
        return chosen
    if chosen is not None:
        return Criterion(chosen)
    _, y = next(samples.fetch([torch.tensor([0])], 0, 0))
    return Criterion("squared" if torch.as_tensor(y).is_floating_point() else "cross_entropy")


def _check_rollback(policy: str, validation: Any, ema: float | None) -> None:
    if policy not in ON_OVERFITTING:
        raise InputError(f"on_overfitting is one of {', '.join(ON_OVERFITTING)}; got {policy!r}")
    if policy == "rollback" and validation is None:
        raise InputError("on_overfitting='rollback' needs validation, which tells of overfitting")
    if policy == "rollback" and ema is not None:
        raise InputError(
            "on_overfitting='rollback' returns to single weights, not to their mean: leave out ema"
        )


def _check_labels(net: nn.Module, samples: Samples) -> None:
    """Raise an InputError unless the labels that are in memory are classes of the network."""
    model = wrap(net, task="classification")
    x, _ = next(samples.fetch([torch.tensor([0])], 0, 0))
    with model.session(), torch.no_grad():
        model(x)
    for labels in samples.labels():
        check_range(model, labels)


def _rounds(threat: LpBall) -> bool:
    """Tell whether kept members stand on whole numbers, which a short step does not leave."""
    return isinstance(threat, Tabular) and (bool(threat.integer.any()) or bool(threat.groups))


def _memory(
    wanted: bool | str | Path, samples: Samples, objective: str, resume: bool
) -> Memory | None:
    if wanted is False or not OBJECTIVES[objective].facts["keeps"]:
        return None
    if samples.augment is not None or _random(samples):
        raise InputError("kept perturbations belong to unchanged samples: memory=False to augment")
    x, _ = next(samples.fetch([torch.tensor([0])], 0, 0))
    file = None if wanted is True else Path(wanted)
    if file is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("several processes cannot keep perturbations in one file: memory=True")
    return Memory(samples.numbered, tuple(x.shape[1:]), file, resume=resume)


def _random(samples: Samples) -> bool:
    """Tell whether some samples look different in the next epochs."""
    if samples.in_memory:
        return False
    some = [torch.arange(min(LOOKED_AT, len(samples)))]
    looks = [next(samples.fetch(some, 0, epoch))[0] for epoch in range(3)]
    return not all(torch.equal(looks[0], look) for look in looks[1:])
