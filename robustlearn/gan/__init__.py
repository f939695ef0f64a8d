"""Generator against critic: losses, stabilisers, the game, and how to tell how it goes."""

from robustlearn.gan.diagnostics import Watch
from robustlearn.gan.game import GanGame, Judgement
from robustlearn.gan.losses import LOSSES, TERMS, Pair
from robustlearn.gan.metrics import Coverage, mode_coverage
from robustlearn.gan.mixtures import Mixture
from robustlearn.gan.regularizers import PENALTIES
from robustlearn.gan.training import GanResult, fit_gan

__all__ = [
    "LOSSES",
    "PENALTIES",
    "TERMS",
    "Coverage",
    "GanGame",
    "GanResult",
    "Judgement",
    "Mixture",
    "Pair",
    "Watch",
    "fit_gan",
    "mode_coverage",
]
