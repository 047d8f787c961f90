"""Draw pictures or videos with a pipeline: one seed per prompt, the latents kept."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dma_diffusers.pipelines.load import arguments


@dataclass(frozen=True)
class Drawing:
    """What one call of a pipeline drew.

    Args:
        frames: uint8 `[prompts, F, height, width, 3]`, RGB; F is 1 for pictures.
        latents: [prompts, ...] float32 on the CPU, as the last step left them, in the pipeline's own layout.
        seconds: wall time of the call, text encoding and decoding included.
    """

    frames: np.ndarray
    latents: torch.Tensor
    seconds: float

    @property
    def pictures(self) -> list[Image.Image]:
        """The picture of each prompt, or its video's first frame."""
        return [Image.fromarray(frames[0]) for frames in self.frames]


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
    where latents or pictures come out NaN or infinite.
    """
    latents: torch.Tensor  # of the last step

    def after_step(step: int, left: torch.Tensor) -> torch.Tensor:
        nonlocal latents
        latents = left
        on_step(step + 1, pipe.num_timesteps)
        return through(step, left)

    if isinstance(call.get("negative_prompt"), str):
        # Flux does not repeat a single negative prompt over the batch.
        call = {**call, "negative_prompt": [call["negative_prompt"]] * len(prompts)}
    start = time.perf_counter()
    with _watched(pipe, after_step) as watching:
        output = pipe(
            prompt=list(prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            **watching,
            **call,
        )
    seconds = time.perf_counter() - start
    drawn = output.frames if "frames" in output else output.images[:, None]
    if not (latents.isfinite().all() and np.isfinite(drawn).all()):
        raise ValueError("the pipeline drew NaN or infinity instead of a picture")
    return Drawing((drawn * 255).round().astype(np.uint8), latents.float().cpu(), seconds)


@contextmanager
def _watched(
    pipe: DiffusionPipeline, after_step: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[dict[str, Any]]:
    """Keyword arguments of a call in which `after_step` sees, and replaces, what each step leaves."""
    if "callback_on_step_end" in arguments(type(pipe)):

        def ended(pipe, step: int, timestep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"latents": after_step(step, tensors["latents"])}

        yield {"callback_on_step_end": ended, "callback_on_step_end_tensor_inputs": ["latents"]}
        return
    # HunyuanVideo 1.5 has no callback, but its scheduler makes one step for each of its own.
    stock, steps = pipe.scheduler.step, itertools.count()

    def step(*given, **named) -> tuple[torch.Tensor, ...]:
        left, *others = stock(*given, **named)
        return after_step(next(steps), left), *others

    pipe.scheduler.step = step
    try:
        yield {}
    finally:
        del pipe.scheduler.step
