"""The full-precision model draws the user's prompts once, and every call of its transformer is kept."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from dma_diffusers.pipelines.finetuning.calls import recording
from dma_diffusers.pipelines.finetuning.guidance import parts_of
from dma_diffusers.pipelines.finetuning.store import CallStore
from dma_diffusers.pipelines.generate import for_batch


def store_teacher(
    pipe: DiffusionPipeline,
    model: torch.nn.Module,
    prompts: Sequence[str],
    call: Mapping[str, Any],
    store: CallStore,
    seed: int,
    batch: int,
    on_step: Callable[[str, int, int], None],
    steps: int | None = None,
) -> None:
    """Draw the prompts that are not in the store yet, down to their latents; prompt i has seed + i.

    model: the transformer of the pipeline whose calls are kept, at full precision. batch: prompts drawn together; under
    `accelerate launch` each process draws its share. steps: of the sampler after which a drawing ends, None for all;
    the pipeline must have an `interrupt`, as FLUX's and Wan's have: ValueError is raised for one that has none.
    """
    if steps and not hasattr(type(pipe), "interrupt"):  # which has no value before the first drawing
        raise ValueError(f"{type(pipe).__name__} can't be stopped after {steps} steps: it has no `interrupt`")
    state = PartialState()
    there = store.stored()
    missing = [number for number in range(len(prompts)) if number not in there]
    state.wait_for_everyone()  # all have looked before anyone writes
    chunks = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    mine = chunks[state.process_index :: state.num_processes]
    written: Future | None = None
    with ThreadPoolExecutor(1) as writer:
        for done, chunk in enumerate(mine):

            def ended(pipe, step: int, timestep, tensors: dict, done: int = done) -> dict:
                each = min(steps or pipe.num_timesteps, pipe.num_timesteps)
                if step + 1 == steps:
                    pipe._interrupt = True
                on_step("full precision", done * each + step + 1, len(mine) * each)
                return tensors

            with recording(model) as calls, parts_of(pipe, calls) as parts:
                pipe(
                    prompt=[prompts[number] for number in chunk],
                    generator=[torch.Generator().manual_seed(seed + number) for number in chunk],
                    output_type="latent", callback_on_step_end=ended, callback_on_step_end_tensor_inputs=["latents"],
                    **for_batch(call, len(chunk)),
                )  # fmt: skip
            if written:
                written.result()  # one chunk is in memory beside the one that is drawn
            written = writer.submit(store.write, chunk, calls, parts)
        if written:
            written.result()
    state.wait_for_everyone()
