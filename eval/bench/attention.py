"""`bench attention`: shapes, one after another, into a file that an interrupted run goes on with."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dma_diffusers.eval import provenance
from dma_diffusers.eval.bench.bound import Gpu, current_gpu
from dma_diffusers.eval.bench.entries import Config, Entry, default_configs
from dma_diffusers.eval.bench.inputs import KINDS
from dma_diffusers.eval.bench.measure import measure
from dma_diffusers.eval.bench.peers import PEERS
from dma_diffusers.eval.bench.shapes import Shape
from dma_diffusers.eval.bench.timing import require_gpu
from dma_diffusers.pipelines.files import write_atomically

OnStep = Callable[[str, int, int], None]


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
    """Time every peer and our `configs` (none: `default_configs`) at each shape: `{"command", "settings", "shapes"}`.

    inputs: one of `KINDS`. seconds: of GPU time for each thing that is timed. command: how this was started, for
    the record. The result is written to `output` (JSON) after each shape; one that is already there, measured with
    the same settings, is not measured again. Raises ValueError for bad input, without a GPU, and where the
    result there has other settings.
    """
    require_gpu()
    if inputs not in KINDS:
        raise ValueError(f"unknown inputs {inputs!r}: choose from {', '.join(KINDS)}")
    gpu = current_gpu()
    configs = configs or default_configs(gpu.architecture)
    names = [config.name for config in configs]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two configs are the same: {repeated}")
    settings = {
        "inputs": inputs,
        "seed": seed,
        "seconds": seconds,
        "configs": [asdict(config) for config in configs],
        "peers": {peer.name: peer.version for peer in PEERS},
        "gpu": gpu._asdict(),
        "sources": provenance.sources(),
        "versions": _versions(),
    }
    stored = _stored_shapes(output, settings) if output else {}
    result = {"command": command, "settings": settings, "shapes": stored}
    entries = [peer.entry for peer in PEERS] + [config.entry for config in configs]
    for shape in shapes:
        if shape.label not in stored:
            stored[shape.label] = measure(shape, entries, gpu, inputs, seed, seconds, on_step)
            torch.cuda.empty_cache()
        if output:
            write_atomically(output, json.dumps(result, indent=1, allow_nan=False).encode())
    return result


def _versions() -> dict[str, str]:
    import triton

    return provenance.versions() | {"triton": triton.__version__, "cuda": torch.version.cuda}


def _stored_shapes(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `output` holds already; ValueError if that is something else, or has other settings."""
    if not output.is_file():
        return {}
    try:
        result = json.loads(output.read_text())
        stored_settings, shapes = dict(result["settings"]), dict(result["shapes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{output} is there, and is no result of bench attention") from error
    settings = json.loads(json.dumps(settings))
    if differing := [name for name in settings if stored_settings.get(name) != settings[name]]:
        raise ValueError(
            f"{output} was measured with different {', '.join(differing)}: choose another file, or delete it"
        )
    return shapes
