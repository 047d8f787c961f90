"""`dma-diffusers finetune`: train a model for the precision that it will run at."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.call import CallOptions, Size, sides_of
from dma_diffusers.cli.console import (
    DEMO_PACKAGES,
    Json,
    given,
    hide_loading_bars,
    print_json,
    processes,
    quiet,
    require,
    working_in,
)
from dma_diffusers.progress import progress


@dataclass(frozen=True)
class Precision:
    """The options that say what the model is trained for, and which weights are trained."""

    linears: Annotated[
        str | None,
        typer.Option(help="Linear layers: qat, quartet, quartet2 or mxint8; full precision if left out."),
    ] = None
    rounding: Annotated[str, typer.Option(help="Of quartet's gradients: nearest or stochastic.")] = "nearest"
    attention: Annotated[
        str | None,
        typer.Option(
            help="Attention, a preset or fields, such as low=mxfp4,window=0,sink=0 or policy=FILE,quality=0.5; full "
            "precision if left out."
        ),
    ] = None
    lora_rank: Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters; 0 trains all weights.")] = 0
    component: Annotated[str, typer.Option(help="The pipeline's transformer to train.")] = "transformer"


@dataclass(frozen=True)
class Training:
    """The options that say how it is trained."""

    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps in all; more than before goes on.")] = (
        1000
    )
    batch: Annotated[int, typer.Option(min=1, help="Examples of each GPU at a time.")] = 4
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of a step.")] = 1
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of AdamW.")] = 1e-5
    warmup: Annotated[int, typer.Option(min=0, help="Steps in which it rises.")] = 50
    decay: Annotated[float, typer.Option(min=0, max=1, help="Share of the steps in which it falls to 0.")] = (
        0.0
    )
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradients; 0 for any.")] = 1.0
    ema: Annotated[
        float, typer.Option(min=0, max=0.99999, help="Decay of the averaged weights; 0 for none.")
    ] = 0.99
    seed: Annotated[int, typer.Option(min=0, help="Of samples, order and noise.")] = 0
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice, and keep few.")
    ] = False


@dataclass(frozen=True)
class Progress:
    """The options that say what is kept of a run on its way."""

    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints; 0 for none.")] = 200
    sheet_every: Annotated[int, typer.Option(min=0, help="Steps between sample sheets; 0 for none.")] = 0
    samples: Annotated[int, typer.Option(min=1, help="Prompts of a sample sheet.")] = 4
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log the loss for TensorBoard.")] = False


def finetune(
    model: Annotated[str, typer.Argument(help="Local folder or hub id, `demo` or `demo-video`.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder of the run: weights, policy.json, loss.jsonl; resumed."),
    ],
    precision: Precision,
    training: Training,
    kept: Progress,
    further: CallOptions,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Distil from full precision, which draws these: .txt, .jsonl, .json, .csv or .tsv."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Or flow matching, on a folder of pictures or clips: captions in .txt or metadata.jsonl."
        ),
    ] = None,
    size: Size = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of clips.")] = None,
    draw_steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of full precision.")] = None,
    as_json: Json = False,
) -> None:
    """Train MODEL's transformer for low precision: on its own full-precision drawings, or on your data.

    The output has what Diffusers loads (transformer/ or lora/) and policy.json for `DMAConfig.from_file`. The same
    command goes on where it was stopped; `accelerate launch -m dma_diffusers finetune …` takes several GPUs.
    """
    require((*DEMO_PACKAGES, "accelerate"), "pip install 'dma-diffusers[finetune]'")
    if precision.lora_rank:
        require(("peft",), "pip install 'dma-diffusers[finetune]'")
    if kept.tensorboard:
        require(("tensorboard",), "pip install 'dma-diffusers[finetune]'")
    if bool(prompts) == bool(data):
        raise ValueError("give --prompts, to distil from full precision, or --data, a folder of your own")
    with quiet():
        hide_loading_bars()
        from dma_diffusers.eval.quality.configurations import parse
        from dma_diffusers.eval.quality.prompts import read_prompts
        from dma_diffusers.pipelines.finetuning.data import read_folder
        from dma_diffusers.pipelines.finetuning.finetune import Watch
        from dma_diffusers.pipelines.finetuning.finetune import finetune as trained
        from dma_diffusers.pipelines.finetuning.request import Request
        from dma_diffusers.pipelines.finetuning.trainer import Settings
        from dma_diffusers.pipelines.load import (
            ability,
            check_call,
            check_model,
            named_model,
            pipeline_class,
            recommended_call,
        )

        path = named_model(model)
        check_model(path)
        kind = pipeline_class(path)
        call = recommended_call(path) | sides_of(size) | further.given
        call |= given({"num_inference_steps": draw_steps, "num_frames": frames})
        check_call(kind, call)
        request = Request(
            model=path,
            call=call,
            prompts=[prompt.text for prompt in read_prompts(prompts, fewest=1)[0]] if prompts else (),
            examples=read_folder(data, ability(kind).video) if data else (),
            linears=precision.linears,
            rounding=precision.rounding,
            attention=parse(precision.attention) if precision.attention else None,
            lora_rank=precision.lora_rank,
            component=precision.component,
            gradient_checkpointing=training.gradient_checkpointing,
            settings=Settings(
                training.batch, training.accumulate, training.lr, training.warmup, training.decay, training.clip,
                training.ema, training.seed,
            ),
        )  # fmt: skip
        watch = Watch(kept.checkpoint_every, kept.sheet_every, kept.samples, training.batch, kept.tensorboard)
        output.mkdir(parents=True, exist_ok=True)
        is_main = processes().is_main_process
        with working_in(output, is_main), progress(is_main and not as_json) as on_step:
            result = trained(request, training.steps, output, watch, on_step)
    if not result:
        return
    if as_json:
        print_json(result)
        return
    first, last = (result["loss"][i] for i in (0, -1))
    print(f"{result['saved']}: {result['steps']} steps, loss {first:.3g} → {last:.3g}")
    for note in result["notes"]:
        print(f"note: {note}")
