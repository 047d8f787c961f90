"""The figures of two drawings."""

import numpy as np
import pytest
import torch

from dma_diffusers.eval.compare import compare_clips, in_words, paired_metrics
from dma_diffusers.eval.metrics.paired import ssim
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


@pytest.fixture
def clips():
    """Two prompts × five frames: full precision; and a drawing that is identical in the first prompt's first frame,
    worst in its fourth."""
    frames = np.random.default_rng(1).integers(0, 200, (2, 5, 32, 48, 3)).astype(np.uint8)
    other = frames + np.uint8([0, 2, 4, 16, 8])[None, :, None, None, None]
    other[1] += 3
    latents = torch.ones(2, 4)
    return Drawing(frames, latents, 1.0), Drawing(other, latents, 1.0)


def test_paired_metrics_of_clips_are_of_all_their_frames(clips):
    exact, drawing = clips
    found = paired_metrics(drawing, exact)
    squares = [np.mean([(change + more) ** 2 for change in (0, 2, 4, 16, 8)]) for more in (0, 3)]
    assert found["psnr_db"] == [pytest.approx(10 * np.log10(255**2 / square), rel=1e-5) for square in squares]
    one, other = (torch.from_numpy(each.frames[1]).permute(0, 3, 1, 2) for each in (drawing, exact))
    assert found["ssim"][1] == pytest.approx(ssim(one, other).mean().item(), rel=1e-5)
    assert found["ssim"][1] < found["ssim"][0] < 1


def test_figures_of_a_clip(clips):
    _, metrics = compare_clips(*clips, "a cat", "DMA")
    decibels = [20 * np.log10(255 / change) for change in (2, 4, 16, 8)]
    assert metrics["frames_psnr_db"] == [None, *(pytest.approx(value, rel=1e-5) for value in decibels)]
    assert metrics["worst_frame"] == 4
    assert metrics["flicker"] == pytest.approx(np.mean([2, 2, 12, 8]))
    words = in_words(metrics)
    assert words.startswith(f"PSNR {10 * np.log10(255**2 / 68):.2f} dB, SSIM 0.")  # 68: the mean square
    assert words.endswith(f"flicker 6.00 of 255; worst is frame 4 of 5, {decibels[2]:.2f} dB")


def test_one_clip_with_itself(clips):
    shown, metrics = compare_clips(clips[0], clips[0], "a cat", "DMA")
    assert not shown[:, :32, -48:].any()
    assert (metrics["psnr_db"], metrics["worst_frame"], metrics["flicker"]) == (None, None, 0.0)
    assert in_words(metrics).startswith("identical pictures, SSIM 1.0000")


def test_a_clip_of_one_frame(clips):
    first = [Drawing(each.frames[:, 3:4], each.latents, each.seconds) for each in clips]
    shown, metrics = compare_clips(*first, "a cat", "DMA")
    assert shown.shape[0] == 1
    assert (metrics["worst_frame"], metrics["flicker"]) == (1, None)


def test_the_clip_that_compares(clips):
    """Panels are untouched, the difference has one factor for all frames, and a marker moves over the curve."""
    exact, drawing = clips
    shown, _ = compare_clips(*clips, "a cat", "DMA")
    assert shown.dtype == np.uint8
    assert shown.shape[0] == 5
    assert not any(side % 2 for side in shown.shape[1:3])
    difference = (drawing.frames[0].astype(int) - exact.frames[0]) * 8  # 16 × 8 = 128 stays below white
    for i, panel in enumerate((exact.frames[0], drawing.frames[0], difference)):
        assert np.array_equal(shown[:, :32, i * (48 + 8) :][:, :, :48], panel)
    red = (shown == (200, 40, 40)).all(-1)
    marker = red.sum(1).argmax(1)  # its column, where a line is
    assert (np.diff(marker) > 0).all()
    assert np.ptp(np.diff(marker)) <= 1
    dots = [np.flatnonzero(red[i, :, marker[i] + 2]) for i in range(5)]  # where it is wider than the line
    heights = [rows.mean() for rows in dots]
    assert heights[3] == max(heights)  # the worst frame is the lowest
    assert heights[0] <= min(heights)  # an identical one is at the top
