"""`dma-diffusers study` measures what each format loses on a model's tensors, and says which one to use."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from dma_diffusers.cli.calibrate import Recording
from dma_diffusers.cli.call import sides_of
from dma_diffusers.cli.console import (
    EVAL_PACKAGES,
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


def study(
    recording: Recording,
    model: Annotated[str, typer.Argument(help="Local folder or hub id, `demo` or `demo-video`.")] = "demo",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for study.json, study.csv and study.html.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help=".txt, .jsonl, .json, .csv or .tsv; the built-in ones if left out.")
    ] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="A format to compare; repeat it. All if left out.")
    ] = None,
    rotations: Annotated[
        list[str] | None,
        typer.Option(
            "--rotation", help="none, hadamard16, hadamard32 or head_dim; repeat it. All if left out."
        ),
    ] = None,
    linears: Annotated[bool, typer.Option(help="Measure linear layers, too.")] = True,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="The theory and random numbers alone, without a model.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what formats lose on MODEL's own q, k, v, probabilities and linear layers, and recommend some.

    Error is set beside what theory predicts from crest factors. `dma-diffusers calibrate --study` takes study.json.
    """
    if synthetic:
        _print_synthetic(as_json)
        return
    require(EVAL_PACKAGES, "pip install 'dma-diffusers[eval]'")
    from dma_diffusers.pipelines.files import check_writable

    if output is None:
        raise ValueError("give --output, a folder for what is found, or --synthetic for the theory alone")
    output.mkdir(parents=True, exist_ok=True)
    check_writable(output / "study.json")
    with quiet():
        hide_loading_bars()
        from dma_diffusers.eval.quality.prompts import built_in, read_prompts
        from dma_diffusers.eval.recordings.record import record
        from dma_diffusers.eval.study import recommend, write
        from dma_diffusers.eval.study.linears import samples
        from dma_diffusers.eval.study.options import Options
        from dma_diffusers.eval.study.study import study as measured
        from dma_diffusers.pipelines.load import load_pipeline, named_model, recommended_call

        options = Options(*(tuple(names) for names in (formats or Options.formats, rotations or ())))
        path = named_model(model)
        texts = [prompt.text for prompt in read_prompts(prompts or built_in(path), recording.count)[0]]
        sides = sides_of(recording.size)
        call = recommended_call(path) | given({"num_inference_steps": recording.steps, **sides})
        seeds = seeds_from(recording.seed, len(texts))
        pipe = load_pipeline(path, calls=[call])
        with tempfile.TemporaryDirectory() as scratch, progress(not as_json) as on_step:
            recordings = record(
                pipe, texts, recording.recordings or Path(scratch), call,
                seeds=seeds, steps=recording.recorded, limit=int(recording.limit * 1e9), on_step=on_step,
            )  # fmt: skip
            taken = samples(pipe, recordings, call, on_step) if linears else ()
            found = measured(recordings, options, taken, on_step=on_step)
        command = " ".join(["dma-diffusers", *sys.argv[1:]])
        document = write.document(found, recordings, options, command)
        write.save(document, output)
    if as_json:
        print_json({name: value for name, value in document.items() if name not in ("rows", "crests")})
        return
    print_table(recommend.HEADER, ([escape(cell) for cell in row] for row in recommend.table(document)))
    for note in document["notes"]:
        print(f"note: {note}")
    print(f"{output}: {', '.join(write.NAMES)}")


def _print_synthetic(as_json: bool) -> None:
    with quiet():
        from dma_diffusers.eval.study import synthetic

        document = synthetic.document()
    if as_json:
        print_json(document)
        return
    print_table(synthetic.HEADER, synthetic.rows(document))
    print("\n".join(synthetic.lines(document)))
