"""Draw pictures with a pipeline: one seed per prompt, the latents kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL.Image import Image


@dataclass(frozen=True)
class Drawing:
    """What one call of a pipeline drew.

    Args:
        pictures: one RGB picture per prompt.
        latents: [prompts, ...] float32 on the CPU, as the last step left them, in the pipeline's own layout.
        seconds: wall time of the call, text encoding and decoding included.
    """

    pictures: list[Image]
    latents: torch.Tensor
    seconds: float


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: dict[str, Any],
    on_step: Callable[[int, int], None] = lambda done, total: None,
    through: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, latents: latents,
) -> Drawing:
    """Draw every prompt with its own seed, as one batch.

    Args:
        call: further keyword arguments of the pipeline's call; one `negative_prompt` serves all prompts.
        on_step: called after each denoising step with (steps done, steps in all).
        through: given each step's index and the latents that it left, returns those that the next one starts from.

    The noise is drawn on the CPU, so that a seed means the same picture on every device. Raises ValueError
    where latents come out NaN or infinite.
    """
    latents = None

    def step_ended(pipe, step: int, timestep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal latents
        latents = tensors["latents"]
        on_step(step + 1, pipe.num_timesteps)
        return {"latents": through(step, latents)}

    if isinstance(call.get("negative_prompt"), str):
        # Flux does not repeat a single negative prompt over the batch.
        call = {**call, "negative_prompt": [call["negative_prompt"]] * len(prompts)}
    start = time.perf_counter()
    output = pipe(
        prompt=list(prompts),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        output_type="pil",
        callback_on_step_end=step_ended,
        callback_on_step_end_tensor_inputs=["latents"],
        **call,
    )
    seconds = time.perf_counter() - start
    if not latents.isfinite().all():
        raise ValueError("the pipeline drew NaN or infinity instead of a picture")
    return Drawing(output.images, latents.float().cpu(), seconds)
