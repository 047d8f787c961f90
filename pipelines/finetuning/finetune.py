"""Fine-tune the transformer of a pipeline for the precision that it will run at, and keep all of it in a folder."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration
from diffusers import DiffusionPipeline

from dma_diffusers import finetune as precision
from dma_diffusers import report
from dma_diffusers.pipelines.finetuning.checkpoints import last_checkpoint, load_checkpoint, save_checkpoint
from dma_diffusers.pipelines.finetuning.data import store_examples
from dma_diffusers.pipelines.finetuning.latents import KNOWN
from dma_diffusers.pipelines.finetuning.log import Log
from dma_diffusers.pipelines.finetuning.objectives import Distillation, FlowMatching, Objective
from dma_diffusers.pipelines.finetuning.request import Request, begin, check
from dma_diffusers.pipelines.finetuning.save import save_trained
from dma_diffusers.pipelines.finetuning.sheets import Sheets
from dma_diffusers.pipelines.finetuning.store import CallStore
from dma_diffusers.pipelines.finetuning.target import depends_on_noise, trainable, with_size
from dma_diffusers.pipelines.finetuning.teacher import store_teacher
from dma_diffusers.pipelines.finetuning.trainer import Diverged, Trainer
from dma_diffusers.pipelines.load import load_pipeline
from dma_diffusers.progress import OnStep

_WHOLE_WEIGHTS = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
_LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Watch:
    """The files that are kept of a run on its way.

    checkpoint_every, sheet_every: steps from one to the next; 0 for none. samples: prompts of a sheet. draw: prompts
    that full precision draws together. tensorboard: whether losses go there as well.
    """

    checkpoint_every: int = 200
    sheet_every: int = 0
    samples: int = 4
    draw: int = 1
    tensorboard: bool = False


def finetune(request: Request, steps: int, folder: Path, watch: Watch, on_step: OnStep) -> dict[str, Any]:
    """Train until so many steps were made in all, save the result, and return what happened.

    `folder` has the result (`pipelines.finetuning.save`), `loss.jsonl`, checkpoints, sample sheets, and the examples. A
    run that was stopped goes on from its last checkpoint. The result's `notes` say why no attention call trained at low
    precision where that was asked for. Under `accelerate launch` every process calls this.

    Raises ValueError where the folder is another run's, the pipeline can't be trained, the model can't have such
    precision, or the loss is not finite, and RuntimeError where the GPU has too little memory.
    """
    check(folder, request.identity(steps))
    accelerator = _accelerator(folder, watch)
    folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()  # all have looked before anyone writes
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass is wrong in PyTorch 2.11
    pipe = load_pipeline(request.model, calls=[request.call])
    model = trainable(pipe, request.component, request.lora_rank > 0)
    call = with_size(pipe, request.call)
    with _within_memory(request.settings.batch):
        objective = _objective(request, pipe, model, call, folder, watch, accelerator, on_step)
        sheets = None
        if watch.sheet_every and accelerator.is_main_process:
            texts = [*request.prompts, *(example.caption for example in request.examples)]
            sheets = Sheets(pipe, texts[: watch.samples], call, folder)
        prepare(model, request)
        by_level = depends_on_noise(request.attention)
        trainer = Trainer(model, objective, request.settings, accelerator, steps, by_level)
        if accelerator.is_main_process:
            begin(folder, request.identity(steps))
        losses = _train(trainer, accelerator, folder, watch, sheets, on_step)
    if not accelerator.is_main_process:
        return {}
    notes = _notes(model)
    with trainer.averaged():
        precision.restore(model)
        trained = {**request.identity(steps), "steps": trainer.step, "last_loss": losses[-1]}
        saved = save_trained(
            pipe,
            request.component,
            request.attention,
            request.linears,
            request.lora_rank > 0,
            trained,
            folder,
        )
    device = str(accelerator.device)
    return {"steps": trainer.step, "loss": losses, "device": device, "saved": str(saved), "notes": notes}


def _notes(model: torch.nn.Module) -> list[str]:
    """Return the reasons for which no attention call trained at low precision, if that was asked for and none did."""
    modules = report(model).modules
    if any(module.intercepted for module in modules):
        return []
    return [
        f"attention trained at full precision: {reason}"
        for reason in dict.fromkeys(reason for module in modules for reason in module.fallbacks)
    ]


def _train(
    trainer: Trainer,
    accelerator: Accelerator,
    folder: Path,
    watch: Watch,
    sheets: Sheets | None,
    on_step: OnStep,
) -> list[float]:
    """Train from the last checkpoint to the end, and return the loss of every step of the run."""
    checkpoints = folder / "checkpoints"
    if found := last_checkpoint(checkpoints):
        load_checkpoint(trainer, accelerator, found)
    log = Log(folder / "loss.jsonl", trainer.step) if accelerator.is_main_process else None
    start = time.perf_counter()
    while trainer.step < trainer.steps:
        try:
            loss = trainer.advance()
        except Diverged as error:
            last = last_checkpoint(checkpoints)
            kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint before it"
            raise ValueError(f"{error}: {kept}; lower --lr, in another folder") from None
        on_step("training", trainer.step, trainer.steps)
        if log:
            seconds = round(time.perf_counter() - start, 3)
            log.append({"step": trainer.step, "loss": loss, "seconds": seconds})
            accelerator.log({"loss": loss}, step=trainer.step)
        if _is_time(trainer, watch.checkpoint_every):
            save_checkpoint(trainer, accelerator, checkpoints)
        if sheets and _is_time(trainer, watch.sheet_every):
            with trainer.averaged():
                sheets.write(trainer.step)
    accelerator.end_training()
    return [line["loss"] for line in log.read()] if log else []


def prepare(model: torch.nn.Module, request: Request) -> None:
    """Give the model the precision that it is trained for, and gradients to the weights that are trained."""
    lora = None
    if request.lora_rank:
        if find_spec("peft") is None:
            raise ValueError("LoRA needs peft: pip install peft")
        from peft import LoraConfig

        lora = LoraConfig(
            r=request.lora_rank,
            lora_alpha=request.lora_rank,
            target_modules=list(_LORA_LAYERS),
            init_lora_weights="gaussian",
        )
        # Adapters begin with the same random numbers in every process, and in every run.
        torch.manual_seed(request.settings.seed)
    model.requires_grad_(True)
    if request.linears or request.attention or lora:
        precision.prepare(model, request.linears, request.attention, rounding=request.rounding, lora=lora)
    if request.gradient_checkpointing:
        model.enable_gradient_checkpointing()  # type: ignore[operator]  # of Diffusers


def _objective(
    request: Request,
    pipe: DiffusionPipeline,
    model: torch.nn.Module,
    call: dict[str, Any],
    folder: Path,
    watch: Watch,
    accelerator: Accelerator,
    on_step: OnStep,
) -> Objective:
    """Store the examples that are not there yet, at full precision."""
    examples = folder / "examples"
    check(examples, request.identity_of_examples())
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        begin(examples, request.identity_of_examples())
    store = CallStore(examples)
    if request.prompts:
        store_teacher(pipe, model, request.prompts, call, store, request.settings.seed, watch.draw, on_step)
        return Distillation(store, len(request.prompts))
    if not isinstance(pipe, KNOWN):
        known = ", ".join(kind.__name__ for kind in KNOWN)
        raise ValueError(
            f"flow matching knows the latents of {known}, not of {type(pipe).__name__}: give prompts"
        )
    with accelerator.main_process_first():
        sigmas = store_examples(pipe, model, request.examples, call, store, on_step)
    return FlowMatching(store, len(request.examples), sigmas, depends_on_noise(request.attention))


@contextmanager
def _within_memory(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(
            f"out of memory with --batch {batch}: lower it and raise --accumulate, add --gradient-checkpointing, train "
            "fewer weights by --lora-rank, or give a smaller --size"
        ) from error


def _is_time(trainer: Trainer, every: int) -> bool:
    return bool(every) and (trainer.step % every == 0 or trainer.step == trainer.steps)


def _accelerator(folder: Path, watch: Watch) -> Accelerator:
    """Return accelerate's view of devices and processes.

    Raises ValueError where TensorBoard is not installed, and for a launcher that splits the weights.
    """
    if watch.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs tensorboard: pip install 'dma-diffusers[finetune]'")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",  # the model computes in its own dtype, as when it draws
        log_with="tensorboard" if watch.tensorboard else None,
        project_config=ProjectConfiguration(str(folder), str(folder / "tensorboard")),
    )
    if (kind := accelerator.distributed_type) not in _WHOLE_WEIGHTS:
        raise ValueError(
            f"fine-tuning keeps all weights on every GPU, and accelerate is set to {kind.value}: "
            "launch it with --multi_gpu"
        )
    accelerator.init_trackers("loss")
    return accelerator
