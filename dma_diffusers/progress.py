"""Progress bars on a terminal, for commands and for functions that take long."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TaskID

OnStep = Callable[[str, int, int], None]
"""A function that is called with a title, steps done, and steps in all."""


@contextmanager
def progress(shown: bool | OnStep = True) -> Iterator[OnStep]:
    """Yields a function that moves bars on a terminal, or the one that was given.

    shown: whether there are bars; or a function that is told of every step in their place.
    """
    if callable(shown):
        yield shown
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bars:
        tasks: dict[str, TaskID] = {}

        def on_step(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=total)
            bars.update(tasks[title], completed=done, total=total)

        yield on_step
