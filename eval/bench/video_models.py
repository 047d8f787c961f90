"""This module makes video transformers at their true size with random weights, and the inputs of one of their steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from dma_diffusers.eval.bench.random_model import random_model
from dma_diffusers.families import FAMILIES
from dma_diffusers.grids import of_video
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Neighborhood

_Random = Callable[..., torch.Tensor]

_TIMESTEP = 500  # timesteps go up to 1,000
_BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def _wan_text(config: Any, tokens: int, random: _Random) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": random(1, tokens, config.text_dim)}


def _hunyuan_text(config: Any, tokens: int, random: _Random) -> dict[str, torch.Tensor]:
    text = random(1, tokens, config.text_embed_dim)
    return {
        "encoder_hidden_states": text,
        "encoder_attention_mask": torch.ones_like(text[..., 0]),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "guidance": torch.full_like(text[0, :1, 0], 6000),
    }


@dataclass(frozen=True)
class Video:
    """A model, and the video that a step of it denoises, are described here.

    kind: a class of Diffusers. config: what differs from its defaults, which are those of the published model. clip:
    the video's size in words. latents: frames, rows and columns. text: tokens of text, none of them padding.
    text_inputs: makes the model's arguments that hold text. neighborhood: LOW within, SKIP beyond, text HIGH.
    """

    kind: str
    clip: str
    latents: tuple[int, int, int]
    text: int
    text_inputs: Callable[[Any, int, _Random], dict[str, torch.Tensor]]
    neighborhood: Neighborhood
    config: Mapping[str, Any] = field(default_factory=dict)

    def build(self, device: torch.device, seed: int) -> torch.nn.Module:
        """Make the model, as `random_model` does.

        The mask that HunyuanVideo makes of its text's padding hides nothing here and is taken away, since stock
        attention has no fast kernel that takes one.
        """
        model = random_model(self.kind, self.config, device, seed)
        if FAMILIES[self.kind].masks_text:
            for blocks in _block_lists(model).values():
                for block in blocks:
                    block.register_forward_pre_hook(_without_mask)
        return model

    def inputs(self, model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
        """Return the arguments of the model's forward call, on its device."""
        generator = torch.Generator(model.device).manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=generator.device, dtype=torch.bfloat16)

        return {
            "hidden_states": random(1, model.config.in_channels, *self.latents),
            "timestep": torch.full((1,), _TIMESTEP, device=generator.device),
            **self.text_inputs(model.config, self.text, random),
        }

    def layout(self, model: torch.nn.Module) -> Layout:
        """Return the layout of the tokens of its self-attention; in HunyuanVideo's, text comes last."""
        latents = SimpleNamespace(shape=(1, 1, *self.latents))
        grid = of_video(model, {"hidden_states": latents})
        video = grid[0] * grid[1] * grid[2]
        tokens = video if FAMILIES[self.kind].text == "none" else video + self.text
        return Layout(tokens, tokens, (video, tokens) if tokens > video else (0, 0), grid)


# These windows leave out nine tenths of the tiles. Of the windows of about that size that `simulate --search` proposes,
# they cut fewest tiles.
VIDEOS = {
    "wan-14b-720p": Video(
        "WanTransformer3DModel", "1280×720, 81 frames", (21, 90, 160), 512, _wan_text,
        Neighborhood((8, 24, 32), (1, 8, 32)),
    ),
    "hunyuan-720p": Video(
        "HunyuanVideoTransformer3DModel", "1280×720, 129 frames", (33, 90, 160), 256, _hunyuan_text,
        Neighborhood((12, 24, 32), (1, 8, 32)),
    ),
    "wan-1.3b-480p": Video(
        "WanTransformer3DModel", "832×480, 33 frames", (9, 60, 104), 512, _wan_text,
        Neighborhood((4, 8, 16), (1, 8, 16)), {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    ),
    "hunyuan-720p-5-layers": Video(
        "HunyuanVideoTransformer3DModel", "1280×720, 129 frames, 2 double and 3 single blocks", (33, 90, 160), 256,
        _hunyuan_text, Neighborhood((12, 24, 32), (1, 8, 32)), {"num_layers": 2, "num_single_layers": 3},
    ),
}  # fmt: skip
FULL_SIZE = ("wan-14b-720p", "hunyuan-720p")  # what is timed unless others are asked for


def named(name: str) -> Video:
    """Return the video of a name; raises ValueError for one that isn't in `VIDEOS`."""
    if name not in VIDEOS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(VIDEOS)}")
    return VIDEOS[name]


@contextmanager
def shortened(model: torch.nn.Module) -> Iterator[None]:
    """Leave the model one block of each kind: its steps then run the same kernels on the same sizes."""
    whole = _block_lists(model)
    for name, blocks in whole.items():
        setattr(model, name, blocks[:1])
    try:
        yield
    finally:
        for name, blocks in whole.items():
            setattr(model, name, blocks)


def _block_lists(model: torch.nn.Module) -> dict[str, torch.nn.ModuleList]:
    return {name: getattr(model, name) for name in _BLOCKS if hasattr(model, name)}


def _without_mask(block: torch.nn.Module, args: tuple) -> tuple:
    hidden, text, embedding, _, *others = args
    return hidden, text, embedding, None, *others
