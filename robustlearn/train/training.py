"""From a fragile network to a robust one: data, game, loop, and the figure at the end."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn.errors import InputError
from robustlearn.evaluate import Report, evaluate, plan
from robustlearn.evaluate.sharing import Shares, first
from robustlearn.loop import History, Moment, checkpoint, play
from robustlearn.loop.sides import plain
from robustlearn.models import TorchModel
from robustlearn.registry import NOT_NEGATIVE, POSITIVE, check_options
from robustlearn.report import write_training
from robustlearn.threats import LpBall
from robustlearn.train.game import ROLLED_BACK_TO, RobustGame
from robustlearn.train.givens import (
    Givens,
    check_threat,
    fingerprint,
    givens,
    in_full,
    judged,
    network_of,
    share,
)
from robustlearn.train.memory import memory_of, moves_in_steps, unchanging
from robustlearn.train.objectives import OBJECTIVES, Criterion, options_of, replays_of
from robustlearn.train.validation import Standing, validate
from robustlearn.train.watching import watched

PLAYED = {  # options of the loop that the weights depend on, and their defaults
    name: inspect.signature(play).parameters[name].default
    for name in (
        *("precision", "compile", "channels_last", "accumulate"),
        *("ema", "clip", "patience", "on_nonfinite"),
    )
}
BOUNDS = ("clean", "attacked", "certified")
FIGURE = "robust"  # what decides which epoch is the best
KEPT, FRESH = "pgd_at:steps=1:step_size=0.5", "pgd_at:steps=2"  # see `fit`
CRAFTING = (None, "float32", "bf16")
ON_OVERFITTING = ("warn", "rollback")


@dataclass(eq=False)
class TrainingResult:
    """A trained network, how it came about, and what it is worth.

    Attributes
    ----------
    model : the network with the weights of the best epoch (their running mean, if ``ema``).
    history : rows per epoch; see `robustlearn.loop.History`.
    report : the two-sided figure on samples held out, whose name says which; None if not asked for.
    settings : what training was asked for, as plain values.
    """

    model: nn.Module
    history: History
    report: Report | None
    settings: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """Return what training did as plain data: what is in training.json.

        ``gradients`` is how often a sample went back through the network over all epochs, and
        ``evaluated`` the bracket of the report: ``clean, attacked, certified`` with intervals.
        """
        return {
            "model": type(self.model).__name__,
            "settings": self.settings,
            "rows": self.history.rows,
            "best": self.history.best,
            "stopped": self.history.stopped,
            "gradients": sum(row["metrics"]["gradients"] for row in self.history.rows),
            "evaluated": None if self.report is None else _bracket(self.report),
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
    net: nn.Module | TorchModel,
    train: Any,
    threat: LpBall,
    *,
    objective: str | None = None,
    validation: Any = 0.1,
    test: Any = None,
    epochs: int = 30,
    batch_size: int | None = None,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    schedule: str = "one_cycle",
    ramp: float = 0.5,
    memory: bool | str | Path | None = None,
    awp: float = 0.0,
    crafting: str | None = None,
    criterion: Criterion | str | None = None,
    on_overfitting: str = "warn",
    seed: int = 0,
    out: str | Path | None = None,
    attacks: str | None = "standard",
    progress: Callable[[Moment], None] | bool | None = None,
    **options: Any,
) -> TrainingResult:
    """min over weights of the mean over samples of max over the threat of a loss.

    Parameters
    ----------
    net : trained in place; ends with the weights of the best epoch. Its outputs are logits, or the
        predictions of a regressor; what `wrap` made of a torch network is taken for that network.
    train : (x, y) as arrays or tensors, a torch ``Dataset``, a ``DataLoader``, or `loop.Samples`
        (weights of classes, extra data, augmentation).
    threat : what the adversary may do.
    objective : name of an objective with its options, as ``"trades:beta=6:steps=3"``; they are
        `robustlearn.train.OBJECTIVES`. By default ``"pgd_at"`` with one step of ε/2 where
        perturbations are kept, and with two steps of 1.25ε where they are not.
    validation : (x, y) to choose the best epoch on; or the share of ``train`` to hold
        out, at most 2,000 samples; or None. Without ``test`` one half of the share chooses the
        epoch, and the report is about the other. Of a ``Dataset`` that changes its samples at
        random the share is held out as it is drawn once, changed: give such data a pair of
        unchanged ones.
    test : (x, y) for the report, which the choice of the epoch does not look at. Without it, and
        with a pair for ``validation``, the report is about that pair, and says so: it is biased
        upwards by the choice.
    batch_size : 64 by default: small batches do better than large ones at equal cost.
    optimizer : ``"adamw"``, ``"sgd"`` (Nesterov, momentum 0.9), or ``parameters -> Optimizer``,
        whose own lr and weight_decay count.
    lr : the peak of ``schedule``. The default is cautious: convolutional networks of 166,000
        parameters did better with 4e-3 (table 1 of benchmarks/training.py).
    schedule, seed, out, **options : as for `robustlearn.loop.play` (resume, patience, precision,
        compile, ema, clip, accumulate, trackers, on_nonfinite, save_every).
    progress : True for a bar with the time left, losses and figures held out (lines where there is
        no terminal), or what is called with a `loop.Moment` after each step.
    ramp : share of the steps during which ε grows to its full size; without it training at a
        large ε may stay at chance.
    memory : whether each sample's perturbation of the epoch before is where the next ascent
        starts; the name of a file keeps them on disk, for one process. By default where samples
        look the same in every epoch. Not where features move in whole steps, which would round
        the next step away; for regressors an ascent starts at x, where the sign of the error is
        right.
    awp : γ of the adversarial weight perturbation; 0 for none.
    crafting : ``"bf16"`` or ``"float32"``, the precision in which points are sought; the pass that
        trains the weights keeps ``precision``, which is meant by default.
    criterion : ``"cross_entropy"``, ``"squared"``, ``"huber"`` or a `Criterion`; by default the
        first for whole labels and the second for others; of a network with one output labels in a
        floating type are targets, but for 0 and 1.
    on_overfitting : when a single step finds little that stands under attack, warn; or roll back
        to the best weights and go on with four steps an ascent.
    attacks : of the evaluation at the end; None for none.

    Returns
    -------
    TrainingResult. The figures of its rows are upper bounds from a cheap attack, to choose an
    epoch by; that of its report is the one to tell.

    Raises
    ------
    InputError, before the first step, for options that do not fit each other, networks that end
    in a softmax or sigmoid, data outside the threat's box, labels that are no classes of the
    network, and threats of other p than 1, 2 and ∞.

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
    _check_rollback(on_overfitting, options.get("ema"))
    if crafting not in CRAFTING:
        raise InputError(f"crafting is one of None, 'float32' and 'bf16'; got {crafting!r}")
    if attacks is not None:
        plan(attacks)  # what it names wrongly is to be told now, not after training
    net = network_of(net)
    name, chosen = options_of(objective or FRESH)
    check_threat(threat, name, validated=validation is not None)
    given = givens(net, train, validation, test, threat, criterion, seed)
    samples, judge = given.samples, given.criterion
    if given.choosing is None:
        _tell_none_held_out(on_overfitting, options.get("patience"), validation, len(samples))
    starts = memory is not False and judge.classifies and not moves_in_steps(threat)
    starts = starts and (memory is not None or unchanging(samples))
    if objective is None:
        objective = KEPT if starts else FRESH
        name, chosen = options_of(objective)
    kept = starts and OBJECTIVES[name].facts["keeps"]
    file = None if isinstance(memory, bool | None) else Path(memory)
    begun = out is not None and checkpoint.exists(Path(out))
    if replays_of(name, chosen) > 1 and options.get("accumulate", 1) > 1:
        raise InputError(f"{name} steps after each replay, and cannot accumulate: accumulate=1")
    game = RobustGame(
        modules={"model": net},
        optimizers={"model": _optimizer(optimizer, net, lr, weight_decay)},
        objective=name,
        options=chosen,
        threat=threat,
        criterion=judge,
        ramp=share("ramp", ramp),
        memory=memory_of(samples, file, resume=bool(options.get("resume")), begun=begun)
        if kept
        else None,
        awp=awp,
        guarded=on_overfitting == "rollback",
        settled=math.ceil(ramp * epochs),
        crafting=crafting,
    )
    watch = None if given.choosing is None else _Watch(game, *given.choosing, seed)
    size = batch_size or samples.batch_size or 64
    settings = {
        "objective": objective,
        "threat": str(threat),
        "threat_in_full": in_full(threat),
        "epochs": epochs,
        "batch_size": size,
        **_told_of_optimizer(game.optimizers["model"]),
        "schedule": schedule,
        "seed": seed,
        "ramp": ramp,
        "memory": game.memory is not None,
        "awp": awp,
        "crafting": crafting,
        **_told_of(judge),
        "on_overfitting": on_overfitting,
        "validation": fingerprint(given.choosing),
        **{key: options.get(key, default) for key, default in PLAYED.items()},
    }
    final = _Final(net, judge, given, threat, attacks, seed)
    with watched(epochs, progress if first() else None) as told:
        history = play(
            game,
            samples,
            epochs=epochs,
            batch_size=size,
            seed=seed,
            schedule=schedule,
            validate=watch,
            figure=None if watch is None else FIGURE,
            out=out,
            progress=told,
            settings=settings,
            conclude=final,
            **options,
        )
    if game.rolled_back is not None:
        settings["rolled_back"] = {"after_epoch": game.rolled_back, "to": ROLLED_BACK_TO}
    result = TrainingResult(net.eval(), history, final.report, settings)
    if out is not None and history.first:
        result.save(out)
    return result


@dataclass
class _Final:
    """Puts the best weights in place once training is over, and evaluates them."""

    net: nn.Module
    criterion: Criterion
    given: Givens
    threat: LpBall
    attacks: str | None
    seed: int
    report: Report | None = None

    def __call__(self, history: History) -> dict[str, float]:
        """Return both bounds; nothing where there is no evaluation."""
        self.net.load_state_dict(history.weights["model"])
        if self.given.telling is None or self.attacks is None:
            return {}
        model, (x, y) = judged(self.net, self.criterion), self.given.telling
        self.report = evaluate(
            model, x, y, self.threat, attacks=self.attacks, seed=self.seed, data=self.given.told
        )
        found = _bracket(self.report)
        return {name: found[name]["value"] for name in BOUNDS if found[name] is not None}


def _bracket(report: Report) -> dict[str, Any]:
    """Return the two-sided figure of an evaluation, and what it is about, as plain data."""
    whole = report.to_dict()
    return {name: whole[name] for name in ("data", "task", *BOUNDS)}


class _Watch:
    """Validates each epoch, and looks for catastrophic overfitting."""

    def __init__(self, game: RobustGame, x: Tensor, y: Tensor, seed: int) -> None:
        self.game, self.x, self.y, self.seed = game, x, y, seed

    def __call__(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the figures of an epoch."""
        net = modules["model"]
        device = next(net.parameters()).device
        x, y = self.x.to(device), self.y.to(device)
        model = judged(net, self.game.criterion)
        found = Shares().told(validate(model, x, y, self.game.threat, seed=self.seed))
        if self.game.grown and found.overfitted(self.game.best):  # before, the full ε is new to it
            found = self._overfitted(found)
        best = self.game.best
        if best is None or found.robust > best.robust:
            self.game.remember(found)
        return {"clean": found.clean, "single": found.single, "robust": found.robust}

    def _overfitted(self, found: Standing) -> Standing:
        """Tell of it, and return what now stands: after a rollback that is what was best."""
        game = self.game
        said = (
            f"catastrophic overfitting: {found.single:.1%} stand after a single step, "
            f"{found.robust:.1%} after an attack of several and a search without gradients"
        )
        if game.best is not None and game.roll_back():
            warnings.warn(f"{said}; back to the best weights, with more steps", stacklevel=2)
            return game.best
        advice = "" if game.guarded else ", or on_overfitting='rollback'"
        warnings.warn(f"{said}; use more steps{advice}", stacklevel=2)
        return found


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


def _told_of_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return its rates as plain values, one for each group of parameters if these differ."""

    def told(name: str) -> Any:
        values = [plain(group).get(name) for group in optimizer.param_groups]
        return values[0] if all(value == values[0] for value in values) else values

    return {
        "optimizer": type(optimizer).__name__,
        "lr": told("lr"),
        "weight_decay": told("weight_decay"),
    }


def _told_of(criterion: Criterion) -> dict[str, Any]:
    """Return a criterion as plain values, the weights of classes as a list."""
    weights = criterion.weights
    return {
        "criterion": criterion.kind,
        "smoothing": criterion.smoothing,
        "knee": criterion.knee,
        "class_weights": None if weights is None else torch.as_tensor(weights).tolist(),
    }


def _tell_none_held_out(policy: str, patience: int | None, validation: Any, samples: int) -> None:
    """Raise an InputError for options that look at samples held out; warn if some were meant."""
    needing = [f"patience={patience}"] if patience is not None else []
    needing += ["on_overfitting='rollback'"] if policy == "rollback" else []
    if needing:
        raise InputError(
            f"{' and '.join(needing)} look at samples held out, and validation={validation} holds "
            f"out none of {samples}: give a larger share, or a pair (x, y)"
        )
    if validation:
        warnings.warn(
            f"validation={validation:g} holds out none of {samples} samples: the last epoch counts "
            "as the best, and without test there is no report; give a larger share, or a pair",
            stacklevel=3,
        )


def _check_rollback(policy: str, ema: float | None) -> None:
    if policy not in ON_OVERFITTING:
        raise InputError(f"on_overfitting is one of {', '.join(ON_OVERFITTING)}; got {policy!r}")
    if policy == "rollback" and ema is not None:
        raise InputError(
            "on_overfitting='rollback' returns to single weights, not to their mean: leave out ema"
        )
