"""Policies choose the class of every pair (Q tile, KV tile) of a layout.

A policy has words, `str(policy)`, from which `parse` makes it again: `neighborhood(window=18x24x24, high=6x8x8)`.
Policies unite, `a | b`: every pair takes the more precise of their classes. Text is HIGH whatever the policy, as keys
for every query and as queries for every key; only `Dense` has no exceptions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling import boxes
from dma_diffusers.kernels.tiling.layout import TILE, Layout, tiles, tiles_with
from dma_diffusers.kernels.tiling.neighborhood import Axis, neighborhood
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.kernels.tiling.tile_order import TileOrder, ranks, reached
from dma_diffusers.kernels.tiling.words import read_call, write_call, write_value


@dataclass(frozen=True)
class Policy:
    """A choice of precision for every pair of tiles; this base class leaves pairs LOW, and tiles with text HIGH.

    A subclass is a frozen dataclass with a `name`. It overrides `_of_tiles` and those properties that differ, by class
    attributes where they are constant.

    name: opens the policy's words.
    omitted: field values that words omit.
    separator: stands between the items of a tuple in words, "x" for sides of a grid, "/" for one value for each head.
    """

    name: ClassVar[str]
    omitted: ClassVar[tuple[Any, ...]] = (None,)
    separator: ClassVar[str] = "x"

    @property
    def on_grid(self) -> bool:
        """True if classes depend on where tokens lie on their grid; tiles are then boxes of the grid."""
        return False

    @property
    def by_content(self) -> bool:
        """True if the numbers in the tiles decide; in a union with others, such a policy sets no classes."""
        return False

    @property
    def leaves_out(self) -> bool:
        """True if pairs may be left out, or taken by their means; False if every pair is computed, in HIGH or LOW."""
        return False

    @property
    def protects_text(self) -> bool:
        """True if tiles with text are HIGH."""
        return True

    @property
    def router(self) -> "Importance | None":
        """The policy by which the numbers in pairs that are LOW otherwise choose their class; None for none."""
        return None

    @final
    @property
    def importance(self) -> float:
        """The share of all pairs visited by a call's heads that becomes HIGH for the numbers in them."""
        return self.router.budget if self.router else 0.0

    @final
    @property
    def remembers(self) -> bool:
        """True if pairs are chosen by what an earlier step of a drawing showed."""
        return self.router is not None and self.router.by is By.MEMORY

    @property
    def skip_below(self) -> float | None:
        """A tile is left out if all its probabilities lie below this share of the largest so far; None for never."""
        return None

    @property
    def heads(self) -> int | None:
        """The number of heads of the queries that the policy is for; None for any number."""
        return None

    @final
    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        """The class of every pair of tiles: integers of `Class`, `[1, H or 1, q_tiles, k_tiles]`.

        tile_order: required by policies on the grid; `layout` is then that of its slots.
        """
        classes = self._of_tiles(layout, is_causal, tile_order)
        return _protected(classes, layout, is_causal) if self.protects_text else classes

    def _of_tiles(self, layout: Layout, is_causal: bool, tile_order: TileOrder | None) -> torch.Tensor:
        """The classes before text is protected; arguments and result are those of `classes`."""
        return torch.full((1, 1, tiles(layout.q_length), tiles(layout.k_length)), int(Class.LOW))

    def box(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The shape of boxes that suits the policy best."""
        return boxes.plan(grid)[0]

    def axes(self, grid: Sequence[int]) -> tuple[Axis, ...]:
        """The neighbourhood beyond which no key is seen, () if all are. Raises ValueError if the grid can't have it."""
        return ()

    def notes(self, grid: Sequence[int]) -> list[str]:
        """Notes on what was changed for this grid. Raises ValueError if the grid can't have the policy."""
        return []

    def __or__(self, other: "Policy") -> "Union":
        return Union((*_members(self), *_members(other)))

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        said = {name: value for name, value in values.items() if value not in self.omitted}
        return write_call(self.name, said, self.separator)


@dataclass(frozen=True)
class Dense(Policy):
    """Every tile in one class, tiles with text included."""

    everywhere: Class = Class.HIGH

    name = "dense"
    protects_text = False

    def __post_init__(self):
        if not isinstance(self.everywhere, Class) or self.everywhere is Class.SKIP:
            raise ValueError(f"everywhere must be high, low or mean, got {write_value(self.everywhere)}")

    @property
    def leaves_out(self) -> bool:
        return self.everywhere is Class.MEAN

    def _of_tiles(self, layout: Layout, is_causal: bool, tile_order: TileOrder | None) -> torch.Tensor:
        return torch.full_like(super()._of_tiles(layout, is_causal, tile_order), int(self.everywhere))


@dataclass(frozen=True)
class Diagonal(Policy):
    """DMA (arXiv 2604.03950): sink tiles and a band around the diagonal are HIGH, the rest is LOW.

    window: tokens. 128 is the diagonal tile alone; each further 256 (causal: 128) adds a tile on either side
        (causal: before it). 0 is no band. Other widths round up. A tuple has a width for each head of the queries.
        Where queries omit the text, a Q tile may have queries of several tiles of keys: all of these are its diagonal.
    sink: tokens at the start of the keys, rounded up to tiles; on the grid, text stands there.
    near: "sequence" for a band of the flattened sequence; "grid" for as many boxes, those nearest on the grid.
    """

    window: int | tuple[int, ...] = TILE
    sink: int = TILE
    near: str = "sequence"

    name = "diagonal"
    separator = "/"
    omitted = (None, "sequence")

    def __post_init__(self):
        if isinstance(self.window, list):
            object.__setattr__(self, "window", tuple(self.window))
        for name, width in [*(("window", width) for width in self.windows), ("sink", self.sink)]:
            if isinstance(width, bool) or not isinstance(width, int) or width < 0:
                raise ValueError(f"{name} must be a whole number of tokens, 0 or more, got {width!r}")
        if not self.windows:
            raise ValueError("window must be one width, or one for each head, got none")
        if self.near not in ("sequence", "grid"):
            raise ValueError(f"near must be sequence or grid, got {self.near!r}")

    @property
    def windows(self) -> tuple[int, ...]:
        """One width for all heads, or one for each."""
        return self.window if isinstance(self.window, tuple) else (self.window,)

    @property
    def heads(self) -> int | None:
        return len(self.windows) if len(self.windows) > 1 else None

    @property
    def on_grid(self) -> bool:
        return self.near == "grid"

    def _of_tiles(self, layout: Layout, is_causal: bool, tile_order: TileOrder | None) -> torch.Tensor:
        own_tile = layout.query_places(is_causal)[:, None] // TILE
        first, last = own_tile[::TILE], torch.cat((own_tile[TILE - 1 : -1 : TILE], own_tile[-1:]))
        k_tile = torch.arange(tiles(layout.k_length))[None, :]
        width = torch.tensor(self.windows)[:, None, None]
        reach = -(-(width - TILE).clamp(min=0) // (TILE if is_causal else 2 * TILE))
        if self.on_grid:
            assert tile_order is not None
            near = ranks(tile_order) <= 2 * reach
        else:
            near = (first - reach <= k_tile) & (k_tile <= last + reach)
        high = ((width > 0) & near) | (k_tile < tiles(self.sink))
        return torch.where(high, int(Class.HIGH), int(Class.LOW))[None]


@dataclass(frozen=True)
class Neighborhood(Policy):
    """Two nested windows on the grid (generalized neighbourhood attention, arXiv 2504.16922).

    window: keys seen by each query, a side for each dimension of the grid; tiles within it are LOW, tiles beyond it are
        skipped, and tiles that its edge cuts are masked. None for the whole grid.
    high: tiles that hold a key within this window are HIGH. None for no such window.
    stride: queries that share one window, a side for each dimension, 1 by default; it holds for `high` as well, but is
        never larger than `high` there.
    beyond: MEAN takes the tiles beyond the window by their means (Sol-Attn, arXiv 2607.24027) rather than skip them.
        Tiles that the window reaches are then LOW as a whole, so that no key is left out.
    A window larger than the grid is clamped, and noted.
    """

    window: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    high: tuple[int, ...] | None = None
    beyond: Class = Class.SKIP

    name = "neighborhood"
    omitted = (None, Class.SKIP)
    on_grid = True

    def __post_init__(self):
        for name in ("window", "stride", "high"):
            sides = getattr(self, name)
            if sides is None:
                continue
            sides = (sides,) if isinstance(sides, int) else tuple(sides)
            if not sides or any(
                isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides
            ):
                raise ValueError(f"{name} must be sides of at least 1 token, got {sides}")
            object.__setattr__(self, name, sides)
        _check_beyond(self.beyond)
        if self.window is None and self.high is None:
            raise ValueError("a neighbourhood needs a window, or one that is HIGH")
        given = [sides for sides in (self.window, self.stride, self.high) if sides]
        if len({len(sides) for sides in given}) > 1:
            raise ValueError(f"{self}: window, stride and high must have as many sides as each other")
        for stride, window in zip(self.stride or (), self.window or (), strict=False):
            if stride > window:
                raise ValueError(f"stride {stride} exceeds window {window}: it can be 1 to the window")

    @property
    def leaves_out(self) -> bool:
        return self.window is not None

    def axes(self, grid: Sequence[int]) -> tuple[Axis, ...]:
        return self._window(grid)[0] if self.beyond is Class.SKIP else ()

    def notes(self, grid: Sequence[int]) -> list[str]:
        notes = self._window(grid)[1] + [f"high: {note}" for note in self._high(grid)[1]]
        if self.beyond is Class.MEAN and self._reached(self._tile_order(grid)).all():
            notes.append("beyond=mean changes nothing: the window reaches every tile")
        return notes

    def box(self, grid: Sequence[int]) -> tuple[int, ...]:
        return boxes.fitting(self._window(grid)[0] or self._high(grid)[0])

    def _of_tiles(self, layout: Layout, is_causal: bool, tile_order: TileOrder | None) -> torch.Tensor:
        assert tile_order is not None
        grid = tile_order.tokens.grid
        classes = torch.where(self._reached(tile_order), int(Class.LOW), int(self.beyond))
        if self.high:
            high = reached(self._high(grid)[0], tile_order, "visited")
            classes = torch.where(high, int(Class.HIGH), classes)
        return classes[None, None]

    def _tile_order(self, grid: Sequence[int]) -> TileOrder:
        tokens = math.prod(grid)
        return TileOrder(Layout(tokens, tokens, grid=tuple(grid)), self.box(grid))

    def _reached(self, tile_order: TileOrder) -> torch.Tensor:
        return reached(self._window(tile_order.tokens.grid)[0], tile_order, "visited")

    def _window(self, grid: Sequence[int]) -> tuple[tuple[Axis, ...], list[str]]:
        return neighborhood(grid, self.window, self.stride) if self.window else ((), [])

    def _high(self, grid: Sequence[int]) -> tuple[tuple[Axis, ...], list[str]]:
        if self.high is None:
            return (), []
        stride = self.stride and [min(sides) for sides in zip(self.stride, self.high, strict=False)]
        return neighborhood(grid, self.high, stride)


class By(Enum):
    """How `Importance` finds the most important pairs of tiles (`routing`)."""

    POOLS = "means and variances of tiles"
    ROWS = "sixteen rows of each Q tile"
    MEMORY = "such rows of an earlier step"


@dataclass(frozen=True)
class Importance(Policy):
    """The most important pairs of tiles are HIGH, the rest is LOW; each call finds them by their numbers (`routing`).

    With `beyond`, each Q tile has its own most important pairs: the first ones are HIGH, the next ones LOW, and the
    rest has the class `beyond`. United with others, it chooses among the pairs that are LOW by their position.

    budget: the share of all pairs visited by a call's heads that becomes HIGH, over 0 and up to 1. Heads share it; with
        `beyond` it is that of each Q tile's pairs, and may be 0 if `low` isn't.
    low: the share of each Q tile's pairs that is LOW; it needs `beyond`.
    beyond: the class of the rest, MEAN or SKIP; None for LOW.
    by: ROWS computes the probabilities of sixteen rows of each Q tile over a quarter of the keys. MEMORY does so in
        some steps of a drawing and remembers the pairs in those between; where nothing tells the steps, it is ROWS.
        POOLS predicts probabilities from the tiles' means and variances, which is less exact and needs no steps.
    """

    budget: float
    low: float | None = None
    beyond: Class | None = None
    by: By = By.MEMORY

    name = "importance"
    omitted = (None, By.MEMORY)
    by_content = True

    def __post_init__(self):
        given = self.budget, self.low
        if self.beyond is not None:
            _check_beyond(self.beyond)
        if self.low is not None:
            if self.beyond is None:
                raise ValueError(
                    f"low={self.low!r} needs beyond=mean or beyond=skip: without it all the rest is LOW"
                )
            if not _is_share(self.low) or self.low > 1:
                raise ValueError(f"low must be over 0 and at most 1, got {self.low!r}")
            given = self.budget or 1, self.low  # 0 is a budget here
        if isinstance(self.budget, bool) or not _is_share(given[0]) or self.budget > 1:
            raise ValueError(f"budget must be over 0 and at most 1, got {self.budget!r}")
        if self.budget + (self.low or 0) > 1:
            raise ValueError(f"budget and low are shares of the same pairs, at most 1 together, got {self}")
        if not isinstance(self.by, By):
            raise ValueError(f"by must be pools, rows or memory, got {write_value(self.by)}")

    @property
    def leaves_out(self) -> bool:
        return self.beyond is not None

    @property
    def router(self) -> "Importance | None":
        return self

    def notes(self, grid: Sequence[int]) -> list[str]:
        has_rest = self.beyond is not Class.MEAN or self.budget + (self.low or 0) < 1
        return [] if has_rest else ["beyond=mean changes nothing: budget and low take every tile"]


@dataclass(frozen=True)
class SkipSoftmax(Policy):
    """Tiles are LOW, and left out where the softmax would make next to nothing of them (BLASST).

    threshold: a tile is left out if all its probabilities lie below this share of the largest that their queries have
        seen so far, over 0 and under 1.
    """

    threshold: float

    name = "skip_softmax"
    by_content = True
    leaves_out = True

    def __post_init__(self):
        if not _is_share(self.threshold) or self.threshold >= 1:
            raise ValueError(f"threshold must be over 0 and under 1, got {self.threshold!r}")

    @property
    def skip_below(self) -> float | None:
        return self.threshold


@dataclass(frozen=True)
class Union(Policy):
    """The more precise of several policies' classes, and everything that its members do by content."""

    members: tuple[Policy, ...]

    def __post_init__(self):
        if len({heads for member in self.members if (heads := member.heads)}) > 1:
            raise ValueError(f"policies for different numbers of heads can't unite: {self}")
        if len([member for member in self.members if isinstance(member, Neighborhood)]) > 1:
            raise ValueError(f"two neighbourhoods can't unite, give one of them a `high` window: {self}")
        routers = [member.router for member in self.members if member.router]
        if len(routers) > 1 and any(router.beyond is not None for router in routers):
            raise ValueError(f"two importances can't unite if one of them says what is beyond: {self}")

    def __str__(self) -> str:
        return " | ".join(map(str, self.members))

    @property
    def on_grid(self) -> bool:
        return any(member.on_grid for member in self.members)

    @property
    def by_content(self) -> bool:
        return all(member.by_content for member in self.members)

    @property
    def leaves_out(self) -> bool:
        if self.skip_below is not None or (self.router and self.router.leaves_out):
            return True
        return all(member.leaves_out for member in self._by_position)

    @property
    def protects_text(self) -> bool:
        return any(member.protects_text for member in self._by_position)

    @property
    def router(self) -> Importance | None:
        routers = [member.router for member in self.members if member.router]
        return max(routers, key=lambda router: router.budget, default=None)

    @property
    def skip_below(self) -> float | None:
        return max((member.skip_below for member in self.members if member.skip_below), default=None)

    @property
    def heads(self) -> int | None:
        return next((member.heads for member in self.members if member.heads), None)

    def _of_tiles(self, layout: Layout, is_causal: bool, tile_order: TileOrder | None) -> torch.Tensor:
        classes, *others = (member._of_tiles(layout, is_causal, tile_order) for member in self._by_position)
        for other in others:
            classes = torch.minimum(classes, other)
        return classes

    def box(self, grid: Sequence[int]) -> tuple[int, ...]:
        neighborhoods_first = sorted(
            self._by_position, key=lambda member: not isinstance(member, Neighborhood)
        )
        return neighborhoods_first[0].box(grid)

    def axes(self, grid: Sequence[int]) -> tuple[Axis, ...]:
        first, *others = self._by_position
        return () if others else first.axes(grid)  # any other member sees every key

    def notes(self, grid: Sequence[int]) -> list[str]:
        notes = [note for member in self.members for note in member.notes(grid)]
        for member in self.members:
            vain = [name for name, value in vars(member).items() if value is Class.MEAN]
            others = [other for other in self._by_position if other is not member and not other.leaves_out]
            if member.by_content:  # it has what is LOW otherwise
                others = [other for other in others if other == Dense(Class.HIGH)]
            notes += [
                f"{name}=mean changes nothing: {others[0]} computes every tile" for name in vain if others
            ]
        return notes

    @property
    def _by_position(self) -> list[Policy]:
        """The members that choose by the position of tiles; all members if there are none such."""
        return [member for member in self.members if not member.by_content] or list(self.members)


KINDS: dict[str, type[Policy]] = {
    kind.name: kind for kind in (Dense, Diagonal, Neighborhood, Importance, SkipSoftmax)
}


@cache
def parse(words: str) -> Policy:
    """The policy that `words` describe. Raises ValueError, in one line, if they describe none."""
    members = [read_call(part, KINDS) for part in words.split("|")]
    return members[0] if len(members) == 1 else Union(tuple(members))


def _members(policy: Policy) -> tuple[Policy, ...]:
    return policy.members if isinstance(policy, Union) else (policy,)


def _protected(classes: torch.Tensor, layout: Layout, is_causal: bool) -> torch.Tensor:
    """`classes`, but HIGH where a tile holds text, as queries or as keys."""
    if not layout.text_length:
        return classes
    is_text = layout.is_text
    of_queries = F.pad(is_text, (0, max(layout.q_length - layout.k_length, 0)))[
        layout.query_places(is_causal)
    ]
    has_text = tiles_with(of_queries)[:, None] | tiles_with(is_text)
    return torch.where(has_text, int(Class.HIGH), classes)


def _check_beyond(beyond: Any) -> None:
    """Raise ValueError unless a policy can take its far tiles so."""
    if beyond not in (Class.MEAN, Class.SKIP) or not isinstance(beyond, Class):
        raise ValueError(f"beyond must be mean or skip, got {write_value(beyond)}")


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
