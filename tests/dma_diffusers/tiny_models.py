"""A tiny model of every family, and a call of it whose text and grid are known."""

from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from tests import tiny_pipelines

TEXT = 21  # tokens
AXES = tiny_pipelines.rope_axes(16)


@dataclass
class Case:
    """One call of a model.

    text: of joint calls. grid: the image's or the video's. latents: as the VAE has them. pack: the pipeline's, to
    `hidden_states`. inputs: the model's other arguments. joint_calls, image_calls: of attention; the latter have the
    image or the video alone.
    """

    model: torch.nn.Module
    text: tuple[int, int]
    grid: tuple[int, ...]
    latents: torch.Tensor
    inputs: dict
    joint_calls: int
    image_calls: int = 0
    pack: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents

    @property
    def tokens(self) -> int:
        return torch.Size(self.grid).numel()

    def texts(self, number: int) -> list[torch.Tensor]:
        """Different texts for the model."""
        config = self.model.config
        names = ("joint_attention_dim", "text_dim", "text_embed_dim", "caption_channels")
        width = next(config[name] for name in names if config.get(name))
        return [torch.randn(self.latents.shape[0], TEXT, width) for _ in range(number)]

    def run(self, text: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.pack(self.latents if latents is None else latents)
        timestep = torch.full((hidden.shape[0],), 0.5)
        inputs = {"timestep": timestep, "return_dict": False, **self.inputs}
        return self.model(hidden_states=hidden, encoder_hidden_states=text, **inputs)[0]

    def keys(self, text: torch.Tensor, latents: torch.Tensor | None = None) -> torch.Tensor:
        """Of the first attention call that has all of the image or the video: `[B, H, S, D]`."""
        with Keys(self.tokens) as mode:
            self.run(text, latents)
        return mode.seen[0]


class Keys(TorchFunctionMode):
    """Records the keys of every attention call over a sequence that holds all of the image."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            query, key = [*args, *(kwargs or {}).values()][:2]
            if query.shape[2] >= self.tokens:
                self.seen.append(key)
        return func(*args, **(kwargs or {}))


def pack_squares(latents: torch.Tensor) -> torch.Tensor:
    """Two by two, as FLUX's pipeline does."""
    return diffusers.FluxPipeline._pack_latents(latents, *latents.shape)


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


def cogvideox(frames: int = 3, **config) -> Case:
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=2, sample_width=24, sample_height=20, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT, **config,
    )  # fmt: skip
    return Case(model, (0, TEXT), (3, 10, 12), torch.randn(1, frames, 4, 20, 24), {}, 2)


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


CASES = {
    "chroma": chroma,
    "cogvideox": cogvideox,
    "cogvideox, frames in patches": lambda: cogvideox(
        6, patch_size_t=2, use_rotary_positional_embeddings=True
    ),
    "flux": flux,
    "flux, single blocks alone": lambda: flux(double=0),
    "flux2": flux2,
    "hunyuan": hunyuan,
    "ltx": ltx,
    "qwen": qwen,
    "sd3": sd3,
    "wan": wan,
    "wan, as much text as video": wan_with_as_much_text_as_video,
}


def make(name: str) -> Case:
    """The case of this name, the same one every time."""
    torch.manual_seed(0)
    case = CASES[name]()
    case.model.eval()
    return case
