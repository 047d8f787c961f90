"""Build stock pipelines with tiny random weights from configurations alone, so that nothing is downloaded.

Each function that is named after a model family builds one pipeline, with the same weights every time. `draw(pipe)`
runs it.
"""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    Cosmos2TextToImagePipeline,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

SPECIALS = ("<pad>", "<s>", "</s>", "<unk>")
VOCABULARY = 266
WIDTH = 32  # every text encoder has this width


def tokenizer(length: int = 77) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, between <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=length, **names)


def _t5(config=T5Config, model=T5EncoderModel):
    return model(
        config(vocab_size=VOCABULARY, d_model=WIDTH, d_ff=37, d_kv=8, num_layers=2, num_heads=4)
    ).eval()


def _clip(model=CLIPTextModel):
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2,
        projection_dim=WIDTH, num_attention_heads=4, max_position_embeddings=77, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return model(config).eval()


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    side = 3 * head_dim // 16 * 2
    return head_dim - 2 * side, side, side


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=channels, norm_num_groups=1,
        shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False,
        mid_block_add_attention=True,
    ).eval()  # fmt: skip


def flux(head_dim: int = 16, **config) -> FluxPipeline:
    """Build a FLUX pipeline whose transformer has one double block, two single blocks and two heads."""
    torch.manual_seed(0)
    settings = dict(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=head_dim, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=rope_axes(head_dim),
    )  # fmt: skip
    transformer = FluxTransformer2DModel(**settings | config).eval()
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4), transformer=transformer,
        text_encoder=_clip(), tokenizer=tokenizer(), text_encoder_2=_t5(), tokenizer_2=tokenizer(),
    )  # fmt: skip
    return _quiet(pipe)


def sd3(head_dim: int = 16, **config) -> StableDiffusion3Pipeline:
    """Build an SD3 pipeline with two blocks; as in SD3.5, the first has an `attn2` that sees the image alone."""
    torch.manual_seed(0)
    settings = dict(
        sample_size=32, patch_size=1, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=head_dim, num_attention_heads=2, joint_attention_dim=WIDTH,
        caption_projection_dim=2 * head_dim,
        pooled_projection_dim=2 * WIDTH, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    transformer = SD3Transformer2DModel(**settings | config).eval()
    pipe = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4), transformer=transformer,
        text_encoder=_clip(CLIPTextModelWithProjection), tokenizer=tokenizer(),
        text_encoder_2=_clip(CLIPTextModelWithProjection), tokenizer_2=tokenizer(),
        text_encoder_3=_t5(), tokenizer_3=tokenizer(),
    )  # fmt: skip
    return _quiet(pipe)


def wan(head_dim: int = 16, **config) -> WanPipeline:
    """Build a Wan pipeline whose transformer has two blocks and two heads."""
    torch.manual_seed(0)
    return _quiet(WanPipeline(transformer=_wan_transformer(head_dim, **config), **_wan_parts()))


def wan_from_image(head_dim: int = 16, **config) -> WanImageToVideoPipeline:
    """Build a pipeline like Wan 2.2's, with a transformer each for high and low noise, and no image encoder."""
    torch.manual_seed(0)
    noisy, clean = (_wan_transformer(head_dim, in_channels=36, **config) for _ in range(2))
    pipe = WanImageToVideoPipeline(
        transformer=noisy, transformer_2=clean, image_encoder=None, image_processor=None, boundary_ratio=0.9,
        **_wan_parts(),
    )  # fmt: skip
    return _quiet(pipe)


def _wan_transformer(head_dim: int, **config) -> WanTransformer3DModel:
    settings = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=head_dim, in_channels=16,
        out_channels=16, text_dim=WIDTH, freq_dim=256, ffn_dim=32, num_layers=2,
        cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    return WanTransformer3DModel(**settings | config).eval()


def _wan_parts() -> dict:
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    return dict(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=vae,
        text_encoder=_t5(UMT5Config, UMT5EncoderModel), tokenizer=tokenizer(512),
    )  # fmt: skip


def cogvideox(head_dim: int = 16, **config) -> CogVideoXPipeline:
    """Build a CogVideoX pipeline whose transformer has two blocks and two heads."""
    torch.manual_seed(0)
    settings = dict(
        num_attention_heads=2, attention_head_dim=head_dim, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=WIDTH, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ).eval()  # fmt: skip
    pipe = CogVideoXPipeline(
        scheduler=CogVideoXDDIMScheduler(), vae=vae, text_encoder=_t5(), tokenizer=tokenizer(16),
        transformer=CogVideoXTransformer3DModel(**settings | config).eval(),
    )  # fmt: skip
    return _quiet(pipe)


def hunyuan(head_dim: int = 16, **config) -> HunyuanVideoPipeline:
    """Build a HunyuanVideo pipeline with a token refiner, a double block, a single block and two heads."""
    torch.manual_seed(0)
    settings = dict(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=head_dim, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=rope_axes(head_dim),
    )  # fmt: skip
    transformer = HunyuanVideoTransformer3DModel(**settings | config).eval()
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        norm_num_groups=4, act_fn="silu", scaling_factor=0.476986, spatial_compression_ratio=8,
        temporal_compression_ratio=4, mid_block_add_attention=True,
    ).eval()  # fmt: skip
    llama = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=4,
        num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
    )  # fmt: skip
    pipe = HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=vae, transformer=transformer,
        text_encoder=LlamaModel(llama).eval(), tokenizer=tokenizer(512),
        text_encoder_2=_clip(), tokenizer_2=tokenizer(),
    )  # fmt: skip
    return _quiet(pipe)


def _quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# These sizes give between 300 and 500 tokens, never a multiple of 128.
CALLS = {
    FluxPipeline: dict(height=48, width=40, max_sequence_length=19),
    StableDiffusion3Pipeline: dict(height=20, width=19, max_sequence_length=23),
    WanPipeline: dict(height=144, width=176, num_frames=9, max_sequence_length=21),
    WanImageToVideoPipeline: dict(height=96, width=112, num_frames=5, max_sequence_length=21),
    CogVideoXPipeline: dict(height=64, width=96, num_frames=9, max_sequence_length=16),
    HunyuanVideoPipeline: dict(
        height=80, width=112, num_frames=9, max_sequence_length=27,
        prompt_template={"template": "{}", "crop_start": 0},
    ),
}  # fmt: skip


def draw(pipe, prompt: str = "a red apple", seed: int = 0, **changes) -> torch.Tensor:
    """Run two steps of a tiny pipeline; returns float32 latents, unless `output_type` says otherwise."""
    call = dict(num_inference_steps=2, output_type="latent", return_dict=False) | CALLS[type(pipe)]
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt=prompt, generator=generator, **call | changes)[0].float()


def _chat_tokenizer(length: int = 512) -> PreTrainedTokenizerFast:
    """Build a tokenizer that reduces a chat to its last message."""
    made = tokenizer(length)
    made.chat_template = "{{ messages[-1]['content'] }}"
    return made


_LANGUAGE = dict(
    vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def z_image(head_dim: int = 16, **config) -> ZImagePipeline:
    """Build a Z-Image pipeline with two blocks after a refiner each for image and text, and two heads."""
    torch.manual_seed(0)
    settings = dict(
        in_channels=4, dim=2 * head_dim, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=rope_axes(head_dim), axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=_vae(4), tokenizer=_chat_tokenizer(),
        text_encoder=Qwen3Model(Qwen3Config(**_LANGUAGE, head_dim=8)).eval(),
        transformer=ZImageTransformer2DModel(**settings | config).eval(),
    )  # fmt: skip
    return _quiet(pipe)


def mochi(head_dim: int = 16, **config) -> MochiPipeline:
    """Build a Mochi pipeline whose transformer has two blocks and two heads."""
    torch.manual_seed(0)
    settings = dict(
        num_attention_heads=2, attention_head_dim=head_dim, num_layers=2, pooled_projection_dim=16, in_channels=12,
        text_embed_dim=WIDTH, time_embed_dim=4,
    )  # fmt: skip
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    pipe = MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae=vae.eval(), text_encoder=_t5(),
        tokenizer=tokenizer(256), transformer=MochiTransformer3DModel(**settings | config).eval(),
    )  # fmt: skip
    return _quiet(pipe)


def hunyuan15(head_dim: int = 16, **config) -> HunyuanVideo15Pipeline:
    """Build a HunyuanVideo 1.5 pipeline with two blocks after a token refiner, and two heads."""
    torch.manual_seed(0)
    settings = dict(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=head_dim, num_layers=2,
        num_refiner_layers=1, mlp_ratio=2, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=8,
        rope_axes_dim=rope_axes(head_dim), task_type="t2v",
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1, spatial_compression_ratio=16,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    pipe = HunyuanVideo15Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=vae.eval(), tokenizer=_chat_tokenizer(),
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_LANGUAGE, rope_parameters=rope)).eval(),
        text_encoder_2=_t5(), tokenizer_2=tokenizer(), guider=ClassifierFreeGuidance(guidance_scale=6.0),
        transformer=HunyuanVideo15Transformer3DModel(**settings | config).eval(),
    )  # fmt: skip
    pipe.tokenizer_max_length, pipe.prompt_template_encode_start_idx = 21, 0
    pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 9, 5
    return _quiet(pipe)


class _Guardrail(torch.nn.Module):
    """Replaces NVIDIA's guardrail, which Cosmos' pipelines insist on; the prompts of tests need none."""

    device = torch.device("cpu")

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video):
        return video


def cosmos(head_dim: int = 16, **config) -> Cosmos2TextToImagePipeline:
    """Build a Cosmos pipeline whose transformer has two blocks and two heads."""
    torch.manual_seed(0)
    settings = dict(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=head_dim, num_layers=2, mlp_ratio=2,
        text_embed_dim=WIDTH, adaln_lora_dim=4, max_size=(4, 64, 64), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip
    pipe = Cosmos2TextToImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), vae=wan().vae, text_encoder=_t5(),
        tokenizer=tokenizer(512), safety_checker=_Guardrail(),
        transformer=CosmosTransformer3DModel(**settings | config).eval(),
    )  # fmt: skip
    return _quiet(pipe)


def wan22(**config) -> WanPipeline:
    """Build a Wan 2.2 pipeline with two transformers, the second one for steps with less noise."""
    first = wan(**config)
    torch.manual_seed(1)
    second = WanTransformer3DModel.from_config(first.transformer.config).eval()
    return _quiet(WanPipeline(**{**first.components, "transformer_2": second}, boundary_ratio=0.95))


CALLS |= {
    ZImagePipeline: dict(height=40, width=30, max_sequence_length=64),
    MochiPipeline: dict(height=160, width=224, num_frames=13, max_sequence_length=23),
    HunyuanVideo15Pipeline: dict(height=160, width=224, num_frames=9),
    Cosmos2TextToImagePipeline: dict(height=272, width=304, max_sequence_length=21, negative_prompt=""),
}
