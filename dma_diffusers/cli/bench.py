"""`dma-diffusers bench`: speed."""

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dma_diffusers.cli.console import Json, print_json, print_table, quiet, require, sizes_of
from dma_diffusers.progress import progress

Inputs = Annotated[str, typer.Option(help="normal or outliers.")]
Seed = Annotated[int, typer.Option(help="Seed of the inputs.")]
Seconds = Annotated[float, typer.Option(min=0.01, max=60, help="GPU time for each kernel and shape.")]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="The raw result as JSON; resumed if it exists.")
]


def bench_attention(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A model's, such as flux-1k, or BxHxNxD; every model's if left out."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=2, help="Of the models' shapes.")] = 1,
    config: Annotated[
        list[str] | None, typer.Option(help="One of ours, such as high=bf16,low=int8,window=0,sink=0.")
    ] = None,
    inputs: Inputs = "normal",
    seed: Seed = 0,
    seconds: Seconds = 0.3,
    backward: Annotated[
        bool, typer.Option("--backward", help="The backward pass, and both, in place of the forward pass.")
    ] = False,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="A chart to draw, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Time our attention beside its peers, and both against the bound of the GPU."""
    from dma_diffusers.eval.bench.timing import require_gpu

    require_gpu()
    require(("triton", "transformers"), "pip install 'dma-diffusers[eval]'")
    from dma_diffusers.eval.bench import attention, shapes, summary
    from dma_diffusers.eval.bench import backward as passes
    from dma_diffusers.eval.bench import plot as chart
    from dma_diffusers.eval.bench.entries import Config
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    chosen = shapes.parse(shape or list(shapes.NAMED), batch)
    configs = [Config.parse(text) for text in config or ()]
    if plot and backward:
        raise ValueError("--plot draws forward passes: leave it out with --backward")
    if plot:
        chart.check_plot(plot)
    for path in filter(None, (output, plot)):
        check_writable(path)
    command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
    measure = passes.bench_backward if backward else attention.bench_attention
    with quiet(), progress(not as_json) as on_step:
        result = measure(chosen, configs, inputs, seed, seconds, output, command, on_step)
    if plot:
        write_atomically(plot, chart.plot(result["shapes"]))
    if as_json:
        print_json(result)
        return
    for label, measured in result["shapes"].items():
        print(f"\n{label}, {inputs} inputs, {result['settings']['gpu']['name']}")
        table = passes if backward else summary
        lines = table.cells(measured["entries"])
        print_table(table.HEADER, ([escape(text) for text in line] for line in lines))


def bench_neighborhood(
    shape: Annotated[
        list[str] | None, typer.Option(help="flux-4k or hunyuan-720p; both if no --grid is given.")
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Tokens of each dimension, for another shape.")] = None,
    window: Annotated[str | None, typer.Option(help="Keys that each query sees, with --grid.")] = None,
    stride: Annotated[
        str | None, typer.Option(help="Queries that share a window, with --grid; 1 if left out.")
    ] = None,
    text: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Text tokens before the grid's; without and with 512 if left out."),
    ] = None,
    heads: Annotated[int, typer.Option(min=1)] = 24,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    inputs: Inputs = "normal",
    seed: Seed = 0,
    seconds: Seconds = 0.3,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time neighbourhoods, LOW inside and SKIP outside, beside dense attention and FlexAttention."""
    from dma_diffusers.eval.bench.timing import require_gpu

    require_gpu()
    require(("triton", "transformers"), "pip install 'dma-diffusers[eval]'")
    from dma_diffusers.eval.bench import neighborhood
    from dma_diffusers.pipelines.files import check_writable

    if (window or stride) if grid is None else (shape or not window):
        raise ValueError("give --grid with --window, and --stride if need be, or --shape, or none of them")
    chosen = {name: neighborhood.named(name) for name in shape or neighborhood.NAMED}
    if grid:
        sides = sizes_of("--grid", grid), sizes_of("--window", window)
        chosen = {"": (*sides, sizes_of("--stride", stride) if stride else (1,) * len(sides[1]))}
    cases = [
        neighborhood.Case(name, *sides, tokens, heads, head_dim)
        for name, sides in chosen.items()
        for tokens in (neighborhood.TEXT if text is None else text)
    ]
    if output:
        check_writable(output)
    command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
    with quiet(), progress(not as_json) as on_step:
        result = neighborhood.bench_neighborhood(cases, inputs, seed, seconds, output, command, on_step)
    if as_json:
        print_json(result)
        return
    for label, measured in result["shapes"].items():
        gpu = result["settings"]["gpu"]["name"]
        print(f"\n{label}, {inputs} inputs, {gpu}; tiles counted: {measured['simulated']:.2f}× fewer")
        lines = neighborhood.cells(measured["entries"])
        print_table(neighborhood.HEADER, ([escape(text) for text in line] for line in lines))


def bench_pipeline(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="flux-dev-1k, flux-dev-2k, flux-dev-4k, qwen-image-1k, wan-14b-720p, hunyuan-720p, or, to try things "
            "out, wan-1.3b-480p, hunyuan-720p-5-layers; or the folder of a pipeline or a transformer. flux-dev-1k if "
            "left out."
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(help="Width x height in pixels, for a folder.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the clip, for a folder.")] = None,
    config: Annotated[
        list[str] | None, typer.Option(help="One of ours, such as preset=hopper,window=384,linears=fp8.")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Time this way alone, such as stock or '*linears=fp8'; more than once for more."),
    ] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(
            help="eager, compiled or graph; by default stock is timed eager too, and pictures as graphs too."
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=600, help="For the timed steps of each way and mode; one at least.")
    ] = 2.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and inputs.")] = 0,
    output: Output = None,
    plot: Annotated[Path | None, typer.Option(help="A chart to draw, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Time whole denoising steps of transformers at true size, and tell what attention, linears and the rest take."""
    from dma_diffusers.eval.bench.timing import require_gpu

    require_gpu()
    require(("triton",), "pip install triton")
    from dma_diffusers.eval.bench import pipeline, pipeline_table, ways
    from dma_diffusers.eval.bench.memory import memory_lines
    from dma_diffusers.eval.bench.own_model import named
    from dma_diffusers.eval.bench.plot import check_plot
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    if plot:
        check_plot(plot)
    for path in filter(None, (output, plot)):
        check_writable(path)
    settings = pipeline.Settings(
        ways.parse(config) if config else None, tuple(only or ()), tuple(mode or ()), seconds, seed
    )
    sides = sizes_of("--size", size) if size else None
    command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
    with quiet(), progress(not as_json) as on_step:
        chosen = {name: named(name, sides, frames) for name in model or ("flux-dev-1k",)}
        result = pipeline.bench_pipeline(chosen, settings, output, command, on_step)
    if plot:
        write_atomically(plot, pipeline_table.plot(result["shapes"]))
    if as_json:
        print_json(result)
        return
    for label, measured in result["shapes"].items():
        print(f"\n{label}, {result['settings']['gpu']['name']}; stock attention: {measured['stock']}")
        lines = pipeline_table.cells(measured["entries"])
        print_table(pipeline_table.HEADER, ([escape(text) for text in line] for line in lines))
        print("\n".join([*memory_lines(measured["entries"]), *pipeline_table.verdict(measured)]))
    print(pipeline.NOTE)


def bench_linear(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A model's: flux-dev, qwen-image, wan-14b, hunyuan; or rows x inputs x outputs, such as "
            "4608x3072x9216. flux-dev if left out."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="One of ours: fp8, 'fp8, fixed input scale', int8, mxfp8, mxfp4, nvfp4, micromix; all if left out."
        ),
    ] = None,
    seed: Seed = 0,
    seconds: Seconds = 0.2,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Time linear layers in low precision beside bf16 and torchao's, with and without quantising their input."""
    from dma_diffusers.eval.bench.timing import require_gpu

    require_gpu()
    require(("triton",), "pip install triton")
    from dma_diffusers.eval.bench import linear, linear_shapes
    from dma_diffusers.pipelines.files import check_writable

    chosen = linear_shapes.parse(shape or ["flux-dev"])
    if output:
        check_writable(output)
    command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
    with quiet(), progress(not as_json) as on_step:
        result = linear.bench_linear(
            chosen, method or linear.METHODS, seed, seconds, output, command, on_step
        )
    if as_json:
        print_json(result)
        return
    for label, measured in result["shapes"].items():
        print(f"\n{label}, {result['settings']['gpu']['name']}")
        print_table(
            linear.HEADER, ([escape(text) for text in line] for line in linear.cells(measured["entries"]))
        )
    print(linear.NOTE)


def bench_parallel(
    shape: Annotated[str, typer.Option(help="A model's, such as flux-1k, or BxHxNxD.")] = "hunyuan-720p",
    rounds: Annotated[int, typer.Option(min=1, max=20, help="In which each kind of call has its turn.")] = 3,
    calls: Annotated[int, typer.Option(min=1, max=100, help="Of each kind in a round.")] = 5,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The raw result as JSON.")] = None,
    as_json: Json = False,
) -> None:
    """Time attention over several GPUs (Ulysses, ring) beside one: python3 -m torch.distributed.run --nproc-per-node 2
    -m dma_diffusers bench parallel."""
    from dma_diffusers.eval.bench import parallel, shapes
    from dma_diffusers.eval.bench.timing import require_gpu
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    require_gpu()
    require(("triton",), "pip install triton")
    (chosen,) = shapes.parse([shape])[:1]
    if output:
        check_writable(output)
    command = f"{parallel.HOW_TO_START.removesuffix(' bench parallel')} {shlex.join(sys.argv[1:])}"
    with quiet(), parallel.processes() as device:
        is_first = int(os.environ["RANK"]) == 0
        with progress(is_first and not as_json) as on_step:
            measured = parallel.bench_parallel(chosen, device, rounds, calls, seed, "auto", command, on_step)
    if not is_first:
        return
    if output:
        write_atomically(output, json.dumps(measured, indent=1, allow_nan=False).encode())
    if as_json:
        print_json(measured)
        return
    settings = measured["settings"]
    print(f"\n{chosen.label}, {settings['gpus']} × {settings['gpu']['name']}")
    print_table(parallel.HEADER, ([escape(text) for text in line] for line in parallel.cells(measured)))
    shares = measured["communication"]
    for name, share in shares["share_of_ulysses"].items():
        gain = shares["most_that_8_bits_gain"][name]
        print(f"{name}: {share:.1%} of Ulysses is the exchange; 8 bits on the wire could gain {gain:.1%}")
    print(parallel.NOTE)
