"""`dma-diffusers generate-video`: one clip."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.attention import AttentionOptions
from dma_diffusers.cli.console import (
    DEMO_PACKAGES,
    Json,
    Seed,
    hide_loading_bars,
    print_json,
    quiet,
    require,
    sizes_of,
)
from dma_diffusers.progress import progress


def generate_video(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="The clip to write: .mp4, .webp or .gif.")],
    attention: AttentionOptions,
    model: Annotated[
        str, typer.Option(help="Local folder or hub id, or `demo-video`, the embedded model.")
    ] = "demo-video",
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of the clip.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second.")] = None,
    size: Annotated[str | None, typer.Option(help="Width x height in pixels, such as 832x480.")] = None,
    image: Annotated[
        Path | None,
        typer.Option(help="First frame, for image-to-video models; cropped to the clip's shape."),
    ] = None,
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
    sides = size and sizes_of("--size", size)
    if sides and len(sides) != 2:
        raise ValueError(f"--size {size}: give width and height, as in 832x480")

    with quiet():
        hide_loading_bars()
        from dma_diffusers.attach import apply, report, restore
        from dma_diffusers.eval import compare as comparison
        from dma_diffusers.pipelines.generate import Drawing, draw
        from dma_diffusers.pipelines.linears import calibrate_where_needed
        from dma_diffusers.pipelines.load import check_model, load_pipeline, named_model, outline
        from dma_diffusers.pipelines.video import clip_call, read_image

        path = named_model(model)
        check_model(path, video=True, image=image is not None)
        first = image and read_image(image)
        call = clip_call(path, steps=steps, frames=frames, size=sides, fps=fps, image=first)
        check_clip(kind, call.size, call.fps)
        # A request that the model can't take is refused before its weights are loaded.
        apply(outline(path), chosen.config, linears=None)
        notes: list[str] = []
        pipe = load_pipeline(path, True, image is not None, [call.arguments], notes.append)

        with progress(not as_json) as on_step:

            def drawn(title: str) -> Drawing:
                return draw(pipe, [prompt], [seed], call.arguments, partial(on_step, title))

            calibrate_where_needed(pipe, chosen.config, call.arguments, on_step)
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
        result = {
            "output": str(output), "frames": count, "fps": call.fps, "width": width, "height": height,
            "seconds": drawing.seconds, **metrics, "receipt": receipt.to_dict(),
        }  # fmt: skip
        print_json(result)
        return
    print(
        f"{output}: {count} frames of {width}x{height}, {call.fps:g} a second; {label}, {drawing.seconds:.1f} s"
    )
    if compare:
        print(comparison.in_words(metrics))
    print("\n".join([*notes, str(receipt)]))
