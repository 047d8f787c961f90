"""FineMask: which slots each query sees, as coordinates that the kernels compare in MASKED tiles.

A query sees a slot if in every dimension its first ≤ the place's low and the place's high ≤ its last. An int32 holds a
field for each dimension, and above each a guard bit: set before a subtraction, it is left only where the field was not
the smaller one, so that one subtraction compares all dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.neighborhood import Axis
from dma_diffusers.kernels.tiling.precision_map import TILE

_BITS = 30  # of a positive int32, which 1, 2 and 3 dimensions divide


@dataclass(frozen=True)
class FineMask:
    """What decides who sees whom.

    packed: int32 `[4, whole tiles of slots]`: each query's first and last, each key's low and high.
    guards: the guard bits. Places past the last one are seen by nobody, nor are empty ones; everybody sees text.
    """

    packed: torch.Tensor
    guards: int

    def to(self, device: torch.device) -> "FineMask":
        """The same spans on `device`."""
        return replace(self, packed=self.packed.to(device))

    def seen(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees: bool, of the shape that the slots `query` and `key` broadcast to."""
        first, last, low, high = self.packed
        not_before = (low[key] | self.guards) - first[query]
        not_after = (last[query] | self.guards) - high[key]
        return (not_before & not_after & self.guards) == self.guards


def hiding(token_order: torch.Tensor) -> FineMask:
    """The spans that hide only empty slots: where `token_order`, integers `[slots]`, is −1, and past its end."""
    return fine_mask(token_order, torch.full((1, len(token_order)), -1), ())


def fine_mask(token_order: torch.Tensor, coordinates: torch.Tensor, axes: Sequence[Axis]) -> FineMask:
    """The spans of a neighbourhood, whose dilation is 1.

    token_order: integers `[slots]`, −1 for empty slots. coordinates: integers `[dimensions, slots]`, −1 off the grid;
    tokens there are text. Without axes everybody sees every token. Raises ValueError for a grid that fields can't hold.
    """
    width = _BITS // len(coordinates)
    top = 2 ** (width - 1) - 1  # as a key's high, it is seen by nobody; as its low, by everybody
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
            place = coordinates[number].long().clamp(min=0)
            start, end = axes[number].spans(axes[number].length)
            first = torch.where(on_grid, start[place], first)
            last = torch.where(on_grid, end[place] - 1, last)
        low = torch.where(on_grid, coordinates[number], top)
        high = torch.where(is_empty, top, coordinates[number].clamp(min=0))
        packed = (packed << width) | torch.stack(
            [x.expand(len(token_order)) for x in (first, last, low, high)]
        )
    guards = sum(1 << (width * number + width - 1) for number in range(len(coordinates)))
    ones = sum(top << (width * number) for number in range(len(coordinates)))
    packed = F.pad(packed, (0, -len(token_order) % TILE))
    packed[3, len(token_order) :] = ones
    return FineMask(packed.int(), guards)
