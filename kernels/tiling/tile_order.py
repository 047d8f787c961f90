"""Tile order: which token stands at which place, so that every tile is text or a box of the grid."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.precision_map import TILE, tiles


@dataclass(frozen=True)
class TileOrder:
    """The slots that the tokens of a layout with a grid take, for boxes of 128 tokens.

    Text comes first, in tiles of its own; then the grid's boxes in row-major order, and within a box its tokens in
    row-major order. Places at the end of the text, and where boxes stick out of the grid, are empty.
    Raises ValueError for a layout without a grid, or a box of another number of tokens or dimensions.
    """

    tokens: Layout
    box: tuple[int, ...]

    def __post_init__(self):
        if not self.tokens.grid:
            raise ValueError("tile order needs the grid that the tokens lie on, and none was given")
        if len(self.box) != len(self.tokens.grid) or math.prod(self.box) != TILE:
            raise ValueError(
                f"a box of grid {self.tokens.grid} has {len(self.tokens.grid)} sides and {TILE} tokens, got {self.box}"
            )

    @property
    def boxes(self) -> tuple[int, ...]:
        """How many boxes there are in each dimension."""
        return tuple(-(-length // side) for length, side in zip(self.tokens.grid, self.box, strict=True))

    @property
    def text_tiles(self) -> int:
        """Tiles of text, which come first."""
        return tiles(self.tokens.text_length)

    @property
    def layout(self) -> Layout:
        """Lengths and text, in slots."""
        length = TILE * (self.text_tiles + math.prod(self.boxes))
        return Layout(length, length, (0, self.tokens.text_length))

    @cached_property
    def token_order(self) -> torch.Tensor:
        """The token that stands at each slot, −1 where none does: int32 `[slots]`."""
        token = torch.arange(self.tokens.k_length, dtype=torch.int32)
        start, stop = self.tokens.text
        of_text = F.pad(token[start:stop], (0, -(stop - start) % TILE), value=-1)
        of_grid = torch.cat((token[:start], token[stop:])).view(self.tokens.grid)
        return torch.cat((of_text, self._in_boxes(of_grid)))

    @cached_property
    def coordinates(self) -> torch.Tensor:
        """Where each slot lies on the grid, −1 for text and empty slots: int32 `[dimensions, slots]`."""
        axes = [torch.arange(length, dtype=torch.int32) for length in self.tokens.grid]
        of_grid = [self._in_boxes(x) for x in torch.meshgrid(*axes, indexing="ij")]
        return F.pad(torch.stack(of_grid), (self.text_tiles * TILE, 0), value=-1)

    def _in_boxes(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the grid's shape, box after box, −1 where boxes stick out."""
        for dimension, (count, side) in enumerate(zip(self.boxes, self.box, strict=True)):
            end = [0, 0] * (x.ndim - 1 - dimension) + [0, count * side - x.shape[dimension]]
            x = F.pad(x, end, value=-1)
        x = x.view([size for pair in zip(self.boxes, self.box, strict=True) for size in pair])
        return x.permute(*range(0, x.ndim, 2), *range(1, x.ndim, 2)).reshape(-1)
