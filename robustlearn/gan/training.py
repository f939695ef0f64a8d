"""From data to a generator of more of it: game, loop, and the figures on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from robustlearn import _tensor
from robustlearn.errors import InputError
from robustlearn.gan import losses, regularizers
from robustlearn.gan.diagnostics import Watch
from robustlearn.gan.game import ANNEALED, GanGame
from robustlearn.gan.losses import Pair
from robustlearn.gan.mixtures import Mixture
from robustlearn.gan.updates import optimistic
from robustlearn.loop import History, Moment, Samples, play
from robustlearn.registry import Range, check_options

KEPT = {"last": "epoch", "best": "closeness"}
OPTIMIZERS = ("adam", "sgd", "optimistic_adam", "optimistic_sgd")
RECIPE = "r1:weight=0.1 + r2:weight=0.1"  # beside relativistic_paired


@dataclass(eq=False)
class GanResult:
    """A trained generator and its critic, how it came about, and how good it is.

    Attributes
    ----------
    generator, critic : with the weights that were kept (their running mean, if ``ema``).
    history : rows per epoch; the figures of `robustlearn.gan.Watch` are their ``validation``.
    game : the game, which knows how noise is drawn.
    settings : what was asked for, as plain values.
    """

    generator: nn.Module
    critic: nn.Module
    history: History
    game: GanGame
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """The figures of the epoch whose weights were kept."""
        best = self.history.best
        return {} if best is None else dict(self.history.rows[best]["validation"])

    @torch.no_grad()
    def sample(self, count: int, *, seed: int = 0, y: Tensor | None = None) -> Tensor:
        """Return (count, *shape) samples G(z), or G(z, y) of a conditional game; y is (count,).

        Raises
        ------
        InputError if labels are missing, or not wanted.
        """
        if (y is None) == self.game.conditional or (y is not None and len(y) != count):
            raise InputError(
                f"a conditional generator needs one label a sample, {count}, and another none; got "
                f"{'none' if y is None else len(y)}"
            )
        device = next(self.generator.parameters()).device
        numbers = torch.arange(count, device=device)
        keys = _tensor.fold(torch.full_like(numbers, seed), numbers)
        labels = torch.empty(count, 0) if y is None else y
        return self.game.generate(self.generator, keys, labels.to(device))


def fit_gan(
    generator: nn.Module,
    critic: nn.Module,
    data: Any,
    *,
    noise: int,
    loss: str | Pair = "relativistic_paired",
    penalty: str = RECIPE,
    anneal: float = 1.0,
    order: str = "alternating",
    critic_steps: int = 1,
    packing: int = 1,
    unroll: int = 0,
    conditional: bool = False,
    auxiliary: float = 0.0,
    epochs: int = 50,
    batch_size: int | None = None,
    optimizer: str | Callable[..., Optimizer] = "adam",
    lr: float = 1e-3,
    critic_lr: float | None = None,
    known: Mixture | None = None,
    compare: int = 1000,
    keep: str = "last",
    seed: int = 0,
    out: str | Path | None = None,
    progress: Callable[[Moment], None] | None = None,
    **options: Any,
) -> GanResult:
    """min over D of E ℓ_D(D(x), D(G(z))) + penalties, against min over G of E ℓ_G(D(x), D(G(z))).

    The default, relativistic pairs with R1 and R2, is the recipe of Huang et al. (2024): its
    equilibrium attracts, and modes are not dropped. Weights of R1 and R2 are in squared units of
    the data: smaller ones make finer details, larger ones a steadier game.

    Parameters
    ----------
    generator : module (n, noise) -> (n, *shape); trained in place.
    critic : module (n, *shape) -> (n,) or (n, 1), or a `Judgement`; an autoencoder for ``began``.
        With ``packing=m`` its input has m times as many features or channels.
    data : x or (x, y) as arrays or tensors, a torch ``Dataset``, ``DataLoader`` or `loop.Samples`.
    noise : number of features of z, which is standard normal.
    loss : name of a loss with its options, as ``"least_squares:a=0:c=1"``; they are
        `robustlearn.gan.LOSSES`.
    penalty : of `robustlearn.gan.PENALTIES`, as ``"r1:weight=0.5 + r2"``; "" for none.
    anneal, order, critic_steps, packing, unroll : see `GanGame`; where modes are missed, anneal.
    conditional : whether both are called with the label too: generator(z, y), critic(x, y).
    auxiliary : weight of the cross-entropy of the critic's ``classes``, for both players.
    batch_size : 256 by default.
    optimizer : ``"adam"`` (β = (0, .99)), ``"sgd"``, the same with ``optimistic_`` before it, or
        ``(parameters, lr) -> Optimizer``.
    lr, critic_lr : of the generator and the critic, the same by default.
    known : the mixture that the data is of, where that is known: modes are counted then.
    compare : how many samples the figures of an epoch are taken from, at least 4.
    keep : the weights of the ``"last"`` epoch, or of the ``"best"``: least sliced Wasserstein
        distance to samples of the data.
    seed, out, **options : as for `robustlearn.loop.play` (resume, ema, schedule, clip, compile,
        patience, precision ``bf16``, trackers, on_nonfinite, save_every).

    Returns
    -------
    GanResult. Warnings name a vanishing gradient, lost modes and divergence, with a remedy each.

    Raises
    ------
    InputError for options that do not fit each other.

    Examples
    --------
    >>> from robustlearn.gan.mixtures import perceptron
    >>> _ = torch.manual_seed(0)
    >>> x = 0.5 * torch.randn(512, 1) + 2
    >>> networks = perceptron(1, 1, width=16), perceptron(1, 1, width=16, zero=True)
    >>> result = fit_gan(*networks, x, noise=1, epochs=8, batch_size=64, lr=1e-2)
    >>> abs(float(result.sample(500).mean()) - 2) < 0.5
    True
    """
    _check(optimizer, keep, critic_steps, order, options)
    check_options(
        "fit_gan", {"compare": compare}, {"compare": Range(4, math.inf, "[)", whole=True)}
    )
    weight = next(generator.parameters())
    samples = _samples(data, weight.dtype)
    game = GanGame(
        modules={"generator": generator, "critic": critic},
        optimizers={
            "generator": _optimizer(optimizer, generator, lr),
            "critic": _optimizer(optimizer, critic, lr if critic_lr is None else critic_lr),
        },
        noise=noise,
        loss=losses.get(loss),
        penalties=regularizers.penalties(penalty),
        anneal=anneal,
        order=order,
        critic_steps=critic_steps,
        packing=packing,
        unroll=unroll,
        conditional=conditional,
        auxiliary=auxiliary,
        settled=math.ceil(ANNEALED * epochs) if anneal > 1 else 0,
    )
    settings = {
        "loss": loss if isinstance(loss, str) else "own",
        "penalty": penalty,
        "anneal": anneal,
        "noise": noise,
        "order": order,
        "critic_steps": critic_steps,
        "packing": packing,
        "unroll": unroll,
        "conditional": conditional,
        "auxiliary": auxiliary,
        "keep": keep,
    }
    index = torch.arange(len(samples))[:: max(1, len(samples) // compare)][:compare]
    real, y = next(samples.fetch([index], seed, 0))
    history = play(
        game,
        samples,
        epochs=epochs,
        batch_size=batch_size or samples.batch_size or 256,
        seed=seed,
        validate=Watch(game, real, y, epochs=epochs, known=known),
        figure=KEPT[keep],
        out=out,
        progress=progress,
        settings=settings,
        **options,
    )
    for name, module in game.modules.items():
        module.load_state_dict(history.weights[name])
        module.eval()
    return GanResult(generator, critic, history, game, settings)


def _check(
    optimizer: Any, keep: str, critic_steps: int, order: str, options: dict[str, Any]
) -> None:
    if keep not in KEPT:
        raise InputError(f"keep is one of {', '.join(KEPT)}; got {keep!r}")
    if not callable(optimizer) and optimizer not in OPTIMIZERS:
        raise InputError(
            f"an optimizer is one of {', '.join(OPTIMIZERS)}, or a function of parameters and "
            f"learning rate; got {optimizer!r}"
        )
    if options.get("precision") == "fp16":
        raise InputError("fp16 has no room for gradients of gradients: precision='bf16'")
    if options.get("accumulate", 1) > 1 and (critic_steps > 1 or order == "extragradient"):
        raise InputError("gradients add up over batches of one kind only: accumulate=1 here")


def _samples(data: Any, dtype: torch.dtype) -> Samples:
    """Return data as samples, arrays and tensors in the generator's dtype."""
    if isinstance(data, Samples | torch.utils.data.Dataset | torch.utils.data.DataLoader):
        return Samples.of(data)
    if isinstance(data, tuple | list) and len(data) == 2:
        return Samples((_tensor.as_tensor(data[0]).to(dtype), data[1]))
    return Samples(_tensor.as_tensor(data).to(dtype))


def _optimizer(chosen: str | Callable[..., Optimizer], net: nn.Module, lr: float) -> Optimizer:
    if not isinstance(chosen, str):
        return chosen(net.parameters(), lr)
    name = chosen.removeprefix("optimistic_")
    options = {"betas": (0.0, 0.99), "fused": True} if name == "adam" else {}
    kind: Any = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    make = optimistic(kind) if chosen != name else kind
    return make(net.parameters(), lr=lr, **options)
