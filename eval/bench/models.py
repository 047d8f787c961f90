"""This module lists transformers of published sizes with random weights, and makes the inputs of their steps."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from dma_diffusers.eval.bench.random_model import random_model
from dma_diffusers.eval.bench.shapes import GRIDS
from dma_diffusers.kernels.tiling.policies import Neighborhood

_Random = Callable[..., torch.Tensor]
_InputMaker = Callable[[Any, int, tuple[int, ...], _Random], dict[str, Any]]

_BLOCKS = ("blocks", "transformer_blocks", "single_transformer_blocks")
_FLUX_DEV = {"guidance_embeds": True}  # everything else is the class's default
_IMAGE_TEXT = 512


class Workload(Protocol):
    """A workload is one step of a model: it makes the model, anew each time, and the inputs of a forward call.

    kind: the model's class. size: what is denoised, in words. grid: the sides of what the tokens lie on, () where that
    isn't known. neighborhood: a window that was chosen for this very size. is_video: tells if it denoises a clip.
    """

    kind: str
    size: str
    grid: tuple[int, ...]
    neighborhood: Neighborhood | None
    is_video: bool

    def build(self, device: torch.device, seed: int) -> torch.nn.Module: ...

    def inputs(self, model: torch.nn.Module, seed: int) -> dict[str, Any]: ...


def _flux_inputs(config: Any, text: int, grid: tuple[int, ...], random: _Random) -> dict[str, Any]:
    rows, columns = grid
    pooled = random(1, config.pooled_projection_dim)
    device, dtype = pooled.device, pooled.dtype
    positions = torch.zeros(rows, columns, 3, device=device, dtype=dtype)
    positions[..., 1] = torch.arange(rows, device=device)[:, None]
    positions[..., 2] = torch.arange(columns, device=device)
    return _packed_image(config, text, grid, random) | {
        "pooled_projections": pooled,
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": positions.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }


def _qwen_inputs(config: Any, text: int, grid: tuple[int, ...], random: _Random) -> dict[str, Any]:
    return _packed_image(config, text, grid, random) | {"img_shapes": [[(1, *grid)]]}


def _packed_image(config: Any, text: int, grid: tuple[int, ...], random: _Random) -> dict[str, Any]:
    rows, columns = grid
    hidden = random(1, rows * columns, config.in_channels)
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": random(1, text, config.joint_attention_dim),
        "timestep": torch.full((1,), 0.5, device=hidden.device, dtype=hidden.dtype),
    }


def _wan_inputs(config: Any, text: int, grid: tuple[int, ...], random: _Random) -> dict[str, Any]:
    return _latents(config, grid, random) | {"encoder_hidden_states": random(1, text, config.text_dim)}


def _hunyuan_inputs(config: Any, text: int, grid: tuple[int, ...], random: _Random) -> dict[str, Any]:
    embedded = random(1, text, config.text_embed_dim)
    return _latents(config, grid, random) | {
        "encoder_hidden_states": embedded,
        "encoder_attention_mask": torch.ones_like(embedded[..., 0]),
        "pooled_projections": random(1, config.pooled_projection_dim),
        "guidance": torch.full_like(embedded[0, :1, 0], 6000),
    }


def _latents(config: Any, grid: tuple[int, ...], random: _Random) -> dict[str, Any]:
    frames, rows, columns = grid
    latents = random(1, config.in_channels, frames, 2 * rows, 2 * columns)  # a token is a patch of 1×2×2
    return {"hidden_states": latents, "timestep": torch.full((1,), 500, device=latents.device)}


# Other classes than these can be measured in a pipeline, which makes its transformer's inputs itself.
INPUTS: dict[str, _InputMaker] = {
    "FluxTransformer2DModel": _flux_inputs,
    "QwenImageTransformer2DModel": _qwen_inputs,
    "WanTransformer3DModel": _wan_inputs,
    "HunyuanVideoTransformer3DModel": _hunyuan_inputs,
}
TEXT_TOKENS = dict.fromkeys(INPUTS, _IMAGE_TEXT) | {"HunyuanVideoTransformer3DModel": 256}


@dataclass(frozen=True)
class Published:
    """A model of a published size, with random weights; a `Workload`.

    config: what differs from the defaults of the class, which are those of the published model. text: tokens of text,
    none of them padding.
    """

    kind: str
    size: str
    grid: tuple[int, ...]
    text: int
    config: Mapping[str, Any] = field(default_factory=dict)
    neighborhood: Neighborhood | None = None

    @property
    def is_video(self) -> bool:
        return len(self.grid) == 3

    def build(self, device: torch.device, seed: int) -> torch.nn.Module:
        """Make the model, as `random_model` does."""
        return without_mask(random_model(self.kind, self.config, device, seed))

    def inputs(self, model: torch.nn.Module, seed: int) -> dict[str, Any]:
        """Return the arguments of the model's forward call, on its device."""
        return random_inputs(model, self.text, self.grid, seed)


def random_inputs(model: torch.nn.Module, text: int, grid: tuple[int, ...], seed: int) -> dict[str, Any]:
    """Return the arguments of a forward call of a model whose class is one of `INPUTS`, on its device."""
    generator = torch.Generator(model.device).manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=generator.device, dtype=torch.bfloat16)

    return INPUTS[type(model).__name__](model.config, text, grid, random)


def without_mask(model: torch.nn.Module) -> torch.nn.Module:
    """Take away the mask that HunyuanVideo makes of its text's padding, and return the model.

    No text that is measured has padding, so the mask hides nothing, and stock attention has no fast kernel that takes
    one.
    """
    if type(model).__name__ == "HunyuanVideoTransformer3DModel":
        for blocks in _block_lists(model).values():
            for block in blocks:
                block.register_forward_pre_hook(_drop_mask)
    return model


def _drop_mask(block: torch.nn.Module, args: tuple) -> tuple:
    hidden, text, embedding, _, *others = args
    return hidden, text, embedding, None, *others


def _flux_dev(size: str, grid: str) -> Published:
    text, sides = GRIDS[grid]
    return Published("FluxTransformer2DModel", size, sides, text, _FLUX_DEV)


_HUNYUAN_WINDOW = Neighborhood((12, 24, 32), (1, 8, 32))
# The videos' windows leave out nine tenths of the tiles. Of the windows of about that size that `simulate --search`
# proposes, they cut fewest tiles.
MODELS: dict[str, Published] = {
    "flux-dev-1k": _flux_dev("1024×1024", "flux-1k"),
    "flux-dev-2k": _flux_dev("2048×2048", "flux-2k"),
    "flux-dev-4k": _flux_dev("4096×4096", "flux-4k"),
    "qwen-image-1k": Published("QwenImageTransformer2DModel", "1024×1024", (64, 64), _IMAGE_TEXT),
    "wan-14b-720p": Published(
        "WanTransformer3DModel", "1280×720, 81 frames", (21, 45, 80), 512,
        neighborhood=Neighborhood((8, 24, 32), (1, 8, 32)),
    ),
    "hunyuan-720p": Published(
        "HunyuanVideoTransformer3DModel", "1280×720, 129 frames", (33, 45, 80), 256, neighborhood=_HUNYUAN_WINDOW
    ),
    "wan-1.3b-480p": Published(
        "WanTransformer3DModel", "832×480, 33 frames", (9, 30, 52), 512,
        {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}, Neighborhood((4, 8, 16), (1, 8, 16)),
    ),
    "hunyuan-720p-5-layers": Published(
        "HunyuanVideoTransformer3DModel", "1280×720, 129 frames, 2 double and 3 single blocks", (33, 45, 80), 256,
        {"num_layers": 2, "num_single_layers": 3}, _HUNYUAN_WINDOW,
    ),
}  # fmt: skip


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
    return {
        name: blocks
        for name in _BLOCKS
        if isinstance(blocks := getattr(model, name, None), torch.nn.ModuleList)
    }
