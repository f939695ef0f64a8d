"""Cheap measurements of a model from which `diagnose` tells whether attacks can be believed.

Each is made once, when a check first asks for it. All attacks climb one objective: minus the
margin of a classifier (positive where it is broken), the squared error of a regressor.
"""

import contextlib
import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from robustlearn import _tensor, losses
from robustlearn._tensor import column, flat
from robustlearn.attacks import ATTACKS
from robustlearn.errors import ModelError
from robustlearn.models import Model, TorchModel, wrap
from robustlearn.threats import LpBall

NORMS = (1, 2, math.inf)  # for which there are an ascent and a search
STEPS, FEW, FAR = 21, 7, 10  # gradients of the long, the short, and the wider climbs
QUERIES, DRAWS = 100, 30  # outputs of the random search, and of random noise
DIRECTIONS, REACH = 4, 0.1  # along which the gradient is tested, and how far in units of ε
COPIES, LEARNED_FROM, EPOCHS = 2, 1000, 30  # what the surrogate learns from, and how long


@dataclass(frozen=True)
class Reached:
    """Where an attack ended: its points, the objective there, and along its path if known."""

    point: Tensor
    value: Tensor
    path: Tensor | None = None


class Probes:
    """A model, at most a few dozen samples, and what was measured on them.

    Parameters
    ----------
    model : held in a session by the caller.
    x, y : (n, *shape), (n,) samples to look at, on the model's device.
    threat : for these samples.
    pool : samples of the same kind, from which a surrogate is learned.
    record : by attack, the samples that it broke, x first and others that the model gets right
        after them; in the order in which attacks ran. None if there was no evaluation.
    surrogate : a model to transfer attacks from; None learns one.
    keys : (n,) random keys.
    """

    def __init__(
        self,
        model: Model,
        x: Tensor,
        y: Tensor,
        threat: LpBall,
        *,
        pool: Tensor,
        keys: Tensor,
        record: Mapping[str, Tensor] | None = None,
        surrogate: Any = None,
    ) -> None:
        self.model, self.x, self.y, self.threat = model, x, y, threat
        self.pool, self.keys, self.record, self._surrogate = pool, keys, record, surrogate
        self.classifies = model.task == "classification"
        self.loss = losses.get(None, str(model.task))

    # ------------------------------------------------------------------ what applies

    @cached_property
    def gradient_fault(self) -> str | None:
        """Why there is no gradient although the model is differentiable; None if there is one."""
        if not self.model.differentiable:
            return None
        try:
            self.model.gradient(self.x[:1], self.y[:1], self.loss)
        except ModelError as error:
            return str(error)
        return None

    @property
    def has_gradient(self) -> bool:
        """Whether attacks by gradient run at all."""
        return self.model.differentiable and self.gradient_fault is None

    # ------------------------------------------------------------------ outputs

    @cached_property
    def output(self) -> Tensor:
        """The outputs for x."""
        return self.model(self.x)

    @cached_property
    def clean(self) -> Tensor:
        """The objective at x, (n,)."""
        return self.value(self.x)

    @cached_property
    def scale(self) -> Tensor:
        """Median |f(x)| + median |f(x_adv) − f(x)|: the unit in which differences are judged."""
        size = self.clean.abs().median() + (self.best.value - self.clean).abs().median()
        return size.clamp_min(torch.finfo(size.dtype).tiny)

    def value(self, points: Tensor) -> Tensor:
        """Return the objective at points, (n,)."""
        return self.objective(self.model(points))

    def objective(self, output: Tensor) -> Tensor:
        """Return the objective of outputs, (n,)."""
        return self.loss.objective(output, self.y)

    # ------------------------------------------------------------------ attacks

    @cached_property
    def slope(self) -> Tensor:
        """The gradient of the objective at x."""
        return self.model.gradient(self.x, self.y, self.loss)[0]

    @cached_property
    def single(self) -> Reached:
        """One step along the gradient to the end of the threat."""
        point = self.threat.restrict(self.x, self.threat.argmax(self.slope, self.x))
        return Reached(point, self.value(point))

    @cached_property
    def climbed(self) -> Reached:
        """Projected gradient ascent from x."""
        return self._climb(self.threat, STEPS, 0)

    @cached_property
    def climbed_briefly(self) -> Reached:
        """The same with fewer steps."""
        return self._climb(self.threat, FEW, 1)

    @cached_property
    def best(self) -> Reached:
        """What the attack of choice reached: by gradient where there is one, else by scores.

        Where the norm allows no ascent it is a single step.
        """
        if self.threat.p not in NORMS and self.has_gradient:
            return self.single
        return self.climbed if self.has_gradient else self.searched

    @cached_property
    def wider(self) -> Reached:
        """The attack of choice with twice the budget."""
        threat = replace(self.threat, eps=self.threat.eps * 2)
        return self._climb(threat, FAR, 2) if self.has_gradient else self._search(threat, 3)

    @cached_property
    def unbounded(self) -> Reached:
        """Gradient ascent where every point of the box is allowed."""
        return self._climb(everywhere(self.threat, self.x, self.pool), FAR, 4)

    @cached_property
    def searched(self) -> Reached:
        """Random search by scores alone."""
        return self._search(self.threat, 5)

    @cached_property
    def noisy(self) -> Reached:
        """The best of random members of the threat and of its corners."""
        best, value = self.x.clone(), self.clean.clone()
        for draw in range(DRAWS):
            keys = _tensor.fold(self.keys, 100 + draw)
            change = self.threat.sample(self.x, keys)
            if draw % 2:  # corners: the ends of the threat in random directions
                direction = _tensor.normal(keys, tuple(self.x.shape[1:]), self.x.dtype)
                change = self.threat.argmax(direction, self.x)
            point = self.threat.restrict(self.x, change)
            reached = self.value(point)
            better = reached > value
            best[better], value[better] = point[better], reached[better]
        return Reached(best, value)

    @cached_property
    def transferred(self) -> Reached:
        """Points that were found on a surrogate."""
        model = wrap(self._surrogate) if self._surrogate is not None else self._learned()
        found = ATTACKS["pgd"].function(
            model, self.x.to(model.dtype), self.y, self.threat, steps=STEPS, stop_when_broken=False
        )
        point = self.threat.restrict(self.x, found.to(self.x) - self.x)
        return Reached(point, self.value(point))

    def _climb(self, threat: LpBall, steps: int, run: int) -> Reached:
        """Ascend from x (run 0) or at random; half the steps each way where it is a regressor."""
        if self.classifies:
            point, path = self._follow(threat, steps, run, self.loss, losses.soft_margin)
            return Reached(point, self.value(point), path)
        ends = []
        for way in (_up, _down):
            point, _ = self._follow(threat, -(-steps // 2), run, way, way)
            ends.append(Reached(point, self.value(point)))
        first = column(ends[0].value > ends[1].value, self.x)
        point = torch.where(first, ends[0].point, ends[1].point)
        return Reached(point, torch.maximum(ends[0].value, ends[1].value))

    def _follow(
        self, threat: LpBall, steps: int, run: int, loss: losses.Loss, early: losses.Loss
    ) -> tuple[Tensor, Tensor]:
        """Run `pgd`, by another slope in its first half; return its points and its path."""
        path: list[Tensor] = []

        def look(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            chosen = early if len(path) < steps // 2 else loss
            value, slope = chosen.look(output, y)
            path.append(value)
            return value, slope

        point = ATTACKS["pgd"].function(
            self.model,
            self.x,
            self.y,
            threat,
            loss=_Watched(loss, look),
            steps=steps,
            random_start=run > 0,
            stop_when_broken=False,
            generator=_tensor.fold(self.keys, run),
        )
        return point, torch.stack(path)

    def _search(self, threat: LpBall, run: int) -> Reached:
        point = ATTACKS["square"].function(
            self.model,
            self.x,
            self.y,
            threat,
            queries=QUERIES,
            generator=_tensor.fold(self.keys, run),
        )
        return Reached(point, self.value(point))

    # ------------------------------------------------------------------ the gradient

    def foreseen(self, point: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
        """Changes of the objective over short ways, and what the gradient foretold.

        Δ = f(a) − f(b) and ⟨∇f, a − b⟩, for a and b on both sides of the point: along the steepest
        direction and random ones, REACH·ε long at most and inside the box.

        Returns
        -------
        two tensors (directions, n).
        """
        free = replace(self.threat, lower=None, upper=None)
        near = replace(self.threat, eps=self.threat.eps * REACH)
        seen, told = [], []
        for number in range(DIRECTIONS):
            direction = slope
            if number:
                keys = _tensor.fold(self.keys, 200 + number)
                direction = _tensor.normal(keys, tuple(point.shape[1:]), point.dtype)
            way = free.argmax(direction, point) * REACH
            ends = [point + near.project(side * way, point) for side in (1, -1)]
            seen.append(self.value(ends[0]) - self.value(ends[1]))
            told.append((flat(slope) * flat(ends[0] - ends[1])).sum(1))
        return torch.stack(seen), torch.stack(told)

    # ------------------------------------------------------------------ arithmetic

    def in_double(self) -> Tensor | None:
        """Return the outputs of a float64 copy; None where the model cannot be copied."""
        model = self.model
        if not isinstance(model, TorchModel) or model.dtype is not torch.float32:
            return None
        if model._probabilities or model._head is not None:
            return None
        try:
            module = copy.deepcopy(model.module).double()
            return wrap(module, task=model.task, output="logits")(self.x.double())
        except (RuntimeError, ModelError, TypeError):
            return None

    @contextlib.contextmanager
    def optimising(self, seen: list[int]) -> Any:
        """Note in ``seen`` each value that is kept for a derivative while gradients are off."""

        def keep(value: Tensor) -> Tensor:
            seen.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            yield

    # ------------------------------------------------------------------ a model to transfer from

    def _learned(self) -> Model:
        """Distil the model into a network with one hidden layer that is smooth.

        It learns the outputs, centred and scaled, of the pool and of noisy copies of it.
        """
        pool = self.pool
        keys = _tensor.fold(torch.arange(len(pool), device=pool.device), 6)
        noise = replace(self.threat, eps=_largest(self.threat.eps))
        points = [pool]
        for number in range(COPIES):
            points.append(pool + noise.sample(pool, _tensor.fold(keys, number)))
        inputs = torch.cat(points)
        outputs = torch.cat(
            [self.model(part) for whole in points for part in whole.split(len(self.x))]
        )
        targets = outputs.reshape(len(inputs), -1).float()
        targets = (targets - targets.mean(0)) / targets.std().clamp_min(1e-12)
        net = distilled(inputs.float(), targets).to(pool.dtype)  # what a wall allows is as it was
        return wrap(net, task=self.model.task)


class _Watched(losses.Loss):
    """A loss whose slope and path are looked at by a given function."""

    def __init__(self, loss: losses.Loss, look: losses.Look) -> None:
        super().__init__(loss.function, ascend=loss.ascend, won=loss._won)
        self._seen_by = look

    def look(self, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective (n,) and its derivative by the output."""
        return self._seen_by(output, y)


def _output(output: Tensor, y: Tensor) -> Tensor:
    return output.reshape(len(y))


_up = losses.Loss(_output, ascend=True, won=None)
_down = losses.Loss(_output, ascend=False, won=None)


def distilled(x: Tensor, targets: Tensor, *, width: int = 128, seed: int = 0) -> nn.Module:
    """min over networks of Σ ‖network(x) − targets‖² by Adam: x (n, *shape), targets (n, K)."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        d = flat(x).shape[1]
        net = nn.Sequential(
            nn.Flatten(), nn.Linear(d, width), nn.SiLU(), nn.Linear(width, targets.shape[1])
        ).to(x.device)
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(x)).split(128):
                optimizer.zero_grad()
                nn.functional.mse_loss(net(x[rows]), targets[rows]).backward()
                optimizer.step()
    return net.eval()


def everywhere(threat: LpBall, x: Tensor, pool: Tensor) -> LpBall:
    """Return the threat with a budget that reaches every point of its box.

    Without a box, of the span of the data.
    """
    low = float(pool.min()) if threat.lower is None else threat.lower
    high = float(pool.max()) if threat.upper is None else threat.upper
    whole = replace(threat, lower=low, upper=high, eps=0.0)
    span = torch.as_tensor(high) - torch.as_tensor(low)
    size = whole.norm(span.to(x).expand(x.shape[1:])[None])
    return replace(whole, eps=float(size))


def _largest(eps: float | Tensor) -> float:
    return float(torch.as_tensor(eps).max())
