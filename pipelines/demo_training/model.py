"""Define the transformer and the model that is trained with it."""

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import nn

from dma_diffusers.pipelines.demo_training.batches import SceneBatch
from dma_diffusers.pipelines.demo_training.text import EOS, PAD, TEXT_TOKENS, TextEncoders

PIXELS_PER_TOKEN = 8
FULL_RESOLUTION = 256


def build_transformer() -> FluxTransformer2DModel:
    """Build the denoiser of 9 million parameters, in which every block starts as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=160,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    modulations = [block.norm1.linear for block in transformer.transformer_blocks]
    modulations += [block.norm1_context.linear for block in transformer.transformer_blocks]
    modulations += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in [*modulations, transformer.norm_out.linear, transformer.proj_out]:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return transformer


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Turn latents ``[B, C, H, W]`` into tokens ``[B, H/2 * W/2, 4 C]``, in FLUX's order."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * 4)


def image_ids(resolution: int, device: torch.device) -> torch.Tensor:
    """Return positions ``[tokens, 3]``: each is (0, row, column), in units of tokens of the full resolution.

    A token of a smaller picture has its position at the centre of the full-resolution tokens that it covers, so that a
    position means the same place at every resolution.
    """
    side = resolution // PIXELS_PER_TOKEN
    stride = FULL_RESOLUTION / resolution
    position = torch.arange(side, device=device) * stride + (stride - 1) / 2
    rows, columns = torch.meshgrid(position, position, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).view(-1, 3)


class DemoModel(nn.Module):
    """The transformer and the text encoders, which are trained together."""

    def __init__(self):
        super().__init__()
        self.text = TextEncoders()
        self.transformer = build_transformer()
        self.register_buffer("no_prompt", torch.tensor([EOS] + [PAD] * (TEXT_TOKENS - 1)), persistent=False)

    def forward(
        self,
        scenes: SceneBatch,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        dropped: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the flow-matching loss and the parse loss, two scalars.

        Args:
            latents, noise: ``[B, C, H, W]``.
            sigma: ``[B]`` in (0, 1), the noise levels.
            dropped: bool ``[B]``, True for the prompts to leave out.
            positions: from :func:`image_ids`.
        """
        tokens, pooled = self.text(torch.where(dropped[:, None], self.no_prompt, scenes.ids))
        mix = sigma[:, None, None, None]
        velocity = self.transformer(
            hidden_states=pack(mix * noise + (1 - mix) * latents),
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=positions,
            txt_ids=positions.new_zeros(TEXT_TOKENS, 3),
            return_dict=False,
        )[0]
        flow = F.mse_loss(velocity.float(), pack(noise - latents))
        return flow, self.text.parse_loss(tokens, pooled, scenes, (~dropped).float())
