"""Robust training as a game of the loop: one move of the adversary, one of the model."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn.attacks.ascent import stepper
from robustlearn.loop.sharded import load
from robustlearn.threats import LpBall
from robustlearn.train.inner import Craft, statistics_held
from robustlearn.train.memory import Memory
from robustlearn.train.objectives import OBJECTIVES, Criterion, Outcome, options_of, replays_of
from robustlearn.train.validation import Standing
from robustlearn.train.weights import perturbed

ROLLED_BACK_TO = "pgd_at:steps=4"  # the objective once single steps have failed


@dataclass
class RobustGame:
    """min over weights of the mean over samples of an objective's loss.

    Attributes
    ----------
    modules, optimizers : ``{"model": …}``, as the loop has them.
    threat : of all training samples; its budget is reached after the share ``ramp`` of all steps.
    memory : keeps the perturbations of the epoch before as starts; None for random starts.
    guarded : whether the best weights are kept, for `roll_back`.
    best : what held-out samples said of the best epoch so far, and ``good`` its weights.
    awp : γ of the adversarial weight perturbation, once the ramp has ended; 0 for none.
    settled : the epochs in which ε grows, or up to a rollback: patience counts those after them.
    crafting : precision in which points are sought, as ``"bf16"``; None for that of the loop.
    grown : whether ε had its full size in the last step, which was of ``epoch``.
    rolled_back : the epoch after which the best weights were returned to; None if they were not.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    objective: str
    options: dict[str, Any]
    threat: LpBall
    criterion: Criterion = field(default_factory=Criterion)
    ramp: float = 0.0
    memory: Memory | None = None
    awp: float = 0.0
    guarded: bool = False
    best: Standing | None = None
    good: dict[str, Tensor] = field(default_factory=dict)
    rolled_back: int | None = None
    settled: int = 0
    crafting: str | None = None
    grown: bool = False
    epoch: int = 0

    def step(self, batch: Any, turn: Any) -> dict[str, Tensor]:
        """Play a mini-batch; return the metrics of each sample (n,).

        Among them ``gradients``, how often it went back through the network, for its weights or
        for its points; passes of bounds are none of these.
        """
        returned: list[int] = []
        threat = self._threat(batch.index, turn.progress)
        self.grown, self.epoch = turn.progress >= self.ramp, turn.epoch
        craft = Craft(
            keys=turn.keys,
            start=None if self.memory is None else self.memory.get(batch.index, batch.x),
            module=turn.unwrapped("model"),
            autocast=turn.autocast,
            climbing=functools.partial(turn.autocast, self.crafting),
            returned=lambda slope: returned.append(len(slope)),
        )
        replays = replays_of(self.objective, self.options)
        for _ in range(replays):
            outcome = self._play(batch, threat, craft, turn)
            if replays > 1:
                craft = replace(craft, points=_replayed(outcome.points, batch.x, threat))
        if self.memory is not None:
            delta = outcome.points.detach() - batch.x
            self.memory.put(turn.gather(batch.index), turn.gather(delta))
        cost = torch.full_like(outcome.loss.detach(), sum(returned) / len(batch.x))
        return {**outcome.metrics, "gradients": cost}

    def remember(self, standing: Standing) -> None:
        """Keep the figures of the best weights, and these too if they may be asked for again."""
        self.best = standing
        if self.guarded:
            weights = self.modules["model"].state_dict()
            self.good = {name: value.detach().clone() for name, value in weights.items()}

    def roll_back(self) -> bool:
        """Return to the weights that were kept, and to several steps; False if that is done."""
        if self.rolled_back is not None or not self.good:
            return False
        load(self.modules["model"], self.good)
        for optimizer in self.optimizers.values():  # its moments are of the weights that failed
            optimizer.state.clear()
        self._climb_longer(self.epoch)
        return True

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered between steps."""
        kept = {} if self.memory is None else {"perturbations": self.memory.kept}
        good = {f"good.{name}": value for name, value in self.good.items()}
        best = () if self.best is None else astuple(self.best)
        told = {"best": torch.tensor(best, dtype=torch.float64)}
        told["rolled_back"] = torch.tensor(() if self.rolled_back is None else (self.rolled_back,))
        told["last"] = torch.tensor((self.grown, self.epoch))
        return {**kept, **good, **told}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what was remembered."""
        if self.memory is not None:
            self.memory.kept.copy_(state["perturbations"])
        prefix = "good."
        self.good = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        self.best = Standing(*state["best"].tolist()) if len(state["best"]) else None
        for epoch in state["rolled_back"].tolist():
            self._climb_longer(int(epoch))
        grown, self.epoch = state["last"].tolist()
        self.grown = bool(grown)

    def _climb_longer(self, epoch: int) -> None:
        self.rolled_back, self.settled = epoch, max(self.settled, epoch + 1)
        self.objective, self.options = options_of(ROLLED_BACK_TO)

    def _threat(self, index: Tensor, progress: float) -> LpBall:
        threat = self.threat.select(index)
        if progress >= self.ramp:
            return threat
        return replace(threat, eps=threat.eps * (progress / self.ramp))

    def _play(self, batch: Any, threat: LpBall, craft: Craft, turn: Any) -> Outcome:
        play: Callable[..., Outcome] = OBJECTIVES[self.objective].function
        model = turn.module("model")
        given = {"criterion": self.criterion, **self.options}
        moved: Any = contextlib.nullcontext()
        if self.awp and turn.progress >= self.ramp:
            network = craft.network(model)
            with statistics_held(network):
                before = play(network, batch.x, batch.y, threat, craft=craft, **given)
            moved = perturbed(network, functools.partial(turn.slopes, before.loss), self.awp)
            craft = replace(craft, points=before.points.detach())
        with moved:
            outcome = play(model, batch.x, batch.y, threat, craft=craft, **given)
            turn.backward(outcome.loss)
        turn.update("model")
        return outcome


def _replayed(points: Tensor, x: Tensor, threat: LpBall) -> Tensor:
    """Step the points by ε along the gradient that the backward pass has left in them."""
    slope = points.grad
    if slope is None:
        return points.detach()
    return threat.enclose(x, stepper(threat, x)(points.detach(), slope.nan_to_num(0.0), 1.0))
