"""This module times whole forward calls of a model: eager, compiled block by block, or replayed as one CUDA graph."""

import time
from collections import Counter
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dma_diffusers.eval.bench.breakdown import parts
from dma_diffusers.eval.bench.models import shortened

EAGER, COMPILED, GRAPH = "eager", "compiled", "graph"
MODES = (EAGER, COMPILED, GRAPH)
_ROUNDS, _MOST_STEPS = 3, 10
_KERNELS = 15  # so many are recorded, those that take the most time

Step = Callable[[], torch.Tensor]


def forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Run a step, without gradients, and return its result."""
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def prepare(model: torch.nn.Module, inputs: dict[str, Any], mode: str) -> Step:
    """Return a step in one of `MODES`, warmed up; the model is compiled for the second and the third.

    Warm-up runs one block of each kind, and for a graph, which needs every block's memory, then the whole step. Raises
    whatever compiling and capturing raise.
    """

    def step() -> torch.Tensor:
        return forward(model, inputs)

    if mode != EAGER and not is_compiled(model):
        model.compile_repeated_blocks(fullgraph=True)
    with shortened(model):
        for _ in range(2):
            step()
    return Captured(step) if mode == GRAPH else step


def is_compiled(model: torch.nn.Module) -> bool:
    """Tell if a block of the model was compiled."""
    return any(module._compiled_call_impl is not None for module in model.modules())


class Captured:
    """A step as one CUDA graph, which writes the same result anew each time.

    It holds the step as it was, and with it the model, whose memory the graph reads.
    """

    def __init__(self, step: Step):
        self._step, self._graph = step, torch.cuda.CUDAGraph()
        # A capture that fails would leave its own stream current.
        with torch.cuda.stream(torch.cuda.current_stream()):
            step()
            with torch.cuda.graph(self._graph):
                self._out = step()

    def __call__(self) -> torch.Tensor:
        self._graph.replay()
        return self._out


def timed(step: Step, seconds: float) -> tuple[dict[str, Any], torch.Tensor]:
    """Return a step's times by the clock on the wall, and its result: `step_ms` is the median of the rounds' means.

    The rounds' are in `rounds_ms`. The first step is profiled: busy_ms is how long kernels run in it, None where the
    profiler sees none, parts_ms what each of `breakdown.PARTS` takes of it, and kernels has those that take the most,
    by name, with their `ms` and `calls`. seconds: for all steps that are timed; there is at least one.
    """
    times, calls, out = _kernel_ms(step)
    one = wall_ms(step, 1)
    count, rounds = counts(one, seconds)
    taken = [one] if count * rounds == 1 else [wall_ms(step, count) for _ in range(rounds)]
    values = {
        "step_ms": median(taken),
        "rounds_ms": taken,
        "busy_ms": times.total() or None,
        "parts_ms": parts(times),
        "kernels": [
            {"name": name, "ms": ms, "calls": calls[name]} for name, ms in times.most_common(_KERNELS)
        ],
    }
    return values, out


def counts(one_ms: float, seconds: float) -> tuple[int, int]:
    """Return how many steps follow each other in a round, and how many rounds there are, for steps of `one_ms`."""
    most = 1e3 * seconds / max(one_ms, 1e-3)
    rounds = min(max(int(most), 1), _ROUNDS)
    return min(max(int(most / rounds), 1), _MOST_STEPS), rounds


def wall_ms(step: Step, count: int) -> float:
    """Return the mean milliseconds of `count` steps that follow each other without a pause."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(count):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / count


def _kernel_ms(step: Step) -> tuple[Counter[str], Counter[str], torch.Tensor]:
    """Return the milliseconds and the number of calls of each kernel of a step, by name, and its result."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        out = step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e3
            calls[event.name] += 1
    return times, calls, out
