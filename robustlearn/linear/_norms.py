"""The norm p of an attack, and its dual q."""

from typing import Any

import numpy as np

from robustlearn.errors import InputError

DUAL = {1.0: np.inf, 2.0: 2.0, np.inf: 1.0}


def dual_norm(norm: Any) -> float:
    """Return q with 1/p + 1/q = 1 for the norm p = 1, 2 or ∞ of an attack; of q it returns p."""
    try:
        return DUAL[np.inf if norm == "inf" else norm]
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"norm must be 1, 2 or inf (the norm of the attack); got {norm!r}"
        ) from None
