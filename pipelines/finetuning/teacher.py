"""The full-precision model draws the user's prompts once, and every call of its transformer is kept."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from dma_diffusers.pipelines.finetuning.calls import Call, CallStore, recording
from dma_diffusers.pipelines.finetuning.guidance import parts_of
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
) -> None:
    """Draw the prompts that are not in the store yet, down to their latents; prompt i has seed + i.

    model: the transformer of the pipeline whose calls are kept, at full precision. batch: prompts drawn together; under
    `accelerate launch` each process draws its share.
    """
    state = PartialState()
    missing = [number for number in range(len(prompts)) if number not in store]
    state.wait_for_everyone()  # all have looked before anyone writes
    chunks = [missing[start : start + batch] for start in range(0, len(missing), batch)]
    mine = chunks[state.process_index :: state.num_processes]
    for done, chunk in enumerate(mine):

        def ended(pipe, step: int, timestep, tensors: dict, done: int = done) -> dict:
            on_step("full precision", done * pipe.num_timesteps + step + 1, len(mine) * pipe.num_timesteps)
            return tensors

        with recording(model) as calls, parts_of(pipe, calls) as parts:
            pipe(
                prompt=[prompts[number] for number in chunk],
                generator=[torch.Generator().manual_seed(seed + number) for number in chunk],
                output_type="latent", callback_on_step_end=ended, callback_on_step_end_tensor_inputs=["latents"],
                **for_batch(call, len(chunk)),
            )  # fmt: skip
        of_sample: dict[int, list[Call]] = defaultdict(list)
        for each in calls:
            for number, sample in zip(chunk, each.samples(), strict=True):
                of_sample[number].append(sample)
        with ThreadPoolExecutor() as pool:
            list(
                pool.map(
                    lambda number, own=of_sample, its=parts: store.write(number, own[number], its), chunk
                )
            )
    state.wait_for_everyone()
