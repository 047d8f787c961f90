"""Tiny ControlNets of transformers."""

from types import SimpleNamespace

import torch
from diffusers.models import controlnets
from diffusers.models.controlnets import controlnet_cosmos
from torch.nn.functional import interpolate

from tests.dma_diffusers import tiny_images
from tests.dma_diffusers.tiny_case import AXES, TEXT, Case, pack_squares, without_zeros
from tests.dma_diffusers.tiny_joint_images import COLUMNS, GRID, HEADS, ROWS, TOKENS, positions

LATENTS = (1, 4, 2 * ROWS, 2 * COLUMNS)


def several(case: Case, kind: str, **inputs) -> Case:
    """The same in a list of one."""
    case.model = getattr(controlnets, kind)([case.model])
    conditions = dict(controlnet_cond=[case.inputs["controlnet_cond"]], conditioning_scale=[1.0])
    case.inputs |= conditions | inputs
    return case


def flux(modes: int | None = None) -> Case:
    """The kind of control stands before the text, where there are several kinds."""
    model = controlnets.FluxControlNetModel(
        in_channels=4, num_layers=1, num_single_layers=1, joint_attention_dim=8, pooled_projection_dim=8,
        axes_dims_rope=AXES, num_mode=modes, **HEADS,
    )  # fmt: skip
    inputs = dict(
        img_ids=positions(), txt_ids=torch.zeros(TEXT, 3), pooled_projections=torch.randn(1, 8),
        controlnet_cond=torch.randn(1, TOKENS, 4), controlnet_mode=torch.tensor([[2]]) if modes else None,
    )  # fmt: skip
    first = int(bool(modes))
    return Case(
        without_zeros(model), (0, first + TEXT), GRID, torch.randn(1, 1, 2 * ROWS, 2 * COLUMNS), inputs, 2,
        pack=pack_squares, prompt=(first, first + TEXT), prompt_width=8,
    )  # fmt: skip


def flux_of_several() -> Case:
    return several(flux(modes=3), "FluxMultiControlNetModel", controlnet_mode=[torch.tensor([2])])


def sd3() -> Case:
    model = controlnets.SD3ControlNetModel(
        sample_size=32, in_channels=4, num_layers=2, joint_attention_dim=8, caption_projection_dim=32,
        pooled_projection_dim=8, out_channels=4, **HEADS,
    )  # fmt: skip
    inputs = dict(pooled_projections=torch.randn(1, 8), controlnet_cond=torch.randn(LATENTS))
    return Case(
        without_zeros(model), (TOKENS, TOKENS + TEXT), GRID, torch.randn(LATENTS), inputs, 2, prompt_width=8
    )


def sd3_without_text() -> Case:
    case = sd3()
    case.model = controlnets.SD3ControlNetModel(
        sample_size=32, in_channels=4, num_layers=2, joint_attention_dim=None, caption_projection_dim=32,
        pooled_projection_dim=8, out_channels=4, **HEADS,
    )  # fmt: skip
    without_zeros(case.model)
    case.names = ("hidden_states", None, "timestep")
    case.text, case.joint_calls, case.image_calls, case.draw = (0, 0), 0, 2, lambda: None
    return case


def qwen() -> Case:
    model = controlnets.QwenImageControlNetModel(
        in_channels=4, out_channels=1, num_layers=2, joint_attention_dim=8, axes_dims_rope=AXES, **HEADS
    )
    inputs = dict(img_shapes=[[(1, *GRID)]], controlnet_cond=torch.randn(1, TOKENS, 4))
    latents = torch.randn(1, 1, 2 * ROWS, 2 * COLUMNS)
    return Case(without_zeros(model), (0, TEXT), GRID, latents, inputs, 2, pack=pack_squares, prompt_width=8)


def hunyuan_dit() -> Case:
    case = tiny_images.hunyuan_dit()
    model = controlnets.HunyuanDiT2DControlNetModel(
        sample_size=8, patch_size=2, in_channels=4, transformer_num_layers=6, cross_attention_dim=8,
        cross_attention_dim_t5=8, pooled_projection_dim=4, hidden_size=32, text_len=TEXT, text_len_t5=5, **HEADS,
    )  # fmt: skip
    case.model = without_zeros(model)
    case.inputs |= dict(controlnet_cond=torch.randn(LATENTS), conditioning_scale=1.0)
    return case


def cosmos() -> Case:
    model = controlnets.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=7, latent_channels=6, model_channels=32, mlp_ratio=2.0, text_embed_dim=8,
        adaln_lora_dim=4, max_size=(4, 32, 32), **HEADS,
    )  # fmt: skip
    if not hasattr(controlnet_cosmos, "transforms"):  # which are torchvision's
        resize = SimpleNamespace(resize=lambda image, size, **_: interpolate(image, size))
        controlnet_cosmos.transforms = SimpleNamespace(
            functional=resize, InterpolationMode=SimpleNamespace(NEAREST="nearest")
        )
    inputs = dict(
        controls_latents=torch.randn(1, 5, 3, 18, 22), condition_mask=torch.ones(1, 1, 3, 18, 22),
        padding_mask=torch.zeros(1, 1, 18, 22),
    )  # fmt: skip
    return Case(
        without_zeros(model), (0, 0), (), torch.randn(1, 4, 3, 18, 22), inputs, 0, image_calls=2,
        names=("latents", "encoder_hidden_states", "timestep"), length=3 * 9 * 11,
    )  # fmt: skip


CASES = {
    "controlnet of cosmos": cosmos,
    "controlnet of flux": flux,
    "controlnet of flux, for several kinds": lambda: flux(modes=3),
    "controlnet of hunyuan_dit": hunyuan_dit,
    "controlnet of qwen": qwen,
    "controlnet of sd3": sd3,
    "controlnet of sd3, without text": sd3_without_text,
    "controlnets of flux": flux_of_several,
    "controlnets of hunyuan_dit": lambda: several(hunyuan_dit(), "HunyuanDiT2DMultiControlNetModel"),
    "controlnets of qwen": lambda: several(qwen(), "QwenImageMultiControlNetModel"),
    "controlnets of sd3": lambda: several(sd3(), "SD3MultiControlNetModel"),
}
