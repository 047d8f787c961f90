"""The error of each denoising step on full precision's own trajectory, where errors don't compound."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dma_diffusers.eval.metrics.paired import relative_l2
from dma_diffusers.eval.quality.configurations import Row
from dma_diffusers.eval.quality.drawing import OnStep, attached
from dma_diffusers.eval.quality.pictures import Sample
from dma_diffusers.pipelines.generate import draw


class Trajectory:
    """The latents that full precision's steps leave, for a few samples drawn as one batch."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        baseline: Row,
        samples: Sequence[Sample],
        call: dict[str, Any],
        on_step: OnStep,
    ):
        self.pipe, self.samples, self.call, self.on_step = pipe, samples, call, on_step
        self.latents: list[torch.Tensor] = []

        def keep(step: int, latents: torch.Tensor) -> torch.Tensor:
            self.latents.append(latents.cpu())
            return latents

        self._draw(baseline, keep)

    def step_errors(self, row: Row) -> list[float]:
        """Relative L2 of the latents after each step, which starts where full precision was; mean over samples.

        A scheduler that looks back at earlier steps' outputs sees the row's own.
        """
        errors: list[float] = []

        def restart(step: int, latents: torch.Tensor) -> torch.Tensor:
            exact = self.latents[step].to(latents)
            errors.append(relative_l2(latents.float(), exact.float()).mean().item())
            return exact

        self._draw(row, restart)
        return errors

    def _draw(self, row: Row, through) -> None:
        texts, seeds = [s.prompt.text for s in self.samples], [s.seed for s in self.samples]
        with attached(self.pipe, row):
            draw(
                self.pipe,
                texts,
                seeds,
                self.call,
                lambda done, total: self.on_step(f"steps of {row.name}", done, total),
                through,
            )
