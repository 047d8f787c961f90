"""The plan of an evaluation says what it draws, what is there already, and about how long it takes."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline

from dma_diffusers.eval.quality.configurations import FULL_PRECISION, Row
from dma_diffusers.eval.quality.drawing import attached
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.progress import in_words


@dataclass(frozen=True)
class Plan:
    """A plan counts samples of one kind, "pictures" or "clips".

    rows: what each row has to draw, by name. stepped: batches whose steps are measured. recorded: prompts whose
    attention calls are. metrics: what everything is compared by.
    """

    noun: str
    prompts: int
    seeds: int
    rows: Mapping[str, "Share"]
    stepped: int
    recorded: int
    metrics: Sequence[str]

    def __str__(self) -> str:
        there = sum(share.there for share in self.rows.values())
        samples = self.prompts * self.seeds
        seeds = f"{self.seeds} seed{'s' * (self.seeds != 1)}"
        return "\n".join(
            [
                f"{len(self.rows)} rows × {self.prompts} prompts × {seeds} = {len(self.rows) * samples} {self.noun}, "
                f"{there} of them there already",
                *(f"  {name}: {samples - share.there} to draw" for name, share in self.rows.items()),
                f"compared by {', '.join(self.metrics)}",
            ]
        )


class Share(NamedTuple):
    """A row's share of the work is samples that are there, and batches of which something is missing."""

    there: int
    batches: int


class Step(NamedTuple):
    """A step of a batch takes so many seconds; a drawing has so many steps."""

    seconds: float
    steps: int

    @property
    def drawing(self) -> float:
        """Return the seconds of all steps of a batch."""
        return self.seconds * self.steps


def share(pictures: Pictures, batches: Sequence[Sequence[Sample]]) -> Share:
    """Count what a row has, and the batches that it has to draw."""
    missing = [[sample not in pictures for sample in batch] for batch in batches]
    return Share(sum(not gone for batch in missing for gone in batch), sum(map(any, missing)))


def estimate(plan: Plan, steps: Mapping[str, Step], batch: int, processes: int) -> str:
    """Say in one line about how long a plan takes: what is drawn, not how it is decoded and scored.

    Drawing is split over processes. The steps of a few batches are measured one by one in every row, and prompts whose
    calls are recorded are drawn once more in full precision.
    """
    drawing = sum(share.batches * steps[name].drawing for name, share in plan.rows.items()) / processes
    trajectory = plan.stepped * sum(step.drawing for step in steps.values())
    recording = plan.recorded * steps[FULL_PRECISION.name].drawing / batch
    parts = {plan.noun: drawing, "errors of steps": trajectory, "errors of layers": recording}
    words = ", ".join(f"{part} {in_words(seconds)}" for part, seconds in parts.items())
    return f"about {in_words(sum(parts.values()))}: {words}"


class _Enough(Exception):
    """It ends a drawing after the step that is timed."""


def time_step(pipe: DiffusionPipeline, row: Row, batch: Sequence[Sample], call: dict[str, Any]) -> Step:
    """Time a step of a row: the second of a drawing that ends there, because the first may compile."""
    times, total = [time.perf_counter()], 0

    def ended(done: int, of: int) -> None:
        nonlocal total
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        total = of
        if done == min(2, of):
            raise _Enough

    with attached(pipe, row), suppress(_Enough):
        draw(pipe, [each.prompt.text for each in batch], [each.seed for each in batch], call, ended)
    return Step(times[-1] - times[-2], total)
