"""The part of each call in a drawing: guidance adds the velocities of several calls up to that of a sampler's step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dma_diffusers.pipelines.finetuning.calls import Call, Part

_NUMBERS = 2**16  # of a batch's velocity, which are enough to find a few weights
# This share of a velocity's norm is more than bfloat16 rounds off, and less than guidance that is no sum would leave.
_UNEXPLAINED = 0.01


@contextmanager
def parts_of(pipe: DiffusionPipeline, calls: Sequence[Call]) -> Iterator[list[Part]]:
    """Yield a list to which the part of every call is added, as `calls` grows and the scheduler makes its steps.

    The weights are those with which the calls' velocities add up to what the scheduler gets: guidance by 3 has 3 and
    −2. Where no sum of them is that, as where guidance rescales, every call is a step of its own.
    """
    parts: list[Part] = []
    stock = pipe.scheduler.step

    def step(velocity: Tensor, *given, **named):
        first = len(parts)
        own = [call.output for call in calls[first:] if call.output is not None]
        if weights := _weights(own, velocity):
            parts.extend(Part(first, weight) for weight in weights)
        else:
            parts.extend(Part(first + i) for i in range(len(own)))
        return stock(velocity, *given, **named)

    pipe.scheduler.step = step
    try:
        yield parts
    finally:
        del pipe.scheduler.step


def _weights(outputs: Sequence[Tensor], velocity: Tensor) -> list[float]:
    """Return the weights of the outputs whose sum is closest to the velocity, none where that is not close."""
    if not outputs or any(output.shape != velocity.shape for output in outputs):
        return []
    wanted = velocity.detach().flatten()[:_NUMBERS].cpu().double()
    given = torch.stack([output.flatten()[:_NUMBERS].double() for output in outputs], 1)
    products = given.T @ given
    weights = torch.linalg.lstsq(products, given.T @ wanted, driver="gelsd").solution
    left = (given @ weights - wanted).norm() / wanted.norm().clamp_min(1e-30)
    return weights.tolist() if left < _UNEXPLAINED else []
