"""`bench attention` measures our configurations and their peers, shape after shape."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dma_diffusers.eval.bench import result
from dma_diffusers.eval.bench.bound import Gpu, current_gpu
from dma_diffusers.eval.bench.entries import Config, Entry, check_different, default_configs
from dma_diffusers.eval.bench.measure import measure
from dma_diffusers.eval.bench.peers import PEERS
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.timing import require_gpu
from dma_diffusers.progress import OnStep


def bench_attention(
    shapes: Sequence[Shape],
    configs: Sequence[Config] = (),
    inputs: str = "normal",
    seed: int = 0,
    seconds: float = 0.3,
    output: Path | None = None,
    command: str = "",
    on_step: OnStep = lambda name, done, total: None,
    measure: Callable[[Shape, Sequence[Entry], Gpu, str, int, float, OnStep], dict[str, Any]] = measure,
) -> dict[str, Any]:
    """Time every peer and our `configs` at each shape, and return the result that `result.collect` describes.

    configs: each shape's `default_configs` are taken where there are none. inputs: one of `KINDS`. seconds: GPU time
    for each thing that is timed. output: the file that the result is written to, shape by shape. command: how this was
    started, for the record. Raises ValueError for bad input, without a GPU, and where `output` has other settings.
    """
    require_gpu()
    gpu = current_gpu()
    check_different(configs)
    settings = result.settings(
        gpu, inputs, seed, seconds,
        configs=[asdict(config) for config in configs], peers={peer.name: peer.version for peer in PEERS},
    )  # fmt: skip

    def measured(shape: Shape) -> dict[str, Any]:
        ours = configs or default_configs(gpu.architecture, shape)
        entries = [peer.entry for peer in PEERS] + [config.entry for config in ours]
        return measure(shape, entries, gpu, inputs, seed, seconds, on_step)

    measures = {shape.label: partial(measured, shape) for shape in shapes}
    return result.collect(measures, settings, output, command)
