"""A benchmark's result is measured shape by shape, into a file that an interrupted run goes on with."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dma_diffusers.eval import provenance
from dma_diffusers.eval.bench.bound import Gpu
from dma_diffusers.eval.bench.inputs import KINDS
from dma_diffusers.pipelines.files import write_atomically


def settings(gpu: Gpu, inputs: str, seed: int, seconds: float, **others: Any) -> dict[str, Any]:
    """Return the settings of a measurement, with the sources and the versions. Raises ValueError for unknown inputs."""
    if inputs not in KINDS:
        raise ValueError(f"unknown inputs {inputs!r}: choose from {', '.join(KINDS)}")
    return {"inputs": inputs, "seed": seed, "seconds": seconds, **others, **environment(gpu)}


def environment(gpu: Gpu, packages: Sequence[str] = provenance.PACKAGES) -> dict[str, Any]:
    """Return the GPU, the sources, and the versions of `packages`, Triton and CUDA."""
    versions = provenance.versions((*packages, "triton")) | {"cuda": torch.version.cuda}
    return {"gpu": gpu._asdict(), "sources": provenance.sources(), "versions": versions}


def collect(
    measures: Mapping[str, Callable[[], dict[str, Any]]],
    settings: dict[str, Any],
    output: Path | None,
    command: str,
) -> dict[str, Any]:
    """Return `{"command", "settings", "shapes"}`, where `shapes` has each measure's values by its label.

    The result is written to `output` (JSON) after each shape; a shape that is already there is not measured again.
    Raises ValueError where something else is there, or a result with other settings.
    """
    stored = _stored_shapes(output, settings) if output else {}
    result = {"command": command, "settings": settings, "shapes": stored}
    for label, measure in measures.items():
        if label not in stored:
            stored[label] = measure()
            torch.cuda.empty_cache()
        if output:
            write_atomically(output, json.dumps(result, indent=1, allow_nan=False).encode())
    return result


def _stored_shapes(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes that `output` holds already."""
    if not output.is_file():
        return {}
    try:
        result = json.loads(output.read_text())
        stored_settings, shapes = dict(result["settings"]), dict(result["shapes"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{output} is there, and is no result of a benchmark") from error
    settings = json.loads(json.dumps(settings))
    if differing := [name for name in settings if stored_settings.get(name) != settings[name]]:
        raise ValueError(
            f"{output} was measured with different {', '.join(differing)}: choose another file, or delete it"
        )
    return shapes
