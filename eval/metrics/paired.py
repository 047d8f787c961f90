"""Paired metrics tell what low precision changed in a picture or its latents, by one number each."""

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

_WINDOW_EDGE = 5  # a window has so many pixels on each side of the middle


def psnr_db(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio in dB of [B, 3, H, W] uint8 pictures, [B] float32; inf where identical."""
    return peak_signal_noise_ratio(
        pictures.float(), references.float(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )


def ssim(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the structural similarity of [B, 3, H, W] uint8 pictures, [B] float64, at most 1.

    It is that of Wang et al., 2004: Gaussian windows of 11 × 11 pixels and σ 1.5, over the places where a window fits.
    Raises ValueError for pictures smaller than a window.
    """
    if min(pictures.shape[2:]) <= 2 * _WINDOW_EDGE:
        raise ValueError(f"SSIM needs pictures of at least 11 × 11 pixels: given are {list(pictures.shape)}")
    # In float32 the variance of a flat background is rounding noise, which takes 2e-4 off identical pictures.
    _, everywhere = structural_similarity_index_measure(
        pictures.double(), references.double(), data_range=255.0, reduction="none", return_full_image=True
    )
    inside = slice(_WINDOW_EDGE, -_WINDOW_EDGE)  # torchmetrics would go on over mirrored borders
    return everywhere[..., inside, inside].mean((1, 2, 3))


def relative_l2(latents: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return ‖latents − references‖ / ‖references‖ of each entry of [B, ...] tensors, [B] float32."""
    return (latents - references).flatten(1).norm(dim=1) / references.flatten(1).norm(dim=1)
