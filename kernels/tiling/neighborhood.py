"""Generalized neighbourhood attention (arXiv 2504.16922): the keys that each query sees on a grid of 1 to 3 dimensions.

Dimensions are independent: a query sees a key if it does so in every dimension. `Axis` is one of them. At the edges
the window shifts and never shrinks. With dilation d, the tokens of one residue class mod d form a sequence of their
own, in which window, stride and tiles are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dma_diffusers.kernels.tiling.layout import DIMENSIONS


class TileRanges(NamedTuple):
    """A half-open range of KV tiles for each Q tile: its first tile and its end, each int64 `[q_tiles]`."""

    first: torch.Tensor
    end: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """The number of KV tiles in each range: int64 `[q_tiles]`."""
        return self.end - self.first


@dataclass(frozen=True)
class Axis:
    """One dimension of a neighbourhood.

    length: the number of tokens. window: how many keys each query sees. stride: how many queries share one window; 1
    gives neighbourhood attention, window (where it divides length) gives blocked attention. dilation: the distance
    between neighbouring keys. causal: no query sees a later key; the window ends at the last query of the group that
    shares it, and each query cuts it off at itself.
    Raises ValueError unless 1 ≤ stride ≤ window and 1 ≤ dilation × window ≤ length.
    """

    length: int
    window: int
    stride: int = 1
    dilation: int = 1
    causal: bool = False

    def __post_init__(self):
        for name in ("length", "window", "stride", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.stride > self.window:
            raise ValueError(f"stride {self.stride} exceeds window {self.window}: it can be 1 to the window")
        if self.dilation * self.window > self.length:
            raise ValueError(
                f"dilation {self.dilation} × window {self.window} = {self.dilation * self.window} exceeds length "
                f"{self.length}: make one of them smaller"
            )

    @property
    def class_lengths(self) -> list[int]:
        """The number of tokens of each residue class mod dilation."""
        return [len(range(residue, self.length, self.dilation)) for residue in range(self.dilation)]

    def key_ranges(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The half-open range of keys that each query sees in a sequence of `length` tokens: two int64 `[length]`."""
        query = torch.arange(length)
        group = query // self.stride * self.stride
        if self.causal:
            leader = (group + self.stride - 1).clamp(max=length - 1)
            return (leader - self.window + 1).clamp(min=0), query + 1
        # The paper clamps the group's leader to the sequence; clamping the window gives the same ranges.
        start = (group + self.stride // 2 - self.window // 2).clamp(0, length - self.window)
        return start, start + self.window

    def mask(self) -> torch.Tensor:
        """The mask `[queries, keys]`, True where the query sees the key: bool `[length, length]`."""
        seen = torch.zeros(self.length, self.length, dtype=torch.bool)
        for residue, length in enumerate(self.class_lengths):
            start, end = self.key_ranges(length)
            key = torch.arange(length)
            own = slice(residue, None, self.dilation)
            seen[own, own] = (key >= start[:, None]) & (key < end[:, None])
        return seen

    def tiles(self, tile: int) -> int:
        """The number of tiles of `tile` tokens; each residue class has its own, of which the last may be partial."""
        return sum(-(-length // tile) for length in self.class_lengths)

    def visited(self, q_tile: int, kv_tile: int) -> TileRanges:
        """The KV tiles with a key that some query of the Q tile sees; one residue class follows the other."""
        return self._ranges(q_tile, kv_tile, inner=False)

    def filled(self, q_tile: int, kv_tile: int) -> TileRanges:
        """The KV tiles of which every query of the Q tile sees all keys; the other visited tiles need the mask."""
        return self._ranges(q_tile, kv_tile, inner=True)

    def _ranges(self, q_tile: int, kv_tile: int, inner: bool) -> TileRanges:
        ranges, before = [], 0
        for length in self.class_lengths:
            start, end = self.key_ranges(length)
            q_first = torch.arange(0, length, q_tile)
            q_last = (q_first + q_tile - 1).clamp(max=length - 1)
            kv_tiles = -(-length // kv_tile)
            # Ranges never move back, and as stride ≤ window, there is no gap between one and the next.
            if inner:
                first = -(-start[q_last] // kv_tile)
                stop = torch.where(end[q_first] == length, kv_tiles, end[q_first] // kv_tile).clamp(min=first)
            else:
                first = start[q_first] // kv_tile
                stop = -(-end[q_last] // kv_tile)
            ranges.append((first + before, stop + before))
            before += kv_tiles
        return TileRanges(*(torch.cat(bounds) for bounds in zip(*ranges, strict=True)))


def neighborhood(
    grid: Sequence[int],
    window: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
    causal: Sequence[bool] | None = None,
) -> tuple[tuple[Axis, ...], list[str]]:
    """The axes of a neighbourhood on `grid`, and notes on what was clamped.

    By default, the window is the largest that grid and dilation allow, stride and dilation are 1, and causal is False.
    A window larger than the grid is clamped, its stride too, and a note says so. Raises ValueError, in one line, for
    what `Axis` refuses, for a grid without 1 to 3 dimensions, and for arguments with another number of dimensions.
    """
    if not 1 <= len(grid) <= DIMENSIONS:
        raise ValueError(f"a grid has 1 to {DIMENSIONS} dimensions, got {len(grid)}")
    ones = (1,) * len(grid)
    stride, dilation, causal = stride or ones, dilation or ones, causal or (False,) * len(grid)
    given = {"window": window or ones, "stride": stride, "dilation": dilation, "causal": causal}
    for name, sizes in given.items():
        check_dimensions(name, sizes, grid)
    window = window or [max(length // max(d, 1), 1) for length, d in zip(grid, dilation, strict=True)]
    axes, notes = [], []
    for number, (length, w, s, d, c) in enumerate(
        zip(grid, window, stride, dilation, causal, strict=True), start=1
    ):
        try:
            if d == 1 and w > length >= 1 and s <= w:
                notes.append(f"window {w} in dimension {number} was clamped to the grid's {length}")
                w, s = length, min(s, length)
            axes.append(Axis(length, w, s, d, bool(c)))
        except ValueError as error:
            raise ValueError(f"dimension {number} of grid {shape_text(grid)}: {error}") from None
    return tuple(axes), notes


def mask(axes: Sequence[Axis]) -> torch.Tensor:
    """The mask `[queries, keys]`, True where the query sees the key: bool `[tokens, tokens]`, in row-major order."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        both = seen[:, None, :, None] & axis.mask()[None, :, None, :]
        seen = both.flatten(2).flatten(0, 1)
    return seen


def tile_map(ranges: Sequence[TileRanges], kv_tiles: Sequence[int]) -> torch.Tensor:
    """True for KV tiles in the ranges of every dimension: bool `[q_tiles, kv_tiles]`, boxes in row-major order."""
    within = torch.ones(1, 1, dtype=torch.bool)
    for (first, end), count in zip(ranges, kv_tiles, strict=True):
        kv_tile = torch.arange(count)
        own = (kv_tile >= first[:, None]) & (kv_tile < end[:, None])
        both = within[:, None, :, None] & own[None, :, None, :]
        within = both.flatten(2).flatten(0, 1)
    return within


def check_dimensions(name: str, sizes: Sequence[int], grid: Sequence[int]) -> None:
    """Raise ValueError, naming `name`, unless `sizes` has as many dimensions as `grid`."""
    if len(sizes) != len(grid):
        raise ValueError(
            f"{name} {shape_text(sizes)} is {len(sizes)}-D, but grid {shape_text(grid)} is {len(grid)}-D"
        )


def shape_text(sizes: Sequence[int]) -> str:
    """Sizes as text, such as 4×8×8."""
    return "×".join(str(int(size)) for size in sizes)
