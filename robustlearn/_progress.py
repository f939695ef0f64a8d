"""What is told while something runs: bars on a terminal, lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Told = Callable[[str, int, int], None]
WHOLE = "evaluation"  # the stage that stands for all


@contextlib.contextmanager
def stages(asked: Told | bool | None) -> Iterator[Told]:
    """Yield ``told(stage, done, total)``: what was given; if True bars, or a line a stage."""
    if callable(asked):
        yield asked
    elif not asked:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with bars() as shown:
            yield _Bars(shown)
    else:
        yield _Lines()


def bars() -> Progress:
    """Return bars with the time that is left."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _Bars:
    """One bar a stage, and one for the whole of an evaluation."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.current: tuple[str, Any] | None = None
        self.whole: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == WHOLE:
            if self.whole is None or done == 0:
                self.whole = self.bars.add_task(stage, total=total)
            self.bars.update(self.whole, completed=done, total=total)
            return
        if self.current is None or self.current[0] != stage or done == 0:
            self.current = (stage, self.bars.add_task(stage, total=total))
        self.bars.update(self.current[1], completed=done)


class _Lines:
    """One line when a stage ends."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage == WHOLE:
            return
        if done == 0:
            self.since = time.perf_counter()
        if done == total and total:
            sys.stderr.write(f"{stage}: {total} in {time.perf_counter() - self.since:.1f} s\n")
            sys.stderr.flush()
