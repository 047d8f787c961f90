"""Boxes are the n-D blocks of a grid whose tokens make up one tile; this file chooses their shape."""

import math
from collections.abc import Sequence

from dma_diffusers.kernels.tiling.layout import TILE
from dma_diffusers.kernels.tiling.neighborhood import Axis


def padding(grid: Sequence[int], box: Sequence[int]) -> float:
    """The share of empty slots, relative to the grid's tokens, if boxes of this shape cover the grid."""
    padded = math.prod(-(-length // side) * side for length, side in zip(grid, box, strict=True))
    return padded / math.prod(grid) - 1


def plan(grid: Sequence[int], tokens: int = TILE) -> list[tuple[int, ...]]:
    """Every shape of a box of `tokens` tokens for `grid`, the best first.

    The best box has the least padding; then the smallest surface, since tokens near each other see nearly the same
    keys; then the longest last sides, since neighbours in the last dimensions are neighbours in memory.
    """
    shapes = _shapes(tokens, len(grid))
    return sorted(shapes, key=lambda box: (padding(grid, box), sum(tokens / side for side in box), box))


def fitting(axes: Sequence[Axis], tokens: int = TILE) -> tuple[int, ...]:
    """The box with which a neighbourhood costs least: it visits few pairs of tiles, and cut ones count twice."""

    def cost(box: tuple[int, ...]) -> int:
        visited, filled = (
            math.prod(
                int(getattr(axis, kind)(side, side).counts.sum())
                for axis, side in zip(axes, box, strict=True)
            )
            for kind in ("visited", "filled")
        )
        return 2 * visited - filled

    return min(plan([axis.length for axis in axes], tokens), key=cost)


def _shapes(tokens: int, dimensions: int) -> list[tuple[int, ...]]:
    if dimensions == 1:
        return [(tokens,)]
    sides = [side for side in range(1, tokens + 1) if tokens % side == 0]
    return [(side, *rest) for side in sides for rest in _shapes(tokens // side, dimensions - 1)]
