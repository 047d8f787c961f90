"""Each process draws its share of the batches of a row's pictures that are not there yet."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from diffusers import DiffusionPipeline

from dma_diffusers.attach import apply, report, restore
from dma_diffusers.eval.quality.configurations import Row
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.progress import OnStep

"""It is called with (title, steps done, steps in all)."""


@contextmanager
def attached(pipe: DiffusionPipeline, row: Row) -> Iterator[None]:
    """Give the pipeline the attention that `row` wants."""
    if row.config is not None:
        apply(pipe, row.config)
    try:
        with row.kernels():
            yield
    finally:
        restore(pipe)


def draw_missing(
    pipe: DiffusionPipeline,
    row: Row,
    pictures: Pictures,
    batches: Sequence[Sequence[Sample]],
    call: dict[str, Any],
    on_step: OnStep,
) -> list[Path]:
    """Draw the batches of which something is missing, and return the files that were corrupt.

    Under `accelerate launch` each process draws every n-th of them. It returns once all have drawn theirs.
    """
    state = PartialState()
    corrupt: list[Path] = []
    samples = [sample for chunk in batches for sample in chunk]
    absent = torch.zeros(len(samples), dtype=torch.uint8, device=state.device)
    if state.is_main_process:
        pictures.create()
        corrupt = pictures.remove_corrupt(samples)
        absent = absent.new_tensor([sample not in pictures for sample in samples])
    # One process alone looks, because a shared folder may look another way from another machine.
    gone = broadcast(absent).tolist()
    missing = {sample.key for sample, is_gone in zip(samples, gone, strict=True) if is_gone}
    wanted = [chunk for chunk in batches if any(sample.key in missing for sample in chunk)]
    mine = wanted[state.process_index :: state.num_processes]
    # Threads write, because to encode clips takes longer than to draw them.
    with attached(pipe, row), ThreadPoolExecutor() as writers:
        for i, chunk in enumerate(mine):
            drawing = draw(
                pipe,
                [sample.prompt.text for sample in chunk],
                [sample.seed for sample in chunk],
                call,
                lambda done, total, i=i: on_step(row.name, i * total + done, len(mine) * total),
            )
            if (
                row.config is not None and state.is_main_process
            ):  # it comes before the pictures, which say that all is there
                pictures.write_receipt(report(pipe).to_dict())
            shares = [drawing.seconds / len(chunk)] * len(chunk)
            drawn = zip(chunk, drawing.frames, drawing.latents, shares, drawing.truncated, strict=True)
            new = [of for of in drawn if of[0].key in missing]
            list(writers.map(lambda of: pictures.write(*of), new))  # the list raises what a writer raises
    state.wait_for_everyone()
    return corrupt
