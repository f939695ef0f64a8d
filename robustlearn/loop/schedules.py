"""Learning rates as a function of how far training has come."""

import math
from collections.abc import Callable

from robustlearn.errors import InputError

RISE = 0.3  # share of one_cycle that rises
START = 1 / 25  # where one_cycle starts, of its peak


def _one_cycle(progress: float) -> float:
    if progress < RISE:
        return START + (1 - START) * progress / RISE
    return _cosine((progress - RISE) / (1 - RISE))


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "step": lambda progress: 0.1 ** ((progress >= 0.5) + (progress >= 0.75)),
}


def rate(schedule: str, progress: float) -> float:
    """Return the factor of the learning rate at ``progress`` in [0, 1).

    ``constant``: 1. ``cosine``: (1 + cos πt)/2. ``one_cycle``: up in a line from 1/25 to 1 during
    the first 0.3, then down as a cosine to 0 (after Smith, 2018). ``step``: a tenth after a half,
    a hundredth after three quarters (as Rice, Wong and Kolter, 2020, train).

    Raises
    ------
    InputError for a schedule of another name.

    Examples
    --------
    >>> [round(rate("step", t), 4) for t in (0.0, 0.5, 0.75)]
    [1.0, 0.1, 0.01]
    """
    if schedule not in SCHEDULES:
        raise InputError(f"there is no schedule {schedule!r}; there are: {', '.join(SCHEDULES)}")
    return SCHEDULES[schedule](progress)
