"""One model's training: optimiser steps, averaged weights, and a state from which it goes on exactly."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch.nn import Parameter

from dma_diffusers.pipelines.finetuning.calls import Call
from dma_diffusers.pipelines.finetuning.objectives import Objective, velocity_loss
from dma_diffusers.pipelines.finetuning.order import Order


@dataclass(frozen=True)
class Settings:
    """How weights are trained.

    batch: examples of one process at a time; `accumulate` of these make a step. learning_rate: of AdamW, after
    `warmup` steps in which it rises from 0, and before it falls to 0 in the last steps, whose share is `decay`. clip:
    the largest norm of all gradients together; 0 for any. ema: the decay of the averaged weights, which are what is
    saved; 0 averages none.
    """

    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-5
    warmup: int = 50
    decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.99
    seed: int = 0

    def rate(self, step: int, steps: int) -> float:
        """Return the learning rate of a step, from 0, of a training of so many steps."""
        falling = (steps - step) / (self.decay * steps) if self.decay else 1.0
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup, 1), falling)


class Diverged(ValueError):
    """A loss or a gradient is NaN or infinite."""


class Trainer:
    """Trains the parameters of `model` that want a gradient.

    The model computes in the dtype that it has, as it will when it draws. Optimiser and averages have float32 copies of
    parameters that are shorter, because a small step would be lost in 8 bits of mantissa.

    steps: in all. by_level: whether a batch has one noise level alone.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: Objective,
        settings: Settings,
        accelerator: Accelerator,
        steps: int,
        by_level: bool = False,
    ):
        self.objective, self.settings, self.accelerator = objective, settings, accelerator
        self.step, self.steps = 0, steps
        self.order = Order(objective.levels, settings.batch, settings.seed, by_level)
        # Every process starts from the first one's weights, also those that are copied below.
        self.model = accelerator.prepare_model(model)
        self.names, self.parameters = zip(
            *((name, value) for name, value in model.named_parameters() if value.requires_grad), strict=True
        )
        self.masters = [
            value if value.dtype == torch.float32 else _master(value) for value in self.parameters
        ]
        self.optimizer = torch.optim.AdamW(self.masters, settings.learning_rate, weight_decay=0.0)
        self.average = EMAModel(self.masters, decay=settings.ema, foreach=True) if settings.ema else None
        # Processes draw different numbers in a forward call, such as those of dropout.
        torch.manual_seed(settings.seed + accelerator.process_index)

    def advance(self) -> float:
        """Make one step, and return its loss, the mean over all processes.

        Raises `Diverged` before any weight changes.
        """
        settings = self.settings
        total = torch.zeros((), device=self.accelerator.device)
        self.model.train()
        for part in range(settings.accumulate):
            last = part == settings.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss = velocity_loss(self.model, self.batch(self.step * settings.accumulate + part))
                self.accelerator.backward(loss / settings.accumulate)
            total += loss.detach() / settings.accumulate
        total = self.accelerator.reduce(total, "mean")
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, settings.clip or math.inf)
        mean, norm = torch.stack([total, norm]).tolist()  # the only wait for the device in a step
        if not math.isfinite(mean) or not math.isfinite(norm):
            raise Diverged(f"the loss is {mean} and the gradients' norm {norm} in step {self.step + 1}")
        self.optimizer.param_groups[0]["lr"] = settings.rate(self.step, self.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._write(self.masters)
        if self.average:
            self.average.step(self.masters)
        self.step += 1
        return mean

    def batch(self, number: int) -> Call:
        """Return this process's part of the batch of this number, from 0."""
        number = number * self.accelerator.num_processes + self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.settings.seed + number)
        return self.objective.batch(self.order[number], self.accelerator.device, generator)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the model its averaged weights, in the mode in which it draws."""
        trained = [parameter.detach().clone() for parameter in self.parameters]
        if self.average:
            self._write(self.average.shadow_params)
        self.model.eval()
        try:
            yield
        finally:
            self._write(trained)

    def keep_averages(self) -> None:
        """Leave the averaged weights in the model, in the mode in which it draws; training is over."""
        if self.average:
            self._write(self.average.shadow_params)
        self.model.eval()

    def state(self) -> dict[str, Any]:
        """Return all from which training goes on, but the state of this process's random numbers."""
        return {
            "step": self.step,
            "weights": dict(zip(self.names, self.masters, strict=True)),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average and self.average.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.step = state["step"]
        with torch.no_grad():
            for name, master in zip(self.names, self.masters, strict=True):
                master.copy_(state["weights"][name])
        self._write(self.masters)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
            self.average.to(self.accelerator.device)

    @torch.no_grad()
    def _write(self, weights: Sequence[torch.Tensor]) -> None:
        torch._foreach_copy_(list(self.parameters), list(weights))


def _master(parameter: Parameter) -> Parameter:
    return Parameter(parameter.detach().float())
