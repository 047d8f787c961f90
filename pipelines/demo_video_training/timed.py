"""Train for a given time, whatever the machine's speed."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch


def timed_steps(seconds: float) -> Iterator[tuple[int, float]]:
    """Yield each step's number and the share of the time that has passed, from 0 to 1.

    The clock starts after the third step, when everything is compiled. Only the last step has a share of 1.
    """
    start = None
    step, share = 0, 0.0
    while share < 1:
        if step == 3:
            start = time.perf_counter()
        share = min(1.0, (time.perf_counter() - start) / seconds) if start else 0.0
        yield step, share
        step += 1


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to ``factor`` times the one it was built with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


class Log:
    """Prints lines of CSV and appends them to a file; each begins with the step and the seconds since the start."""

    def __init__(self, path: Path):
        self.path = path
        self.start = time.perf_counter()

    def __call__(self, step: int, *values: str) -> None:
        line = ",".join([str(step), f"{time.perf_counter() - self.start:.0f}", *values])
        print(line, flush=True)
        with self.path.open("a") as file:
            print(line, file=file)
