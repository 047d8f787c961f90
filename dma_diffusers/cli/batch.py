"""`dma-diffusers batch`: many pictures and clips, from a file of jobs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.attention import AttentionOptions
from dma_diffusers.cli.call import CallOptions, Loras
from dma_diffusers.cli.console import (
    DEMO_PACKAGES,
    given,
    hide_loading_bars,
    processes,
    quiet,
    require,
    working_in,
)
from dma_diffusers.progress import progress


def batch(
    jobs: Annotated[
        Path, typer.Argument(help=".jsonl, .csv or .yaml: a prompt a job, and what it asks for.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of pictures, clips and results.jsonl; resumed.")
    ],
    attention: AttentionOptions,
    call: CallOptions,
    model: Annotated[
        str | None,
        typer.Option(help="Local folder or hub id; `demo`, or `demo-video` for clips, if left out."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the noise; 0 if left out.")] = None,
    size: Annotated[
        str | None, typer.Option(help="Pixels, such as 832x480, or one number for a square.")
    ] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of clips.")] = None,
    lora: Loras = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of clips.")] = None,
) -> None:
    """Draw the JOBS of a file; the options are for jobs that don't say otherwise.

    What is in the folder already, drawn with the same settings, is not drawn again. Jobs are split over processes
    under `accelerate launch -m dma_diffusers batch …`. Ends with status 1 if any job failed.
    """
    require((*DEMO_PACKAGES, "accelerate"), "pip install 'dma-diffusers[demo]'")
    flags = {"model": model, "steps": steps, "seed": seed, "size": size, "frames": frames, "fps": fps}
    flags["lora"] = [os.path.abspath(file) for file in lora] if lora else None
    defaults = attention.given | call.given | given(flags)
    with quiet():
        hide_loading_bars()
        from dma_diffusers.pipelines.batch import batch as drawn
        from dma_diffusers.pipelines.files import check_writable
        from dma_diffusers.pipelines.jobs import read_jobs

        asked, failures = read_jobs(jobs, defaults)
        output.mkdir(exist_ok=True)
        check_writable(output / "results.jsonl")
        is_main = processes().is_main_process
        with working_in(output, is_main), progress(is_main) as on_step:
            outcome = drawn(asked, failures, output, on_step)
    if outcome is None:
        return
    print(
        f"{output}: {outcome.drawn} drawn, {outcome.already_drawn} there already, {len(outcome.failures)} failed"
    )
    for note in outcome.notes:
        print(f"note: {note}")
    for failure in outcome.failures:
        print(f"failed: {failure.where}: {failure.error}", file=sys.stderr)
    if outcome.failures:
        raise typer.Exit(1)
