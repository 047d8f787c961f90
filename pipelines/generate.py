"""Draw pictures or videos with a pipeline, with one seed per prompt, and keep the latents."""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dma_diffusers.pipelines.load import arguments
from dma_diffusers.pipelines.tokens import TokenWatch


@dataclass(frozen=True)
class Drawing:
    """The output of one pipeline call.

    Args:
        frames: uint8 `[prompts, F, height, width, 3]`, RGB; F is 1 for pictures.
        latents: float32 `[prompts, ...]` on the CPU: the result of the last step, in the pipeline's own layout.
        seconds: wall time of the call, including text encoding and decoding.
        truncated: for each prompt, what was cut off it, one line for each tokenizer that did.
    """

    frames: np.ndarray
    latents: torch.Tensor
    seconds: float
    truncated: Sequence[Sequence[str]] = ()

    @property
    def pictures(self) -> list[Image.Image]:
        """Return the picture of each prompt, or the first frame of its video."""
        return [Image.fromarray(frames[0]) for frames in self.frames]

    @property
    def notes(self) -> list[str]:
        """Return what was cut off any of the prompts."""
        return list(dict.fromkeys(note for of_prompt in self.truncated for note in of_prompt))


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    call: dict[str, Any],
    on_step: Callable[[int, int], None] = lambda done, total: None,
    replace_latents: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, latents: latents,
) -> Drawing:
    """Draw every prompt with its own seed, as one batch.

    The noise is drawn on the CPU, so that a seed means the same picture on every device.

    Args:
        call: further keyword arguments of the pipeline's call; one `negative_prompt` serves all prompts.
        on_step: is called after each denoising step with (steps done, total steps).
        replace_latents: is called after each step with the step's index and its resulting latents, and returns the
            latents from which the next step starts.

    Raises ValueError if latents or pictures contain NaN or infinity, if the pipeline draws another size than the call
    has, or if it does not read a negative prompt.
    """
    latents: torch.Tensor  # of the last step
    watch = TokenWatch(pipe, prompts, call)

    def after_step(step: int, left: torch.Tensor) -> torch.Tensor:
        nonlocal latents
        latents = left
        if step == 0:
            watch.check_negative_prompt()
        on_step(step + 1, pipe.num_timesteps)
        return replace_latents(step, left)

    start = time.perf_counter()
    with _observe_steps(pipe, after_step) as observing, watch.watching():
        output = pipe(
            prompt=list(prompts),
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            output_type="np",
            **observing,
            **for_batch(call, len(prompts)),
        )
    seconds = time.perf_counter() - start
    drawn = output.frames if "frames" in output else output.images[:, None]
    if not (latents.isfinite().all() and np.isfinite(drawn).all()):
        raise ValueError("the pipeline drew NaN or infinity instead of a picture")
    _check_size(pipe, call, *drawn.shape[2:4])
    frames = (drawn * 255).round().astype(np.uint8)
    return Drawing(frames, latents.float().cpu(), seconds, watch.cuts)


def for_batch(call: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """Return the keyword arguments of a call for several prompts: a single negative prompt is repeated for each.

    FluxPipeline does not repeat it over the batch.
    """
    negative = call.get("negative_prompt")
    return {**call, "negative_prompt": [negative] * prompts} if isinstance(negative, str) else dict(call)


def _check_size(pipe: DiffusionPipeline, call: dict[str, Any], height: int, width: int) -> None:
    """Raise ValueError if a pipeline drew another size than the call has; Diffusers only warns of that."""
    if (call.get("height") or height, call.get("width") or width) != (height, width):
        asked = f"{call.get('width') or width}x{call.get('height') or height}"
        raise ValueError(f"{type(pipe).__name__} drew {width}x{height}: ask for that size, not for {asked}")


@contextmanager
def _observe_steps(
    pipe: DiffusionPipeline, after_step: Callable[[int, torch.Tensor], torch.Tensor]
) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments of a call in which `after_step` receives, and may replace, each step's latents."""
    if "callback_on_step_end" in arguments(type(pipe)):

        def ended(pipe, step: int, timestep, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"latents": after_step(step, tensors["latents"])}

        yield {"callback_on_step_end": ended, "callback_on_step_end_tensor_inputs": ["latents"]}
        return
    # HunyuanVideo 1.5 has no callback, but it calls its scheduler once in each step.
    stock, steps = pipe.scheduler.step, itertools.count()

    def step(*given, **named) -> tuple[torch.Tensor, ...]:
        left, *others = stock(*given, **named)
        return after_step(next(steps), left), *others

    pipe.scheduler.step = step
    try:
        yield {}
    finally:
        del pipe.scheduler.step
