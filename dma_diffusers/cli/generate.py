"""`dma-diffusers generate`: one picture."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dma_diffusers.cli.console import (
    DEMO_PACKAGES,
    Format,
    Json,
    Tokens,
    given,
    hide_loading_bars,
    print_json,
    progress,
    quiet,
    require,
)


def generate(
    prompt: str,
    output: Annotated[Path, typer.Option("--output", "-o", help="The picture to write.")],
    model: Annotated[
        str | None, typer.Option(help="Local folder or hub id; `demo`, the embedded model, if left out.")
    ] = None,
    preset: Annotated[str, typer.Option(help="auto, b200, hopper or exact.")] = "b200",
    high: Format = None,
    low: Format = None,
    window: Tokens = None,
    sink: Tokens = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="A policy in words, such as 'neighborhood(window=8x8)'; or the file that `calibrate` wrote, instead "
            "of preset, formats and tokens."
        ),
    ] = None,
    quality: Annotated[
        float | None, typer.Option(help="From 0 to 1: the policy file's choice at or above it.")
    ] = None,
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
    require(DEMO_PACKAGES, "pip install 'dma-diffusers[demo]'")
    from dma_diffusers.config import DMAConfig, is_words
    from dma_diffusers.pipelines.files import check_writable, write_atomically
    from dma_diffusers.pipelines.picture import encode, picture_format

    tiles = given({"high": high, "low": low, "window": window, "sink": sink})
    file = Path(policy) if policy and not is_words(policy) else None
    if file and tiles:
        raise ValueError(f"--policy chooses {', '.join(tiles)} itself: give one or the other")
    if quality is not None and not file:
        raise ValueError("--quality chooses from a policy file: give --policy too")
    chosen = tiles | given({"lowering": lowering})
    if file:
        config = DMAConfig.from_file(file, quality, **chosen)
    else:
        config = DMAConfig.preset(preset, **chosen | given({"policy": policy}))
    kind = picture_format(output)
    check_writable(output)

    with quiet():
        hide_loading_bars()
        from dma_diffusers.attach import apply, report, restore
        from dma_diffusers.eval.compare import compare as compared
        from dma_diffusers.pipelines.generate import Drawing, draw
        from dma_diffusers.pipelines.load import load_pipeline, named_model, recommended_call

        flags = {"num_inference_steps": steps, "height": size, "width": size}
        path = named_model(model)
        call = recommended_call(path) | given(flags)
        pipe = load_pipeline(path)

        with progress(not as_json) as on_step:

            def drawn(title: str) -> Drawing:
                return draw(pipe, [prompt], [seed], call, partial(on_step, title))

            apply(pipe, config)
            drawing = drawn("DMA")
            receipt = report(pipe)
            label = _label(config, file, receipt)
            picture, metrics = drawing.pictures[0], {}
            if compare:
                restore(pipe)
                picture, metrics = compared(drawn("full precision"), drawing, prompt, label)
        write_atomically(output, encode(picture, kind))

    if as_json:
        result = {"output": str(output), "seconds": drawing.seconds, **metrics, "receipt": receipt.to_dict()}
        print_json(result)
        return
    print(f"{output}: {label}, {drawing.seconds:.1f} s")
    if compare:
        psnr = "identical pictures" if metrics["psnr_db"] is None else f"PSNR {metrics['psnr_db']:.2f} dB"
        print(
            f"{psnr}, SSIM {metrics['ssim']:.4f}, relative L2 of latents {metrics['latents_relative_l2']:.4f}"
        )
    print(receipt)


def _label(config: Any, file: Path | None, receipt: Any) -> str:
    """What a picture was drawn with."""
    if not any(module.diverted for module in receipt.modules):
        return "stock attention"
    if file:
        return f"DMA as {file.name} chooses"
    if config.policy:
        return f"DMA {config.high}/{config.low}, {config.policy}"
    return f"DMA {config.high}/{config.low}, window {config.window}, sink {config.sink}"
