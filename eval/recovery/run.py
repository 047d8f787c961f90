"""One row of the study: the model is trained to each budget of steps, judged on held-out calls, and drawn with.

A row that was stopped goes on from its last checkpoint.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dma_diffusers import finetune
from dma_diffusers.attach import apply
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.provenance import hardware, versions
from dma_diffusers.eval.recovery.drawings import save_drawings
from dma_diffusers.eval.recovery.rows import ROWS, Row
from dma_diffusers.eval.recovery.scores import scores
from dma_diffusers.eval.recovery.study import OnStep, Study
from dma_diffusers.eval.recovery.training import Training
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.finetuning.objectives import Objective, velocity_loss
from dma_diffusers.pipelines.placement import own_device


def run(study: Study, name: str, seed: int, seconds: float, on_step: OnStep) -> Path:
    """Make a row and write its result, unless that is there; return the result's file.

    seed: of the order of training. seconds: of a last training after those of the plan's budgets, with which the row
    draws then; 0 for none.
    """
    known = ROWS[study.plan.model]
    if name not in known:
        raise ValueError(f"there is no row {name!r} of {study.plan.model}; there are {', '.join(known)}")
    path, row = result_path(study, name, seed), known[name]
    if path.is_file():
        return path
    path.parent.mkdir(exist_ok=True)
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is wrong in PyTorch 2.11
    pipe, call = study.pipeline()
    _give(pipe, row)
    judged = partial(held_out_loss, pipe.transformer, study.judged(), study.plan.batch)
    result: dict[str, Any] = {"name": name, "seed": seed, "trains": row.trains, "loss": {0: judged()}}
    unfinished = path.with_suffix(".training")
    if row.trains:
        training = Training(study, row, pipe.transformer, seed, unfinished)
        trained = training.run(seconds, judged, on_step)
        result |= trained | {"loss": result["loss"] | trained["loss"]}
    frames = study.draw(pipe, call, on_step)
    save_drawings(drawings_path(path), frames)
    result |= {"scores": scores(frames, study.exact, study.held_out)}
    result |= {"hardware": hardware(), "versions": versions()}
    write_atomically(path, json.dumps(result, indent=1).encode())
    shutil.rmtree(unfinished, ignore_errors=True)
    return path


def result_path(study: Study, name: str, seed: int = 0) -> Path:
    """Return the file of a row's result."""
    return study.folder / "rows" / f"{_plain(name)}{f'_seed{seed}' if seed else ''}.json"


def result_paths(study: Study, name: str) -> list[Path]:
    """Return the files of a row's results that are there, one for each seed."""
    path = result_path(study, name)
    return [each for each in (path, *sorted(path.parent.glob(f"{path.stem}_seed*.json"))) if each.is_file()]


def drawings_path(result: Path) -> Path:
    """Return the folder of the drawings that a result is about."""
    return result.with_suffix("")


def _plain(name: str) -> str:
    return name.replace(" %", "").replace(",", "").replace(" ", "_")


def _give(pipe: DiffusionPipeline, row: Row) -> None:
    """Give the pipeline the row's precision."""
    if row.quantised:
        apply(pipe, DMAConfig.preset("exact", linears=row.quantised))
        return
    attention = row.attention if row.trains else None
    if row.linears or attention:
        finetune.prepare(pipe.transformer, row.linears, attention, rounding=row.rounding)
    if row.attention and not row.trains:
        apply(pipe, row.attention)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # as rows that aren't trained
def held_out_loss(model: torch.nn.Module, objective: Objective, batch: int) -> float:
    """Return the mean loss of all the objective's calls, in the mode in which a model draws."""
    model.eval()
    total, count, device = 0.0, len(objective.levels), own_device()
    for start in range(0, count, batch):
        part = range(start, min(start + batch, count))
        total += float(velocity_loss(model, objective.batch(part, device, torch.Generator()))) * len(part)
    return total / count
