"""Paired metrics against NumPy, written from their definitions."""

import numpy as np
import pytest
import torch

from dma_diffusers.eval.metrics.paired import paired_metrics, psnr_db, relative_l2, ssim
from dma_diffusers.pipelines.generate import Drawing


def numpy_psnr_db(picture, reference):
    return 10 * np.log10(255**2 / np.mean((picture.astype(float) - reference) ** 2))


def numpy_ssim(picture, reference):
    """Structural similarity of [3, H, W] in float64: 11×11 Gaussian windows of σ 1.5, borders mirrored."""
    profile = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(profile, profile) / profile.sum() ** 2

    def mean(values):
        mirrored = np.pad(values, ((0, 0), (5, 5), (5, 5)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(mirrored, (11, 11), axis=(1, 2))
        return (windows * weights).sum((-1, -2))

    x, y = picture.astype(float), reference.astype(float)
    variance_x, variance_y = mean(x * x) - mean(x) ** 2, mean(y * y) - mean(y) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean(x) * mean(y) + c1) / (mean(x) ** 2 + mean(y) ** 2 + c1)
    return np.mean(luminance * (2 * covariance + c2) / (variance_x + variance_y + c2))


@pytest.fixture
def pairs():
    noise = np.random.default_rng(0)
    references = noise.integers(0, 256, (3, 3, 24, 40))
    spread = np.array([2, 10, 60]).reshape(3, 1, 1, 1)
    pictures = np.clip(references + noise.integers(-60, 61, references.shape) * spread // 60, 0, 255)
    return pictures.astype(np.uint8), references.astype(np.uint8)


@pytest.mark.parametrize(("metric", "oracle"), [(psnr_db, numpy_psnr_db), (ssim, numpy_ssim)])
def test_pictures_against_numpy(pairs, metric, oracle):
    measured = metric(*map(torch.from_numpy, pairs))
    expected = [oracle(*pair) for pair in zip(*pairs, strict=True)]
    assert measured.shape == (3,)
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-4)


def test_relative_l2_is_per_prompt():
    references = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    latents = references + torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
    torch.testing.assert_close(relative_l2(latents, references), torch.tensor([0.2, 1.0]))


def test_identical_pictures():
    frames = np.random.default_rng(0).integers(0, 256, (1, 1, 32, 32, 3)).astype(np.uint8)
    drawing = Drawing(frames, torch.ones(1, 4), 1.0)
    assert paired_metrics(drawing, drawing) == {
        "psnr_db": [None],
        "ssim": [1.0],
        "latents_relative_l2": [0.0],
    }


def test_one_identical_picture_among_others(pairs):
    pictures, references = pairs
    pictures[1] = references[1]
    assert torch.isinf(psnr_db(*map(torch.from_numpy, pairs))).tolist() == [False, True, False]


def test_identical_flat_pictures_are_exactly_alike():
    pictures = torch.full((1, 3, 64, 64), 249, dtype=torch.uint8)
    pictures[..., 20:40, 20:40] = 31
    assert ssim(pictures, pictures.clone()).item() == pytest.approx(1.0, abs=1e-9)
