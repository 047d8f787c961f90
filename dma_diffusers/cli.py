"""The command line: `dma-diffusers`, or `python -m dma_diffusers`. Rooms are imported inside the commands."""

import importlib.util
import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

app = typer.Typer(
    help="Diffusers pipelines with diagonal-tiled mixed-precision attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure speed.", no_args_is_help=True)
app.add_typer(bench, name="bench")

_DEMO_PACKAGES = ("transformers", "PIL", "torchmetrics")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Format = Annotated[
    str | None, typer.Option(help="Format of these tiles, such as mxfp8; replaces the preset's.")
]
Tokens = Annotated[int | None, typer.Option(help="Tokens kept HIGH; replaces the preset's.")]


def main() -> None:
    """Run the command line; what a user got wrong is one line on standard error and exit status 1."""
    # Threads that spin while they wait made a machine that is busy otherwise too seven times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except (ValueError, OSError, RuntimeError, TypeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"error: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
        sys.exit(1)


@app.command()
def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")],
    model: Annotated[
        str | None, typer.Option(help="Local folder or hub id; the demo model if left out.")
    ] = None,
    preset: Annotated[str, typer.Option(help="auto, b200, hopper or exact.")] = "b200",
    high: Format = None,
    low: Format = None,
    window: Tokens = None,
    sink: Tokens = None,
    lowering: Annotated[
        str | None,
        typer.Option(help="auto, fastest, stock, native, faithful or reference; `doctor` says which run."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    size: Annotated[int | None, typer.Option(min=1, help="Height and width in pixels.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Add full precision and the difference.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw PROMPT with DMA attention."""
    _require(_DEMO_PACKAGES, "pip install 'dma-diffusers[demo]'")
    from dma_diffusers.config import DMAConfig
    from dma_diffusers.pipelines.files import check_writable, write_atomically
    from dma_diffusers.pipelines.picture import encode, picture_format

    chosen = {"high": high, "low": low, "window": window, "sink": sink, "lowering": lowering}
    config = DMAConfig.preset(preset, **_given(chosen))
    kind = picture_format(output)
    check_writable(output)

    with _quiet():
        _hide_loading_bars()
        from dma_diffusers.attach import apply, report, restore
        from dma_diffusers.eval.compare import compare as compared
        from dma_diffusers.pipelines.generate import Drawing, draw
        from dma_diffusers.pipelines.load import DEMO_MODEL, load_pipeline, recommended_call

        flags = {"num_inference_steps": steps, "height": size, "width": size}
        call = recommended_call(model or DEMO_MODEL) | _given(flags)
        pipe = load_pipeline(model or DEMO_MODEL)

        with _progress(not as_json) as on_step:

            def drawn(title: str) -> Drawing:
                return draw(pipe, [prompt], [seed], call, partial(on_step, title))

            apply(pipe, config)
            drawing = drawn("DMA")
            receipt = report(pipe)
            label = _label(config, receipt)
            picture, metrics = drawing.pictures[0], {}
            if compare:
                restore(pipe)
                picture, metrics = compared(drawn("full precision"), drawing, prompt, label)
        write_atomically(output, encode(picture, kind))

    if as_json:
        result = {"output": str(output), "seconds": drawing.seconds, **metrics, "receipt": receipt.to_dict()}
        _print_json(result)
        return
    print(f"{output}: {label}, {drawing.seconds:.1f} s")
    if compare:
        psnr = "identical pictures" if metrics["psnr_db"] is None else f"PSNR {metrics['psnr_db']:.2f} dB"
        print(
            f"{psnr}, SSIM {metrics['ssim']:.4f}, relative L2 of latents {metrics['latents_relative_l2']:.4f}"
        )
    print(receipt)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine can run, and if not, why."""
    from dma_diffusers.doctor import diagnose

    with _quiet():
        findings = diagnose()
    if as_json:
        _print_json(findings)
        return
    print(
        f"torch {findings['torch']}, triton {findings['triton'] or 'absent'}, {findings['gpu'] or 'no GPU'}"
    )
    rows = [
        (found["formats"], found["name"], "yes" if found["runs"] else "no", found["reason"])
        for found in findings["lowerings"]
    ]
    _print_table(("formats", "lowering", "runs", "why"), rows)


@app.command("compile")
def compile_kernels(
    target: Annotated[str, typer.Option(help="sm_100, sm_103, sm_120 or sm_90.")],
    high: Format = None,
    low: Format = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel variant for an architecture, ahead of time, on any machine."""
    _require(("triton",), "it is there for Linux alone")
    from dma_diffusers.kernels.compile import compile_all

    with _quiet():
        variants = compile_all(target, high=high, low=low)
    if as_json:
        _print_json(variants)
        return
    columns = [name for name in variants[0] if name != "loops"]  # instruction counts, for --json alone
    _print_table(columns, [[variant[name] for name in columns] for variant in variants])


@app.command("quality-table")
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
    _require(_DEMO_PACKAGES, "pip install 'dma-diffusers[demo]'")
    from dma_diffusers.pipelines.files import check_writable

    check_writable(output)
    with _quiet():
        _hide_loading_bars()
        from dma_diffusers.eval.quality_summary import markdown
        from dma_diffusers.eval.quality_table import quality_table as measure
        from dma_diffusers.eval.quality_table import read_prompts
        from dma_diffusers.pipelines.load import DEMO_MODEL

        chosen = read_prompts(prompts or DEMO_MODEL.parent / "prompts.txt", count)
        command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
        with _progress() as on_step:
            table = measure(chosen, output, command, model or DEMO_MODEL, seed, batch, on_step)
    print(markdown(table["summary"]))


@bench.command("attention")
def bench_attention(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="A model's, such as flux-1k, or BxHxNxD; every model's if left out."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=2, help="Of the models' shapes.")] = 1,
    config: Annotated[
        list[str] | None, typer.Option(help="One of ours, such as high=bf16,low=int8,window=0,sink=0.")
    ] = None,
    inputs: Annotated[str, typer.Option(help="normal or outliers.")] = "normal",
    seed: Annotated[int, typer.Option(help="Seed of the inputs.")] = 0,
    seconds: Annotated[
        float, typer.Option(min=0.01, max=60, help="GPU time for each kernel and shape.")
    ] = 0.3,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The raw result as JSON; resumed if it exists.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="A chart to draw, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Time our attention beside its peers, and both against the bound of the GPU."""
    from dma_diffusers.eval.bench.timing import require_gpu

    require_gpu()
    _require(("triton", "transformers"), "pip install 'dma-diffusers[eval]'")
    from dma_diffusers.eval.bench import plot as chart
    from dma_diffusers.eval.bench import shapes, summary
    from dma_diffusers.eval.bench.attention import bench_attention as measure
    from dma_diffusers.eval.bench.entries import Config
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    chosen = shapes.parse(shape or list(shapes.NAMED), batch)
    configs = [Config.parse(text) for text in config or ()]
    if plot:
        chart.check_plot(plot)
    for path in filter(None, (output, plot)):
        check_writable(path)
    command = f"dma-diffusers {shlex.join(sys.argv[1:])}"
    with _quiet(), _progress(not as_json) as on_step:
        result = measure(chosen, configs, inputs, seed, seconds, output, command, on_step)
    if plot:
        write_atomically(plot, chart.plot(result["shapes"]))
    if as_json:
        _print_json(result)
        return
    for label, measured in result["shapes"].items():
        print(f"\n{label}, {inputs} inputs, {result['settings']['gpu']['name']}")
        lines = summary.cells(measured["entries"])
        _print_table(summary.HEADER, ([escape(text) for text in line] for line in lines))


def _require(packages: tuple[str, ...], remedy: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this command needs {', '.join(missing)}: {remedy}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings, and keep what libraries print off standard output."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _hide_loading_bars() -> None:
    import diffusers
    import huggingface_hub
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.enable_progress_bars()  # transformers hides downloads too, which can take long


@contextmanager
def _progress(shown: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Bars on a terminal; what this yields moves them, called with (title, steps done, steps in all)."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (shown and console.is_terminal)) as bars:
        tasks: dict[str, TaskID] = {}

        def on_step(title: str, done: int, total: int) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=total)
            bars.update(tasks[title], completed=done)

        yield on_step


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _label(config: Any, receipt: Any) -> str:
    """What a picture was drawn with."""
    if not any(module.diverted for module in receipt.modules):
        return "stock attention"
    return f"DMA {config.high}/{config.low}, window {config.window}, sink {config.sink}"


def _print_table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    table = Table(*header, box=SIMPLE_HEAD)
    for row in rows:
        table.add_row(*(", ".join(value) if isinstance(value, list) else str(value) for value in row))
    console = Console()
    if not console.is_terminal:
        console.width = 160  # what goes into a file or a pipe keeps its lines whole
    console.print(table)


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))
