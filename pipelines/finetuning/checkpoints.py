"""Checkpoints: all that a run needs to go on as if it had not been stopped, bit for bit where the device is exact."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dma_diffusers.pipelines.files import temporary_folder
from dma_diffusers.pipelines.finetuning.trainer import Trainer

_KEPT = 2


def save_checkpoint(trainer: Trainer, accelerator: Accelerator, folder: Path) -> Path:
    """Write a checkpoint of this step, which has its name once it is whole, and remove those before the last two."""
    path = _of_step(folder, trainer.step)
    random_states = _gathered(accelerator, _random_state())
    if accelerator.is_main_process:
        folder.mkdir(exist_ok=True)
        with temporary_folder(folder) as unfinished:
            with (unfinished / "state.pt").open("wb") as file:
                torch.save({**trainer.state(), "random": random_states}, file)
                file.flush()
                # After a power cut, a checkpoint with its name is whole.
                os.fsync(file.fileno())
            shutil.rmtree(path, ignore_errors=True)
            unfinished.rename(path)
        for former in _all(folder)[:-_KEPT]:
            shutil.rmtree(former)
    accelerator.wait_for_everyone()
    return path


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder, None where there is none."""
    return next(reversed(_all(folder)), None)


def load_checkpoint(trainer: Trainer, accelerator: Accelerator, path: Path) -> None:
    """Go on from a checkpoint.

    Raises ValueError for one of another number of processes, whose examples were split otherwise.
    """
    state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    random_states = state.pop("random")
    if len(random_states) != accelerator.num_processes:
        raise ValueError(
            f"{path} is of {len(random_states)} processes, not of {accelerator.num_processes}: start as many"
        )
    trainer.load_state(state)
    own = random_states[accelerator.process_index]
    torch.set_rng_state(own["cpu"])
    if "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"], accelerator.device)


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def _gathered(accelerator: Accelerator, own: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """Return each process's object."""
    if accelerator.num_processes == 1:
        return [own]
    everyone: list[Any] = [None] * accelerator.num_processes
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def _of_step(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
