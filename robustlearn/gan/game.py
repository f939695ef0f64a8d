"""A critic that tells real from generated, and a generator that deceives it: a game of the loop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.gan.losses import Pair
from robustlearn.gan.regularizers import Penalty, packed
from robustlearn.gan.updates import frozen, looking_ahead, unrolled
from robustlearn.registry import COUNT, NATURAL, NOT_NEGATIVE, Range, check_options

ORDERS = ("alternating", "simultaneous", "extragradient")
RANGES = {
    "noise": COUNT,
    "critic_steps": COUNT,
    "packing": COUNT,
    "unroll": NATURAL,
    "auxiliary": NOT_NEGATIVE,
    "anneal": Range(1, math.inf, "[)"),
}
ANNEALED = 0.8  # share of training after which penalties have their own weights
CRITIC_NOISE, GENERATOR_NOISE, PENALTY_NOISE = range(3)  # purposes of a sample's random key
Critic = Callable[..., Any]
Metrics = dict[str, Tensor]


class Judgement(NamedTuple):
    """What a critic may return in place of its scores.

    Attributes
    ----------
    scores : (n,) or (n, 1); higher is more real.
    features : (n, d), for losses on features.
    classes : (n, K) logits, for an auxiliary classifier.
    """

    scores: Tensor | None = None
    features: Tensor | None = None
    classes: Tensor | None = None


def judged(output: Any, x: Tensor, kind: str) -> Tensor:
    """Return what a loss reads of a critic's output at x: scores, errors (n,) or features (n, d).

    Raises
    ------
    InputError if the critic does not return that.

    Examples
    --------
    >>> x = torch.tensor([[1.0, 2.0]])
    >>> judged(torch.zeros(1, 1), x, "scores"), judged(torch.zeros(1, 2), x, "errors")
    (tensor([0.]), tensor([1.5000]))
    """
    if isinstance(output, Judgement):
        output = output.features if kind == "features" else output.scores
    n = len(x)
    if kind == "errors" and isinstance(output, Tensor) and output.shape == x.shape:
        return _tensor.flat(output - x).abs().mean(1)
    if kind == "features" and isinstance(output, Tensor) and output.dim() == 2:
        return output
    if kind == "scores" and isinstance(output, Tensor) and output.shape in ((n,), (n, 1)):
        return output.reshape(n)
    wanted = {
        "scores": f"scores ({n},) or ({n}, 1)",
        "errors": f"a reconstruction of its input, {tuple(x.shape)}",
        "features": f"features ({n}, d), alone or in a Judgement",
    }
    got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise InputError(f"this loss needs of the critic {wanted[kind]}; it returned {got}")


@dataclass
class GanGame:
    """min over the critic of E ℓ_D(D(x), D(G(z))), min over the generator of E ℓ_G: a game.

    Attributes
    ----------
    modules, optimizers : of ``"generator"`` and ``"critic"``, as the loop has them.
    noise : number of features of z, which is standard normal.
    loss : the losses of both.
    penalties : on the critic's gradient, added to its loss.
    anneal : they weigh so many times more at the start, a factor that falls geometrically to 1
        during the first 0.8 of training: a flat critic first moves the generator to every mode,
        a steep one then sharpens them.
    order : ``"alternating"``: the critic moves, then the generator. ``"simultaneous"``: both at
        once. ``"extragradient"``: both at once, along the gradient where their next step leads.
    critic_steps : the generator moves in every so-manieth step; each step has a batch of its own.
    packing : the critic sees so many samples side by side.
    unroll : the generator moves against the critic that so many steps of plain descent would make,
        at the critic's learning rate; the points of penalties are held fixed there.
    conditional : whether labels y are the second argument of both.
    auxiliary : weight of the cross-entropy of the critic's ``classes``; 0 for none.
    settled : the epochs after which it no longer changes.
    epoch : the last one that was played.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    noise: int
    loss: Pair
    penalties: list[Penalty] = field(default_factory=list)
    anneal: float = 1.0
    order: str = "alternating"
    critic_steps: int = 1
    packing: int = 1
    unroll: int = 0
    conditional: bool = False
    auxiliary: float = 0.0
    settled: int = 0
    epoch: int = 0
    factor: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"an order is one of {', '.join(ORDERS)}; got {self.order!r}")
        check_options("a GAN", {name: getattr(self, name) for name in RANGES}, RANGES)
        if self.critic_steps > 1 and self.order != "alternating":
            raise InputError("only where players alternate can the critic take more steps")
        if self.packing > 1 and (self.conditional or self.auxiliary or self._on_errors):
            raise InputError(
                "packs are of samples of any label, for a critic that scores them: packing=1 with "
                "labels, an auxiliary classifier or an autoencoder"
            )

    def step(self, batch: Any, turn: Any) -> Metrics:
        """Play a mini-batch; return the metrics of each sample (n,)."""
        self.epoch = turn.epoch
        self.factor = self.anneal ** max(0.0, 1 - turn.progress / ANNEALED)
        if self.order == "alternating":
            return self._alternate(batch, turn)
        metrics, read = self._gradients(batch, turn)
        if self.order == "extragradient":
            if not all([turn.limited(name) for name in self.optimizers]):
                self._drop()  # there is no step to look ahead by: the batch is left out
                return metrics
            with looking_ahead(self.optimizers.values()):
                metrics, read = self._gradients(batch, turn)
        self._follow_critic(turn, read)
        turn.update("generator")
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Return what is remembered between steps."""
        state = torch.tensor(self.loss.state, dtype=torch.float64)
        return {"state": state, "epoch": torch.tensor(self.epoch)}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what was remembered."""
        self.epoch = int(state["epoch"])
        if self.loss.at is not None:
            self.loss = self.loss.at(float(state["state"]))

    def generate(self, generator: Callable[..., Tensor], keys: Tensor, y: Tensor) -> Tensor:
        """Return G(z) or G(z, y), z standard normal numbers of the keys (n,)."""
        weight = next(self.modules["generator"].parameters())
        z = _tensor.normal(keys, (self.noise,), weight.dtype)
        return generator(z, y) if self.conditional else generator(z)

    @property
    def _on_errors(self) -> bool:
        return self.loss.critic_on == "errors"

    def _alternate(self, batch: Any, turn: Any) -> Metrics:
        metrics, read = self._critic_gradient(batch, turn)
        self._follow_critic(turn, read)
        if turn.number % self.critic_steps == self.critic_steps - 1:
            metrics |= self._generator_gradient(batch, turn)
            turn.update("generator")
        return metrics

    def _gradients(self, batch: Any, turn: Any) -> tuple[Metrics, list[Tensor]]:
        metrics, read = self._critic_gradient(batch, turn)
        return metrics | self._generator_gradient(batch, turn), read

    def _follow_critic(self, turn: Any, read: Sequence[Tensor]) -> None:
        """Move the critic; a loss that adapts itself does so once with every move."""
        if turn.update("critic") and self.loss.at is not None:
            self.loss = self.loss.following(*(turn.gather(part) for part in read))

    def _drop(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def _critic_gradient(self, batch: Any, turn: Any) -> tuple[Metrics, list[Tensor]]:
        """Leave the gradient of the critic's loss in its weights; return also what it read."""
        with torch.no_grad(), turn.autocast():
            keys = _tensor.fold(turn.keys, CRITIC_NOISE)
            fake = self.generate(turn.unwrapped("generator"), keys, batch.y)
        real, fake = self.seen(batch.x), self.seen(fake.to(batch.x))
        with turn.autocast():
            outputs = [self.judge(turn.module("critic"), x, batch.y) for x in (real, fake)]
        ours, theirs = self._read(outputs, (real, fake), self.loss.critic_on)
        losses = self.loss.critic(ours, theirs)
        metrics = {"critic": losses, **self._accuracy(ours, theirs)}
        costs = self._penalise(turn.unwrapped("critic"), real, fake, batch.y, turn.keys)
        if costs is not None:
            metrics["penalty"] = costs
            losses = losses + costs
        for output in outputs if self.auxiliary else ():
            losses = losses + self._classify(output, batch.y)
        turn.backward(losses)
        metrics["critic_gradient"] = self._norm("critic", losses)
        return metrics, [ours, theirs]

    def _generator_gradient(self, batch: Any, turn: Any) -> Metrics:
        """Leave the gradient of the generator's loss in its weights."""
        keys = _tensor.fold(turn.keys, GENERATOR_NOISE)
        with turn.autocast():
            fake = self.generate(turn.module("generator"), keys, batch.y)
        real, fake = self.seen(batch.x), self.seen(fake.to(batch.x))
        with frozen(turn.unwrapped("critic")) as critic:
            opponent = (
                self._ahead(critic, real, fake, batch.y, turn.keys) if self.unroll else critic
            )
            points = (real, fake) if self.loss.uses_real else (fake,)
            with turn.autocast():
                outputs = [self.judge(opponent, x, batch.y) for x in points]
            read = self._read(outputs, points, self.loss.generator_on)
            losses = self.loss.generator(read[0], read[-1])
            metrics = {"generator": losses}
            if self.auxiliary:
                losses = losses + self._classify(outputs[-1], batch.y)
            turn.backward(losses)
        metrics["generator_gradient"] = self._norm("generator", losses)
        return metrics

    def seen(self, x: Tensor) -> Tensor:
        """Return samples as the critic sees them: packed."""
        return packed(x, self.packing) if self.packing > 1 else x

    def judge(self, critic: Critic, x: Tensor, y: Tensor) -> Any:
        """Return D(x), or D(x, y) of a conditional game."""
        return critic(x, y) if self.conditional else critic(x)

    def _read(self, outputs: list[Any], points: Sequence[Tensor], kind: str) -> list[Tensor]:
        """Return what a loss reads of each output, at single precision at least."""
        read = [judged(output, x, kind) for output, x in zip(outputs, points, strict=True)]
        return [part.to(torch.promote_types(part.dtype, torch.float32)) for part in read]

    def _penalise(
        self, critic: Critic, real: Tensor, fake: Tensor, y: Tensor, keys: Tensor
    ) -> Tensor | None:
        """Return the sum of the penalties, (n,)."""

        def scores(x: Tensor) -> Tensor:
            return judged(self.judge(critic, x, y), x, "errors" if self._on_errors else "scores")

        keys = _tensor.fold(keys, PENALTY_NOISE)
        costs = [penalty(scores, real, fake, keys) for penalty in self.penalties]
        return self.factor * torch.stack(costs).sum(0) if costs else None

    def _ahead(
        self, critic: nn.Module, real: Tensor, fake: Tensor, y: Tensor, keys: Tensor
    ) -> Critic:
        """Return the critic after some steps of descent against these samples."""

        def losses(called: Critic) -> Tensor:
            outputs = [self.judge(called, x, y) for x in (real, fake)]
            found = self.loss.critic(*self._read(outputs, (real, fake), self.loss.critic_on))
            costs = self._penalise(called, real, fake, y, keys)
            return found if costs is None else found + costs

        rate = self.optimizers["critic"].param_groups[0]["lr"]
        return unrolled(critic, losses, steps=self.unroll, step_size=rate)

    def _classify(self, output: Any, y: Tensor) -> Tensor:
        classes = output.classes if isinstance(output, Judgement) else None
        if classes is None or y.shape != (len(classes),) or y.is_floating_point():
            raise InputError(
                "an auxiliary classifier needs whole labels (n,) in the data, and a critic that "
                f"returns a Judgement with classes (n, K); labels are {y.dtype} {tuple(y.shape)}"
            )
        return self.auxiliary * functional.cross_entropy(classes.float(), y, reduction="none")

    def _accuracy(self, real: Tensor, fake: Tensor) -> Metrics:
        """Share of pairs in which the real sample has the higher score; a tie is half."""
        if self.loss.critic_on != "scores":
            return {}
        return {"accuracy": ((real - fake).sign() + 1) / 2}

    def _norm(self, name: str, like: Tensor) -> Tensor:
        """‖∇‖ over the weights that a player moves, given to each sample."""
        groups = self.optimizers[name].param_groups
        slopes = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        return torch.nn.utils.get_total_norm(slopes).expand(len(like))
