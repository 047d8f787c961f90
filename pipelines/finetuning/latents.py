"""Latents of pictures and clips, in the layout in which a pipeline hands them to its transformer."""

import torch
from diffusers import DiffusionPipeline, FluxPipeline, WanPipeline
from torch import Tensor

KNOWN = (FluxPipeline, WanPipeline)
"""The pipelines whose layout is known here, and those derived from them."""


@torch.no_grad()
def encode(pipe: DiffusionPipeline, frames: Tensor) -> Tensor:
    """Encode frames uint8 `[F, H, W, 3]`, RGB, as latents `[1, …]`: FLUX's tokens, or Wan's grid."""
    vae = pipe.vae
    pixels = frames.to(vae.device, vae.dtype).permute(3, 0, 1, 2)[None] / 127.5 - 1
    if isinstance(pipe, WanPipeline):
        latents = vae.encode(pixels).latent_dist.mode()
        mean, deviation = (
            latents.new_tensor(vae.config[name]).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) / deviation
    latents = vae.encode(pixels[:, :, 0]).latent_dist.mode()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)
