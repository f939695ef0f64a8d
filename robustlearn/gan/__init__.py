"""Generator against critic: losses, stabilisers, the game, and how to tell how it goes."""

from robustlearn.gan.losses import LOSSES, TERMS, Pair
from robustlearn.gan.metrics import Coverage, mode_coverage

__all__ = ["LOSSES", "TERMS", "Coverage", "Pair", "mode_coverage"]
