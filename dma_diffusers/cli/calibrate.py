"""`dma-diffusers calibrate`: choose formats and policies for a model."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dma_diffusers.cli.call import CallOptions, Loras, Size, sides_of
from dma_diffusers.cli.console import (
    Json,
    given,
    hide_loading_bars,
    print_json,
    print_table,
    quiet,
    require,
    seeds_from,
)
from dma_diffusers.progress import progress


@dataclass(frozen=True)
class Recording:
    """The options that say what is recorded."""

    count: Annotated[int, typer.Option(min=1, help="How many of the prompts, from the first.")] = 4
    recorded: Annotated[
        int, typer.Option(min=1, help="Denoising steps to record, evenly spread from first to last.")
    ] = 3
    seed: Annotated[int, typer.Option(help="Of the first prompt; each further one has the next.")] = 0
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None
    size: Size = None
    recordings: Annotated[
        Path | None, typer.Option(help="Folder to keep the recordings in, and to go on with.")
    ] = None
    limit: Annotated[float, typer.Option(min=0.001, help="Gigabytes that the recordings may take.")] = 2.0


@dataclass(frozen=True)
class Candidates:
    """The options that say what is chosen from."""

    formats: Annotated[
        list[str] | None, typer.Option(help="HIGH|LOW to choose from, such as mxfp8|mxfp4; repeat it.")
    ] = None
    rotation: Annotated[
        str | None,
        typer.Option(
            help="Of the channels of q and k: none (the default), hadamard16, hadamard32 or head_dim."
        ),
    ] = None
    study: Annotated[
        Path | None,
        typer.Option(
            help="study.json of `dma-diffusers study`, which says the formats to choose from, and the rotation."
        ),
    ] = None


def calibrate(
    model: Annotated[str, typer.Argument(help="Local folder or hub id, or `demo`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The policy file to write, for DMAConfig.from_file.")
    ],
    prompts: Annotated[
        Path, typer.Option(help="Prompts like those to be drawn: .txt, .jsonl, .json, .csv or .tsv.")
    ],
    recording: Recording,
    candidates: Candidates,
    further: CallOptions,
    lora: Loras = None,
    quality: Annotated[float, typer.Option(help="From 0, the cheapest, to 1, the most precise.")] = 0.5,
    target: Annotated[
        str | None, typer.Option(help="sm_90, sm_100, sm_103 or sm_120; this machine's GPU if left out.")
    ] = None,
    linears: Annotated[
        bool, typer.Option("--linears", help="Choose the bits of linear layers, too, within the same error.")
    ] = False,
    bits_plot: Annotated[
        Path | None,
        typer.Option(
            help="SVG to write with --linears: shares of 4, 6, 8 bits over noise levels; and a .json."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Record MODEL's attention on PROMPTS, and choose HIGH, LOW, MEAN or SKIP for each layer and noise level by error.

    Every fourth prompt is held out, to measure the choice on. The file holds a ladder of qualities, of which
    `DMAConfig.from_file(path, quality=0.7)` takes the next at or above. With --linears it has files of linear layers
    beside it, which must stay there.
    """
    require(("transformers", "PIL", "triton"), "pip install 'dma-diffusers[eval]'")
    from dma_diffusers.eval.bench.plot import check_plot
    from dma_diffusers.kernels.formats import Rotations
    from dma_diffusers.pipelines.files import check_writable
    from dma_diffusers.policy_file import check_quality

    check_quality(quality)
    check_writable(output)
    if linears:
        check_writable(output.with_name(f"{output.stem}-{0.25}.safetensors"))
    if bits_plot:
        if not linears:
            raise ValueError("--bits-plot shows what linear layers need: give --linears too")
        check_plot(bits_plot)
        check_writable(bits_plot)
        check_writable(bits_plot.with_suffix(".json"))
    if candidates.study and (candidates.formats or candidates.rotation):
        raise ValueError("--study says the formats and the rotation: leave --formats and --rotation out")
    pairs, rotation = [_pair(text) for text in candidates.formats or ()], candidates.rotation or "none"
    Rotations.parse(rotation)
    with quiet():
        hide_loading_bars()
        from dma_diffusers.eval import cost
        from dma_diffusers.eval.linears import over_time
        from dma_diffusers.eval.linears.options import observe, save_choice
        from dma_diffusers.eval.quality.prompts import read_prompts
        from dma_diffusers.eval.recordings import policy as tables
        from dma_diffusers.eval.recordings.calibrate import calibrate as chosen
        from dma_diffusers.eval.recordings.record import record
        from dma_diffusers.eval.study import recommend
        from dma_diffusers.pipelines.load import (
            check_call,
            load_pipeline,
            named_model,
            pipeline_class,
            recommended_call,
        )
        from dma_diffusers.pipelines.loras import parse as parse_lora

        cost.check_target(target or cost.current_target())
        if candidates.study:
            studied = recommend.read(candidates.study)
            pairs = recommend.pairs(studied, target or cost.current_target())
            rotation = recommend.rotation(studied, pairs)
        path = named_model(model)
        chosen_prompts, repeated = read_prompts(prompts, recording.count, fewest=1)
        texts = [prompt.text for prompt in chosen_prompts]
        call = recommended_call(path) | given(
            {"num_inference_steps": recording.steps, **sides_of(recording.size)}
        )
        call |= further.given
        check_call(pipeline_class(path), call)
        seeds = seeds_from(recording.seed, len(texts))
        pipe = load_pipeline(path, calls=[call], loras=[parse_lora(file) for file in lora or ()])
        if candidates.study:
            recommend.check_model(studied, pipe)
        with tempfile.TemporaryDirectory() as scratch, progress(not as_json) as on_step:
            folder = recording.recordings or Path(scratch)
            recorded_calls = record(
                pipe, texts, folder, call,
                seeds=seeds, steps=recording.recorded, limit=int(recording.limit * 1e9), on_step=on_step,
            )  # fmt: skip
            items = []
            if linears:
                seen, items = observe(pipe, recorded_calls, call, target or cost.current_target(), on_step)
            policy = chosen(
                recorded_calls, quality, target=target, formats=pairs or None, rotation=rotation, linears=items,
                on_step=on_step,
            )  # fmt: skip
        for choice in policy.choices:
            if file := choice.file_of_linears(output.name):
                save_choice(pipe, choice.linears, output.with_name(file))
        policy.save(output)
        if bits_plot:
            over_time.save(over_time.bits_over_time(seen), bits_plot)
    if as_json:
        print_json(policy.to_dict(output.name))
        return
    print_table(tables.LADDER_HEADER, tables.ladder(policy))
    if linears:
        print_table(tables.LINEARS_HEADER, tables.linears(policy))
    print_table(tables.MODULES_HEADER, ([escape(cell) for cell in row] for row in tables.modules(policy)))
    notes = [f"{repeated} repeated prompts were left out"] if repeated else []
    if not policy.evidence["prompts_held_out"]:
        recorded = policy.evidence["prompts_recorded"]
        counted = "1 was" if recorded == 1 else f"{recorded} were"
        notes.append(f"no prompt is held out, because {counted} recorded: of four or more, every fourth is")
    for note in [*notes, *recorded_calls.notes]:
        print(f"note: {note}")
    print(f"{output}: chosen for {policy.evidence['target']}; costs are predicted, errors are measured")


def _pair(text: str) -> tuple[str, str]:
    from dma_diffusers.kernels.precision import Precisions

    high, separator, low = text.partition("|")
    if not separator:
        raise ValueError(f"formats {text!r}: give HIGH|LOW, as in mxfp8|mxfp4")
    return Precisions.parse(high.strip(), low.strip()).words
