"""Generator against critic: losses, stabilisers, the game, and how to tell how it goes."""

from robustlearn.gan.diagnostics import Watch
from robustlearn.gan.game import GanGame, Judgement
from robustlearn.gan.losses import LOSSES, Pair
from robustlearn.gan.metrics import Coverage, mode_coverage
from robustlearn.gan.mixtures import Mixture
from robustlearn.gan.regularizers import PENALTIES
from robustlearn.gan.terms import adversarial_cross_entropy, adversarial_hinge
from robustlearn.gan.training import GanResult, fit_gan

__all__ = [
    "LOSSES",
    "PENALTIES",
    "Coverage",
    "GanGame",
    "GanResult",
    "Judgement",
    "Mixture",
    "Pair",
    "Watch",
    "adversarial_cross_entropy",
    "adversarial_hinge",
    "fit_gan",
    "mode_coverage",
]
