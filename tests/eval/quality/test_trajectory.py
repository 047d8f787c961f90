"""Errors of single steps."""

import pytest
import torch

from dma_diffusers.attach import apply, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.metrics.paired import relative_l2
from dma_diffusers.eval.quality.configurations import FULL_PRECISION, Row
from dma_diffusers.eval.quality.pictures import batches
from dma_diffusers.eval.quality.prompts import Prompt
from dma_diffusers.eval.quality.trajectory import Trajectory
from dma_diffusers.pipelines.generate import draw
from tests.pipelines.saved_flux import CALL
from tests.tiny_pipelines import flux

PROMPTS = [Prompt(text) for text in ("a red apple", "two cats", "a dog")]
LOW = Row("low", config=DMAConfig(low="mxfp4", window=0, sink=0, protect_text=False))


@pytest.mark.parametrize("size", [1, 2])
def test_a_step_starts_where_full_precision_was(size):
    pipe = flux()
    chunks = batches(PROMPTS, [0], size)
    first, second = Trajectory(pipe, FULL_PRECISION, chunks, CALL, lambda *_: None).step_errors(LOW)

    def drawn(low_before_step):
        def switch(step, latents):
            if step + 1 == low_before_step:
                apply(pipe, LOW.config)
            return latents

        latents = []
        for chunk in chunks:
            switch(-1, None)
            texts, seeds = [sample.prompt.text for sample in chunk], [sample.seed for sample in chunk]
            latents.append(draw(pipe, texts, seeds, CALL, replace_latents=switch).latents)
            restore(pipe)
        return torch.cat(latents)

    exact = drawn(None)
    assert second == pytest.approx(relative_l2(drawn(1), exact).mean().item(), rel=1e-3)
    from_the_start = relative_l2(drawn(0), exact).mean().item()
    assert first > 0 and second != pytest.approx(from_the_start, rel=1e-2)
