"""Generalized neighbourhood attention (arXiv 2504.16922): which keys each query sees on a grid of 1 to 3 dimensions.

Dimensions are independent: a query sees a key if it does so in every dimension. `Axis` is one of them. The window
shifts at the edges and never shrinks. With dilation d, the tokens of one residue class mod d form a sequence of their
own, in which window, stride and tiles count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

DIMENSIONS = 3


class TileRanges(NamedTuple):
    """For each Q tile, a half-open range of KV tiles: int64 `[q_tiles]` both."""

    first: torch.Tensor
    end: torch.Tensor

    @property
    def counts(self) -> torch.Tensor:
        """How many KV tiles each range holds: int64 `[q_tiles]`."""
        return self.end - self.first


@dataclass(frozen=True)
class Axis:
    """One dimension of a neighbourhood.

    length: tokens. window: keys seen by each query. stride: queries that share one window; 1 is neighbourhood
    attention, window (dividing length) is blocked attention. dilation: distance between neighbouring keys.
    causal: no query sees a later key; its window ends at its group's last query, and is cut off at the query itself.
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
        """Tokens of each residue class mod dilation."""
        return [len(range(residue, self.length, self.dilation)) for residue in range(self.dilation)]

    def spans(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First key of each query and the one after its last, in a sequence of `length` tokens: int64 `[length]`."""
        query = torch.arange(length)
        group = query // self.stride * self.stride
        if self.causal:
            leader = (group + self.stride - 1).clamp(max=length - 1)
            return (leader - self.window + 1).clamp(min=0), query + 1
        # The definition keeps the leader within the sequence; keeping the window there does that too.
        start = (group + self.stride // 2 - self.window // 2).clamp(0, length - self.window)
        return start, start + self.window

    def mask(self) -> torch.Tensor:
        """Which keys each query sees: bool `[length, length]`."""
        seen = torch.zeros(self.length, self.length, dtype=torch.bool)
        for residue, length in enumerate(self.class_lengths):
            start, end = self.spans(length)
            key = torch.arange(length)
            own = slice(residue, None, self.dilation)
            seen[own, own] = (key >= start[:, None]) & (key < end[:, None])
        return seen

    def tiles(self, tile: int) -> int:
        """How many tiles of `tile` tokens there are: each residue class by itself, its last may be partial."""
        return sum(-(-length // tile) for length in self.class_lengths)

    def visited(self, q_tile: int, kv_tile: int) -> TileRanges:
        """The KV tiles that hold a key which some query of the Q tile sees, residue class after residue class."""
        return self._ranges(q_tile, kv_tile, inner=False)

    def filled(self, q_tile: int, kv_tile: int) -> TileRanges:
        """The KV tiles of whose keys every query of the Q tile sees all; those visited besides need the mask."""
        return self._ranges(q_tile, kv_tile, inner=True)

    def _ranges(self, q_tile: int, kv_tile: int, inner: bool) -> TileRanges:
        ranges, before = [], 0
        for length in self.class_lengths:
            start, end = self.spans(length)
            q_first = torch.arange(0, length, q_tile)
            q_last = (q_first + q_tile - 1).clamp(max=length - 1)
            kv_tiles = -(-length // kv_tile)
            # Spans never move back, and stride ≤ window leaves no gap between one and the next.
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
    """The axes of a neighbourhood on `grid`, and notes on what was changed.

    Left out, the window is the largest that grid and dilation allow, stride and dilation are 1, causal is False. A
    window larger than the grid is clamped, and a stride with it, which is noted. Raises ValueError, in one line, for
    what `Axis` refuses, other than 1 to 3 dimensions, and arguments of other numbers of dimensions than the grid's.
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
    """Which keys each query sees: bool `[tokens, tokens]`, tokens of the grid in row-major order."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    for axis in axes:
        both = seen[:, None, :, None] & axis.mask()[None, :, None, :]
        seen = both.flatten(2).flatten(0, 1)
    return seen


def tile_map(ranges: Sequence[TileRanges], kv_tiles: Sequence[int]) -> torch.Tensor:
    """Which KV tiles lie in the ranges of every dimension: bool `[q_tiles, kv_tiles]`, boxes in row-major order."""
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
    """Sizes as one reads them: 4×8×8."""
    return "×".join(str(int(size)) for size in sizes)
