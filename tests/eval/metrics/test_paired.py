"""Paired metrics against scikit-image and their definitions."""

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim


def skimage_psnr_db(picture, reference):
    return peak_signal_noise_ratio(reference, picture, data_range=255)


def skimage_ssim(picture, reference):
    return structural_similarity(
        reference,
        picture,
        data_range=255,
        channel_axis=0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


@pytest.mark.parametrize("size", [(11, 11), (64, 90)], ids=str)
@pytest.mark.parametrize("strength", [1, 10, 80])
@pytest.mark.parametrize(("metric", "oracle"), [(psnr_db, skimage_psnr_db), (ssim, skimage_ssim)])
def test_pictures_against_scikit_image(demo_pictures, noisy, metric, oracle, size, strength):
    pictures, references = (each[:3, :, : size[0], : size[1]] for each in (noisy(strength), demo_pictures))
    measured = metric(pictures, references)
    expected = [oracle(*pair) for pair in zip(pictures.numpy(), references.numpy(), strict=True)]
    assert measured.shape == (3,)
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-6)


def test_ssim_refuses_pictures_smaller_than_its_window():
    small = torch.zeros(1, 3, 64, 10, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"at least 11 × 11 pixels: given are \[1, 3, 64, 10\]"):
        ssim(small, small)


def test_relative_l2_is_per_prompt():
    references = torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    latents = references + torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]])
    torch.testing.assert_close(relative_l2(latents, references), torch.tensor([0.2, 1.0]))


def test_one_identical_picture_among_others(demo_pictures, noisy):
    pictures = noisy(10)[:3].clone()
    pictures[1] = demo_pictures[1]
    assert torch.isinf(psnr_db(pictures, demo_pictures[:3])).tolist() == [False, True, False]


def test_identical_flat_pictures_are_exactly_alike():
    pictures = torch.full((1, 3, 64, 64), 249, dtype=torch.uint8)
    pictures[..., 20:40, 20:40] = 31
    assert ssim(pictures, pictures.clone()).item() == pytest.approx(1.0, abs=1e-9)
