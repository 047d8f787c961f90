"""Tiny models of images in which text and image attend together."""

import torch
from diffusers.models import transformers

from tests.dma_diffusers.tiny_case import AXES, TEXT, Case, pack_squares, without_zeros

HEADS = dict(num_attention_heads=2, attention_head_dim=16)
ROWS, COLUMNS = GRID = (10, 13)
TOKENS = ROWS * COLUMNS


def positions(image: int = 0, start: int = 0) -> torch.Tensor:
    """(image, row, column) of every token."""
    found = torch.zeros(ROWS, COLUMNS, 3)
    found[..., 0] = image
    found[..., 1] = torch.arange(start, start + ROWS)[:, None]
    found[..., 2] = torch.arange(start, start + COLUMNS)
    return found.flatten(0, 1)


def like_flux(kind: str, image: int = 0, start: int = 0, inputs: dict | None = None, **config) -> Case:
    """A double block and a single one; `latents` are packed two by two."""
    model = getattr(transformers, kind)(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=8, axes_dims_rope=AXES, **HEADS, **config
    )  # fmt: skip
    inputs = dict(img_ids=positions(image, start), txt_ids=torch.zeros(TEXT, 3)) | (inputs or {})
    latents = torch.randn(1, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(model, (0, TEXT), GRID, latents, inputs, 2, pack=pack_squares)


def bria_fibo() -> Case:
    case = like_flux("BriaFiboTransformer2DModel", pooled_projection_dim=None, text_encoder_dim=4)
    case.inputs["text_encoder_layers"] = [torch.randn(1, TEXT, 4)] * 2
    return case


def flux3(blocks: int = 1) -> Case:
    """Blocks for the text alone and for the image alone, and one for both."""
    model = transformers.Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=blocks, num_single_layers=1, joint_attention_dim=8,
        timestep_channels=16, axes_dims_rope=(4, 4, 4, 4), **HEADS,
    )  # fmt: skip
    ids = torch.cat((positions(), torch.zeros(TOKENS, 1)), 1)
    inputs = dict(img_ids=ids, txt_ids=torch.zeros(TEXT, 4))
    latents = torch.randn(1, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(model, (0, TEXT), GRID, latents, inputs, 1, image_calls=blocks, pack=pack_squares)


def aura_flow() -> Case:
    """Eight registers stand before the text."""
    model = transformers.AuraFlowTransformer2DModel(
        sample_size=32, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, caption_projection_dim=32,
        joint_attention_dim=8, out_channels=4, pos_embed_max_size=256, **HEADS,
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        if "attn" in name or "norm1" in name:
            parameter.data *= 5  # what attention does would be small beside the rest
    latents = torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS)
    return Case(model, (0, 8 + TEXT), GRID, latents, {}, 2, prompt=(8, 8 + TEXT))


def cogview(kind: str) -> Case:
    model = getattr(transformers, kind)(
        in_channels=4, num_layers=2, out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=2, **HEADS,
        **({"pos_embed_max_size": 32, "sample_size": 8} if "3" in kind else {}),
    )  # fmt: skip
    sizes = dict(original_size=torch.tensor([[80, 104]]), target_size=torch.tensor([[80, 104]]))
    inputs = sizes | dict(crop_coords=torch.zeros(1, 2))
    return Case(model, (0, TEXT), GRID, torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS), inputs, 2)


def glm_image() -> Case:
    model = transformers.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, text_embed_dim=8, time_embed_dim=8, condition_dim=2,
        prior_vq_quantizer_codebook_size=16, **HEADS,
    )  # fmt: skip
    inputs = dict(
        prior_token_id=torch.randint(16, (1, TOKENS)), prior_token_drop=torch.zeros(1, TOKENS, dtype=torch.bool),
        target_size=torch.tensor([[80.0, 104.0]]), crop_coords=torch.zeros(1, 2),
    )  # fmt: skip
    return Case(model, (0, TEXT), GRID, torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS), inputs, 2)


def ernie() -> Case:
    model = transformers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=4, out_channels=4,
        patch_size=2, text_in_dim=8, rope_axes_dim=AXES,
    )  # fmt: skip
    return Case(
        without_zeros(model), (TOKENS, TOKENS + TEXT), GRID, torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS),
        dict(text_lens=torch.tensor([TEXT, TEXT])), 2, prompt_width=8, names=("hidden_states", "text_bth", "timestep"),
    )  # fmt: skip


def hidream() -> Case:
    """T5's tokens, the last layer of Llama, and one more for each block."""
    model = transformers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, caption_channels=[8, 4],
        text_emb_dim=8, num_routed_experts=2, num_activated_experts=2, axes_dims_rope=AXES, max_resolution=(32, 32),
        llama_layers=(0, 1), force_inference_output=True, **HEADS,
    )  # fmt: skip
    inputs = dict(encoder_hidden_states_llama3=torch.randn(2, 1, 9, 4), pooled_embeds=torch.randn(1, 8))
    return Case(
        model, (144, 144 + TEXT + 18), (12, 12), torch.randn(1, 4, 24, 24), inputs, 2, prompt=(144, 144 + TEXT),
        prompt_width=8, names=("hidden_states", "encoder_hidden_states_t5", "timesteps"),
    )  # fmt: skip


def hunyuan_image() -> Case:
    model = transformers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, num_refiner_layers=1, mlp_ratio=2.0,
        patch_size=(2, 2), text_embed_dim=8, text_embed_2_dim=6, rope_axes_dim=(8, 8), **HEADS,
    )  # fmt: skip
    inputs = dict(
        encoder_attention_mask=torch.ones(1, TEXT),
        encoder_hidden_states_2=torch.randn(1, 7, 6), encoder_attention_mask_2=torch.arange(7)[None] < 4,
    )  # fmt: skip
    start = TOKENS + 4  # behind those of the second text that count; then come the others
    return Case(
        model, (TOKENS, TOKENS + 7 + TEXT), GRID, torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS), inputs, 2,
        prompt=(start, start + TEXT),
    )  # fmt: skip


def joy() -> Case:
    model = transformers.JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, num_layers=2,
        rope_dim_list=AXES,
    )  # fmt: skip
    latents = torch.randn(1, 1, 4, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(model, (TOKENS, TOKENS + TEXT), (1, *GRID), latents, {}, 2)


def joy_plus() -> Case:
    model = transformers.JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=8, num_layers=2,
        rope_dim_list=AXES,
    )  # fmt: skip
    inputs = dict(shape_list=[[(1, *GRID)]], encoder_hidden_states_mask=torch.ones(1, TEXT))

    def pack(latents):
        return (
            latents.unflatten(3, (ROWS, 2))
            .unflatten(5, (COLUMNS, 2))
            .permute(0, 3, 5, 1, 2, 4, 6)
            .flatten(1, 2)
        )

    latents = torch.randn(1, 4, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(model, (TOKENS, TOKENS + TEXT), (1, *GRID), latents, inputs, 2, pack=pack)


def krea2() -> Case:
    """Three layers of the text encoder for each token."""
    model = transformers.Krea2Transformer2DModel(
        in_channels=4, num_layers=2, num_key_value_heads=1, intermediate_size=32, timestep_embed_dim=8,
        text_hidden_dim=8, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=1,
        text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=AXES, **HEADS,
    )  # fmt: skip
    inputs = dict(
        position_ids=torch.cat((torch.zeros(TEXT, 3), positions())),
        encoder_attention_mask=torch.arange(TEXT)[None] < TEXT - 2,
    )
    latents = torch.randn(1, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(
        model, (0, TEXT), GRID, latents, inputs, 2, pack=pack_squares, draw=lambda: torch.randn(1, TEXT, 3, 8)
    )


def bria_fibo2(refiners: int = 0) -> Case:
    """The prompt, for each block that wants it, is summed up in 8 to 24 tokens."""
    model = transformers.BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=refiners, n_heads=2, cap_feat_dim=8,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=8, max_num_gist_tokens=24, gist_step=4,
        gist_min_text_len=8, gist_max_text_len=40, axes_dims=AXES, axes_lens=(64, 64, 64),
    )  # fmt: skip
    latents = torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS)
    return Case(
        model, (0, 16), GRID, latents, {}, 2, image_calls=refiners, draw=lambda: torch.randn(1, 2, TEXT, 8),
    )  # fmt: skip


def lumina2(refiners: int = 0, valid: int = TEXT - 2) -> Case:
    """The image begins where the text ends."""
    model = transformers.Lumina2Transformer2DModel(
        sample_size=16, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=refiners,
        num_attention_heads=2, num_kv_heads=1, multiple_of=2, axes_dim_rope=AXES, axes_lens=(64, 64, 64),
        cap_feat_dim=8,
    )  # fmt: skip
    latents = torch.randn(2, 4, 2 * ROWS, 2 * COLUMNS)
    inputs = dict(encoder_attention_mask=(torch.arange(TEXT) < valid).expand(2, -1).contiguous())
    return Case(model, (0, valid), GRID, latents, inputs, 2, image_calls=refiners)


def nucleus() -> Case:
    model = transformers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=1, num_layers=2, joint_attention_dim=8, axes_dims_rope=AXES,
        moe_enabled=False, capacity_factors=[8.0, 8.0], **HEADS,
    )  # fmt: skip
    inputs = dict(img_shapes=[(1, *GRID)], encoder_hidden_states_mask=torch.arange(TEXT)[None] < TEXT - 2)
    latents = torch.randn(1, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(
        model, (TOKENS, TOKENS + TEXT), GRID, latents, inputs, 2, pack=pack_squares, image_queries=True
    )


def prx() -> Case:
    model = transformers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=8, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip
    inputs = dict(attention_mask=torch.arange(TEXT)[None] < TEXT - 2)
    latents = torch.randn(1, 4, 2 * ROWS, 2 * COLUMNS)
    return Case(without_zeros(model), (0, TEXT), GRID, latents, inputs, 2, prompt_width=8, image_queries=True)


def qwen21() -> Case:
    """The text's own call has a mask of tokens × tokens."""
    model = transformers.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, context_in_dim=8, axes_dims_rope=AXES, **HEADS
    )
    rows, columns = 2 * ROWS, 2 * COLUMNS + 2  # tokens come in fours
    inputs = dict(
        img_shapes=[[(1, ROWS, COLUMNS + 1)]],
        img_mask=torch.arange(TEXT + ROWS * (COLUMNS + 1) // 4)[None] >= TEXT,
    )
    return Case(
        model, (0, TEXT), (ROWS, COLUMNS + 1), torch.randn(1, 1, rows, columns), inputs, 2, pack=pack_squares,
        prompt_width=8, image_queries=True,
    )  # fmt: skip


def prior() -> Case:
    """The prompt's tokens, its pooled embedding and the timestep stand before the image's only token and one more."""
    model = transformers.PriorTransformer(
        num_layers=2, embedding_dim=8, num_embeddings=TEXT, additional_embeddings=4, **HEADS
    )
    return Case(
        model, (0, TEXT + 2), (), torch.randn(1, 8), dict(proj_embedding=torch.randn(1, 8)), 2, prompt=(0, TEXT),
        prompt_width=8, length=2,
    )  # fmt: skip


def prior_without_a_prompt() -> Case:
    """As Shap-E has it: many tokens to be drawn, behind an image's embedding and the timestep."""
    model = transformers.PriorTransformer(
        num_layers=2, embedding_dim=8, num_embeddings=64, additional_embeddings=0, time_embed_act_fn="gelu",
        added_emb_type=None, encoder_hid_proj_type=None, norm_in_type="layer", **HEADS,
    )  # fmt: skip
    return Case(
        model, (0, 2), (), torch.randn(1, 64, 8), {}, 2, prompt=(0, 1), draw=lambda: torch.randn(1, 8),
        names=("hidden_states", "proj_embedding", "timestep"), length=64,
    )  # fmt: skip


CASES = {
    "aura_flow": aura_flow,
    "bria": lambda: like_flux("BriaTransformer2DModel", pooled_projection_dim=None),
    "bria_fibo": bria_fibo,
    "bria_fibo2": bria_fibo2,
    "bria_fibo2, with refiners": lambda: bria_fibo2(refiners=1),
    "cogview3": lambda: cogview("CogView3PlusTransformer2DModel"),
    "cogview4": lambda: cogview("CogView4Transformer2DModel"),
    "ernie": ernie,
    "flux3": flux3,
    "flux3, of both alone": lambda: flux3(blocks=0),
    "glm_image": glm_image,
    "hidream": hidream,
    "hunyuan_image": hunyuan_image,
    "joy": joy,
    "joy_plus": joy_plus,
    "krea2": krea2,
    "longcat_image": lambda: like_flux("LongCatImageTransformer2DModel", 1, 9, pooled_projection_dim=8),
    "lumina2": lumina2,
    "lumina2, with refiners": lambda: lumina2(refiners=1, valid=TEXT),
    "nucleus": nucleus,
    "ovis": lambda: like_flux("OvisImageTransformer2DModel", out_channels=4),
    "prior": prior,
    "prior, without a prompt": prior_without_a_prompt,
    "prx": prx,
    "qwen21": qwen21,
}
