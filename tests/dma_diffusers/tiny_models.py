"""Tiny models, and for each a call whose text and grid are known.

CASES: of the families of which most is known. EVERY: of every family.
"""

import diffusers
import torch

from tests import tiny_pipelines
from tests.dma_diffusers import tiny_controlnets, tiny_images, tiny_joint_images, tiny_sounds, tiny_videos
from tests.dma_diffusers.tiny_case import AXES, TEXT, Case, pack_squares, without_zeros


def flux(cls=diffusers.FluxTransformer2DModel, double=1, **config) -> Case:
    settings = dict(
        in_channels=4, num_layers=double, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=AXES,
    )  # fmt: skip
    positions = diffusers.FluxPipeline._prepare_latent_image_ids(1, 12, 25, "cpu", torch.bfloat16)
    inputs = dict(img_ids=positions, txt_ids=torch.zeros(TEXT, 3))
    if cls is diffusers.FluxTransformer2DModel:
        settings["pooled_projection_dim"] = 8
        inputs["pooled_projections"] = torch.randn(1, 8)
    latents = torch.randn(1, 1, 24, 50)
    return Case(cls(**settings | config), (0, TEXT), (12, 25), latents, inputs, 2 + double, pack=pack_squares)


def chroma() -> Case:
    return flux(
        diffusers.ChromaTransformer2DModel,
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip


def flux2() -> Case:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    latents = torch.randn(1, 4, 25, 12)
    positions = diffusers.Flux2Pipeline._prepare_latent_ids(latents)
    inputs = dict(img_ids=positions, txt_ids=torch.zeros(TEXT, 4), guidance=torch.ones(1))
    return Case(model, (0, TEXT), (25, 12), latents, inputs, 2, pack=diffusers.Flux2Pipeline._pack_latents)


def sd3() -> Case:
    model = tiny_pipelines.sd3(patch_size=2).transformer
    inputs = dict(pooled_projections=torch.randn(2, 64))
    return Case(model, (380, 380 + TEXT), (20, 19), torch.randn(2, 4, 41, 38), inputs, 2, image_calls=1)


def hunyuan() -> Case:
    inputs = dict(
        pooled_projections=torch.randn(1, 32), guidance=torch.ones(1),
        encoder_attention_mask=torch.ones(1, TEXT),
    )  # fmt: skip
    model = tiny_pipelines.hunyuan(patch_size=2, patch_size_t=3).transformer
    return Case(model, (420, 420 + TEXT), (3, 10, 14), torch.randn(1, 4, 9, 20, 28), inputs, 2)


def wan() -> Case:
    model = tiny_pipelines.wan().transformer
    return Case(model, (0, 0), (3, 9, 11), torch.randn(2, 16, 3, 18, 22), {}, 0, image_calls=2)


def wan_with_as_much_text_as_video() -> Case:
    model = tiny_pipelines.wan().transformer
    return Case(model, (0, 0), (1, 3, 7), torch.randn(1, 16, 1, 6, 14), {}, 0, image_calls=2)


def qwen() -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, axes_dims_rope=AXES,
    )  # fmt: skip
    inputs = dict(img_shapes=[[(1, 16, 19)]], encoder_hidden_states_mask=torch.arange(TEXT)[None] < TEXT - 2)
    return Case(
        model, (0, TEXT), (16, 19), torch.randn(1, 1, 32, 38), inputs, 2,
        pack=lambda latents: diffusers.QwenImagePipeline._pack_latents(latents, *latents.shape),
    )  # fmt: skip


def cogvideox(frames: int = 3, in_channels: int = 4, **config) -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=in_channels, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=2, sample_width=24, sample_height=20, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT, **config,
    )  # fmt: skip
    latents = torch.randn(1, frames, 4, 20, 24)
    return Case(model, (0, TEXT), (3, 10, 12), latents, {}, 2, axes=(1, 3, 4))


def cogvideox_of_images() -> Case:
    """As CogVideoX 1.5 takes an image: in channels beside the latents'."""
    case = cogvideox(6, in_channels=8, patch_size_t=2, use_rotary_positional_embeddings=True, ofs_embed_dim=2)
    image = torch.randn_like(case.latents)
    case.inputs = dict(ofs=torch.full((1,), 2.0))
    case.pack = lambda latents: torch.cat((latents, image), 2)
    return case


def ltx() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=8,
    )  # fmt: skip
    inputs = dict(num_frames=3, height=10, width=11, encoder_attention_mask=torch.ones(1, TEXT))
    return Case(
        model, (0, 0), (3, 10, 11), torch.randn(1, 4, 3, 10, 11), inputs, 0, image_calls=2,
        pack=diffusers.LTXPipeline._pack_latents,
    )  # fmt: skip


def ltx2() -> Case:
    model = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=2, caption_channels=8, rope_double_precision=False,
    )  # fmt: skip
    inputs = dict(
        num_frames=3, height=10, width=11, encoder_attention_mask=torch.ones(1, TEXT),
        audio_hidden_states=torch.randn(1, 13, 4), audio_encoder_hidden_states=torch.randn(1, TEXT, 8),
        audio_encoder_attention_mask=torch.ones(1, TEXT), audio_num_frames=13,
    )  # fmt: skip
    return Case(
        model, (0, 0), (3, 10, 11), torch.randn(1, 4, 3, 10, 11), inputs, 0, image_calls=2,
        pack=diffusers.LTX2Pipeline._pack_latents,
    )  # fmt: skip


def cosmos(**config) -> Case:
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=8, adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False, **config,
    )  # fmt: skip
    return Case(model, (0, 0), (3, 9, 11), torch.randn(1, 4, 3, 18, 22), {"fps": 16}, 0, image_calls=2)


def hunyuan15() -> Case:
    model = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2, patch_size=2, text_embed_dim=8, text_embed_2_dim=6, image_embed_dim=5,
        rope_axes_dim=AXES,
    )  # fmt: skip
    inputs = dict(
        encoder_attention_mask=torch.arange(TEXT)[None] < TEXT - 2,
        encoder_hidden_states_2=torch.randn(1, 7, 6), encoder_attention_mask_2=torch.arange(7)[None] < 4,
        image_embeds=torch.randn(1, 3, 5),
    )  # fmt: skip
    start, tokens = 3 * 10 * 14, 3 + 7 + TEXT
    return Case(
        model, (start, start + tokens), (3, 10, 14), torch.randn(1, 9, 3, 20, 28), inputs, 2,
        prompt=(start + 3 + 4, start + 3 + 4 + TEXT - 2),  # behind the image and those of the second text that count
    )  # fmt: skip


def mochi() -> Case:
    model = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=8, time_embed_dim=4,
    )  # fmt: skip
    torch.nn.init.zeros_(model.time_embed.pooler.to_out.weight)  # through which all tokens follow the prompt
    torch.nn.init.normal_(model.pos_frequencies)
    inputs = dict(encoder_attention_mask=torch.arange(TEXT)[None] < TEXT - 2)
    latents = torch.randn(1, 4, 3, 20, 28)
    return Case(model, (420, 420 + TEXT - 2), (3, 10, 14), latents, inputs, 2)


def z_image(
    rows: int = 12, columns: int = 24, refiners: int = 0, captions: tuple[int, ...] = (TEXT,)
) -> Case:
    """A batch entry for each of the captions' lengths in tokens, of which the model makes 32, or 64, …"""
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=refiners, n_heads=2, n_kv_heads=2, cap_feat_dim=8,
        axes_dims=AXES, axes_lens=[128, 32, 32],
    )  # fmt: skip
    tokens, text = rows * columns, -(-max(captions) // 32) * 32
    padded = -(-tokens // 32) * 32
    return Case(
        model, (tokens, padded + text), (rows, columns), torch.randn(len(captions), 4, 1, 2 * rows, 2 * columns), {},
        2, pack=list, prompt=(padded, padded + max(captions)), prompt_tokens=max(captions),
        names=("x", "cap_feats", "t"),
    )  # fmt: skip


def wan_of_images() -> Case:
    """As Wan 2.1 takes an image: beside the latents, and as tokens for a second cross-attention."""
    model = tiny_pipelines.wan(in_channels=36, image_dim=4, added_kv_proj_dim=32).transformer
    inputs = dict(encoder_hidden_states_image=torch.randn(1, 7, 4))
    latents = torch.randn(1, 36, 3, 18, 22)
    return Case(model, (0, 0), (3, 9, 11), latents, inputs, 0, image_calls=2, prompt_tokens=512)


WAN = dict(
    num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=256, ffn_dim=32,
    num_layers=2, rope_max_seq_len=32,
)  # fmt: skip


def wan_vace() -> Case:
    model = diffusers.WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=6)
    inputs = dict(control_hidden_states=torch.randn(1, 6, 3, 18, 22))
    return Case(model, (0, 0), (3, 9, 11), torch.randn(1, 4, 3, 18, 22), inputs, 0, image_calls=3)


def skyreels() -> Case:
    model = diffusers.SkyReelsV2Transformer3DModel(**WAN)
    return Case(model, (0, 0), (3, 9, 11), torch.randn(1, 4, 3, 18, 22), {}, 0, image_calls=2)


CASES = {
    "chroma": chroma,
    "cogvideox": cogvideox,
    "cogvideox, frames in patches": lambda: cogvideox(
        6, patch_size_t=2, use_rotary_positional_embeddings=True
    ),
    "cogvideox, of images": cogvideox_of_images,
    "cosmos": lambda: cosmos(extra_pos_embed_type="learnable"),
    "cosmos 2.5": lambda: cosmos(
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=8,
        encoder_hidden_states_channels=8,
    ),
    "flux": flux,
    "flux, single blocks alone": lambda: flux(double=0),
    "flux2": flux2,
    "hunyuan": hunyuan,
    "hunyuan15": hunyuan15,
    "ltx": ltx,
    "ltx2": ltx2,
    "mochi": mochi,
    "qwen": qwen,
    "sd3": sd3,
    "wan": wan,
    "skyreels": skyreels,
    "wan, as much text as video": wan_with_as_much_text_as_video,
    "wan, of images": wan_of_images,
    "wan, vace": wan_vace,
    "z_image": z_image,
}


def z_image_controlnet() -> Case:
    """It shares the refiners of the transformer."""
    case = z_image(refiners=1)
    model = diffusers.ZImageControlNetModel(
        control_layers_places=[0, 1], control_refiner_layers_places=[0], control_in_dim=4, dim=32, n_refiner_layers=1,
        n_heads=2, n_kv_heads=2,
    )  # fmt: skip
    case.model = without_zeros(model.from_transformer(model, case.model))
    case.inputs = dict(control_context=list(torch.randn_like(case.latents)))
    case.image_calls, case.prompt_width, case.prompt = (
        1,
        8,
        (288, 320),
    )  # its refiner has mixed text and padding
    return case


EVERY = (
    CASES
    | tiny_controlnets.CASES
    | {"controlnet of z_image": z_image_controlnet}
    | tiny_joint_images.CASES
    | tiny_images.CASES
    | tiny_videos.CASES
    | tiny_sounds.CASES
)


def make(name: str) -> Case:
    """The case of this name, the same one every time."""
    torch.manual_seed(0)
    case = EVERY[name]()
    case.model.eval()
    return case
