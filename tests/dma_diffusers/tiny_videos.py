"""Tiny models of videos, beside those of which most is known."""

from collections import Counter
from itertools import count

import torch
from diffusers.models import transformers

from tests.dma_diffusers.tiny_case import AXES, TEXT, Case, without_zeros

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
FRAMES, ROWS, COLUMNS = GRID = (3, 6, 7)
TOKENS = FRAMES * ROWS * COLUMNS
LATENTS = (1, 4, FRAMES, 2 * ROWS, 2 * COLUMNS)
WAN = dict(
    in_channels=4,
    out_channels=4,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
    **HEADS,
)


def allegro() -> Case:
    model = transformers.AllegroTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, cross_attention_dim=32, sample_width=8, sample_height=8,
        sample_frames=8, caption_channels=8, **HEADS,
    )  # fmt: skip
    return Case(model, (0, 0), GRID, torch.randn(LATENTS), {}, 0, image_calls=2)


def any_flow() -> Case:
    model = transformers.AnyFlowTransformer3DModel(
        patch_size=(1, 2, 2), gate_value=0.25, deltatime_type="r", cross_attn_norm=True, **WAN
    )
    times = torch.full((1, FRAMES), 500.0)
    latents = torch.randn(1, FRAMES, 4, 2 * ROWS, 2 * COLUMNS)
    inputs = dict(timestep=times, r_timestep=times / 2)
    return Case(model, (0, 0), GRID, latents, inputs, 0, image_calls=2, axes=(1, 3, 4))


def chrono_edit() -> Case:
    model = transformers.ChronoEditTransformer3DModel(rope_temporal_skip_len=8, **WAN)
    return Case(model, (0, 0), GRID, torch.randn(LATENTS), {}, 0, image_calls=2)


def consis_id() -> Case:
    model = transformers.ConsisIDTransformer3DModel(
        in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=8, num_layers=2, sample_width=2 * COLUMNS,
        sample_height=2 * ROWS, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=TEXT,
        cross_attn_interval=1, is_train_face=True, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2,
        LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
        LFE_output_dim=21, LFE_ff_mult=1, LFE_num_scale=1, **HEADS,
    )  # fmt: skip
    inputs = dict(id_vit_hidden=[torch.randn(1, 2, 2)], id_cond=torch.randn(1, 2))
    latents = torch.randn(1, FRAMES, 4, 2 * ROWS, 2 * COLUMNS)
    return Case(model, (0, TEXT), GRID, latents, inputs, 2, axes=(1, 3, 4))


def cosmos3() -> Case:
    """The text attends to itself, and the video to both."""
    model = transformers.Cosmos3OmniTransformer(
        head_dim=16, hidden_act="relu2", hidden_size=32, intermediate_size=24, latent_channel=2, latent_patch_size=1,
        num_attention_heads=2, num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=2, qk_norm_for_text=False,
        rope_axes_dim=[2, 3, 3], vocab_size=64,
    )  # fmt: skip
    prompts = (torch.arange(TEXT) + first for first in count())
    places = torch.arange(TEXT, TEXT + TOKENS)
    inputs = dict(
        text_indexes=torch.arange(TEXT), position_ids=torch.arange(TEXT + TOKENS).expand(3, -1), und_len=TEXT,
        sequence_length=TEXT + TOKENS, vision_token_shapes=[GRID], vision_sequence_indexes=places,
        vision_mse_loss_indexes=places, vision_timesteps=torch.ones(TOKENS),
        vision_noisy_frame_indexes=[torch.arange(FRAMES)],
    )  # fmt: skip
    return Case(
        model, (0, TEXT), GRID, torch.randn(1, 2, *GRID), inputs, 2,
        other_calls=Counter({(TEXT, TEXT, 0, TEXT): 2}), pack=lambda latents: [latents],
        draw=lambda: next(prompts), names=("vision_tokens", "input_ids", None), image_queries=True,
    )  # fmt: skip


def easy_animate() -> Case:
    model = transformers.EasyAnimateTransformer3DModel(
        in_channels=4, mmdit_layers=2, num_layers=2, out_channels=4, patch_size=2, sample_height=2 * ROWS,
        sample_width=2 * COLUMNS, text_embed_dim=8, text_embed_dim_t5=6, time_embed_dim=8, **HEADS,
    )  # fmt: skip
    inputs = dict(encoder_hidden_states_t5=torch.randn(1, 5, 6))
    return Case(model, (0, TEXT + 5), GRID, torch.randn(LATENTS), inputs, 2, prompt=(0, TEXT), prompt_width=8)


def helios() -> Case:
    """Frames that were drawn before stand before the others."""
    model = transformers.HeliosTransformer3DModel(
        patch_size=(1, 2, 2), in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_dim=AXES, has_multi_term_memory_patch=True, guidance_cross_attn=True, zero_history_timestep=True,
        is_amplify_history=False, **HEADS,
    )  # fmt: skip
    latents = torch.randn(1, 4, 2, 16, 16)
    inputs = dict(
        indices_hidden_states=torch.ones(1, 2), indices_latents_history_short=torch.ones(1, 1),
        indices_latents_history_mid=torch.ones(1, 1), indices_latents_history_long=torch.ones(1, 4),
        latents_history_short=torch.randn(1, 4, 1, 16, 16), latents_history_mid=torch.randn(1, 4, 1, 16, 16),
        latents_history_long=torch.randn(1, 4, 4, 16, 16),
    )  # fmt: skip
    return Case(model, (0, 0), (), latents, inputs, 0, image_calls=2, length=212)


def framepack() -> Case:
    """Frames that were drawn before stand before the others, and an image before the text."""
    model = transformers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=2,
        patch_size_t=1, text_embed_dim=8, pooled_projection_dim=8, rope_axes_dim=AXES, has_image_proj=True,
        image_proj_dim=6, has_clean_x_embedder=True, **HEADS,
    )  # fmt: skip
    history = {
        name: torch.randn(1, 4, frames, 4, 4)
        for name, frames in (("latents_clean", 2), ("latents_history_2x", 2), ("latents_history_4x", 8))
    }
    places = {f"indices_{name}": torch.ones(latents.shape[2]) for name, latents in history.items()}
    inputs = dict(
        pooled_projections=torch.randn(1, 8), encoder_attention_mask=torch.ones(1, TEXT), guidance=torch.ones(1),
        image_embeds=torch.randn(1, 5, 6), indices_latents=torch.ones(3),
    )  # fmt: skip
    return Case(
        model, (23, 23 + 5 + TEXT), (), torch.randn(1, 4, 3, 4, 4), inputs | history | places, 2,
        prompt=(23 + 5, 23 + 5 + TEXT), length=23,
    )  # fmt: skip


KANDINSKY = dict(
    in_visual_dim=4, in_text_dim=8, in_text_dim2=6, time_dim=16, out_visual_dim=4, patch_size=(1, 2, 2), model_dim=32,
    ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=AXES,
)  # fmt: skip


def kandinsky5() -> Case:
    model = without_zeros(transformers.Kandinsky5Transformer3DModel(**KANDINSKY))
    inputs = dict(
        pooled_projections=torch.randn(1, 6), visual_rope_pos=[torch.arange(side) for side in GRID],
        text_rope_pos=torch.arange(TEXT),
    )  # fmt: skip
    latents = torch.randn(1, FRAMES, 2 * ROWS, 2 * COLUMNS, 4)
    return Case(model, (0, 0), GRID, latents, inputs, 0, image_calls=2, prompt_width=8, axes=(1, 2, 3))


def kandinsky6() -> Case:
    """A video and its sound."""
    model = transformers.Kandinsky6Transformer3DModel(
        **KANDINSKY, visual_cond=False, in_audio_dim=3, out_audio_dim=3, model_dim_a=32, time_dim_a=16, ff_dim_a=32,
        axes_dims_a=(16,),
    )  # fmt: skip
    inputs = dict(pooled_projections=torch.randn(1, 6), audio_hidden_states=torch.randn(1, 10, 3))
    latents = torch.randn(1, FRAMES, 2 * ROWS, 2 * COLUMNS, 4)
    return Case(model, (0, 0), GRID, latents, inputs, 0, image_calls=2, prompt_width=8, axes=(1, 2, 3))


def latte() -> Case:
    """Tokens attend within a frame, and within a place over time."""
    model = transformers.LatteTransformer3DModel(
        sample_size=8, video_length=5, num_layers=2, patch_size=2, caption_channels=8, in_channels=4,
        cross_attention_dim=32, out_channels=8, norm_type="ada_norm_single", norm_elementwise_affine=False,
        num_embeds_ada_norm=8, **HEADS,
    )  # fmt: skip
    latents = torch.randn(1, 4, 5, 16, 16)
    over_time = Counter({(5, 5, 0, 0): 2})
    return Case(model, (0, 0), (), latents, {}, 0, image_calls=2, other_calls=over_time, length=64)


def motif(decoders: int = 0) -> Case:
    model = transformers.MotifVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=2, num_decoder_layers=decoders, mlp_ratio=2.0,
        patch_size=2, patch_size_t=1, text_embed_dim=8, image_embed_dim=6, rope_axes_dim=AXES,
        enable_text_cross_attention_dual=True, **HEADS,
    )  # fmt: skip
    inputs = dict(
        encoder_attention_mask=torch.arange(TEXT)[None] < TEXT - 2, image_embeds=torch.randn(1, 5, 6)
    )
    text = (TOKENS, TOKENS + 5 + TEXT)
    decoder = (
        2 * TOKENS,
        2 * TOKENS,
        TOKENS,
        2 * TOKENS,
    )  # the tokens of the blocks before are conditions, like text
    return Case(
        model, text, GRID, torch.randn(LATENTS), inputs, 3 - decoders, other_calls=Counter({decoder: decoders}),
        prompt=(TOKENS + 5, TOKENS + 5 + TEXT),
    )  # fmt: skip


def h3() -> Case:
    """Text, sound and video stand in one sequence."""
    model = transformers.MiniMaxH3Transformer3DModel(
        hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=32, in_channels=4, audio_in_channels=6,
        patch_size=(1, 2, 2), text_dim=8, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2,
        **HEADS,
    )  # fmt: skip
    sound = 10
    tags = torch.tensor([1] * TEXT + [2] * sound + [0] * TOKENS)
    places = torch.arange(len(tags))
    inputs = dict(
        audio_hidden_states=torch.randn(1, sound, 6), timestep=torch.tensor([0.7, 0.3]),
        timestep_indices=(tags == 2).long(), token_tags=tags, position_ids=places[:, None].expand(-1, 3).float(),
        text_indices=places[tags == 1], audio_indices=places[tags == 2], video_indices=places[tags == 0],
    )  # fmt: skip
    return Case(model, (0, TEXT), (), torch.randn(1, TOKENS, 16), inputs, 2, length=sound + TOKENS)


def sana_refiner() -> Case:
    model = transformers.SanaWMLTX2RefinerTransformer3DModel(
        in_channels=4, out_channels=4, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
        audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2,
        caption_channels=8, rope_double_precision=False, **HEADS,
    )  # fmt: skip
    rotary = torch.ones(1, TOKENS, 32), torch.zeros(1, TOKENS, 32)
    inputs = dict(video_rotary_emb=rotary, encoder_attention_mask=torch.ones(1, TEXT))
    return Case(model, (0, 0), (), torch.randn(1, TOKENS, 4), inputs, 0, image_calls=2, length=TOKENS)


def wan_animate() -> Case:
    frames = 21  # with these, a frame of the face stands for each
    model = transformers.WanAnimateTransformer3DModel(
        **WAN | dict(in_channels=12), latent_channels=4, image_dim=6, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    inputs = dict(
        encoder_hidden_states_image=torch.randn(1, 5, 6), pose_hidden_states=torch.randn(1, 4, frames - 1, 6, 8),
        face_pixel_values=torch.randn(1, 3, 77, 16, 16),
    )  # fmt: skip
    latents = torch.randn(1, 12, frames, 6, 8)
    return Case(model, (0, 0), (frames, 3, 4), latents, inputs, 0, image_calls=2)


def wan_animate2() -> Case:
    """The tokens of the video that the motion is taken from; those of the other are left to flex attention."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    model = transformers.WanAnimate2Transformer3DModel(
        patch_size=(1, 2, 2), text_len=TEXT, in_dim=7, dim=32, ffn_dim=32, freq_dim=16, text_dim=8, out_dim=4,
        num_heads=2, num_layers=2, cross_attn_norm=True, use_img_emb=True,
    )  # fmt: skip
    inputs = dict(
        condition_latents=[torch.randn(3, FRAMES, 2 * ROWS, 2 * COLUMNS)], kv_cache_mode="extract", seq_len=TOKENS,
        encoder_hidden_states_image=torch.randn(1, 5, 1280), offset_grid_sizes=torch.tensor([GRID]),
        kv_cache=WanAnimate2KVCache(2),
    )  # fmt: skip
    return Case(
        model, (0, 0), (), torch.randn(LATENTS), inputs, 0, image_calls=2, pack=list,
        draw=lambda: [torch.randn(TEXT - 3, 8)], length=TOKENS,
    )  # fmt: skip


CASES = {
    "allegro": allegro,
    "any_flow": any_flow,
    "chrono_edit": chrono_edit,
    "consis_id": consis_id,
    "cosmos3": cosmos3,
    "easy_animate": easy_animate,
    "framepack": framepack,
    "h3": h3,
    "helios": helios,
    "kandinsky5": kandinsky5,
    "kandinsky6": kandinsky6,
    "latte": latte,
    "motif": motif,
    "motif, with a decoder": lambda: motif(decoders=1),
    "sana_refiner": sana_refiner,
    "wan_animate": wan_animate,
    "wan_animate2": wan_animate2,
}
