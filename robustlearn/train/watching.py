"""What training tells while it runs: a bar with the time left and the figures, or lines."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from robustlearn._progress import bars
from robustlearn.loop import Moment

Told = Callable[[Moment], None]
RECENT = 50  # steps between two looks at the metrics, which wait for the device


@contextlib.contextmanager
def watched(epochs: int, asked: Told | bool | None) -> Iterator[Told | None]:
    """Yield what is told of each step: what was given; if True a bar, or a line an epoch."""
    if callable(asked):
        yield asked
    elif not asked:
        yield None
    elif sys.stderr.isatty():
        with bars() as shown:
            yield _Bar(shown, epochs)
    else:
        yield _line


class _Bar:
    """One bar over all steps."""

    def __init__(self, shown: Any, epochs: int) -> None:
        self.shown, self.epochs = shown, epochs
        self.task = shown.add_task("training", total=None)
        self.held_out = ""

    def __call__(self, moment: Moment) -> None:
        done = moment.epoch * moment.steps + moment.step
        text: dict[str, Any] = {}
        if moment.validation:
            self.held_out = f"; held out {_told(moment.validation)}"
        if moment.step % RECENT == 0 or moment.validation is not None:
            said = _told(moment.means()) + self.held_out
            text["description"] = f"epoch {moment.epoch + 1}/{self.epochs}: {said}"
        self.shown.update(self.task, completed=done, total=self.epochs * moment.steps, **text)


def _line(moment: Moment) -> None:
    if moment.validation is not None:
        held_out = f"; held out {_told(moment.validation)}" if moment.validation else ""
        sys.stderr.write(f"epoch {moment.epoch + 1}: {_told(moment.means())}{held_out}\n")
        sys.stderr.flush()


def _told(figures: Mapping[str, float]) -> str:
    """Return figures as text, without the cost, which is the same in every step."""
    return ", ".join(f"{name} {v:.3g}" for name, v in figures.items() if name != "gradients")
