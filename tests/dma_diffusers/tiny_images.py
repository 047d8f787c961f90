"""Tiny models of images that attend to their text in cross-attention, or have none."""

import torch
from diffusers.models import transformers

from tests.dma_diffusers.tiny_case import TEXT, Case

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
ROWS, COLUMNS = GRID = (10, 13)
LATENTS = (1, 4, 2 * ROWS, 2 * COLUMNS)


def dit() -> Case:
    model = transformers.DiTTransformer2DModel(
        in_channels=4, num_layers=2, num_embeds_ada_norm=8, patch_size=2, sample_size=8, **HEADS
    )
    inputs = dict(class_labels=torch.tensor([3]))
    return Case(
        model, (0, 0), (11, 11), torch.randn(1, 4, 22, 22), inputs, 0, image_calls=2, draw=lambda: None,
        names=("hidden_states", None, "timestep"),
    )  # fmt: skip


def pixart() -> Case:
    model = transformers.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, in_channels=4, cross_attention_dim=32, out_channels=8,
        use_additional_conditions=False, caption_channels=8, **HEADS,
    )  # fmt: skip
    inputs = dict(added_cond_kwargs={"aspect_ratio": None, "resolution": None})
    return Case(model, (0, 0), GRID, torch.randn(LATENTS), inputs, 0, image_calls=2)


def hunyuan_dit() -> Case:
    model = transformers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, cross_attention_dim=8, cross_attention_dim_t5=8,
        pooled_projection_dim=4, hidden_size=32, text_len=TEXT, text_len_t5=5, activation_fn="gelu-approximate",
        **HEADS,
    )  # fmt: skip
    inputs = dict(
        text_embedding_mask=torch.ones(1, TEXT), text_embedding_mask_t5=torch.ones(1, 5), style=torch.zeros(1).long(),
        encoder_hidden_states_t5=torch.randn(1, 5, 8), image_meta_size=torch.tensor([[80.0, 104, 80, 104, 0, 0]]),
        image_rotary_emb=[torch.ones(130, 16), torch.zeros(130, 16)],
    )  # fmt: skip
    return Case(model, (0, 0), GRID, torch.randn(LATENTS), inputs, 0, image_calls=2, prompt_width=8)


def lumina_next() -> Case:
    """The text reaches all tokens through their norms."""
    model = transformers.LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, learn_sigma=False, qk_norm=True, cross_attention_dim=8,
    )  # fmt: skip
    inputs = dict(
        encoder_mask=torch.ones(1, TEXT), image_rotary_emb=torch.randn(384, 384, 8), cross_attention_kwargs={}
    )
    return Case(
        model, (0, 0), GRID, torch.randn(LATENTS), inputs, 0, image_calls=2, prompt=(0, 130), prompt_width=8
    )


def basic(kind: str = "Transformer2DModel", **config) -> Case:
    model = getattr(transformers, kind)(
        in_channels=4, num_layers=2, cross_attention_dim=8, norm_num_groups=2, **HEADS, **config
    )
    return Case(
        model, (0, 0), GRID, torch.randn(1, 4, *GRID), dict(timestep=None), 0, image_calls=2, prompt_width=8
    )


def basic_of_patches() -> Case:
    model = transformers.Transformer2DModel(
        in_channels=4, num_layers=2, cross_attention_dim=32, caption_channels=8, sample_size=8, patch_size=2,
        norm_type="ada_norm_single", norm_elementwise_affine=False, use_additional_conditions=False, **HEADS,
    )  # fmt: skip
    inputs = dict(added_cond_kwargs={"aspect_ratio": None, "resolution": None})
    return Case(model, (0, 0), GRID, torch.randn(LATENTS), inputs, 0, image_calls=2)


def temporal() -> Case:
    """Self-attention over 9 frames for each place, twice in a block."""
    model = transformers.TransformerTemporalModel(in_channels=4, num_layers=1, norm_num_groups=2, **HEADS)
    inputs = dict(num_frames=9, timestep=None)
    return Case(
        model, (0, 0), (), torch.randn(9, 4, 3, 5), inputs, 0, image_calls=2, draw=lambda: None,
        names=("hidden_states", None, "timestep"), length=9,
    )  # fmt: skip


CASES = {
    "basic": basic,
    "basic, of patches": basic_of_patches,
    "dit": dit,
    "dream_lite": lambda: basic("DreamLiteTransformer2DModel"),
    "hunyuan_dit": hunyuan_dit,
    "lumina_next": lumina_next,
    "pixart": pixart,
    "temporal": temporal,
}
