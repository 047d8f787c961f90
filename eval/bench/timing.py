"""GPU times of several calls, taken in turns, so that a clock that drifts hits all alike."""

import math
import time
from collections.abc import Callable, Hashable
from statistics import median, quantiles
from typing import Any, TypeVar

import torch

_Key = TypeVar("_Key", bound=Hashable)
_ROUNDS = 5
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
    time for each, in 5 rounds of at least one call.
    """
    counts, hosts = {}, {}
    for key, call in calls.items():
        gpu, host = _timed(call, 0, 2, 0.01)
        counts[key] = min(
            max(math.ceil(seconds / _ROUNDS / (1e-3 * max(gpu[-1], 1e-3))), 1), _MOST_IN_A_ROUND
        )
        hosts[key] = host[-1]
    taken = {key: ([], []) for key in calls}
    for turn in range(_ROUNDS):
        for key, call in calls.items():
            # The GPU waits until all is enqueued: a call that is slow to enqueue is told by host_us, not by ms.
            wait = min(1.5 * hosts[key] * counts[key], 0.2)
            for all_of_them, new in zip(
                taken[key], _timed(call, turn * counts[key], counts[key], wait), strict=True
            ):
                all_of_them += new
    return {
        key: {
            "ms": median(gpu),
            "ms_quartiles": quantiles(gpu, n=4)[::2],
            "host_us": 1e6 * median(host),
        }
        for key, (gpu, host) in taken.items()
    }


def _timed(
    call: Callable[[int], Any], first: int, count: int, wait: float
) -> tuple[list[float], list[float]]:
    """Milliseconds on the GPU and seconds on the host of `count` calls, enqueued while the GPU waits."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    host = []
    torch.cuda.synchronize()
    torch.cuda._sleep(int(wait * 2e9))  # clocks, of which GPUs have up to 2e9 a second
    for number, (start, end) in enumerate(events, first):
        start.record()
        began = time.perf_counter()
        call(number)
        host.append(time.perf_counter() - began)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events], host
