"""Policies: from a layout to the class of every pair (Q tile, KV tile)."""

from dataclasses import dataclass
from typing import Protocol

import torch

from dma_diffusers.kernels.layout import Layout
from dma_diffusers.kernels.maps import TILE, Class, tiles


class Policy(Protocol):
    """Says which pairs of tiles matter."""

    def classes(self, layout: Layout, is_causal: bool = False) -> torch.Tensor:
        """Integers of `Class`, `[B or 1, H or 1, q_tiles, k_tiles]`."""
        ...


@dataclass(frozen=True)
class Dense:
    """Every tile in one class."""

    everywhere: Class = Class.HIGH

    def classes(self, layout: Layout, is_causal: bool = False) -> torch.Tensor:
        shape = (1, 1, tiles(layout.q_length), tiles(layout.k_length))
        return torch.full(shape, int(self.everywhere))


@dataclass(frozen=True)
class Diagonal:
    """DMA (arXiv 2604.03950): sink tiles and a band around the diagonal HIGH, the rest LOW.

    window: tokens. 128 is the diagonal tile alone; each further 256 (causal: 128) adds a tile on either side
        (causal: before it). 0 is no band. Other widths round up. A tuple has a width for each head of the queries.
    sink: tokens at the start of the keys, rounded up to tiles.
    Tiles that hold text are HIGH, as keys for every query and as queries for every key.
    """

    window: int | tuple[int, ...] = TILE
    sink: int = TILE

    def __post_init__(self):
        for name, width in [*(("window", width) for width in self.windows), ("sink", self.sink)]:
            if width < 0:
                raise ValueError(f"{name} must be 0 tokens or more, got {width}")

    @property
    def windows(self) -> tuple[int, ...]:
        """One width for all heads, or one for each."""
        return self.window if isinstance(self.window, tuple) else (self.window,)

    def classes(self, layout: Layout, is_causal: bool = False) -> torch.Tensor:
        q_tile = torch.arange(tiles(layout.q_length))[:, None]
        k_tile = torch.arange(tiles(layout.k_length))[None, :]
        high = (k_tile < tiles(self.sink)).expand(len(q_tile), -1)
        width = torch.tensor(self.windows)[:, None, None]
        reach = -(-(width - TILE).clamp(min=0) // (TILE if is_causal else 2 * TILE))
        high = high | ((width > 0) & ((q_tile - k_tile).abs() <= reach))
        start, stop = layout.text
        if stop > start:
            first, end = start // TILE, tiles(stop)
            high = high | ((k_tile >= first) & (k_tile < end)) | ((q_tile >= first) & (q_tile < end))
        return torch.where(high, int(Class.HIGH), int(Class.LOW))[None]
