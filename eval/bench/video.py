"""`bench video` measures whole steps of video transformers at their true size, with stock attention and with ours."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dma_diffusers import report, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.bench import result
from dma_diffusers.eval.bench.bound import Gpu, Products, bound_tflops, current_gpu
from dma_diffusers.eval.bench.entries import products
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.steps import BACKENDS, Step, fastest_backend, step
from dma_diffusers.eval.bench.timing import require_gpu
from dma_diffusers.eval.bench.video_models import Video, shortened
from dma_diffusers.eval.cost import pairs
from dma_diffusers.kernels import operator, plan
from dma_diffusers.kernels.tiling.layout import Layout, tiles
from dma_diffusers.kernels.tiling.policies import Dense, Policy
from dma_diffusers.kernels.tiling.precision_map import Class

NOTE = (
    "Weights are random: these are speeds, and quality is unknown. A step is one forward call, without torch.compile. "
    "Attention is self-attention alone, quantisation and gathering included. The relative L2 of a step's result to "
    "stock's tells whether the same is computed, and with skipped tiles it is not; trained weights give other errors."
)
STOCK, LOW, SPARSE, DENSE = "stock", "LOW everywhere", "neighbourhood", "its dense step, HIGH everywhere"
DENSE_SHARE = 0.3
# No step and no layer is dense; without these fields a model's family may ask for some.
UNGATED = {"dense_above_sigma": 1, "dense_layers": ()}
EVERY_STEP_DENSE = {"dense_above_sigma": 0, "dense_layers": ()}
_PACKAGES = ("dma_diffusers", "torch", "diffusers")
OnStep = Callable[[str, int, int], None]


def configurations(neighborhood: Policy) -> dict[str, DMAConfig | None]:
    """Return the configurations that steps are timed with; None is stock attention."""
    near = {"policy": str(neighborhood)}
    return {
        STOCK: None,
        LOW: DMAConfig.preset("hopper", policy=str(Dense(Class.LOW)), **UNGATED),
        SPARSE: DMAConfig.preset("hopper", **near, **UNGATED),
        DENSE: DMAConfig.preset("hopper", **near, **EVERY_STEP_DENSE),
    }


def bench_video(
    videos: dict[str, Video],
    rounds: int = 2,
    seed: int = 0,
    output: Path | None = None,
    command: str = "",
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Time steps of each model in `configurations`, and return the result that `result.collect` describes.

    It has what `measure` returns for each model. rounds: each configuration has one step in each of them. output: the
    file that the result is written to, model by model. command: how this was started, for the record. Raises ValueError
    without a GPU that our kernels run on, and where the file there has other settings.
    """
    require_gpu()
    gpu = current_gpu()
    ours = configurations(Dense())[LOW]
    device = torch.device("cuda")
    chosen = operator.choose(device, 128, ours.high, ours.low, ours.operator_lowering)
    if chosen.lowering == "reference":
        raise ValueError(f"there is no kernel for {ours.high}|{ours.low}: {chosen.reason}")
    backends = {peer.name: peer.version for peer in BACKENDS}
    settings = {"note": NOTE, "seed": seed, "rounds": rounds, "backends": backends}
    measures = {
        name: partial(measure, name, video, device, gpu, rounds, seed, on_step)
        for name, video in videos.items()
    }
    return result.collect(measures, settings | result.environment(gpu, _PACKAGES), output, command)


def measure(
    name: str,
    video: Video,
    device: torch.device,
    gpu: Gpu,
    rounds: int,
    seed: int,
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure one model: `{"model", "clip", …, "backends", "stock", "entries"}`, the entries as `compared` gives them.

    The fastest of `BACKENDS` on its shape stands in for SDPA in the self-attention of stock steps. After a step of a
    shortened model, which compiles, each configuration has one step in each round. `relative_l2` compares a step's
    result with the stock step's; it is None where it isn't finite.
    """
    configs = configurations(video.neighborhood)
    title, total = f"{name}, {video.clip}", 1 + rounds * len(configs)
    on_step(title, 0, total)
    model = video.build(device, seed)
    inputs = video.inputs(model, seed)
    layout = video.layout(model)
    heads, head_dim = model.config.num_attention_heads, model.config.attention_head_dim
    shape = Shape(name, 1, heads, layout.k_length, head_dim)
    backends, stock = fastest_backend(shape, gpu, seed)
    with shortened(model):
        calls = {
            entry: step(model, config, inputs, stock, layout.k_length).calls
            for entry, config in configs.items()
        }
    if not all(calls.values()) or len(set(calls.values())) > 1:
        raise RuntimeError(f"self-attention should be called as often with every configuration, got {calls}")
    steps: dict[str, list[Step]] = {entry: [] for entry in configs}
    receipts = {}
    for turn in range(rounds):
        for index, (entry, config) in enumerate(configs.items(), 1):
            on_step(title, turn * len(configs) + index, total)
            steps[entry].append(step(model, config, inputs, stock, layout.k_length))
            receipts[entry] = str(report(model)).splitlines()
    on_step(title, total, total)
    restore(model)
    first = {entry: taken[0] for entry, taken in steps.items()}
    entries = []
    for entry, config in configs.items():
        of_policy = workload(config, layout, head_dim, device, entry == DENSE)
        bound = bound_tflops(shape, of_policy.pop("products"), gpu)
        error = relative_l2(first[entry].out, first[STOCK].out)
        entries.append({
            "name": entry, **of_policy,
            "step_s": median(taken.seconds for taken in steps[entry]),
            "attention_s": median(taken.attention for taken in steps[entry]),
            "steps_s": [taken.seconds for taken in steps[entry]],
            "attentions_s": [taken.attention for taken in steps[entry]],
            "attention_bound_s": bound and first[entry].calls * shape.flop / bound / 1e12,
            "peak_bytes": max(taken.peak_bytes for taken in steps[entry]),
            "extra_bytes": first[entry].extra_bytes,
            "said_bytes": first[entry].said_bytes,
            "relative_l2": error if math.isfinite(error) else None,
            "receipt": receipts[entry],
        })  # fmt: skip
    return {
        "model": video.kind,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "clip": video.clip,
        "size": list(shape.size),
        "grid": list(layout.grid),
        "text": layout.text_length,
        "attention_calls": first[STOCK].calls,
        "backends": backends,
        "stock": stock.name,
        "entries": compared(entries),
    }


def workload(
    config: DMAConfig | None, layout: Layout, head_dim: int, device: torch.device, is_dense: bool
) -> dict[str, Any]:
    """Return a configuration's policy in words, the shares of all pairs of tiles in HIGH and LOW, and its `products`.

    is_dense: says if the step is HIGH everywhere. In tile order, padding may bring the sum of the shares over 1.
    """
    if config is None:
        return {"policy": None, "high": 1.0, "low": 0.0, "products": [Products(1.0, "H", "H")]}
    policy = Dense(Class.HIGH) if is_dense else config.asked
    chosen = operator.choose(device, head_dim, config.high, config.low, config.operator_lowering)
    every = tiles(layout.q_length) ** 2
    in_high, in_low = (number.mean().item() / every for number in pairs(policy, layout))
    precision_map = plan.make(policy, layout).precision_map
    return {
        "policy": str(policy), "high": in_high, "low": in_low,
        "products": products(precision_map, config.high, config.low, chosen.lowering),
    }  # fmt: skip


def compared(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries, and after them a schedule: `DENSE_SHARE` of its steps are dense, the others neighbourhoods.

    Adds `over_stock` and `attention_over_stock`, speeds in units of stock's, and `attention_share` of a step's time.
    The schedule's times are means over its steps, computed from the entries' medians.
    """
    named = {entry["name"]: entry for entry in entries}
    mixed = {
        key: DENSE_SHARE * named[DENSE][key] + (1 - DENSE_SHARE) * named[SPARSE][key]
        for key in ("step_s", "attention_s", "high", "low")
    }
    memory = max(named[part]["peak_bytes"] for part in (DENSE, SPARSE))
    schedule = {
        "name": f"{SPARSE}, {DENSE_SHARE:.0%} of steps dense",
        "computed": True,
        "peak_bytes": memory,
    } | mixed
    stock = named[STOCK]
    return [
        entry
        | {
            "over_stock": stock["step_s"] / entry["step_s"],
            "attention_over_stock": stock["attention_s"] / entry["attention_s"],
            "attention_share": entry["attention_s"] / entry["step_s"],
        }
        for entry in (*entries, schedule)
    ]


def relative_l2(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Return ‖out − exact‖ / ‖exact‖."""
    out, exact = out.double(), exact.double()
    return ((out - exact).norm() / exact.norm()).item()


HEADER = (
    "Attention",
    "s a step",
    "× stock",
    "attention, s",
    "× stock",
    "% of step",
    "% of bound",
    "% of tiles",
    "peak GiB",
    "relative L2",
)


def cells(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`."""
    lines = []
    for entry in entries:
        bound = entry.get("attention_bound_s")
        lines.append([
            entry["name"],
            f"{entry['step_s']:.3f}", f"{entry['over_stock']:.2f}",
            f"{entry['attention_s']:.3f}", f"{entry['attention_over_stock']:.2f}",
            f"{100 * entry['attention_share']:.0f}",
            f"{100 * bound / entry['attention_s']:.0f}" if bound else "",
            f"{100 * (entry['high'] + entry['low']):.1f}",
            f"{entry['peak_bytes'] / 2**30:.1f}",
            "" if entry.get("computed") else _error(entry["relative_l2"]),
        ])  # fmt: skip
    return lines


def _error(relative_l2: float | None) -> str:
    return "NaN" if relative_l2 is None else f"{relative_l2:.4f}"
