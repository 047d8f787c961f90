"""Each denoising step's error is measured on full precision's own trajectory, where errors don't compound."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline

from dma_diffusers.eval.metrics.paired import relative_l2
from dma_diffusers.eval.quality.configurations import Row
from dma_diffusers.eval.quality.drawing import OnStep, attached
from dma_diffusers.eval.quality.pictures import Sample
from dma_diffusers.pipelines.generate import draw


class Trajectory:
    """A trajectory holds the latents that full precision's steps leave, for a few samples in their batches."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        baseline: Row,
        batches: Sequence[Sequence[Sample]],
        call: dict[str, Any],
        on_step: OnStep,
    ):
        self.pipe, self.batches, self.call, self.on_step = pipe, batches, call, on_step
        self.latents: dict[tuple[int, int], torch.Tensor] = {}  # its keys are batch and step

        def keep(batch: int, step: int, latents: torch.Tensor) -> torch.Tensor:
            self.latents[batch, step] = latents.cpu()
            return latents

        self._draw(baseline, keep)

    def step_errors(self, row: Row) -> list[float]:
        """Measure the relative L2 of the latents after each step, which starts where full precision was.

        It is a mean over samples. A scheduler that looks back at earlier steps' outputs sees the row's own.
        """
        errors: dict[int, list[torch.Tensor]] = defaultdict(list)

        def restart(batch: int, step: int, latents: torch.Tensor) -> torch.Tensor:
            exact = self.latents[batch, step].to(latents)
            errors[step].append(relative_l2(latents.float(), exact.float()))
            return exact

        self._draw(row, restart)
        return [torch.cat(of_step).mean().item() for _, of_step in sorted(errors.items())]

    def _draw(self, row: Row, through: Callable[[int, int, torch.Tensor], torch.Tensor]) -> None:
        with attached(self.pipe, row):
            for i, batch in enumerate(self.batches):
                draw(
                    self.pipe,
                    [sample.prompt.text for sample in batch],
                    [sample.seed for sample in batch],
                    self.call,
                    lambda done, total, i=i: self.on_step(
                        f"steps of {row.name}", i * total + done, len(self.batches) * total
                    ),
                    partial(through, i),
                )
