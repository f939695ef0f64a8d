"""One training loop for every game: robust training, and generator against critic."""

from robustlearn.loop.history import History, Moment
from robustlearn.loop.play import play
from robustlearn.loop.samples import Batch, Samples
from robustlearn.loop.schedules import SCHEDULES, rate
from robustlearn.loop.turn import Game, Remembering, Turn

__all__ = [
    "SCHEDULES",
    "Batch",
    "Game",
    "History",
    "Moment",
    "Remembering",
    "Samples",
    "Turn",
    "play",
    "rate",
]
