"""Precision maps: which class each pair (Q tile, KV tile) gets, as the kernel walks it.

The kernel of one Q tile walks three contiguous phases, each of one kind of tile: HIGH, LOW, and MASKED, the
tiles that a fine mask cuts (the causal diagonal, the end of the keys), which are HIGH too. Splitting the walk
keeps precision out of the loops' bodies (DMA, arXiv 2604.03950).
"""

from dataclasses import dataclass
from enum import IntEnum

import torch

from dma_diffusers.kernels.layout import Layout

TILE = 128


class Class(IntEnum):
    """What a policy says of one pair of tiles."""

    HIGH = 0
    LOW = 1
    SKIP = 2


class Phase(IntEnum):
    """The kernel's loops over one class each, in the order in which they run."""

    HIGH = 0
    LOW = 1
    MASKED = 2


def tiles(length: int) -> int:
    """How many map tiles `length` tokens take."""
    return -(-length // TILE)


@dataclass(frozen=True)
class PrecisionMap:
    """For each Q tile, the KV tiles it visits, in the kernel's order.

    indices: int32 `[B or 1, H or 1, q_tiles, n]`, KV tile numbers, ascending within each phase.
    bounds: int32 `[B or 1, H or 1, q_tiles, 3]`, where each phase ends in `indices`.
    """

    indices: torch.Tensor
    bounds: torch.Tensor

    def uses(self, phase: Phase) -> bool:
        """Whether any Q tile has a tile in `phase`; reads the map, so ask before it goes to a GPU."""
        start = self.bounds[..., phase - 1] if phase else 0
        return bool((self.bounds[..., phase] > start).any())

    def to(self, device: torch.device) -> "PrecisionMap":
        """The same map on `device`."""
        return PrecisionMap(self.indices.to(device), self.bounds.to(device))


def causal_classes(classes: torch.Tensor) -> torch.Tensor:
    """`classes` without the tiles that lie wholly above the diagonal."""
    q_tile = torch.arange(classes.shape[-2])[:, None]
    k_tile = torch.arange(classes.shape[-1])[None, :]
    return torch.where(k_tile > q_tile, int(Class.SKIP), classes)


def cut_tiles(layout: Layout, is_causal: bool) -> torch.Tensor:
    """Which tiles a fine mask cuts: bool `[q_tiles, k_tiles]`."""
    q_tiles, k_tiles = tiles(layout.q_length), tiles(layout.k_length)
    cut = torch.zeros(q_tiles, k_tiles, dtype=torch.bool)
    if layout.k_length % TILE:
        cut[:, -1] = True
    if is_causal:
        cut |= torch.arange(k_tiles)[None, :] == torch.arange(q_tiles)[:, None]
    return cut


def build_map(classes: torch.Tensor, layout: Layout, is_causal: bool = False) -> PrecisionMap:
    """The map that a policy's classes give.

    classes: integers of `Class`, `[B or 1, H or 1, q_tiles, k_tiles]`. A causal mask compares token indices,
    query i seeing keys 0 … i, as `scaled_dot_product_attention(is_causal=True)` does.
    """
    expected = (tiles(layout.q_length), tiles(layout.k_length))
    if classes.ndim != 4 or tuple(classes.shape[-2:]) != expected:
        raise ValueError(f"classes must be [B or 1, H or 1, *{expected}], got {list(classes.shape)}")
    if is_causal:
        classes = causal_classes(classes)
    skipped = classes == Class.SKIP
    phases = torch.where(cut_tiles(layout, is_causal), int(Phase.MASKED), classes)
    phases = torch.where(skipped, len(Phase), phases)
    order = phases.argsort(dim=-1, stable=True)
    counts = torch.stack([(phases == phase).sum(-1) for phase in Phase], dim=-1)
    bounds = counts.cumsum(-1)
    longest = max(int(bounds[..., -1].max()), 1)
    return PrecisionMap(order[..., :longest].int().contiguous(), bounds.int().contiguous())
