"""The two objectives: the full-precision model's own velocities, and flow matching on the user's data."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from dma_diffusers.pipelines.finetuning.calls import LATENTS, NOISE, Call, joined
from dma_diffusers.pipelines.finetuning.store import CallStore, HeldCalls


def velocity_loss(model: torch.nn.Module, call: Call) -> Tensor:
    """Return the mean squared error of the model's velocity, a float32 scalar; the call has what it is to be."""
    assert call.output is not None
    error = (model(**call.inputs)[0].float() - call.output.float()).flatten(1)
    return (error if call.sums is None else call.sums @ error).square().mean()


class Objective(Protocol):
    """Examples to learn from."""

    @property
    def levels(self) -> Sequence[float]:
        """The noise level of each example; all are equal where it is drawn for each batch."""
        ...

    def batch(self, examples: Sequence[int], device: torch.device, generator: torch.Generator) -> Call:
        """Return these examples as one call of the transformer, whose output is the velocity to learn."""
        ...


class Distillation:
    """The student's velocity is to be the full-precision model's, at the very states through which that one draws.

    These are the states of inference. Where guidance adds up the velocities with and without the prompt, their sum is
    what is compared: guidance by 3 has nine and four times the squared error of either, unless both err alike.

    No data is needed, as in quantisation-aware distillation (QAD, arXiv 2601.20088).
    """

    def __init__(self, store: CallStore | HeldCalls, samples: int):
        self.store = store
        self.steps = store.steps(samples)
        self.levels = [step.level for step in self.steps]

    def batch(self, examples: Sequence[int], device: torch.device, generator: torch.Generator) -> Call:
        steps = [self.steps[example] for example in examples]
        call = self.store.batch([(step.sample, number) for step in steps for number in step.calls], device)
        sums = torch.block_diag(*(torch.tensor([step.weights]) for step in steps))
        return replace(call, sums=sums.to(device))


class FlowMatching:
    """Latents of the user's pictures or clips x meet noise n: the velocity at (1 − σ)·x + σ·n is n − x.

    σ is as dense as the noise levels of the pipeline's own schedule, so that its shift holds here as well.

    store: a call for each example, with clean latents, and in the noise level's place the number that stands for σ = 1.
    sigmas: the schedule, falling. by_level: whether a batch has one noise level.
    """

    def __init__(self, store: CallStore, samples: int, sigmas: Sequence[float], by_level: bool = False):
        self.store, self.sigmas, self.by_level = store, torch.tensor(sigmas), by_level
        self.levels = [1.0] * samples

    def batch(self, examples: Sequence[int], device: torch.device, generator: torch.Generator) -> Call:
        call = self.store.batch([(example, 0) for example in examples], torch.device("cpu"))
        clean = call.inputs[LATENTS].float()
        sigma = self._sigmas(1 if self.by_level else len(examples), generator).expand(len(examples))
        noise = torch.randn(clean.shape, generator=generator)
        mix = sigma.view(-1, *[1] * (clean.ndim - 1))
        level = call.inputs[NOISE]
        changed = {
            LATENTS: ((1 - mix) * clean + mix * noise).to(call.inputs[LATENTS].dtype),
            # Some schedulers count in whole timesteps, between which there are levels too.
            NOISE: (level * sigma).to(level.dtype if level.is_floating_point() else torch.float32),
        }
        return joined([replace(call, inputs={**call.inputs, **changed}, output=noise - clean)], device)

    def _sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw noise levels `[count]`, uniform over the schedule's steps and linear between two of them."""
        place = torch.rand(count, generator=generator) * (len(self.sigmas) - 1)
        before = place.long()
        return torch.lerp(self.sigmas[before], self.sigmas[before + 1], place - before)
