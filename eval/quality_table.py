"""Measure attention configurations on the same prompts and seeds, paired with full precision."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dma_diffusers.attach import apply, report, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval import provenance
from dma_diffusers.eval.metrics.paired import paired_metrics
from dma_diffusers.eval.quality_summary import summarise
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.generate import Drawing, draw
from dma_diffusers.pipelines.load import DEMO_MODEL, load_pipeline, recommended_call

_ALL_TOKENS = 2**20  # sinks this wide make every tile HIGH
_ALL_LOW = {"window": 0, "sink": 0, "protect_text": False}

CONFIGURATIONS = {
    "exact": DMAConfig.preset("exact"),
    "all MXFP8": DMAConfig.preset("b200", sink=_ALL_TOKENS),
    "DMA, window 640": DMAConfig.preset("b200", window=640),
    "DMA, window 384": DMAConfig.preset("b200", window=384),
    "DMA, window 128": DMAConfig.preset("b200", window=128),
    "all MXFP4": DMAConfig.preset("b200", low="mxfp4", **_ALL_LOW),
    "all NVFP4": DMAConfig.preset("b200", low="nvfp4", **_ALL_LOW),
}


def read_prompts(path: Path, count: int) -> list[str]:
    """The first `count` lines of a file, empty ones left out; ValueError where there is none."""
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()][:count]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def quality_table(
    prompts: Sequence[str],
    output: Path,
    command: str,
    model: Path = DEMO_MODEL,
    seed: int = 0,
    batch: int = 1,
    on_step: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Per-prompt metrics of every configuration against the stock pipeline, and their summary.

    Prompt i has seed `seed` + i. The table is written to `output` (JSON) after each configuration; one that
    is already there, measured with the same settings, is not measured again. Raises ValueError where the
    table there has other settings.

    Args:
        command: how this was started, for the record.
        on_step: called after each denoising step with (configuration, steps done, steps in all).
    """
    settings = {
        "prompts": list(prompts),
        "seed": seed,
        "batch": batch,
        "model": provenance.fingerprint(model, "*.safetensors", "*.json"),
        "sources": provenance.sources(),
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
    }
    results = _stored_results(output, settings)
    missing = [name for name in CONFIGURATIONS if name not in results]

    def write() -> dict[str, Any]:
        ordered = {name: results[name] for name in CONFIGURATIONS if name in results}
        table = {
            "command": command,
            "settings": settings,
            "configurations": ordered,
            "summary": summarise(ordered),
        }
        write_atomically(output, json.dumps(table, indent=1, allow_nan=False).encode())
        return table

    if missing:
        pipe, call = load_pipeline(model), recommended_call(model)
        stock = _draw_in_batches(pipe, prompts, seed, batch, call, partial(on_step, "stock"))
    for name in missing:
        apply(pipe, CONFIGURATIONS[name])
        drawing = _draw_in_batches(pipe, prompts, seed, batch, call, partial(on_step, name))
        results[name] = {
            "config": asdict(CONFIGURATIONS[name]),
            "seconds": drawing.seconds,
            "prompts": paired_metrics(drawing, stock),
            "receipt": report(pipe).to_dict(),
        }
        restore(pipe)
        write()
    return write()


def _stored_results(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Results in `output` that were measured with today's configurations; ValueError for other settings."""
    if not output.is_file():
        return {}
    try:
        table = json.loads(output.read_text())
        stored_settings, stored = dict(table["settings"]), table["configurations"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{output} is there, and is no quality table") from error
    if differing := [name for name in settings if stored_settings.get(name) != settings[name]]:
        raise ValueError(
            f"{output} was measured with different {', '.join(differing)}: choose another file, or delete it"
        )
    as_stored = {name: json.loads(json.dumps(asdict(config))) for name, config in CONFIGURATIONS.items()}
    return {name: result for name, result in stored.items() if result["config"] == as_stored.get(name)}


def _draw_in_batches(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seed: int,
    batch: int,
    call: dict[str, Any],
    on_step: Callable[[int, int], None],
) -> Drawing:
    """All prompts as one drawing, `batch` of them at a time."""
    starts = range(0, len(prompts), batch)
    drawings = []
    for i, start in enumerate(starts):
        chunk = prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(chunk))
        drawings.append(
            draw(
                pipe,
                chunk,
                seeds,
                call,
                lambda done, total, i=i: on_step(i * total + done, len(starts) * total),
            )
        )
    return Drawing(
        [picture for drawing in drawings for picture in drawing.pictures],
        torch.cat([drawing.latents for drawing in drawings]),
        sum(drawing.seconds for drawing in drawings),
    )
