"""GPU times of several calls, taken in turns, so that a clock that drifts hits all alike."""

import math
import time
from collections.abc import Callable, Hashable
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

_Key = TypeVar("_Key", bound=Hashable)
_ROUNDS = 3
_SETTLING = 0.06  # seconds
_MOST_IN_A_ROUND = 30  # their launches have to fit the queue, which holds about a thousand


def require_gpu() -> None:
    """Raise ValueError where there is no NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError("this command needs a CUDA GPU, and there is none")


def take_turns(
    calls: dict[_Key, Callable[[int], Any]], seconds: float
) -> dict[_Key, dict[str, float | list[float]]]:
    """What each call takes: `ms` on the GPU, its `ms_quartiles`, and `host_us` until it is enqueued; medians.

    calls: each takes the number of the copy of the inputs to run on, and must have run once. seconds: of GPU
    time for each, in 3 rounds of 1 to 30 calls. Each turn begins with untimed calls, so that what is timed runs
    at the clock that this very call leaves the GPU under load.
    """
    counts, untimed, waits = {}, {}, {}
    for key, call in calls.items():
        gpu, host = _timed(call, 0, 0, 2, 0.01)
        each = 1e-3 * max(gpu[-1], 1e-3)
        counts[key] = min(max(math.ceil(seconds / _ROUNDS / each), 1), _MOST_IN_A_ROUND)
        untimed[key] = min(math.ceil(_SETTLING / each), 2 * _MOST_IN_A_ROUND)
        # The GPU waits until enough is enqueued: a call that is slow to enqueue is told by host_us, not by ms.
        waits[key] = max(1.5 * host[-1] - each, 0) * (counts[key] + untimed[key])
    wait = min(max(waits.values()), 0.2)  # the same for all: a GPU that waits cools
    taken = {key: ([], []) for key in calls}
    for turn in range(_ROUNDS):
        for key, call in calls.items():
            found = _timed(call, turn * counts[key], untimed[key], counts[key], wait)
            for all_of_them, new in zip(taken[key], found, strict=True):
                all_of_them += new
    return {
        key: {"ms": median(gpu), "ms_quartiles": _quartiles(gpu), "host_us": 1e6 * median(host)}
        for key, (gpu, host) in taken.items()
    }


def _quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4)[::2]


def _timed(
    call: Callable[[int], Any], first: int, untimed: int, count: int, wait: float
) -> tuple[list[float], list[float]]:
    """Milliseconds on the GPU and seconds on the host of `count` calls after others, enqueued while the GPU waits."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    host = []
    torch.cuda.synchronize()
    torch.cuda._sleep(int(wait * 2e9))  # clocks, of which GPUs have up to 2e9 a second
    for number in range(untimed):
        call(number)
    for number, (start, end) in enumerate(events, first):
        start.record()
        began = time.perf_counter()
        call(number)
        host.append(time.perf_counter() - began)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host
