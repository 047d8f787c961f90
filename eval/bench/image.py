"""`bench image` measures whole steps of image transformers at true size, with stock attention and with ours."""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from dma_diffusers import apply, report, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.errors import first_line
from dma_diffusers.eval.bench import result
from dma_diffusers.eval.bench.bound import current_gpu
from dma_diffusers.eval.bench.fp8_linears import use_fp8_linears
from dma_diffusers.eval.bench.image_models import Image
from dma_diffusers.eval.bench.memory import CallMemory
from dma_diffusers.eval.bench.timing import require_gpu
from dma_diffusers.eval.bench.video import UNGATED, relative_l2
from dma_diffusers.families import family_of
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES
from dma_diffusers.kernels.tiling.policies import Dense
from dma_diffusers.kernels.tiling.precision_map import Class

NOTE = (
    "Weights are random: these are speeds, and quality is unknown. A step is one forward call, and steps follow each "
    "other without a pause. The GPU is busy while a kernel runs, by PyTorch's profiler in a step of its own; the rest "
    "of a step's time it waits for the host. Compiled: compile_repeated_blocks(fullgraph=True)."
)
LINEARS = ("bf16", "fp8")
EAGER, COMPILED = "eager", "compiled"
_PACKAGES = ("dma_diffusers", "torch", "diffusers")
_WARM_UP, _ROUNDS = 3, 3
_KERNELS = 15  # so many are recorded, those that take the most time
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Attention:
    """A step's attention is computed in this way. config: None for stock, in the backends that `kernels` allows."""

    name: str
    config: DMAConfig | None = None
    kernels: Callable[[], AbstractContextManager] = nullcontext


STOCK = (
    Attention("stock, PyTorch's choice"),
    Attention("stock, cuDNN", kernels=partial(sdpa_kernel, SDPBackend.CUDNN_ATTENTION)),
)


def default_configs(model: torch.nn.Module, grid: tuple[int, int], architecture: str) -> dict[str, DMAConfig]:
    """Return LOW everywhere, the diagonal and the first tile HIGH, and a neighbourhood if one was published.

    No step is dense. Formats are those that the GPU multiplies.
    """
    preset = DMAConfig.preset("b200" if architecture in BLOCK_SCALED_ARCHITECTURES else "hopper")
    formats = {"high": preset.high, "low": preset.low} | UNGATED
    found = {
        f"LOW {preset.low}": DMAConfig(policy=str(Dense(Class.LOW)), **formats),
        f"{preset.high}|{preset.low}, window 128, sink 128": DMAConfig(**formats),
    }
    if family_of(model).published:
        near = DMAConfig.published(model, grid, **formats)
        found[f"published neighbourhood, LOW {preset.low}"] = near
    return found


def bench_image(
    images: Mapping[str, Image],
    configs: Mapping[str, DMAConfig] | None = None,
    linears: str = "bf16",
    steps: int = 5,
    seed: int = 0,
    output: Path | None = None,
    command: str = "",
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Time steps for each picture, and return the result that `result.collect` describes, of what `measure` gives.

    configs: ours, by name; `default_configs` if None. linears: one of `LINEARS`. steps: how many follow each other in
    each of 3 timed rounds. output: the file that the result is written to. command: how this was started, for the
    record. Raises ValueError for unknown linears, without a GPU, and where the file there has other settings.
    """
    if linears not in LINEARS:
        raise ValueError(f"unknown linears {linears!r}: choose from {', '.join(LINEARS)}")
    require_gpu()
    gpu = current_gpu()
    settings = {
        "note": NOTE,
        "seed": seed,
        "steps": steps,
        "configs": {k: str(v) for k, v in (configs or {}).items()},
    }
    measures = {
        f"{name}, {linears} linears": partial(
            measure,
            name,
            image,
            configs,
            linears,
            steps,
            seed,
            gpu.architecture,
            torch.device("cuda"),
            on_step,
        )
        for name, image in images.items()
    }
    return result.collect(measures, settings | result.environment(gpu, _PACKAGES), output, command)


def measure(
    name: str,
    image: Image,
    configs: Mapping[str, DMAConfig] | None,
    linears: str,
    steps: int,
    seed: int,
    architecture: str,
    device: torch.device,
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure one picture: `{"parameters", "grid", "text", "fp8_linears", "entries"}`, the entries as in `compared`.

    Every way to compute attention is measured eager first and compiled then. An entry has its name and mode, and the
    values of `_timed`, or the reason under `absent`. `relative_l2` compares a step's result with the first entry's; it
    is None where it isn't finite.
    """
    model = image.build(device, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    replaced = use_fp8_linears(model) if linears == "fp8" else 0
    inputs = image.inputs(model, seed)
    ours = default_configs(model, image.grid, architecture) if configs is None else configs
    ways = [*STOCK, *(Attention(title, config) for title, config in ours.items())]
    entries: list[dict[str, Any]] = []
    reference = None
    for mode in (EAGER, COMPILED):
        for way in ways:
            on_step(name, len(entries), 2 * len(ways))
            entry: dict[str, Any] = {"name": way.name, "mode": mode, "is_stock": way.config is None}
            try:
                out = _prepared(model, way, mode, inputs)
                reference = out if reference is None else reference
                error = relative_l2(out, reference)
                entry["relative_l2"] = error if math.isfinite(error) else None
                with way.kernels():
                    entry |= _timed(partial(_forward, model, inputs), steps)
                entry["receipt"] = str(report(model)).splitlines()
                if mode == EAGER and way.config is not None:
                    entry |= _memory(model, inputs)
            except Exception as error:  # a backend may fail in whatever way it likes
                torch.cuda.synchronize()  # raises, and ends the run, if the device is lost to all
                entry = {"name": way.name, "mode": mode, "absent": first_line(error)}
            entries.append(entry)
    on_step(name, len(entries), len(entries))
    return {
        "parameters": parameters, "grid": list(image.grid), "text": image.text, "fp8_linears": replaced,
        "entries": compared(entries),
    }  # fmt: skip


def compared(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `over_stock` to the entries, their speed in units of the fastest stock attention's in the same mode.

    Also adds `host_bound`, the share of a step's time in which the GPU is not busy; None where that wasn't measured.
    """
    stock = {
        mode: min((e["step_ms"] for e in entries if e["mode"] == mode and e.get("is_stock")), default=None)
        for mode in (EAGER, COMPILED)
    }
    return [
        entry if "absent" in entry else entry | {
            "over_stock": stock[entry["mode"]] and stock[entry["mode"]] / entry["step_ms"],
            "host_bound": entry["busy_ms"] and max(1 - entry["busy_ms"] / entry["step_ms"], 0.0),
        }
        for entry in entries
    ]  # fmt: skip


HEADER = (
    "Attention",
    "mode",
    "ms a step",
    "× stock",
    "GPU busy, ms",
    "% host-bound",
    "peak GiB",
    "relative L2",
)


def cells(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`."""
    lines = []
    for entry in entries:
        if "absent" in entry:
            lines.append([f"{entry['name']}: {entry['absent']}", entry["mode"], *[""] * (len(HEADER) - 2)])
            continue
        lines.append([
            entry["name"], entry["mode"], f"{entry['step_ms']:.1f}",
            "" if entry["over_stock"] is None else f"{entry['over_stock']:.3f}",
            "" if entry["busy_ms"] is None else f"{entry['busy_ms']:.1f}",
            "" if entry["host_bound"] is None else f"{100 * entry['host_bound']:.1f}",
            f"{entry['peak_bytes'] / 2**30:.1f}",
            "NaN" if entry["relative_l2"] is None else f"{entry['relative_l2']:.4f}",
        ])  # fmt: skip
    return lines


def _prepared(model: torch.nn.Module, way: Attention, mode: str, inputs: dict[str, Any]) -> torch.Tensor:
    """Give the model its attention in a mode, warm it up, and return a step's result."""
    restore(model)
    if way.config is not None:
        apply(model, way.config)
    torch.compiler.reset()
    for block in model.modules():
        block._compiled_call_impl = None
    if mode == COMPILED:
        model.compile_repeated_blocks(fullgraph=True)
    with way.kernels():
        for _ in range(_WARM_UP):
            out = _forward(model, inputs)
    return out


def _memory(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, int | None]:
    """Return the most bytes that a call of our attention takes beside its tensors, and what `doctor` says of it."""
    memory = CallMemory()
    memory.watch(model)
    _forward(model, inputs)
    return {"extra_bytes": memory.extra, "said_bytes": memory.said}


def _forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def _timed(step: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Time a step by the clock on the wall: `step_ms` is the median of the rounds' means, `rounds_ms`.

    busy_ms: how long kernels run in a step, None where the profiler sees none. kernels: those that take the most of it,
    by name, with their `ms` and `calls`. peak_bytes: the most memory that was allocated.
    """
    torch.cuda.reset_peak_memory_stats()
    rounds = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
        rounds.append(1e3 * (time.perf_counter() - began) / steps)
    times, calls = _kernel_ms(step)
    return {
        "step_ms": median(rounds),
        "rounds_ms": rounds,
        "busy_ms": times.total() or None,
        "kernels": [
            {"name": name, "ms": ms, "calls": calls[name]} for name, ms in times.most_common(_KERNELS)
        ],
        "peak_bytes": torch.cuda.max_memory_allocated(),
    }


def _kernel_ms(step: Callable[[], Any]) -> tuple[Counter[str], Counter[str]]:
    """Return the milliseconds and the number of calls of each kernel in a step, by the kernels' names."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us() / 1e3
            calls[event.name] += 1
    return times, calls
