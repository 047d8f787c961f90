"""Define the demo video model's autoencoder, and do its arithmetic on whole clips at once for training."""

from types import MethodType

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanResample,
    WanResidualBlock,
    patchify,
    unpatchify,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format, convert_conv3d_weight_memory_format

_PATCH, _CHANNELS = 2, 16


def build_vae() -> AutoencoderKLWan:
    """Build an autoencoder of 1.5 million parameters.

    It has 16 latent channels at an eighth of a clip's side and a quarter of its frames. At first only the shortcuts
    carry a signal, and the latents have little noise: without that, it learns nothing in the first hundred steps.
    """
    vae = AutoencoderKLWan(
        base_dim=24,
        z_dim=_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * _CHANNELS,
        latents_std=[1.0] * _CHANNELS,
        is_residual=True,
        in_channels=3 * _PATCH**2,
        out_channels=3 * _PATCH**2,
        patch_size=_PATCH,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
        if isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
    nn.init.constant_(vae.quant_conv.bias[_CHANNELS:], -4.0)  # log variances
    return vae


def whole_clips(vae: AutoencoderKLWan) -> AutoencoderKLWan:
    """Prepare ``vae`` in place for :func:`encode` and :func:`decode`; its own chunked methods no longer work then.

    The stock class goes through a clip four frames at a time and keeps the past that its causal convolutions need.
    Processing all frames at once gives the same numbers with a tenth of the kernel launches.
    """
    for module in vae.modules():
        if isinstance(module, WanResample):
            module.forward = MethodType(_resample, module)
    # Clips have their channels last, because the GPU's convolutions are fast with that layout.
    convert_conv2d_weight_memory_format(vae, torch.channels_last)
    return convert_conv3d_weight_memory_format(vae, torch.channels_last_3d)


def encode(vae: AutoencoderKLWan, clips: torch.Tensor) -> DiagonalGaussianDistribution:
    """Encode clips ``[B, 3, 4 n + 1, H, W]`` in [-1, 1] as the posterior of latents ``[B, 16, n + 1, H/8, W/8]``."""
    return DiagonalGaussianDistribution(vae.quant_conv(vae.encoder(patchify(clips, _PATCH))))


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to clips that are not clamped; the shapes are as in :func:`encode`."""
    return unpatchify(vae.decoder(vae.post_quant_conv(latents), first_chunk=True), _PATCH)


def _resample(self: WanResample, x: torch.Tensor, feat_cache=None, feat_idx=None) -> torch.Tensor:
    if self.mode == "upsample3d":  # the first frame stays one frame
        b, c, t, h, w = x[:, :, 1:].shape
        doubled = self.time_conv(x[:, :, 1:]).view(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5)
        x = torch.cat([x[:, :, :1], doubled.reshape(b, c, 2 * t, h, w)], dim=2)
    frames = x.shape[2]
    x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, frames)).transpose(1, 2)
    if self.mode == "downsample3d":
        x = torch.cat([x[:, :, :1], self.time_conv(x)], dim=2)
    return x
