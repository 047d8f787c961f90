"""Progress for commands and functions that take long: bars on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

OnStep = Callable[[str, int, int], None]
"""A function that is called with a title, steps done, and steps in all."""

_SECONDS_BETWEEN_LINES = 60  # a short run writes none


@contextmanager
def progress(shown: bool | OnStep = True) -> Iterator[OnStep]:
    """Yields a function that shows progress on standard error, or the one that was given.

    shown: whether it is shown; or a function that is told of every step in its place.
    """
    if callable(shown):
        yield shown
        return
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        yield _lines()
        return
    with Progress(console=console, transient=True, disable=not shown) as bars:
        tasks: dict[str, TaskID] = {}

        def on_step(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=total)
            bars.update(tasks[title], completed=done, total=total)

        yield on_step


def _lines() -> OnStep:
    """A function that writes a line with the time left, but no two of one title within a minute."""
    start = time.monotonic()
    written: dict[str, float] = {}
    began: dict[str, tuple[float, int]] = {}  # when, and the steps done then

    def on_step(title: str, done: int, total: int) -> None:
        now = time.monotonic()
        since, first = began.get(title, (now, done))
        if done <= first:  # it begins anew, as the steps of each drawing do
            since, first = began[title] = now, done
        if done > first and now - written.get(title, start) >= _SECONDS_BETWEEN_LINES:
            written[title] = now
            left = (now - since) / (done - first) * (total - done)
            print(f"{title}: {done} of {total}, about {in_words(left)} left", file=sys.stderr, flush=True)

    return on_step


def in_words(seconds: float) -> str:
    """Return a time as a reader would say it, such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
