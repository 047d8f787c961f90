"""The trainings of a row, one for each budget of steps and one for a time.

Each goes on where it was stopped.
"""

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from dma_diffusers.eval.recovery.rows import Row
from dma_diffusers.eval.recovery.study import OnStep, Study
from dma_diffusers.pipelines.finetuning.checkpoints import last_checkpoint, load_checkpoint, save_checkpoint
from dma_diffusers.pipelines.finetuning.log import Log
from dma_diffusers.pipelines.finetuning.target import depends_on_noise
from dma_diffusers.pipelines.finetuning.trainer import Trainer

END = "end"
"""The training for a time, among those whose names are numbers of steps."""

_CURVE = 100  # a loss of training is kept for each so many steps, as their mean
_CHECKPOINT_SECONDS = 60
_PACE = 200  # the last steps, whose median time foretells that of the next ones


class Training:
    """The trainings of one row, each of which begins with the model's own weights.

    model: with the row's precision. seed: of the order. folder: has the checkpoints and the losses, until the row is
    finished.
    """

    def __init__(self, study: Study, row: Row, model: torch.nn.Module, seed: int, folder: Path):
        self.model, self.folder = model, folder
        if study.plan.compiled:
            model.compile_repeated_blocks()  # type: ignore[operator]  # of Diffusers
        self.budgets, self.settings = study.plan.budgets, study.plan.settings(seed)
        self.objective, self.by_level = study.training(), depends_on_noise(row.attention)
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
        self.untrained = [parameter.detach().clone() for parameter in model.parameters()]

    def run(self, seconds: float, judged: Callable[[], float], on_step: OnStep) -> dict[str, Any]:
        """Train for each budget, and then for so many seconds unless these are 0; return losses and times by name.

        The averaged weights of the last training are in the model afterwards.
        """
        losses, took = {}, {}
        for name in (*map(str, self.budgets), *([END] if seconds else [])):
            with torch.no_grad():
                for parameter, value in zip(self.model.parameters(), self.untrained, strict=True):
                    parameter.copy_(value)
            lines = self._train(name, seconds, on_step)
            losses[name], took[name] = judged(), lines[-1]["seconds"]
        curve = [line["loss"] for line in lines]
        means = [float(f"{np.mean(curve[i : i + _CURVE]):.4g}") for i in range(0, len(curve), _CURVE)]
        return {"loss": losses, "steps": len(lines), "seconds": took, "curve": means}

    def _train(self, name: str, seconds: float, on_step: OnStep) -> list[dict[str, Any]]:
        """Make the training of a budget, and return its log."""
        folder, timed = self.folder / name, name == END
        folder.mkdir(parents=True, exist_ok=True)
        steps = 10**9 if timed else int(name)  # of a time, they are foretold below
        trainer = Trainer(self.model, self.objective, self.settings, self.accelerator, steps, self.by_level)
        if found := last_checkpoint(folder):
            load_checkpoint(trainer, self.accelerator, found)
        log = Log(folder / "loss.jsonl", trainer.step)
        ends = deque([0.0, *(line["seconds"] for line in log.read())], _PACE + 1)
        start = saved = time.perf_counter()
        start -= ends[-1]
        while (ends[-1] < seconds) if timed else (trainer.step < steps):
            if timed and len(ends) > 2:
                pace = median(np.diff(ends))
                trainer.steps = trainer.step + max(1, round((seconds - ends[-1]) / pace))
            loss = trainer.advance()
            ends.append(round(time.perf_counter() - start, 3))
            log.append({"step": trainer.step, "loss": loss, "seconds": ends[-1]})
            on_step(f"training, {name}", *((int(ends[-1]), int(seconds)) if timed else (trainer.step, steps)))
            if time.perf_counter() - saved > _CHECKPOINT_SECONDS:
                save_checkpoint(trainer, self.accelerator, folder)
                saved = time.perf_counter()
        save_checkpoint(trainer, self.accelerator, folder)
        trainer.keep_averages()
        return log.read()
