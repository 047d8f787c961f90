"""`dma-diffusers eval --attention` records a pipeline's attention, and measures configurations on it."""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from dma_diffusers.attach import check
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval import provenance
from dma_diffusers.eval.recordings.measure import layers, mean_of_present, measure, to_json
from dma_diffusers.eval.recordings.record import LIMIT, record
from dma_diffusers.pipelines.files import write_atomically

HEADER = ("configuration", "relative L2", "cosine", "recall", "worst module", "worst head", "worst step")


def evaluate_attention(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    configurations: Mapping[str, DMAConfig],
    folder: Path,
    call: dict[str, Any],
    command: str,
    *,
    seeds: Sequence[int] | None = None,
    modules: Sequence[int | str] | None = None,
    steps: int | Sequence[int] = 3,
    limit: int = LIMIT,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> dict[str, Any]:
    """Record into `folder`/recordings, measure, write `folder`/attention.json, and return what that holds.

    call, seeds, modules, steps, limit: as in `record`, whose recordings stay, and are used again by the next call with
    the same settings. command: how this was started, for the record. `layers` is what an evaluation.json has under that
    name; `summary` has a row of `table` for each configuration. Raises ValueError, naming the configuration, before
    anything is recorded, for one that cannot be applied to `pipe`.
    """
    check(pipe, configurations)
    recordings = record(
        pipe, prompts, folder / "recordings", call,
        seeds=seeds, modules=modules, steps=steps, limit=limit, on_step=on_step,
    )  # fmt: skip
    measured = measure(recordings, configurations, on_step=on_step)
    detail = to_json(recordings, measured)
    document = {
        "command": command,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": recordings.settings,
        "versions": provenance.versions(),
        "hardware": provenance.hardware(),
        "sources": provenance.sources(),
        "notes": recordings.notes,
        "summary": {
            name: _summary(values, recordings.modules, recordings.steps) for name, values in measured.items()
        },
        "layers": layers(recordings, measured),
        **detail,
    }
    write_atomically(folder / "attention.json", json.dumps(document, allow_nan=False).encode())
    return document


def table(document: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows under `HEADER`, one a configuration: means over all calls, and where the error is largest."""
    rows = []
    for name, found in document["summary"].items():
        worst = [
            f"{found[key]['of']} ({found[key]['relative_l2']:.4f})" for key in ("module", "head", "step")
        ]
        rows.append(
            [name, f"{found['relative_l2']:.4f}", f"{found['cosine']:.5f}", f"{found['recall']:.3f}", *worst]
        )
    return rows


def _summary(values: Any, modules: Sequence[str], steps: Sequence[int]) -> dict[str, Any]:
    """Return means of everything, and the module, head and step with the largest mean error."""
    everything = (0, 1, 2, 3)
    of_module, of_step = (mean_of_present(values.of_modules, axes) for axes in ((0, 2), (0, 1)))
    of_head = mean_of_present(values.relative_l2, (0, 2))
    module, head = np.unravel_index(np.nanargmax(of_head), of_head.shape)
    return {
        "relative_l2": float(mean_of_present(values.of_modules, (0, 1, 2))),
        "cosine": float(mean_of_present(values.cosine, everything)),
        "recall": float(mean_of_present(values.recall, everything)),
        "module": {"of": modules[np.nanargmax(of_module)], "relative_l2": float(np.nanmax(of_module))},
        "head": {"of": f"{head} of {modules[module]}", "relative_l2": float(of_head[module, head])},
        "step": {"of": f"{steps[np.nanargmax(of_step)]}", "relative_l2": float(np.nanmax(of_step))},
    }
