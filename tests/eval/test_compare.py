"""The figures of two drawings."""

import numpy as np
import pytest
import torch

from dma_diffusers.eval.compare import paired_metrics
from dma_diffusers.pipelines.generate import Drawing


def test_paired_metrics_have_a_value_for_each_prompt():
    frames = np.random.default_rng(0).integers(0, 256, (2, 1, 16, 24, 3)).astype(np.uint8)
    other = frames.copy()
    other[1] ^= 8
    latents = torch.ones(2, 4)
    found = paired_metrics(
        Drawing(other, latents * torch.tensor([[1.0], [1.5]]), 1.0), Drawing(frames, latents, 1.0)
    )
    assert found["psnr_db"] == [None, pytest.approx(10 * np.log10(255**2 / 8**2), rel=1e-5)]
    assert found["ssim"] == [pytest.approx(1.0, abs=1e-9), pytest.approx(0.99, abs=0.02)]
    assert found["latents_relative_l2"] == [0.0, 0.5]
