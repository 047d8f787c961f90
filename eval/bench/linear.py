"""`bench linear` measures linear layers: torch's, torchao's, and ours with and without quantising the input."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dma_diffusers.eval.bench import result
from dma_diffusers.eval.bench.bound import Gpu, current_gpu
from dma_diffusers.eval.bench.entries import FULL
from dma_diffusers.eval.bench.linear_entries import (
    METHODS,
    MICROMIX_SHARES,
    Entry,
    Tensors,
    bound_tflops,
    draw,
    entries,
)
from dma_diffusers.eval.bench.linear_shapes import LinearShape
from dma_diffusers.eval.bench.timing import Call, prepare_and_time, require_gpu
from dma_diffusers.progress import OnStep

NOTE = (
    "Inputs and weights are normal random numbers, and nothing of them is in the L2 cache. Ours and torchao's are "
    "compiled. torch._scaled_mm is the product alone, of operands that were quantised before. micromix has "
    f"{' / '.join(f'{share:.0%}' for share in MICROMIX_SHARES)} of the channels in 4, 6 and 8 bits."
)
_PACKAGES = ("dma_diffusers", "torch", "torchao")
_ROWS = 64  # so many rows of a result are compared with float64
_GRAPHS = 100  # more graphs of one function than torch.compile makes by itself: each entry and shape has one


def bench_linear(
    shapes: Sequence[LinearShape],
    methods: Sequence[str] = METHODS,
    seed: int = 0,
    seconds: float = 0.2,
    output: Path | None = None,
    command: str = "",
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Time every entry at each shape, and return the result that `result.collect` describes, of what `measure` gives.

    methods: ours, of `METHODS`. seconds: GPU time for each thing that is timed. output: the file that the result is
    written to, shape by shape. command: how this was started, for the record. Raises ValueError for an unknown method,
    without a GPU, and where `output` has other settings.
    """
    entries(methods)  # raises for an unknown one
    require_gpu()
    gpu = current_gpu()
    settings = {"note": NOTE, "seed": seed, "seconds": seconds, "methods": list(methods)}
    measures = {
        shape.label: partial(measure, shape, methods, gpu, torch.device("cuda"), seed, seconds, on_step)
        for shape in shapes
    }
    return result.collect(measures, settings | result.environment(gpu, _PACKAGES), output, command)


def measure(
    shape: LinearShape,
    methods: Sequence[str],
    gpu: Gpu,
    device: torch.device,
    seed: int,
    seconds: float,
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure every entry at a shape: `{"size", "copies", "entries"}`, the entries as `compared` gives them.

    An entry that can't run has the reason under `absent`. `relative_l2` is that of a sample of rows, to float64.
    """
    copies = draw(shape, seed, gpu.l2_bytes, device)
    sample = _Sample(copies[0], seed)
    every = entries(methods)

    def prepare(entry: Entry) -> tuple[dict[str, Any], dict[str, Call]]:
        prepared = entry.prepare(copies, gpu.architecture)
        parts = {part: getattr(prepared, part) for part in ("whole", "kernel", "quantise")}
        found = {part: call for part, call in parts.items() if call}
        for call in found.values():  # the first calls compile
            call(0)
        error = sample.relative_l2((prepared.whole or prepared.kernel)(0))
        known = {"bits": prepared.bits, "bound_tflops": bound_tflops(prepared, gpu)}
        return known | {"relative_l2": error if math.isfinite(error) else None}, found

    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=_GRAPHS):
        rows, _ = prepare_and_time(shape.label, every, prepare, seconds, on_step)
    on_step(shape.label, len(every) + 1, len(every) + 1)
    return {"size": list(shape[1:]), "copies": len(copies), "entries": compared(shape, rows)}


def compared(shape: LinearShape, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to the entries what their times mean.

    `whole` and `kernel` get `tflops`, `share_of_bound` (None without a bound) and `over_full`, the speed in units of
    bf16's. `quantising_share` is the part of the whole call that quantising takes: whole less kernel; None where one of
    them wasn't timed.
    """
    full = min((row["whole"]["ms"] for row in rows if row["kind"] == FULL and "whole" in row), default=None)
    found = []
    for row in rows:
        parts: dict[str, Any] = {}
        for part in ("whole", "kernel"):
            if part in row:
                ms = row[part]["ms"]
                tflops = shape.flop / ms / 1e9
                parts[part] = row[part] | {
                    "tflops": tflops,
                    "share_of_bound": row["bound_tflops"] and tflops / row["bound_tflops"],
                    "over_full": full and full / ms,
                }
        both = parts.keys() == {"whole", "kernel"}
        share = max(1 - parts["kernel"]["ms"] / parts["whole"]["ms"], 0.0) if both else None
        found.append(row if "absent" in row else row | parts | {"quantising_share": share})
    return found


HEADER = (
    "Linear",
    "ms",
    "TFLOP/s",
    "× bf16",
    "% of bound",
    "product alone: TFLOP/s",
    "% of bound",
    "quantiser, ms",
    "quantising, %",
    "bits",
    "relative L2",
)


def cells(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`."""
    lines = []
    for entry in entries:
        if "absent" in entry:
            lines.append([f"{entry['name']}: {entry['absent']}", *[""] * (len(HEADER) - 1)])
            continue
        whole, kernel, quantiser = (entry.get(part, {}) for part in ("whole", "kernel", "quantise"))
        lines.append([
            entry["name"], _number(whole.get("ms"), 3), _number(whole.get("tflops")),
            _number(whole.get("over_full"), 2), _percent(whole.get("share_of_bound")),
            _number(kernel.get("tflops")), _percent(kernel.get("share_of_bound")),
            _number(quantiser.get("ms"), 3), _percent(entry["quantising_share"], 1), f"{entry['bits']:.2f}",
            "NaN" if entry["relative_l2"] is None else f"{entry['relative_l2']:.4f}",
        ])  # fmt: skip
    return lines


class _Sample:
    """A sample has some rows of a layer's exact result, in float64."""

    def __init__(self, tensors: Tensors, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self._rows = torch.randperm(len(tensors.x), generator=generator)[:_ROWS].to(tensors.x.device)
        x, weight, bias = tensors.x[self._rows].double(), tensors.weight.double(), tensors.bias.double()
        self._exact = x @ weight.T + bias

    def relative_l2(self, out: torch.Tensor) -> float:
        """Return ‖out − exact‖ / ‖exact‖ over the sampled rows of a result `[rows, N]`."""
        return ((out[self._rows].double() - self._exact).norm() / self._exact.norm()).item()


def _number(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "" if value is None else f"{100 * value:.{digits}f}"
