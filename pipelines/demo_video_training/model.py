"""Define the transformer and the model that is trained with it."""

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import nn

from dma_diffusers.pipelines.demo_training.text import EOS, PAD
from dma_diffusers.pipelines.demo_video_training.clips import Clips
from dma_diffusers.pipelines.demo_video_training.text import TEXT_TOKENS, build_text_encoder, prompt_ids


def build_transformer() -> WanTransformer3DModel:
    """Build the denoiser of 4.2 million parameters; its blocks start without modulation, and its output at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=128,
        freq_dim=256,
        ffn_dim=704,
        num_layers=4,
        rope_max_seq_len=64,
    )
    modulation, output = transformer.condition_embedder.time_proj, transformer.proj_out
    for zero in (modulation.weight, modulation.bias, output.weight, output.bias):
        nn.init.zeros_(zero)
    for block in transformer.blocks:
        nn.init.zeros_(block.scale_shift_table)
        nn.init.zeros_(block.attn2.to_out[0].weight)
    return transformer


class SpreadPositions(nn.Module):
    """Replaces Wan's rotary embedding for clips with fewer pixels or frames than the full clip.

    A latent has its position at the centre of the full clip's latents that it covers, so that a position means the same
    place and time at every size.

    Args:
        grid: (frames, rows, columns) of the latents.
        stride: the number of the full clip's frames, and of its pixels along a side, that make one of the smaller clip.
        head_dim: dimension of an attention head.
    """

    def __init__(self, grid: tuple[int, int, int], stride: tuple[int, int], head_dim: int):
        super().__init__()
        time, space = stride
        frames, rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
        # The first latent covers one frame, and each later one ends where the next one begins.
        frames = torch.where(frames > 0, frames * time - (time - 1) / 2, 0)
        rows, columns = (axis * space + (space - 1) / 2 for axis in (rows, columns))
        side = 2 * (head_dim // 6)
        tables = []
        for positions, dim, shape in (
            (frames, head_dim - 2 * side, (-1, 1, 1)),
            (rows, side, (1, -1, 1)),
            (columns, side, (1, 1, -1)),
        ):
            both = get_1d_rotary_pos_embed(dim, positions, use_real=True, freqs_dtype=torch.float64)
            tables.append([table.view(*shape, dim).expand(*grid, dim) for table in both])
        for name, parts in zip(("cos", "sin"), zip(*tables, strict=True), strict=True):
            self.register_buffer(name, torch.cat(parts, dim=-1).reshape(1, -1, 1, head_dim), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cos, self.sin


class VideoModel(nn.Module):
    """The transformer and the text encoder, which are trained together."""

    def __init__(self):
        super().__init__()
        self.text = build_text_encoder()
        self.transformer = build_transformer()
        self.register_buffer("prompts", prompt_ids(), persistent=False)
        self.register_buffer("no_prompt", torch.tensor([EOS] + [PAD] * (TEXT_TOKENS - 1)), persistent=False)

    def encode(self, ids: torch.Tensor) -> torch.Tensor:
        """Encode ids ``[B, TEXT_TOKENS]`` as ``[B, TEXT_TOKENS, 128]``; padding gives zeros, as in WanPipeline."""
        words = ids != PAD
        return self.text(ids, words).last_hidden_state * words[..., None]

    def forward(
        self,
        clips: Clips,
        latents: torch.Tensor,
        noise: torch.Tensor,
        sigma: torch.Tensor,
        dropped: torch.Tensor,
    ) -> torch.Tensor:
        """Return the flow-matching loss, a scalar.

        Args:
            latents, noise: ``[B, C, T, H, W]``.
            sigma: ``[B]`` in (0, 1), the noise levels.
            dropped: bool ``[B]``, True for the prompts to leave out.
        """
        ids = self.prompts[clips.concept, clips.motion, clips.background]
        tokens = self.encode(torch.where(dropped[:, None], self.no_prompt, ids))
        mix = sigma[:, None, None, None, None]
        velocity = self.transformer(
            hidden_states=mix * noise + (1 - mix) * latents,
            timestep=1000 * sigma,
            encoder_hidden_states=tokens,
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - latents)
