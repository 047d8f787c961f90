"""This module times calls on the GPU and on the host, in turns, so that a drifting clock hits all of them alike."""

import math
import time
from collections.abc import Callable, Hashable, Sequence
from statistics import median, quantiles
from typing import Any, Protocol, TypeVar

import torch

from dma_diffusers.errors import first_line
from dma_diffusers.progress import OnStep

Call = Callable[[int], Any]
"""A call launches one kernel or more, on the copy of the inputs that has this number (modulo their count)."""


class Contender(Protocol):
    """A contender has a name, and a kind such as `entries.OURS`."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


_Key = TypeVar("_Key", bound=Hashable)
_Contender = TypeVar("_Contender", bound=Contender)
_ROUNDS = 3
_SETTLING = 0.06  # calls run untimed for so many seconds first
_MOST_IN_A_ROUND = 30  # their launches have to fit the queue, which holds about a thousand
_HOST_ROUNDS, _HOST_CALLS = 5, 20
_HOST_WAIT = 0.05  # the GPU waits for so many seconds while calls are enqueued, so that it never idles
_CLOCKS = 2e9  # a GPU counts its wait in clocks, of which it has so many a second at most


def require_gpu() -> None:
    """Raise ValueError where there is no NVIDIA GPU."""
    if not torch.cuda.is_available() or torch.version.hip:
        raise ValueError("this command needs a CUDA GPU, and there is none")


def prepare_and_time(
    label: str,
    contenders: Sequence[_Contender],
    prepare: Callable[[_Contender], tuple[dict[str, Any], dict[str, Call]]],
    seconds: float,
    on_step: OnStep,
) -> tuple[list[dict[str, Any]], dict[tuple[int, str], Call]]:
    """Prepare every contender, time the calls of all in turns, and return a row for each, and calls by row and part.

    prepare: returns what is known of a contender, and its calls by part, which have run once. A row has `name`, `kind`,
    what is known, and under each part what `take_turns` gives; where `prepare` raised, the reason under `absent`.
    seconds: as of `take_turns`. on_step: is told of each contender's step, and of one more, whose end is the caller's.
    """
    rows: list[dict[str, Any]] = []
    calls: dict[tuple[int, str], Call] = {}
    for index, contender in enumerate(contenders):
        on_step(label, index, len(contenders) + 1)
        row = {"name": contender.name, "kind": contender.kind}
        try:
            known, found = prepare(contender)
        except Exception as error:  # a peer may fail in whatever way it likes
            torch.cuda.synchronize()  # raises, and ends the run, if the device is lost to all
            rows.append(row | {"absent": first_line(error)})
        else:
            rows.append(row | known)
            calls |= {(index, part): call for part, call in found.items()}
    on_step(label, len(contenders), len(contenders) + 1)
    for (index, part), taken in take_turns(calls, seconds).items():
        rows[index][part] = taken
    return rows, calls


def take_turns(calls: dict[_Key, Call], seconds: float) -> dict[_Key, dict[str, float | list[float]]]:
    """Measure each call: `ms` on the GPU, its `ms_quartiles`, and `host_us` until it is enqueued; medians.

    calls: each takes the number of the copy of the inputs to run on, and must have run once. seconds: GPU time
    for each, in 3 rounds of 1 to 30 calls. Each turn begins with untimed calls, so that what is timed runs
    at the clock that this very call leaves the GPU under load.
    """
    counts, untimed, waits, host = {}, {}, {}, {}
    for key, call in calls.items():
        each = 1e-3 * max(_gpu_ms(call, 0, 0, 2, 0.01)[-1], 1e-3)
        counts[key] = min(max(math.ceil(seconds / _ROUNDS / each), 1), _MOST_IN_A_ROUND)
        untimed[key] = min(math.ceil(_SETTLING / each), 2 * _MOST_IN_A_ROUND)
        host[key] = host_seconds(call, min(counts[key], _HOST_CALLS))
        # The GPU waits until enough is enqueued: host_us tells that a call is slow to enqueue, ms does not.
        waits[key] = max(1.5 * host[key] - each, 0) * (counts[key] + untimed[key])
    wait = min(max(waits.values()), 0.2)  # it is the same for all, because a GPU that waits cools
    taken: dict[_Key, list[float]] = {key: [] for key in calls}
    for turn in range(_ROUNDS):
        for key, call in calls.items():
            taken[key] += _gpu_ms(call, turn * counts[key], untimed[key], counts[key], wait)
    return {
        key: {"ms": median(ms), "ms_quartiles": quantiles(ms, n=4)[::2], "host_us": 1e6 * host[key]}
        for key, ms in taken.items()
    }


def host_seconds(call: Call, count: int = _HOST_CALLS) -> float:
    """Measure how long the host takes to enqueue a call while the GPU is busy: the median of 5 means over `count`."""
    taken = []
    for _ in range(_HOST_ROUNDS):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(_HOST_WAIT * _CLOCKS))
        began = time.perf_counter()
        for number in range(count):
            call(number)
        taken.append((time.perf_counter() - began) / count)
    torch.cuda.synchronize()
    return median(taken)


def eager_and_graph(call: Call, copies: int, seconds: float) -> dict[str, Any]:
    """Measure a call as a program meets it: `eager_ms`, one call after another, and `graph_ms`, CUDA graphs likewise.

    Nothing makes the GPU wait, so a call that takes longer to enqueue than to run takes that time in `eager_ms`.
    Each graph holds one call on one copy of the inputs, of which there are `copies`. Both are medians of 3 rounds in
    turns, each of `seconds` / 3 and at least one call. `graph_ms` is None where the call can't be captured, and
    `graph_absent` then has the reason.
    """
    found: dict[str, Any] = {}
    calls = {"eager_ms": call}
    try:
        calls["graph_ms"] = _captured(call, copies)
    except Exception as error:  # a peer may fail in whatever way it likes
        torch.cuda.synchronize()  # raises, and ends the run, if the device is lost to all
        found |= {"graph_ms": None, "graph_absent": first_line(error)}
    each = {name: 1e-3 * _throughput_ms(timed, 1, 3) for name, timed in calls.items()}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, timed in calls.items():
            untimed, count = (math.ceil(duration / each[name]) for duration in (_SETTLING, seconds / _ROUNDS))
            taken[name].append(_throughput_ms(timed, untimed, count))
    return {name: median(ms) for name, ms in taken.items()} | found


def _captured(call: Call, copies: int) -> Call:
    """Return the call as CUDA graphs, one for each copy of the inputs."""
    graphs = []
    with torch.cuda.stream(
        torch.cuda.current_stream()
    ):  # a capture that fails would leave its own stream current
        for number in range(copies):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call(number)
            graphs.append(graph)
    return lambda number: graphs[number % copies].replay()


def _throughput_ms(call: Call, untimed: int, count: int) -> float:
    """Measure the mean milliseconds of `count` calls that follow others without a pause."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    for number in range(untimed):
        call(number)
    start.record()
    for number in range(untimed, untimed + count):
        call(number)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def _gpu_ms(call: Call, first: int, untimed: int, count: int, wait: float) -> list[float]:
    """Measure the milliseconds of each of `count` calls after `untimed` others, all enqueued while the GPU waits."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(wait * _CLOCKS))
    for number in range(untimed):
        call(number)
    for number, (start, end) in enumerate(events, first):
        start.record()
        call(number)
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]
