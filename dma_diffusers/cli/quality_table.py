"""`dma-diffusers quality-table`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.console import DEMO_PACKAGES, hide_loading_bars, progress, quiet, require


def quality_table(
    output: Annotated[Path, typer.Option("--output", "-o", help="The table as JSON; resumed if it exists.")],
    prompts: Annotated[
        Path | None, typer.Option(help="One prompt a line; the held-out ones if left out.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Local folder; the demo model if left out.")] = None,
    count: Annotated[int, typer.Option(min=2, help="How many of the prompts.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt; each further one has the next.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Prompts drawn together.")] = 1,
) -> None:
    """Measure full precision, MXFP8, DMA at three windows, MXFP4 and NVFP4 on the same prompts and seeds."""
    require(DEMO_PACKAGES, "pip install 'dma-diffusers[demo]'")
    from dma_diffusers.pipelines.files import check_writable

    check_writable(output)
    with quiet():
        hide_loading_bars()
        from dma_diffusers.eval.quality_summary import markdown
        from dma_diffusers.eval.quality_table import quality_table as measure
        from dma_diffusers.eval.quality_table import read_prompts
        from dma_diffusers.pipelines.load import DEMO_MODEL

        chosen = read_prompts(prompts or DEMO_MODEL.parent / "prompts.txt", count)
        command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
        with progress() as on_step:
            table = measure(chosen, output, command, model or DEMO_MODEL, seed, batch, on_step)
    print(markdown(table["summary"]))
