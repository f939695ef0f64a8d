"""How a game goes, which its losses do not tell: figures after each epoch, and warnings."""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from robustlearn import _tensor
from robustlearn.gan import metrics
from robustlearn.gan.game import GanGame, judged
from robustlearn.gan.kernels import median_bandwidth
from robustlearn.gan.mixtures import Mixture

SURE = 0.95  # accuracy of a critic that is hardly ever deceived
WEAK = 0.01  # |∂ℓ/∂D| under which a generator hardly moves; it is ½ at the start
BLIND = 0.5  # recall of less than so much of the precision speaks of collapse
FAR = 2.0  # times the distance of the untrained generator
LARGE = 1e4  # a score beyond any use
NEIGHBOURS = 3  # that precision and recall look at

REMEDIES = {
    "vanishing": (
        "the generator's gradient vanishes: the critic ranks {accuracy:.1%} of pairs rightly, and "
        "|∂loss/∂score| is {pull:.1e}. Use a loss that does not saturate (relativistic_paired, "
        "non_saturating), penalise the critic (r1 + r2), or lower its learning rate"
    ),
    "collapse": (
        "mode collapse: {lost}. Use relativistic_paired with r1 + r2, show the critic packs "
        "(packing=4), unroll it (unroll=5), anneal its penalties (anneal=20), or make batches "
        "larger"
    ),
    "divergence": (
        "the game diverges: sliced Wasserstein distance {sliced_wasserstein:.3g}, {first:.3g} "
        "before training, scores up to {scores:.3g}. Lower the learning rates, penalise the critic "
        "(r1 + r2), or use order='extragradient'"
    ),
}


class Watch:
    """Looks at generator and critic after each epoch; warns once of each trouble.

    Figures: ``epoch``; ``closeness``, minus the next; ``sliced_wasserstein``; ``mmd`` at one
    bandwidth, the median of the reference; ``precision``, ``recall``; ``modes``, ``high_quality``,
    ``reverse_kl`` where the modes are known; of a critic with scores ``accuracy``, the share of
    pairs it ranks rightly (½ at the equilibrium), ``scores``, the largest, and ``pull``, the mean
    of |∂ℓ_G/∂D(G(z))|. What takes more samples than there are is NaN: 2 for ``mmd``, 4 for
    ``precision`` and ``recall``. Generator and critic are the averaged ones where there is an
    average. The noise is the same after each epoch.

    Parameters
    ----------
    real, y : samples to compare with, and their labels (n, 0) if they have none.
    epochs : how many there will be: collapse is no news before half of them, nor before the game
        has settled.
    known : the mixture that the data is of.
    """

    def __init__(
        self, game: GanGame, real: Tensor, y: Tensor, *, epochs: int, known: Mixture | None = None
    ) -> None:
        self.game, self.real, self.y = game, real, y
        self.epochs, self.known = epochs, known
        self.sigma = _bandwidth(_tensor.flat(real))
        self.keys = _tensor.keys(0, real)
        self.keys = _tensor.fold(self.keys, torch.arange(len(real)))
        self.warned: set[str] = set()
        self.first = self._distances(self._samples(game.modules))["sliced_wasserstein"]

    def __call__(self, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return the figures of an epoch."""
        fake = self._samples(modules)
        figures = {"epoch": float(self.game.epoch), **self._distances(fake)}
        if self.known is not None:
            found = metrics.mode_coverage(fake, self.known.centres.to(fake), self.known.std)
            figures["modes"] = float(found.modes)
            figures["high_quality"], figures["reverse_kl"] = found.high_quality, found.reverse_kl
        figures |= self._judgements(modules["critic"], fake)
        for trouble in self.troubles(figures):
            if trouble not in self.warned:
                self.warned.add(trouble)
                said = REMEDIES[trouble].format(
                    first=self.first, lost=self._lost(figures), **{"scores": math.nan} | figures
                )
                warnings.warn(f"epoch {self.game.epoch}: {said}", stacklevel=2)
        return figures

    def troubles(self, figures: Mapping[str, float]) -> list[str]:
        """Return what is wrong with these figures: names of `REMEDIES`."""
        found = []
        if figures.get("accuracy", 0.0) > SURE and figures["pull"] < WEAK:
            found.append("vanishing")
        late = min(self.epochs, max(self.epochs / 2, self.game.settled + 1))
        if self.game.epoch + 1 >= late and self._lost(figures):
            found.append("collapse")
        distance, scores = figures["sliced_wasserstein"], figures.get("scores", 0.0)
        if not (distance <= FAR * self.first and scores <= LARGE):  # NaN is trouble too
            found.append("divergence")
        return found

    def _lost(self, figures: Mapping[str, float]) -> str:
        """Say what is missing among the samples; nothing if all is there."""
        if self.known is not None:
            modes, all_of_them = int(figures["modes"]), len(self.known.centres)
            return f"{modes} of {all_of_them} modes have their share" if modes < all_of_them else ""
        if not figures["recall"] < BLIND * figures["precision"]:
            return ""
        return f"{figures['recall']:.1%} of the real samples lie among the generated ones"

    @torch.no_grad()
    def _samples(self, modules: Mapping[str, nn.Module]) -> Tensor:
        generator = modules["generator"]
        device = next(generator.parameters()).device
        mode, keys, y = generator.training, self.keys.to(device), self.y.to(device)
        fake = self.game.generate(generator.eval(), keys, y)
        generator.train(mode)
        return fake

    def _distances(self, fake: Tensor) -> dict[str, float]:
        real = self.real.to(fake)
        if not bool(fake.isfinite().all()):
            names = ("closeness", "sliced_wasserstein", "mmd", "precision", "recall")
            return dict.fromkeys(names, math.nan)
        sliced = metrics.sliced_wasserstein(_tensor.flat(real), _tensor.flat(fake))
        precision = recall = math.nan
        if len(real) > NEIGHBOURS:
            precision, recall = metrics.precision_recall(real, fake, neighbours=NEIGHBOURS)
        return {
            "closeness": -sliced,
            "sliced_wasserstein": sliced,
            "mmd": metrics.mmd(real, fake, sigma=self.sigma) if len(real) > 1 else math.nan,
            "precision": precision,
            "recall": recall,
        }

    def _judgements(self, critic: nn.Module, fake: Tensor) -> dict[str, float]:
        """What the critic makes of real and generated samples, and the generator of that."""
        loss, y = self.game.loss, self.y.to(fake.device)
        if loss.critic_on != "scores" or loss.generator_on != "scores":
            return {}
        with torch.no_grad():
            ours, theirs = (
                judged(self.game.judge(critic, x, y), x, "scores")
                for x in (self.game.seen(self.real.to(fake)), self.game.seen(fake))
            )
        theirs.requires_grad_()
        (slope,) = torch.autograd.grad(loss.generator(ours, theirs).sum(), theirs)
        theirs = theirs.detach()
        ranked = ((ours[:, None] - theirs).sign() + 1) / 2
        return {
            "accuracy": float(ranked.mean()),
            "scores": float(torch.cat([ours, theirs]).abs().max()),
            "pull": float(slope.abs().mean()),
        }


def _bandwidth(real: Tensor) -> float:
    """Return the median distance of the samples; of equal ones, from which any width tells, 1."""
    if bool((real == real[:1]).all()):
        return 1.0
    return median_bandwidth(real, real[:0])
