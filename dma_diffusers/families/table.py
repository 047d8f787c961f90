"""Every transformer and ControlNet that Diffusers exports: what is known of its family, or why it can't be had."""

from dataclasses import replace
from functools import partial

from dma_diffusers import grids
from dma_diffusers.families import published, texts
from dma_diffusers.families.family import Family

# Joint attention over text, image; in FLUX's single blocks as one sequence.
_FLUX = Family("first", single_stream=True, timestep_scale=1, grid=grids.of_positions, grid_on_device=True)
_FLUX_1 = replace(
    _FLUX,
    published=published.FLUX_1_NEIGHBORHOOD,
    dense_first=published.FLUX_1_DENSE,
    quality_first=published.FLUX_1_QUALITY,
)
_FLUX_CONTROL = replace(_FLUX, text_tokens=texts.with_control_mode)
_COGVIEW = Family(
    "first",
    timestep_scale=1000,
    grid=grids.of_image,
    falls_back="those with a mask of the text, which is of tokens × tokens",
)
_COGVIDEO = Family("first", timestep_scale=1000, grid=grids.of_frames)
_QWEN = Family("first", masks_text=True, timestep_scale=1, grid=grids.of_shapes)
_HUNYUAN_VIDEO = Family("last", text_only=("refiner",), masks_text=True, timestep_scale=1000)
# An IP-Adapter brings image_proj.
_SD3 = Family("last", cross_attention=("image_proj",), timestep_scale=1000, grid=grids.of_image)
_JOY = Family("last", timestep_scale=1000)
_Z_IMAGE = Family(
    "last",
    pads_grid=True,
    text_only=("context_refiner", "siglip_refiner"),
    masks_text=True,
    timestep="t",
    timestep_scale=1,
    timestep_rises=True,
    grid=grids.of_list,
)

# Self-attention, and cross-attention to the text.
_CROSS = Family(cross_attention=("attn2",), timestep_scale=1000)
_IMAGE = replace(_CROSS, grid=grids.of_image)
_VIDEO = replace(_CROSS, grid=grids.of_video)
_WAN = replace(_VIDEO, dense_first=published.WAN_DENSE, quality_first=published.WAN_QUALITY)
_COSMOS = replace(_CROSS, timestep_scale=None)
_LTX_2 = replace(
    _CROSS,
    cross_attention=("attn2", "_to_video_attn", "_to_audio_attn"),
    sound=("audio_attn1",),
)
_KANDINSKY = Family(
    cross_attention=("cross_attention",), text_only=("text_transformer_blocks",), grid=grids.of_channels_last
)
_AUDIO = Family(cross_attention=("cross_attn",))


def _refused(reason: str) -> Family:
    return Family(refusal=reason)


_LINEAR = _refused("its self-attention is linear: it has no softmax, and no pairs of tokens to be quantised")
_FLEX = _refused("it attends with flex attention by block masks, which the kernels do not take")
_OF_UNET = _refused("it is a copy of parts of a UNet; only transformers are supported")

TRANSFORMERS = {
    "AceStepTransformer1DModel": replace(
        _AUDIO, timestep_scale=1, falls_back="those in sliding windows, which is every other layer"
    ),
    "AllegroTransformer3DModel": _VIDEO,
    "AnyFlowFARTransformer3DModel": _FLEX,
    "AnyFlowTransformer3DModel": replace(_CROSS, grid=grids.of_frames),
    "AuraFlowTransformer2DModel": Family(
        "first", single_stream=True, text_tokens=texts.with_registers, timestep_scale=1, grid=grids.of_image
    ),
    # Its text is summed up in more or fewer tokens, as the prompt is long.
    "BriaFibo2Transformer2DModel": Family(
        "first",
        pads_grid=True,
        cross_attention=("cross_attention",),
        text_only=("perceiver",),
        image_only=("noise_refiner",),
        timestep_scale=1,
        grid=grids.of_image_alone,
        falls_back="those with images to be edited, or with prompts of several lengths",
    ),
    "BriaFiboTransformer2DModel": replace(_FLUX, masks_text=True, timestep_scale=1000),
    "BriaTransformer2DModel": replace(_FLUX, timestep_scale=1000),
    "ChromaTransformer2DModel": replace(
        _FLUX, falls_back="those with a mask of tokens × tokens, as its pipeline makes"
    ),
    "ChronoEditTransformer3DModel": _VIDEO,
    "CogVideoXTransformer3DModel": replace(
        _COGVIDEO, dense_first=published.COGVIDEO_DENSE, quality_first=published.COGVIDEO_QUALITY
    ),
    "CogView3PlusTransformer2DModel": replace(_COGVIEW, falls_back=""),
    "CogView4Transformer2DModel": _COGVIEW,
    "ConsisIDTransformer3DModel": _COGVIDEO,
    # The queries of its second call are those of the video alone.
    "Cosmos3OmniTransformer": Family(
        "first",
        single_stream=True,
        text_tokens=texts.of_cosmos3,
        timestep="vision_timesteps",
        grid=grids.of_token_shapes,
    ),
    # Its timestep is ln(sigma) / 4 in the first release's pipelines, sigma / (1 + sigma) in those since.
    "CosmosTransformer3DModel": replace(_COSMOS, grid=grids.of_video),
    "DiTTransformer2DModel": _IMAGE,
    "DreamLiteTransformer2DModel": replace(_IMAGE, timestep_scale=None),
    "EasyAnimateTransformer3DModel": Family("first", timestep_scale=1000, grid=grids.of_video),
    "ErnieImageTransformer2DModel": Family(
        "last",
        single_stream=True,
        text_tokens=partial(texts.of_prompt, name="text_bth"),
        masks_text=True,
        timestep_scale=1000,
        grid=grids.of_image,
    ),
    "Flux2Transformer2DModel": _FLUX,
    "Flux3Transformer2DModel": replace(_FLUX, text_only=("txt_mode_blocks",), image_only=("mode_blocks",)),
    "FluxTransformer2DModel": _FLUX_1,
    "GlmImageTransformer2DModel": replace(_COGVIEW, timestep_scale=None),
    "HeliosTransformer3DModel": replace(_CROSS, timestep_scale=None),
    "HiDreamImageTransformer2DModel": Family(
        "last",
        single_stream=True,
        text_tokens=texts.of_hidream,
        timestep="timesteps",
        timestep_scale=1000,
        grid=grids.of_square_image,
    ),
    "HunyuanDiT2DModel": _IMAGE,
    "HunyuanImageTransformer2DModel": replace(_HUNYUAN_VIDEO, grid=grids.of_video),
    # The tokens of a given image count as text: they stand with it, and are conditions like it.
    "HunyuanVideo15Transformer3DModel": replace(_HUNYUAN_VIDEO, squares_masks=True, grid=grids.of_video),
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN_VIDEO,
    "HunyuanVideoTransformer3DModel": replace(
        _HUNYUAN_VIDEO,
        grid=grids.of_video,
        published=published.HUNYUAN_VIDEO_NEIGHBORHOOD,
        dense_first=published.HUNYUAN_VIDEO_DENSE,
        quality_first=published.HUNYUAN_VIDEO_QUALITY,
    ),
    "Ideogram4Transformer2DModel": _refused(
        "it masks tokens × tokens, which the kernels do not take: each token sees those of its own segment"
    ),
    "JoyImageEditPlusTransformer3DModel": replace(_JOY, grid=grids.of_shape_list),
    "JoyImageEditTransformer3DModel": replace(_JOY, grid=grids.of_items),
    "Kandinsky5Transformer3DModel": replace(
        _KANDINSKY,
        timestep_scale=1000,
        falls_back="those with sparse_params, which ask for flex attention",
    ),
    "Kandinsky6SRTransformer3DModel": _FLEX,
    "Kandinsky6Transformer3DModel": replace(
        _KANDINSKY,
        cross_attention=("cross_attention",),
        sound=("audio_dec_block.self_attention",),
    ),
    "Krea2Transformer2DModel": Family(
        "first",
        single_stream=True,
        text_only=("text_fusion",),
        masks_text=True,
        timestep_scale=1,
        grid=grids.of_joint_positions,
        grid_on_device=True,
    ),
    "LTX2VideoTransformer3DModel": replace(_LTX_2, grid=grids.of_lengths),
    "LTXVideoTransformer3DModel": replace(_CROSS, grid=grids.of_lengths),
    "LatteTransformer3DModel": _CROSS,  # its tokens attend within a frame, and within a place over time
    "LongCatAudioDiTTransformer": replace(_AUDIO, timestep_scale=1),
    "LongCatImageTransformer2DModel": _FLUX,
    # The image begins where the text ends, without its padding.
    "Lumina2Transformer2DModel": Family(
        "first",
        pads_grid=True,
        text_only=("context_refiner",),
        image_only=("noise_refiner",),
        timestep_scale=1,
        timestep_rises=True,
        grid=grids.of_image_alone,
        falls_back="those with prompts of several lengths",
    ),
    "LuminaNextDiT2DModel": replace(_IMAGE, timestep_scale=1, timestep_rises=True),
    "MiniMaxH3Transformer3DModel": Family("first", single_stream=True, text_only=("refiner",)),
    "MiniMaxMusic3RVQDepthDecoder": Family(),
    "MiniMaxMusic3Transformer1DModel": Family(),
    "MochiTransformer3DModel": Family(
        "last", drops_padding=True, timestep_scale=1000, timestep_rises=True, grid=grids.of_video
    ),
    "MotifVideoTransformer3DModel": Family(
        "last", cross_attention=("cross_attn",), masks_text=True, grid=grids.of_video
    ),
    # The queries are those of the image alone.
    "NucleusMoEImageTransformer2DModel": replace(_QWEN, text="last"),
    "OmniGenTransformer2DModel": _refused(
        "it masks tokens × tokens, which the kernels do not take: its text is causal, its images are not"
    ),
    "OvisImageTransformer2DModel": _FLUX,
    # The queries are those of the image alone.
    "PRXTransformer2DModel": Family("first", masks_text=True, timestep_scale=1, grid=grids.of_image),
    "PixArtTransformer2DModel": _IMAGE,
    "PriorTransformer": Family(
        "first",
        single_stream=True,
        text_tokens=texts.of_prior,
        falls_back="those with a mask of the text, which is causal then",
    ),
    # The queries of its last call are those of the picture to be drawn alone.
    "QwenImage21Transformer2DModel": replace(
        _QWEN,
        single_stream=True,
        text_tokens=texts.of_qwen21,
        falls_back="those of the text, which are causal, and of pictures among it",
    ),
    "QwenImageTransformer2DModel": _QWEN,
    "RFD4ProteinaTransformer": _refused(
        "it adds a bias to each pair of tokens, which the kernels do not take"
    ),
    "SD3Transformer2DModel": _SD3,
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaWMLTX2RefinerTransformer3DModel": replace(_LTX_2, timestep_scale=None),
    "SanaWMTransformer3DModel": _refused(
        "most of its self-attention is linear, and the rest has no processor that could be replaced"
    ),
    "SkyReelsV2Transformer3DModel": _VIDEO,
    "StableAudio3DiTModel": _AUDIO,
    "StableAudioDiTModel": replace(_CROSS, timestep_scale=None),
    "T5FilmDecoder": _refused("it computes its softmax itself, and never asks PyTorch for attention"),
    "Transformer2DModel": replace(_IMAGE, timestep_scale=None),
    "TransformerTemporalModel": Family(),
    "WanAnimate2Transformer3DModel": replace(
        _AUDIO, falls_back="those of the video to be drawn, which ask for flex attention"
    ),
    "WanAnimateTransformer3DModel": replace(_VIDEO, cross_attention=("attn2", "face_adapter")),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _VIDEO,
    "ZImageTransformer2DModel": _Z_IMAGE,
}

CONTROLNETS = {
    "ControlNetModel": _OF_UNET,
    "ControlNetUnionModel": _OF_UNET,
    "ControlNetXSAdapter": _OF_UNET,
    "CosmosControlNetModel": _COSMOS,
    "FluxControlNetModel": _FLUX_CONTROL,
    "FluxMultiControlNetModel": _FLUX_CONTROL,
    "HunyuanDiT2DControlNetModel": _IMAGE,
    "HunyuanDiT2DMultiControlNetModel": _IMAGE,
    "MultiControlNetModel": _OF_UNET,
    "MultiControlNetUnionModel": _OF_UNET,
    "QwenImageControlNetModel": _QWEN,
    "QwenImageMultiControlNetModel": _QWEN,
    "SD3ControlNetModel": _SD3,
    "SD3MultiControlNetModel": _SD3,
    "SanaControlNetModel": _LINEAR,
    "SparseControlNetModel": _OF_UNET,
    "UNetControlNetXSModel": _OF_UNET,
    "ZImageControlNetModel": replace(_Z_IMAGE, borrowed=("noise_refiner", "context_refiner")),
}

FAMILIES = TRANSFORMERS | CONTROLNETS
