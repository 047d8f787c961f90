"""The weight of each of the sampler's steps in the loss: what the finished drawing makes of its error.

The first steps decide what is drawn where, neighbours among them err alike, and all later steps follow them. A drawing
in which low precision makes a few steps alone shows how much these count.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.finetuning.calls import NOISE
from dma_diffusers.pipelines.finetuning.objectives import Distillation, velocity_loss
from dma_diffusers.pipelines.generate import for_batch
from dma_diffusers.pipelines.placement import own_device
from dma_diffusers.progress import OnStep

_PROMPTS = 8
_PARTS = 6  # of a drawing, each of which low precision draws once
_CHANGED = 1e-4  # of the largest loss: what is less is chance
_LEAST = 0.1  # of the mean: a step that hardly matters has to stay what it is


def loss_weights(
    path: Path,
    pipe: DiffusionPipeline,
    model: torch.nn.Module,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    seed: int,
    batch: int,
    objective: Distillation,
    low: Callable[[], object],
    full: Callable[[], object],
    on_step: OnStep,
) -> dict[float, float]:
    """Return the weight of each noise level at which `model` is called, from the file, which is written if need be.

    path: a JSON file with pairs of a level and its weight; their mean is 1. prompts: of those that `objective` has the
    first; their drawings began with seed, seed + 1, …. batch: so many are drawn together. low, full: they give the
    model low precision, and full precision, which it has now.

    Low precision draws each sixth of the steps in turn, and full precision the others. The weight of these steps is the
    mean squared error of the finished latents, as a geometric mean over prompts, over the sum of the steps' losses.
    Where low precision changes nothing it is 1.
    """
    if not path.is_file():
        found = _measured(pipe, model, prompts[:_PROMPTS], call, seed, batch, objective, low, full, on_step)
        write_atomically(path, json.dumps(list(found.items())).encode())
    return dict(json.loads(path.read_bytes()))


def _measured(
    pipe: DiffusionPipeline,
    model: torch.nn.Module,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    seed: int,
    batch: int,
    objective: Distillation,
    low: Callable[[], object],
    full: Callable[[], object],
    on_step: OnStep,
) -> dict[float, float]:
    now, levels = 0, {}

    def remember(step: int) -> None:
        nonlocal now
        now = step

    def called(model: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        levels[now] = float(inputs[NOISE].flatten()[0])

    hook = model.register_forward_pre_hook(called, with_kwargs=True)
    try:
        exact = _finished(pipe, prompts, call, seed, batch, remember)
    finally:
        hook.remove()
    parts = [part.tolist() for part in np.array_split(sorted(levels), _PARTS) if len(part)]
    errors, losses = np.zeros(len(parts)), np.zeros(len(parts))
    for number, part in enumerate(parts):

        def turn(step: int, part: list[int] = part) -> None:
            if step == part[0]:
                low()
            elif step == part[-1] + 1:
                full()

        try:
            drawn = _finished(pipe, prompts, call, seed, batch, turn)
            low()
            losses[number] = _loss(model, objective, len(prompts), {levels[step] for step in part})
        finally:
            full()
        errors[number] = (drawn - exact).flatten(1).square().mean(1).log().mean().exp()
        on_step("weighing steps", number + 1, len(parts))
    sizes, changed = np.array([len(part) for part in parts]), losses > _CHANGED * losses.max()
    weights = np.ones(len(parts))
    weights[changed] = errors[changed] / (sizes * losses)[changed]
    weights[changed] /= np.average(weights[changed], weights=sizes[changed]) if changed.any() else 1.0
    weights = weights.clip(_LEAST)
    weights /= np.average(weights, weights=sizes)
    return {
        levels[step]: weight for part, weight in zip(parts, weights.tolist(), strict=True) for step in part
    }


def _finished(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    seed: int,
    batch: int,
    before_step: Callable[[int], None],
) -> Tensor:
    """Draw prompts, and return their finished latents on the CPU; the step's number is told before each step."""

    def ended(pipe, step: int, timestep, tensors: dict) -> dict:
        before_step(step + 1)
        return tensors

    finished = []
    for start in range(0, len(prompts), batch):
        chunk = list(prompts[start : start + batch])
        before_step(0)
        drawn = pipe(
            prompt=chunk,
            generator=[torch.Generator().manual_seed(seed + start + i) for i in range(len(chunk))],
            output_type="latent", return_dict=False, callback_on_step_end=ended,
            callback_on_step_end_tensor_inputs=["latents"], **for_batch(call, len(chunk)),
        )  # fmt: skip
        finished.append(drawn[0].float().cpu())
    return torch.cat(finished)


@torch.no_grad()
def _loss(model: torch.nn.Module, objective: Distillation, samples: int, levels: set[float]) -> float:
    """Return the mean loss at these noise levels of the first samples."""
    examples = [
        example
        for example, step in enumerate(objective.steps)
        if step.sample < samples and step.level in levels
    ]
    losses = [
        velocity_loss(model, objective.batch([example], own_device(), torch.Generator()))
        for example in examples
    ]
    return float(torch.stack(losses).mean())
