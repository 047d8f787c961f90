"""One row of the study: the model is trained to each budget of steps, judged on held-out calls, and drawn with."""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from dma_diffusers import finetune
from dma_diffusers.attach import apply
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.provenance import hardware, versions
from dma_diffusers.eval.recovery.drawings import save_drawings
from dma_diffusers.eval.recovery.rows import ROWS, Row
from dma_diffusers.eval.recovery.scores import scores
from dma_diffusers.eval.recovery.study import OnStep, Study
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.finetuning.objectives import Objective, velocity_loss
from dma_diffusers.pipelines.finetuning.target import depends_on_noise
from dma_diffusers.pipelines.finetuning.trainer import Trainer
from dma_diffusers.pipelines.placement import own_device

_CURVE = 10  # a loss of training is kept for each so many steps, as their mean


def run(study: Study, name: str, seconds: float, on_step: OnStep) -> Path:
    """Make a row and write its result, unless that is there; return the result's file.

    seconds: of training; the loss of a budget that is not reached by then is left out.
    """
    known = ROWS[study.plan.model]
    if name not in known:
        raise ValueError(f"there is no row {name!r} of {study.plan.model}; there are {', '.join(known)}")
    path = result_path(study, name)
    if path.is_file():
        return path
    path.parent.mkdir(exist_ok=True)
    row = known[name]
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is wrong in PyTorch 2.11
    pipe, call = study.pipeline()
    _give(pipe, row)
    judged = partial(held_out_loss, pipe.transformer, study.judged(), study.plan.batch)
    result = {"name": name, "trains": row.trains, "loss": {0: judged()}}
    if row.trains:
        trained = _trained(study, row, pipe.transformer, seconds, judged, on_step)
        result |= trained | {"loss": result["loss"] | trained["loss"]}
    frames = study.draw(pipe, call, on_step)
    save_drawings(drawings_path(study, name), frames)
    result |= {"scores": scores(frames, study.exact, study.held_out)}
    result |= {"hardware": hardware(), "versions": versions()}
    write_atomically(path, json.dumps(result, indent=1).encode())
    return path


def result_path(study: Study, name: str) -> Path:
    """Return the file of a row's result."""
    return study.folder / "rows" / f"{_plain(name)}.json"


def drawings_path(study: Study, name: str) -> Path:
    """Return the folder of a row's drawings."""
    return study.folder / "rows" / _plain(name)


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


def _trained(
    study: Study,
    row: Row,
    model: torch.nn.Module,
    seconds: float,
    judged: Callable[[], float],
    on_step: OnStep,
) -> dict[str, Any]:
    """Train for each budget anew, and leave the averaged weights of the last one in the model; return losses, times."""
    plan, objective, by_level = study.plan, study.training(), depends_on_noise(row.attention)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    untrained = [parameter.detach().clone() for parameter in model.parameters()]
    losses, curve, took, start = {}, [], {}, time.perf_counter()
    for budget in plan.budgets:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), untrained, strict=True):
                parameter.copy_(value)
        began, curve = time.perf_counter(), []
        trainer = Trainer(model, objective, plan.settings, accelerator, budget, by_level)
        while trainer.step < budget and time.perf_counter() - start < seconds:
            curve.append(trainer.advance())
            on_step(f"training, {budget} steps", trainer.step, budget)
        took[budget] = round(time.perf_counter() - began, 1)
        trainer.keep_averages()
        if trainer.step < budget:
            break
        losses[budget] = judged()
    means = [float(f"{np.mean(curve[i : i + _CURVE]):.4g}") for i in range(0, len(curve), _CURVE)]
    return {"loss": losses, "steps": trainer.step, "seconds": took, "curve": means}


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, objective: Objective, batch: int) -> float:
    """Return the mean loss of all the objective's calls, in the mode in which a model draws."""
    model.eval()
    total, count, device = 0.0, len(objective.levels), own_device()
    for start in range(0, count, batch):
        part = range(start, min(start + batch, count))
        total += float(velocity_loss(model, objective.batch(part, device, torch.Generator()))) * len(part)
    return total / count
