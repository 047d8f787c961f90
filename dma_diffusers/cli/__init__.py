"""The command line: `dma-diffusers`, or `python -m dma_diffusers`. Rooms are imported inside the commands."""

import os
import signal
import sys

import typer

from dma_diffusers.cli.batch import batch
from dma_diffusers.cli.bench import (
    bench_attention,
    bench_linear,
    bench_neighborhood,
    bench_parallel,
    bench_pipeline,
)
from dma_diffusers.cli.calibrate import calibrate
from dma_diffusers.cli.distance import distance
from dma_diffusers.cli.evaluate import evaluate
from dma_diffusers.cli.finetune import finetune
from dma_diffusers.cli.generate import generate
from dma_diffusers.cli.generate_video import generate_video
from dma_diffusers.cli.machine import compile_kernels, doctor
from dma_diffusers.cli.options import flat
from dma_diffusers.cli.simulate import simulate
from dma_diffusers.cli.study import study
from dma_diffusers.errors import first_line

app = typer.Typer(
    help="Diffusers pipelines with diagonal-tiled mixed-precision attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench, name="bench")

app.command()(flat(generate))
app.command()(flat(generate_video))
app.command()(flat(batch))
app.command("eval")(flat(evaluate))
app.command()(distance)
app.command()(flat(calibrate))
app.command()(flat(finetune))
app.command()(flat(simulate))
app.command()(flat(study))
app.command()(doctor)
app.command("compile")(compile_kernels)
bench.command("attention")(bench_attention)
bench.command("neighborhood")(bench_neighborhood)
bench.command("linear")(bench_linear)
bench.command("pipeline")(bench_pipeline)
bench.command("parallel")(bench_parallel)


def _terminated(number: int, frame: object) -> None:
    """Leave as after Ctrl-C, so that temporary files and folders are removed."""
    sys.exit(128 + number)


def main() -> None:
    """Run the command line; what a user got wrong is one line on standard error and exit status 1."""
    # Threads that spin while they wait made a machine that is busy otherwise too seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except (ValueError, OSError, RuntimeError, TypeError, ImportError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        sys.exit(1)
