"""This module times the backward pass of attention, and both passes, ours beside kernels of full precision."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dma_diffusers.eval.bench import result
from dma_diffusers.eval.bench.backends import BACKENDS
from dma_diffusers.eval.bench.bound import Gpu, current_gpu
from dma_diffusers.eval.bench.entries import FULL, OURS, Config, Tensors, check_different
from dma_diffusers.eval.bench.inputs import draw
from dma_diffusers.eval.bench.measure import peak_bytes
from dma_diffusers.eval.bench.peers import Peer
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.timing import Call, prepare_and_time, require_gpu
from dma_diffusers.kernels import operator, plan
from dma_diffusers.kernels.defaults import default_formats
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.precision_map import UNVISITED, Phase
from dma_diffusers.progress import OnStep

Attend = Callable[..., torch.Tensor]

# Products of matrices in each, where the forward pass has two.
PRODUCTS = {"backward": 5, "both": 7}
HEADER = (
    "Attention",
    "backward ms",
    "TFLOP/s",
    "× best full precision",
    "both passes ms",
    "TFLOP/s",
    "× best full precision",
    "% of tiles left out",
    "relative L2 of dQ",
    "dK",
    "dV",
    "peak MiB",
)
_ROWS = 1024  # so many queries of a head have their exact scores at a time


@dataclass(frozen=True)
class Way:
    """A way computes attention with gradients.

    prepare: takes a q, and returns a function of q, k and v, and the share of all pairs of tiles that it leaves out; it
    raises, with the reason, where it can't take such a q.
    """

    name: str
    kind: str
    prepare: Callable[[torch.Tensor], tuple[Attend, float]]


def peers() -> list[Way]:
    """Return the kernels of full precision; some of them have no backward pass, which they say when they are asked."""

    def prepare(peer: Peer, q: torch.Tensor) -> tuple[Attend, float]:
        return partial(peer.call, peer.load()), 0.0

    return [Way(backend.peer.name, FULL, partial(prepare, backend.peer)) for backend in BACKENDS]


def default_configs(architecture: str) -> list[Config]:
    """Return configurations that show what formats, INT8 products and skipping do to the backward pass."""
    formats = default_formats(architecture)
    return [
        Config("bf16", "int8", mapped=False),
        Config("bf16", "int8", policy="importance(budget=0.5, beyond=skip, by=pools)"),
        Config(*formats, window=0, sink=0),
        Config("bf16", "int8", window=0, sink=0, backward="int8"),
    ]


def of_config(config: Config) -> Way:
    """Return the way of one of our configurations."""

    def prepare(q: torch.Tensor) -> tuple[Attend, float]:
        chosen = operator.choose(q.device, q.shape[3], config.high, config.low, config.lowering)
        if chosen.lowering == "reference":
            raise ValueError(f"there is no kernel for it: {chosen.reason}")
        planned = plan.make(config.map_policy, Layout(q.shape[2], q.shape[2], config.text, config.grid))
        return lambda *qkv: operator.attention(*qkv, **config.keywords).out, 1 - share_of_tiles(planned)

    return Way(config.name, OURS, prepare)


def share_of_tiles(planned: plan.Plan) -> float:
    """Return the share of all pairs of tiles that are HIGH or LOW, by position or by content."""
    routing, bounds = planned.routing, planned.precision_map.bounds
    if routing is None:
        return bounds[..., -1].double().mean().item() / bounds.shape[-2]
    if routing.shares is None:
        return routing.visited / routing.phases.numel()
    by_position = ((routing.phases != Phase.LOW) & (routing.phases != UNVISITED)).sum(-1)
    taken = by_position + routing.shares[..., 1]
    return taken.double().mean().item() / routing.phases.shape[-1]


def measure(
    shape: Shape,
    ways: Sequence[Way],
    gpu: Gpu,
    kind: str,
    seed: int,
    seconds: float,
    on_step: OnStep = lambda name, done, total: None,
) -> dict[str, Any]:
    """Measure every way at a shape: `{"size", "copies", "entries"}`.

    An entry has `name`, `kind`, `skipped` (the share of pairs of tiles left out, or taken by means), `relative_l2` of
    the gradients of q, k and v to the exact ones of all scores in one head, and `peak_bytes` of both passes. For the
    `backward` pass alone and `both` it has `ms`, `ms_quartiles`, `host_us`, `tflops` (of `PRODUCTS`, whatever a kernel
    really multiplies) and `over_full`, the speed in units of the best peer's. A way that can't run has the reason under
    `absent`.
    """
    copies = draw(shape, kind, seed, gpu.l2_bytes)
    generator = torch.Generator("cuda").manual_seed(seed)
    gradient = torch.randn(shape.size, generator=generator, device="cuda").bfloat16()
    exact = exact_gradients(*copies[0], gradient)

    def prepare(way: Way) -> tuple[dict[str, Any], dict[str, Call]]:
        attend, skipped = way.prepare(copies[0][0])
        backward, both = passes(attend, copies, gradient)
        errors = [_error(own, other) for own, other in zip(backward(0), exact, strict=True)]
        known = {"skipped": skipped, "relative_l2": errors, "peak_bytes": peak_bytes(partial(both, 0))}
        return known, {"backward": backward, "both": both}

    rows, _ = prepare_and_time(shape.label, ways, prepare, seconds, on_step)
    on_step(shape.label, len(ways) + 1, len(ways) + 1)
    return {"size": list(shape.size), "copies": len(copies), "entries": compared(shape, rows)}


def bench_backward(
    shapes: Sequence[Shape],
    configs: Sequence[Config] = (),
    inputs: str = "normal",
    seed: int = 0,
    seconds: float = 0.3,
    output: Path | None = None,
    command: str = "",
    on_step: OnStep = lambda name, done, total: None,
    measure: Callable[[Shape, Sequence[Way], Gpu, str, int, float, OnStep], dict[str, Any]] = measure,
) -> dict[str, Any]:
    """Time the backward pass, and both, of our `configs` and their peers at each shape: a result as of `collect`.

    Arguments and errors are those of `bench_attention`; `default_configs` are taken where there are none.
    """
    require_gpu()
    gpu = current_gpu()
    check_different(configs)
    ways = [*peers(), *map(of_config, configs or default_configs(gpu.architecture))]
    settings = result.settings(
        gpu, inputs, seed, seconds, passes="backward", configs=[asdict(config) for config in configs],
        peers={backend.peer.name: backend.peer.version for backend in BACKENDS},
    )  # fmt: skip
    measures = {
        shape.label: partial(measure, shape, ways, gpu, inputs, seed, seconds, on_step) for shape in shapes
    }
    return result.collect(measures, settings, output, command)


def passes(attend: Attend, copies: Sequence[Tensors], gradient: torch.Tensor) -> tuple[Call, Call]:
    """Return the backward pass alone, and both passes: each gives the gradients of q, k and v of one of the copies."""
    inputs = [tuple(x.detach().requires_grad_() for x in copy) for copy in copies]
    outs = [attend(*qkv) for qkv in inputs]

    def backward(number: int) -> tuple[torch.Tensor, ...]:
        number %= len(inputs)
        return torch.autograd.grad(outs[number], inputs[number], gradient, retain_graph=True)

    def both(number: int) -> tuple[torch.Tensor, ...]:
        qkv = inputs[number % len(inputs)]
        return torch.autograd.grad(attend(*qkv), qkv, gradient)

    return backward, both


def exact_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """Return the gradients of the last head of q, k and v, each `[S, D]`, by attention in float64."""
    q, k, v, gradient = (x[-1, -1].double() for x in (q, k, v, gradient))
    scale = q.shape[-1] ** -0.5
    of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
    for start in range(0, len(q), _ROWS):
        part = slice(start, start + _ROWS)
        p = (q[part] @ k.mT * scale).softmax(-1)
        of_v += p.mT @ gradient[part]
        dp = gradient[part] @ v.mT
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        of_q[part] = ds @ k
        of_k += ds.mT @ q[part]
    return [of_q, of_k, of_v]


def compared(shape: Shape, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to the timed entries `tflops` and, where a peer of full precision ran, `over_full`; None where none did."""
    for part, count in PRODUCTS.items():
        best = min((e[part]["ms"] for e in entries if e["kind"] == FULL and part in e), default=None)
        for entry in entries:
            if part in entry:
                ms = entry[part]["ms"]
                speed = {"tflops": shape.flop * count / 2 / ms / 1e9, "over_full": best and best / ms}
                entry[part] = entry[part] | speed
    return entries


def cells(entries: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`: one for each entry."""
    return [_line(entry) for entry in entries]


def _line(entry: dict[str, Any]) -> list[str]:
    if "both" not in entry:
        return [f"{entry['name']}: {entry['absent']}", *[""] * (len(HEADER) - 1)]
    line = [entry["name"]]
    for part in PRODUCTS:
        ratio = entry[part]["over_full"]
        line += [
            f"{entry[part]['ms']:.3f}",
            f"{entry[part]['tflops']:.0f}",
            "" if ratio is None else f"{ratio:.2f}",
        ]
    line.append(f"{100 * entry['skipped']:.0f}")
    line += ["NaN" if error is None else f"{error:.4f}" for error in entry["relative_l2"]]
    return [*line, f"{entry['peak_bytes'] / 2**20:,.0f}"]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Return ‖found − exact‖ / ‖exact‖ of the last head, None if that isn't finite."""
    error = ((found[-1, -1].double() - exact).norm() / exact.norm()).item()
    return error if math.isfinite(error) else None
