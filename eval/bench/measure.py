"""This module measures one shape: it prepares every entry, checks it, and times all of them in turns."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from dma_diffusers.eval.bench.bound import Gpu, bound_tflops
from dma_diffusers.eval.bench.entries import Entry
from dma_diffusers.eval.bench.inputs import Sample, draw
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.summary import compared
from dma_diffusers.eval.bench.timing import Call, eager_and_graph, prepare_and_time
from dma_diffusers.progress import OnStep

PARTS = ("whole", "kernel", "quantise")


def measure(
    shape: Shape,
    entries: Sequence[Entry],
    gpu: Gpu,
    kind: str,
    seed: int,
    seconds: float,
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure every entry at a shape: `{"size", "copies", "entries"}`, the entries as `summary.compared` gives them.

    Entries get the same inputs (`kind`, `seed`), and their errors are taken over the same rows of what each is asked
    for. An entry that can't run has the reason under `absent`. seconds: GPU time for each thing that is timed.
    """
    copies = draw(shape, kind, seed, gpu.l2_bytes)
    samples = {seen: Sample(*copies[0], seed, seen) for seen in {entry.seen for entry in entries}}

    def prepare(entry: Entry) -> tuple[dict[str, Any], dict[str, Call]]:
        prepared = entry.prepare(copies)
        error = samples[entry.seen].relative_l2(prepared.whole(0))
        known = {
            "relative_l2": error if math.isfinite(error) else None,
            "peak_bytes": peak_bytes(partial(prepared.whole, 0)),
            "bound_tflops": bound_tflops(shape, prepared.products, gpu),
            "products": [part._asdict() for part in prepared.products],
        }
        found = {part: getattr(prepared, part) for part in PARTS}
        return known, {part: call for part, call in found.items() if call}

    rows, calls = prepare_and_time(shape.label, entries, prepare, seconds, on_step)
    for (index, part), call in calls.items():
        if part == "whole":
            rows[index][part] |= eager_and_graph(call, len(copies), seconds)
    on_step(shape.label, len(entries) + 1, len(entries) + 1)
    return {"size": list(shape.size), "copies": len(copies), "entries": compared(shape, rows)}


def peak_bytes(call: Callable[[], Any]) -> int:
    """Return the memory that a call needs beyond what was allocated before, its result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
