"""Draw batches of scenes on the device: ``grid_sample`` places sprites on a coloured background."""

import numpy as np
import torch
import torch.nn.functional as F

from dma_diffusers.pipelines.demo_training.batches import SceneBatch
from dma_diffusers.pipelines.demo_training.concepts import BACKGROUNDS, TINTS

_LEVELS = 3


class SceneRenderer:
    """Draws scenes from sprites.

    Args:
        sprites: uint8 ``[N, S, S, 4]``, one per concept, with straight alpha; S is a multiple of 8.
        device: the device to draw on.
    """

    def __init__(self, sprites: np.ndarray, device: torch.device):
        rgba = torch.from_numpy(sprites).to(device).permute(0, 3, 1, 2).float() / 255
        rgba[:, :3] *= rgba[:, 3:]  # interpolation needs premultiplied colours
        self.size = rgba.shape[-1]
        self.textures = mipmaps(rgba)
        self.backgrounds = colour_table(BACKGROUNDS, device)
        self.tints = colour_table(TINTS, device)

    @torch.no_grad()
    def __call__(self, scenes: SceneBatch, resolution: int) -> torch.Tensor:
        """Draw ``scenes``; returns float32 ``[B, 3, resolution, resolution]`` in [-1, 1]."""
        picture = self.backgrounds[scenes.background][:, :, None, None]
        picture = picture.expand(-1, -1, resolution, resolution)
        for concept, tint, place in zip(
            scenes.concept.unbind(1), scenes.tint.unbind(1), scenes.place.unbind(1), strict=True
        ):
            rgb, alpha = self._object(concept, tint, place, resolution)
            picture = picture * (1 - alpha) + rgb
        return picture * 2 - 1

    def _object(self, concept, tint, place, resolution: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y, side = place.clamp(min=1e-3).unbind(1)
        pixel = (torch.arange(resolution, device=place.device) + 0.5) / resolution
        u = ((pixel - x[:, None]) / side[:, None] + 0.5)[:, None, :].expand(-1, resolution, -1)
        v = ((pixel - y[:, None]) / side[:, None] + 0.5)[:, :, None].expand(-1, -1, resolution)
        minification = torch.log2(self.size / (side * resolution))
        rgba = sample(self.textures[concept.clamp(min=0)], u, v, minification)
        rgb, alpha = (rgba * (concept >= 0)[:, None, None, None]).split([3, 1], dim=1)
        tinted = _tint(rgb, alpha, self.tints[tint.clamp(min=0)][:, :, None, None])
        return torch.where((tint >= 0)[:, None, None, None], tinted, rgb), alpha


def mipmaps(rgba: torch.Tensor) -> torch.Tensor:
    """Put sprites ``[N, 4, S, S]`` at full, half and quarter size into one texture ``[N, 4, S, 1.5 S]``."""
    half, quarter = F.avg_pool2d(rgba, 2), F.avg_pool2d(rgba, 4)
    below = F.pad(quarter, (0, quarter.shape[-1], 0, quarter.shape[-1]))
    return torch.cat([rgba, torch.cat([half, below], dim=2)], dim=3)


def sample(
    textures: torch.Tensor, u: torch.Tensor, v: torch.Tensor, minification: torch.Tensor
) -> torch.Tensor:
    """Read the premultiplied colours ``[B, 4, H, W]`` of sprites at given coordinates.

    Args:
        textures: ``[B, 4, S, 1.5 S]`` from :func:`mipmaps`.
        u, v: ``[B, H, W]``, the horizontal and vertical coordinate; a sprite is transparent outside [0, 1].
        minification: ``[B]``, log2 of the sprite pixels per drawn pixel.
    """
    inside = (u > 0) & (u < 1) & (v > 0) & (v < 1)
    level = minification.round().clamp(0, _LEVELS - 1)
    scale = 0.5 ** level[:, None, None]
    left = (level > 0)[:, None, None].float()
    top = (level > 1)[:, None, None] * 0.5
    texture_u = (left + u * scale) / 1.5 * 2 - 1
    texture_v = (top + v * scale) * 2 - 1
    grid = torch.stack([texture_u, texture_v], dim=-1)
    return F.grid_sample(textures, grid, align_corners=False) * inside[:, None]


def _tint(rgb: torch.Tensor, alpha: torch.Tensor, tint: torch.Tensor) -> torch.Tensor:
    """Recolour premultiplied ``rgb``: its lightness selects a colour from black over ``tint`` to white."""
    weights = rgb.new_tensor([0.299, 0.587, 0.114])[:, None, None]
    light = (rgb * weights).sum(1, keepdim=True) / alpha.clamp(min=1e-3)
    light = 0.15 + 0.75 * light
    dark = tint * (2 * light).clamp(max=1)
    return (dark + (1 - dark) * (2 * light - 1).clamp(min=0)) * alpha


def colour_table(colours: dict[str, str], device: torch.device) -> torch.Tensor:
    """Turn colours (word -> sRGB, "#rrggbb") into float32 ``[N, 3]`` in [0, 1]."""
    rows = [[int(value[i : i + 2], 16) / 255 for i in (1, 3, 5)] for value in colours.values()]
    return torch.tensor(rows, device=device)
