"""This module makes FLUX.1-dev and Qwen-Image at true size with random weights, and the inputs of one of the steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from dma_diffusers.eval.bench.random_model import random_model
from dma_diffusers.eval.bench.shapes import GRIDS

_TIMESTEP, _GUIDANCE = 0.5, 3.5
_FLUX_DEV = {"guidance_embeds": True}  # everything else is the class's default

_Random = Callable[..., torch.Tensor]


def _of_flux(config: Any, text: int, grid: tuple[int, int], random: _Random) -> dict[str, Any]:
    rows, columns = grid
    pooled = random(1, config.pooled_projection_dim)
    device, dtype = pooled.device, pooled.dtype
    positions = torch.zeros(rows, columns, 3, device=device, dtype=dtype)
    positions[..., 1] = torch.arange(rows, device=device)[:, None]
    positions[..., 2] = torch.arange(columns, device=device)
    return {
        "pooled_projections": pooled,
        "guidance": torch.full((1,), _GUIDANCE, device=device),
        "img_ids": positions.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=device, dtype=dtype),
    }


def _of_qwen(config: Any, text: int, grid: tuple[int, int], random: _Random) -> dict[str, Any]:
    return {"img_shapes": [[(1, *grid)]]}


@dataclass(frozen=True)
class Image:
    """A step of a model denoises this picture: its text tokens, and the rows and columns of all others.

    config: what differs from the defaults of Diffusers' class, which are those of the published model. kind: the class.
    own_inputs: makes those of the model's arguments that others have not.
    """

    text: int
    grid: tuple[int, int]
    config: Mapping[str, Any] = field(default_factory=lambda: _FLUX_DEV)
    kind: str = "FluxTransformer2DModel"
    own_inputs: Callable[[Any, int, tuple[int, int], _Random], dict[str, Any]] = _of_flux

    def build(self, device: torch.device, seed: int) -> torch.nn.Module:
        """Make the model, as `random_model` does."""
        return random_model(self.kind, self.config, device, seed)

    def inputs(self, model: torch.nn.Module, seed: int) -> dict[str, Any]:
        """Return the arguments of the model's forward call, on its device."""
        device, config = model.device, model.config
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=torch.bfloat16)

        rows, columns = self.grid
        return {
            "hidden_states": random(1, rows * columns, config.in_channels),
            "encoder_hidden_states": random(1, self.text, config.joint_attention_dim),
            "timestep": torch.full((1,), _TIMESTEP, device=device, dtype=torch.bfloat16),
            **self.own_inputs(config, self.text, self.grid, random),
        }


IMAGES = {name: Image(*GRIDS[name]) for name in ("flux-1k", "flux-2k", "flux-4k")} | {
    "qwen-1k": Image(512, (64, 64), {}, "QwenImageTransformer2DModel", _of_qwen),
}


def named(name: str) -> Image:
    """Return the picture of a name; raises ValueError for one that isn't in `IMAGES`."""
    if name not in IMAGES:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(IMAGES)}")
    return IMAGES[name]
