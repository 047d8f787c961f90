"""Tile order: the order of tokens under which every tile holds either text or one box of the grid."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.layout import TILE, Layout, tiles
from dma_diffusers.kernels.tiling.neighborhood import Axis, tile_map


@dataclass(frozen=True)
class TileOrder:
    """The slots in which the tokens of a layout stand, if tiles are boxes of its grid.

    Text comes first, in tiles of its own. The boxes of the grid follow in row-major order, and so do the tokens within
    a box. Slots are empty at the end of the text, and where boxes stick out of the grid.
    tokens: the layout in the model's order. box: the sides of a box, which holds 128 tokens.
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
        """The number of boxes in each dimension."""
        return tuple(-(-length // side) for length, side in zip(self.tokens.grid, self.box, strict=True))

    @property
    def text_tiles(self) -> int:
        """The number of tiles of text, which come first."""
        return tiles(self.tokens.text_length)

    @property
    def layout(self) -> Layout:
        """The layout of the slots: their number, empty ones included, and the slots of text."""
        length = TILE * (self.text_tiles + math.prod(self.boxes))
        return Layout(length, length, (0, self.tokens.text_length))

    @cached_property
    def token_order(self) -> torch.Tensor:
        """The token in each slot, −1 for empty slots: int32 `[slots]`."""
        token, is_text = torch.arange(self.tokens.k_length, dtype=torch.int32), self.tokens.is_text
        of_text = F.pad(token[is_text], (0, -self.tokens.text_length % TILE), value=-1)
        of_grid = token[~is_text].view(self.tokens.grid)
        return torch.cat((of_text, self._in_boxes(of_grid)))

    @cached_property
    def coordinates(self) -> torch.Tensor:
        """The grid coordinates of each slot, −1 for text and empty slots: int32 `[dimensions, slots]`."""
        axes = [torch.arange(length, dtype=torch.int32) for length in self.tokens.grid]
        of_grid = [self._in_boxes(x) for x in torch.meshgrid(*axes, indexing="ij")]
        return F.pad(torch.stack(of_grid), (self.text_tiles * TILE, 0), value=-1)

    def _in_boxes(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the grid's shape, flattened box after box, −1 where boxes stick out."""
        for dimension, (count, side) in enumerate(zip(self.boxes, self.box, strict=True)):
            end = [0, 0] * (x.ndim - 1 - dimension) + [0, count * side - x.shape[dimension]]
            x = F.pad(x, end, value=-1)
        x = x.view([size for pair in zip(self.boxes, self.box, strict=True) for size in pair])
        return x.permute(*range(0, x.ndim, 2), *range(1, x.ndim, 2)).reshape(-1)


def reached(axes: Sequence[Axis], tile_order: TileOrder, how: str) -> torch.Tensor:
    """The KV tiles that a neighbourhood reaches from each Q tile: bool `[q_tiles, k_tiles]`, True for tiles of text.

    how: "visited" if some query has to see some of the tile's keys, "filled" if every query has to see all of them.
    Without axes every tile is reached.
    """
    reach = torch.ones(2 * (tiles(tile_order.layout.k_length),), dtype=torch.bool)
    if axes:
        ranges = [getattr(axis, how)(side, side) for axis, side in zip(axes, tile_order.box, strict=True)]
        reach[tile_order.text_tiles :, tile_order.text_tiles :] = tile_map(ranges, tile_order.boxes)
    return reach


def ranks(tile_order: TileOrder) -> torch.Tensor:
    """The number of boxes nearer to each Q tile than each KV tile: int64 `[q_tiles, k_tiles]`; text ranks last."""
    axes = [side * torch.arange(count) for count, side in zip(tile_order.boxes, tile_order.box, strict=True)]
    corners = torch.cartesian_prod(*axes).view(-1, len(axes)).double()
    of_tiles = torch.full(2 * (tiles(tile_order.layout.k_length),), 2**62)
    of_boxes = torch.cdist(corners, corners).argsort(stable=True).argsort()
    of_tiles[tile_order.text_tiles :, tile_order.text_tiles :] = of_boxes
    return of_tiles
