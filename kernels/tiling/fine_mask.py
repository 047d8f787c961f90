"""Fine masks say which slots each query sees within MASKED tiles, by coordinates that the kernels compare.

A query has a first and a last coordinate in every dimension, a key has a low and a high one. The query sees the key if
first ≤ low and high ≤ last in every dimension. On the grid, low and high are the key's coordinate; text and empty slots
have values that let every query see them, or none.

One int32 holds all dimensions: a field for each, with a guard bit above it. The guard bits are set before a
subtraction, and each is still set afterwards only if its field did not borrow. So one subtraction compares all
dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.neighborhood import Axis

_BITS = 30  # the most bits of a positive int32 that 1, 2 and 3 dimensions divide


@dataclass(frozen=True)
class FineMask:
    """The coordinates that say which slots each query sees; they cover whole tiles of slots.

    packed: int32 `[4, slots]`: the first and last coordinates of each query, the low and high ones of each key.
    guards: the guard bits.
    Every query sees text; no query sees empty slots.
    """

    packed: torch.Tensor
    guards: int

    def to(self, device: torch.device) -> "FineMask":
        """The same mask on `device`."""
        return replace(self, packed=self.packed.to(device))

    def seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """True where the query sees the key: bool, of the shape to which the slots `query` and `key` broadcast."""
        first, last, low, high = self.packed
        not_before = (low[key] | self.guards) - first[query]
        not_after = (last[query] | self.guards) - high[key]
        return (not_before & not_after & self.guards) == self.guards


def hide_empty_slots(token_order: torch.Tensor) -> FineMask:
    """The mask under which every query sees every token; empty slots are hidden, and those past the order's end.

    token_order: integers `[slots]`, −1 for empty slots.
    """
    return fine_mask(token_order, torch.full((1, len(token_order)), -1), ())


def fine_mask(token_order: torch.Tensor, coordinates: torch.Tensor, axes: Sequence[Axis]) -> FineMask:
    """The mask of a neighbourhood whose dilation is 1.

    token_order: integers `[slots]`, −1 for empty slots. coordinates: integers `[dimensions, slots]`, −1 off the grid;
    tokens there are text. axes: the neighbourhood; without axes every query sees every token.
    Raises ValueError for a grid whose coordinates don't fit into the fields.
    """
    width = _BITS // len(coordinates)
    top = 2 ** (width - 1) - 1  # no query sees a key whose high it is, every query one whose low it is
    longest = max((axis.length for axis in axes), default=0)
    if longest > top:
        raise ValueError(
            f"a neighbourhood of {len(axes)} dimensions takes up to {top} tokens in each, got {longest}"
        )
    is_empty, on_grid = token_order < 0, coordinates[0] >= 0
    packed = torch.zeros(4, len(token_order), dtype=torch.int64)
    for number in range(len(coordinates)):
        first, last = torch.tensor(0), torch.tensor(top - 1)
        if axes:
            coordinate = coordinates[number].long().clamp(min=0)
            start, end = axes[number].key_ranges(axes[number].length)
            first = torch.where(on_grid, start[coordinate], first)
            last = torch.where(on_grid, end[coordinate] - 1, last)
        low = torch.where(on_grid, coordinates[number], top)
        high = torch.where(is_empty, top, coordinates[number].clamp(min=0))
        packed = (packed << width) | torch.stack(
            [x.expand(len(token_order)) for x in (first, last, low, high)]
        )
    guards = sum(1 << (width * number + width - 1) for number in range(len(coordinates)))
    all_top = sum(top << (width * number) for number in range(len(coordinates)))
    packed = F.pad(packed, (0, -len(token_order) % TILE))
    packed[3, len(token_order) :] = all_top
    return FineMask(packed.int(), guards)
