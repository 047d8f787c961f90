"""`dma-diffusers generate`: one picture."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.attention import AttentionOptions
from dma_diffusers.cli.call import CallOptions, Loras, Size, sides_of
from dma_diffusers.cli.console import (
    DEMO_PACKAGES,
    Json,
    Seed,
    given,
    hide_loading_bars,
    print_json,
    quiet,
    require,
)
from dma_diffusers.progress import progress


def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")],
    attention: AttentionOptions,
    further: CallOptions,
    model: Annotated[
        str | None, typer.Option(help="Local folder or hub id; `demo`, the embedded model, if left out.")
    ] = None,
    lora: Loras = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Seed = 0,
    size: Size = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Add full precision and the difference.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw PROMPT with DMA attention."""
    require(DEMO_PACKAGES, "pip install 'dma-diffusers[demo]'")
    from dma_diffusers.pipelines.files import check_writable, write_atomically
    from dma_diffusers.pipelines.picture import encode, picture_format

    chosen = attention.choose()
    kind = picture_format(output)
    check_writable(output)

    with quiet():
        hide_loading_bars()
        from dma_diffusers.attach import apply, report, restore
        from dma_diffusers.eval import compare as comparison
        from dma_diffusers.pipelines import loras
        from dma_diffusers.pipelines.captions import without_letters
        from dma_diffusers.pipelines.generate import Drawing, draw
        from dma_diffusers.pipelines.linears import calibrate_where_needed
        from dma_diffusers.pipelines.load import (
            check_call,
            check_model,
            load_pipeline,
            named_model,
            pipeline_class,
            recommended_call,
        )

        flags = {"num_inference_steps": steps, **sides_of(size)}
        path = named_model(model)
        check_model(path, video=False)
        call = recommended_call(path) | given(flags) | further.given
        check_call(pipeline_class(path), call)
        notes: list[str] = []
        pipe = load_pipeline(
            path,
            video=False,
            calls=[call],
            say=notes.append,
            loras=[loras.parse(file) for file in lora or ()],
        )

        with progress(not as_json) as on_step:

            def drawn(title: str) -> Drawing:
                return draw(pipe, [prompt], [seed], call, partial(on_step, title))

            calibrate_where_needed(pipe, chosen.config, call, on_step)
            apply(pipe, chosen.config)
            drawing = drawn("DMA")
            receipt = report(pipe)
            label = chosen.label(receipt)
            picture, metrics = drawing.pictures[0], {}
            if compare:
                restore(pipe)
                picture, metrics = comparison.compare(drawn("full precision"), drawing, prompt, label)
        write_atomically(output, encode(picture, kind))

    if as_json:
        about = {"output": str(output), "seconds": drawing.seconds}
        about |= {"notes": drawing.notes} if drawing.notes else {}
        print_json({**about, **metrics, "receipt": receipt.to_dict()})
        return
    print(f"{output}: {label}, {drawing.seconds:.1f} s")
    if compare:
        print(comparison.in_words(metrics))
    notes += [f"note: {note}" for note in (*drawing.notes, *without_letters(prompt if compare else ""))]
    print("\n".join([*notes, str(receipt)]))
