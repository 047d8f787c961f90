"""Video metrics of moving squares against loops over frames and pixels."""

import math

import numpy as np
import pytest
import torch

from dma_diffusers.eval.metrics import video
from dma_diffusers.eval.metrics.paired import psnr_db, ssim
from dma_diffusers.eval.metrics.video import each_frame, flicker, flicker_of_frames, pooled_psnr_db

FRAMES = 5


@pytest.fixture
def references():
    """Two videos of a square that moves over a gradient, uint8 [2, FRAMES, 3, 24, 32]."""
    videos = np.arange(32, dtype=np.uint8) * 5 + np.zeros((2, FRAMES, 3, 24, 1), dtype=np.uint8)
    for t in range(FRAMES):
        videos[0, t, :, 4:12, 3 * t : 3 * t + 8] = np.array([250, 30, 90])[:, None, None]
        videos[1, t, :, 2 * t : 2 * t + 6, 20:26] = 255
    return torch.from_numpy(videos)


@pytest.fixture
def noisy(references):
    noise = torch.randint(-40, 41, references.shape, generator=torch.Generator().manual_seed(0))
    return (references.int() + noise).clamp(0, 255).to(torch.uint8)


def slow_flicker(video, reference):
    x, y = video.numpy().astype(int), reference.numpy().astype(int)
    errors = [
        abs(int(x[t + 1][pixel]) - int(x[t][pixel]) - int(y[t + 1][pixel]) + int(y[t][pixel]))
        for t in range(len(x) - 1)
        for pixel in np.ndindex(x.shape[1:])
    ]
    return sum(errors) / len(errors)


def test_flicker_is_its_definition(noisy, references):
    expected = [slow_flicker(*pair) for pair in zip(noisy, references, strict=True)]
    measured = flicker(noisy, references)
    each = [slow_flicker(noisy[0, t : t + 2], references[0, t : t + 2]) for t in range(noisy.shape[1] - 1)]
    np.testing.assert_allclose(flicker_of_frames(noisy, references)[0].numpy(), each, rtol=1e-5)
    assert measured.shape == (2,) and measured.dtype == torch.float32
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-5)


def test_what_changes_as_its_reference_does_not_flicker(references):
    assert flicker(references, references).tolist() == [0, 0]
    brighter = references.clamp(max=200) + 55
    assert flicker(brighter, references.clamp(max=200)).tolist() == [0, 0]


def test_a_still_picture_of_a_moving_scene_counts_as_much_as_the_motion_it_lacks(references):
    still = references[:, :1].expand_as(references)
    motion = references.float().diff(dim=1).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(flicker(still, references), motion)


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("metric", [psnr_db, ssim])
def test_a_metric_of_each_frame(noisy, references, metric, at_once, monkeypatch):
    monkeypatch.setattr(video, "_PIXELS", at_once * 24 * 32)
    seen = []

    def watched(pictures, others):
        seen.append(len(pictures))
        return metric(pictures, others)

    expected = [
        [metric(frame[None], other[None]).item() for frame, other in zip(*pair, strict=True)]
        for pair in zip(noisy, references, strict=True)
    ]
    measured = each_frame(watched, noisy, references)
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-5)
    assert max(seen) == min(at_once, 2 * FRAMES) and sum(seen) == 2 * FRAMES


def test_pooled_psnr_is_that_of_all_pixels(noisy, references):
    noisy[0, 1] = references[0, 1]
    of_frames = each_frame(psnr_db, noisy, references)
    assert of_frames[0, 1] == math.inf
    squares = (noisy.double() - references.double()).square()
    for dim, kept in ((1, (1, 2, 3, 4)), (0, (0, 2, 3, 4))):
        expected = 10 * torch.log10(255**2 / squares.mean(kept))
        torch.testing.assert_close(pooled_psnr_db(of_frames, dim), expected, rtol=1e-6, atol=0)
    same = each_frame(psnr_db, references, references)
    assert pooled_psnr_db(same, 1).tolist() == [math.inf] * 2


def test_the_pooled_psnr_of_one_picture_is_its_own():
    psnr = torch.rand(50, 1) * 60
    torch.testing.assert_close(pooled_psnr_db(psnr, 1), psnr[:, 0].double(), rtol=1e-12, atol=0)


def test_what_cannot_be_measured(references):
    with pytest.raises(ValueError, match=r"videos are \[2, 4, 3, 24, 32\], their references \[2, 5,"):
        flicker(references[:, 1:], references)
    with pytest.raises(ValueError, match="two or more are needed"):
        flicker(references[:, :1], references[:, :1])
