"""Define the demo model's autoencoder."""

import torch
from diffusers import AutoencoderKL


def build_vae() -> AutoencoderKL:
    """Build an autoencoder of under a million parameters, with four latent channels at a quarter of the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # `standardise` puts the scale into the weights
        shift_factor=0.0,
    )


@torch.no_grad()
def standardise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Standardise latents that have ``mean`` and ``std`` per channel (``[C]``) to mean 0 and deviation 1, in place.

    The affine map goes into the convolutions before and after the latents; decoded pictures stay the same.
    """
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.bias[:channels].sub_(mean).div_(std)
    encode.weight[:channels].div_(std[:, None, None, None])
    encode.bias[channels:].sub_(2 * std.log())
    decode.bias.add_(decode.weight[:, :, 0, 0] @ mean)
    decode.weight.mul_(std[None, :, None, None])
