"""`dma-diffusers generate-video`: one clip."""

from dataclasses import dataclass
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
    hide_loading_bars,
    print_json,
    quiet,
    require,
)
from dma_diffusers.progress import progress


@dataclass(frozen=True)
class Clip:
    """The options that say what the clip is like."""

    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the clip.")] = None
    fps: Annotated[float | None, typer.Option(help="Frames per second.")] = None
    size: Size = None
    image: Annotated[
        Path | None,
        typer.Option(help="First frame, for image-to-video models; cropped to the clip's shape."),
    ] = None


def generate_video(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="The clip to write: .mp4, .webp or .gif.")],
    attention: AttentionOptions,
    further: CallOptions,
    asked: Clip,
    model: Annotated[
        str, typer.Option(help="Local folder or hub id, or `demo-video`, the embedded model.")
    ] = "demo-video",
    lora: Loras = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps.")] = None,
    seed: Seed = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Add full precision, the difference, and PSNR over time.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Draw a clip of PROMPT with DMA attention."""
    require(DEMO_PACKAGES, "pip install 'dma-diffusers[demo]'")
    from dma_diffusers.pipelines.clip import check_clip, clip_format, encode_clip
    from dma_diffusers.pipelines.files import check_writable, write_atomically

    chosen = attention.choose()
    kind = clip_format(output)
    check_writable(output)
    sides = tuple(sides_of(asked.size).values()) or None

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
            outline,
            pipeline_class,
        )
        from dma_diffusers.pipelines.video import clip_call, read_image

        path = named_model(model)
        from_image = asked.image is not None
        check_model(path, video=True, image=from_image)
        first = asked.image and read_image(asked.image)
        call = clip_call(path, steps=steps, frames=asked.frames, size=sides, fps=asked.fps, image=first)
        check_clip(kind, call.size, call.fps)
        arguments = call.arguments | further.given
        check_call(pipeline_class(path), arguments)
        # A request that the model can't take is refused before its weights are loaded.
        apply(outline(path), chosen.config, linears=None)
        notes: list[str] = []
        pipe = load_pipeline(
            path, True, from_image, [arguments], notes.append, [loras.parse(file) for file in lora or ()]
        )

        with progress(not as_json) as on_step:

            def drawn(title: str) -> Drawing:
                return draw(pipe, [prompt], [seed], arguments, partial(on_step, title))

            calibrate_where_needed(pipe, chosen.config, arguments, on_step)
            apply(pipe, chosen.config)
            drawing = drawn("DMA")
            receipt = report(pipe)
            label = chosen.label(receipt)
            clip, metrics = drawing.frames[0], {}
            if compare:
                restore(pipe)
                clip, metrics = comparison.compare_clips(drawn("full precision"), drawing, prompt, label)
            write_atomically(output, encode_clip(clip, call.fps, kind))

    count, height, width, _ = drawing.frames[0].shape
    if as_json:
        said = {"notes": drawing.notes} if drawing.notes else {}
        result = {
            "output": str(output), "frames": count, "fps": call.fps, "width": width, "height": height,
            "seconds": drawing.seconds, **said, **metrics, "receipt": receipt.to_dict(),
        }  # fmt: skip
        print_json(result)
        return
    print(
        f"{output}: {count} frames of {width}x{height}, {call.fps:g} a second; {label}, {drawing.seconds:.1f} s"
    )
    if compare:
        print(comparison.in_words(metrics))
    notes += [f"note: {note}" for note in (*drawing.notes, *without_letters(prompt if compare else ""))]
    print("\n".join([*notes, str(receipt)]))
