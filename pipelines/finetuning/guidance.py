"""The part of each call in a drawing: guidance adds the velocities of several calls up to that of a sampler's step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dma_diffusers.pipelines.finetuning.calls import Call, Part

_NUMBERS = 2**16  # of a batch's velocity, from end to end: they are enough to find a few weights
# This share of a velocity's norm is more than bfloat16 rounds off, and less than guidance that is no sum would leave.
_UNEXPLAINED = 0.01


@contextmanager
def parts_of(pipe: DiffusionPipeline, calls: Sequence[Call]) -> Iterator[list[Part]]:
    """Yield a list to which the part of every call is added, as `calls` grows and the scheduler makes its steps.

    The weights are those with which the calls' velocities add up to what the scheduler gets: guidance by 3 has 3 and
    −2. Where no one sum is that for all samples, as where guidance rescales each of them, every call is a step of its
    own; so is a call after which the scheduler makes no step.
    """
    parts: list[Part] = []

    def leave_alone() -> None:
        parts.extend(Part(number) for number in range(len(parts), len(calls)))

    def step(scheduler: Any, velocity: Tensor, *given, **named):
        if scheduler is pipe.scheduler:
            first = len(parts)
            own = [call.output for call in calls[first:] if call.output is not None]
            parts.extend(Part(first, weight) for weight in _weights(own, velocity))
            leave_alone()
        return type(scheduler).step(scheduler, velocity, *given, **named)

    # A copy of the scheduler, such as a pipeline makes for sound, then has this method of its own.
    pipe.scheduler.step = MethodType(step, pipe.scheduler)
    try:
        yield parts
        leave_alone()
    finally:
        del pipe.scheduler.step


def _weights(outputs: Sequence[Tensor], velocity: Tensor) -> list[float]:
    """Return the weights of the outputs whose sum is closest to the velocity, none where that is not close."""
    if not outputs or any(output.shape != velocity.shape for output in outputs):
        return []
    every = -(-velocity.numel() // _NUMBERS)
    wanted = velocity.detach().flatten()[::every].cpu().double()
    given = torch.stack([output.flatten()[::every].double() for output in outputs], 1)
    products = given.T @ given
    weights = torch.linalg.lstsq(products, given.T @ wanted, driver="gelsd").solution
    left = (given @ weights - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return weights.tolist() if left < _UNEXPLAINED else []
