"""Generator against critic: losses, stabilisers, the game, and how to tell how it goes."""

from robustlearn.gan.losses import LOSSES, TERMS, Pair

__all__ = ["LOSSES", "TERMS", "Pair"]
