"""This module counts the tiles that a neighbourhood visits, and the speed-up that their count allows.

It follows the simulator of generalized neighbourhood attention (arXiv 2504.16922): the grid is cut into boxes, and a Q
tile visits, in each dimension, ceil(end(last query) / T) − floor(start(first query) / T) KV tiles; the product over the
dimensions in all. That is exact, not a bound: each dimension's windows leave no gap between the queries of a tile, and
a query sees a key where it does so in every dimension. The count does not know time: partial and masked tiles count as
much as whole ones, and nothing else costs anything.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from dma_diffusers.kernels.tiling.neighborhood import Axis, check_dimensions, shape_text


class Tally(NamedTuple):
    """One dimension has these visits: of its busiest Q tile, of all its Q tiles, and those that need no mask."""

    most: int
    visited: int
    filled: int


@lru_cache(maxsize=2**14)
def tally(axis: Axis, q_side: int, kv_side: int) -> Tally:
    """Count one dimension's visits, with tiles of `q_side` and `kv_side` tokens."""
    visited = axis.visited(q_side, kv_side).counts
    return Tally(int(visited.max()), int(visited.sum()), int(axis.filled(q_side, kv_side).counts.sum()))


@dataclass(frozen=True)
class Count:
    """The tiles visited are counted for one neighbourhood, one shape of Q and of KV tiles, and so many text tokens.

    q_tile, kv_tile: sides of the boxes in tokens, one for each of `axes`; with dilation, boxes of tokens of one residue
    class. text: tokens in tiles of their own, as large as a box; grid queries visit all text keys, text queries visit
    everything. Raises ValueError for sides under 1, a wrong number of them, or less than no text.
    """

    axes: tuple[Axis, ...]
    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    text: int = 0

    def __post_init__(self):
        grid = [axis.length for axis in self.axes]
        for name, box in (("Q tile", self.q_tile), ("KV tile", self.kv_tile)):
            check_dimensions(name, box, grid)
            if min(box) < 1:
                raise ValueError(f"{name} {shape_text(box)}: sides must be at least 1")
        if self.text < 0:
            raise ValueError(f"text must be 0 tokens or more, got {self.text}")

    @property
    def grid_tiles(self) -> tuple[int, int]:
        """Return the number of Q tiles and of KV tiles of the grid."""
        return self._boxes(self.q_tile), self._boxes(self.kv_tile)

    @property
    def text_tiles(self) -> tuple[int, int]:
        """Return the number of Q tiles and of KV tiles of text."""
        return -(-self.text // math.prod(self.q_tile)), -(-self.text // math.prod(self.kv_tile))

    @property
    def all(self) -> int:
        """Return the number of KV tiles, text included."""
        return self.grid_tiles[1] + self.text_tiles[1]

    @property
    def visits(self) -> int:
        """Return the number of pairs of tiles that are visited, text included."""
        return math.prod(tally.visited for tally in self._tallies) + self.text_visits

    @property
    def text_visits(self) -> int:
        """Return the number of pairs of tiles with text in either."""
        return self.grid_tiles[0] * self.text_tiles[1] + self.text_tiles[0] * self.all

    @property
    def worst(self) -> int:
        """Return the number of KV tiles that the busiest Q tile of the grid visits, text included."""
        return math.prod(tally.most for tally in self._tallies) + self.text_tiles[1]

    @property
    def mean(self) -> float:
        """Return the number of KV tiles that a Q tile visits on average, text included, as key and as query."""
        return self.visits / (self.grid_tiles[0] + self.text_tiles[0])

    @property
    def cut(self) -> float:
        """Return the share of the grid's visited tiles that the window's edge cuts; 0 is a perfect fit.

        Those tiles need a mask.
        """
        filled, visited = (
            math.prod(getattr(tally, kind) for tally in self._tallies) for kind in ("filled", "visited")
        )
        return 1 - filled / visited

    @property
    def padding(self) -> tuple[float, float]:
        """Return the slots without a token in the grid's Q tiles and KV tiles, as a share of its tokens."""
        tokens = math.prod(axis.length for axis in self.axes)
        q_tiles, kv_tiles = self.grid_tiles
        return q_tiles * math.prod(self.q_tile) / tokens - 1, kv_tiles * math.prod(self.kv_tile) / tokens - 1

    @property
    def speedup_worst(self) -> float:
        """Return the visits of dense attention over those made if every Q tile of the grid were the busiest.

        That is all / worst, but for text, whose queries gain nothing, and dilation, which makes other tiles than dense
        attention has.
        """
        return self._dense_visits / self._worst_visits

    @property
    def speedup_mean(self) -> float:
        """Return the visits of dense attention over visits made: all / mean, but for dilation."""
        return self._dense_visits / self.visits

    @property
    def cost(self) -> float:
        """Return 1 / speedup_worst beside dense attention without the boxes' padding, which a search can compare."""
        slots = math.prod(self.q_tile) * math.prod(self.kv_tile)
        tokens = math.prod(axis.length for axis in self.axes) + self.text
        return self._worst_visits * slots / tokens**2

    @property
    def _tallies(self) -> list["Tally"]:
        return [tally(*sides) for sides in zip(self.axes, self.q_tile, self.kv_tile, strict=True)]

    @property
    def _worst_visits(self) -> int:
        return self.grid_tiles[0] * self.worst + self.text_tiles[0] * self.all

    @property
    def _dense_visits(self) -> int:
        q_tiles, kv_tiles = (
            math.prod(-(-axis.length // side) for axis, side in zip(self.axes, box, strict=True))
            for box in (self.q_tile, self.kv_tile)
        )
        return (q_tiles + self.text_tiles[0]) * (kv_tiles + self.text_tiles[1])

    def _boxes(self, box: tuple[int, ...]) -> int:
        return math.prod(axis.tiles(side) for axis, side in zip(self.axes, box, strict=True))


def end_to_end(speedup: float, attention_share: float, dense_steps: tuple[int, int] = (0, 1)) -> float:
    """Return the speed-up of a whole run by Amdahl's law.

    attention_share: attention's share of the time at full attention, 0 to 1. dense_steps: K of N steps at full
    attention. Raises ValueError beyond those.
    """
    dense, steps = dense_steps
    if not 0 <= attention_share <= 1:
        raise ValueError(f"attention share must lie between 0 and 1, got {attention_share}")
    if not 0 <= dense <= steps or steps < 1:
        raise ValueError(f"dense steps must be K/N with 0 ≤ K ≤ N and N at least 1, got {dense}/{steps}")
    sparse = 1 - dense / steps
    return 1 / (1 - attention_share * sparse * (1 - 1 / speedup))
