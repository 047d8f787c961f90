"""Policies: from a layout to the class of every pair (Q tile, KV tile).

A policy has words, `str(policy)`, from which `parse` makes it again: `neighborhood(window=18x24x24, high=6x8x8)`.
Policies unite, `a | b`: every pair takes the more precise of their classes. Text is HIGH whatever the policy, as keys
for every query and as queries for every key; only `Dense` has no exceptions.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

import torch

from dma_diffusers.kernels.tiling import boxes
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import Axis, neighborhood, tile_map
from dma_diffusers.kernels.tiling.precision_map import TILE, Class, tiles
from dma_diffusers.kernels.tiling.tile_order import TileOrder


class Policy:
    """Says which pairs of tiles matter.

    on_grid: whether it asks where tokens lie on their grid; its tiles are then boxes.
    by_content: whether it looks at what tiles hold; united with others, it says nothing of where tiles lie.
    leaves_out: whether it leaves pairs out, rather than compute all of them in HIGH or LOW.
    importance: of all pairs that a call's heads visit, the share that is HIGH for what it holds.
    skip_below: tiles whose probabilities all lie below it, beside the largest seen so far, are left out; None for none.
    heads: for how many heads of the queries the policy is; None for any number.
    unsaid: values of fields that words leave out.
    """

    on_grid = False
    by_content = False
    leaves_out = False
    importance = 0.0
    skip_below: float | None = None
    heads: int | None = None
    unsaid: tuple[Any, ...] = (None,)

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        """Integers of `Class`, `[1, H or 1, q_tiles, k_tiles]`; on the grid they need `slots`, and their layout."""
        return torch.full((1, 1, tiles(layout.q_length), tiles(layout.k_length)), int(Class.LOW))

    def box(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The shape of boxes that suits it best."""
        return boxes.plan(grid)[0]

    def axes(self, grid: Sequence[int]) -> tuple[Axis, ...]:
        """The neighbourhood beyond which no key is seen; none where all are. Raises ValueError if it can't be had."""
        return ()

    def notes(self, grid: Sequence[int]) -> list[str]:
        """What was changed for this grid. Raises ValueError for a grid that the policy can't have."""
        return []

    def __or__(self, other: "Policy") -> "Union":
        return Union((*_members(self), *_members(other)))

    def __str__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        words = [f"{name}={self._word(value)}" for name, value in given.items() if value not in self.unsaid]
        return f"{_name(type(self))}({', '.join(words)})"

    def _word(self, value: Any) -> str:
        if isinstance(value, Class):
            return value.name.lower()
        return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)  # sides of a grid


@dataclass(frozen=True)
class Dense(Policy):
    """Every tile in one class."""

    everywhere: Class = Class.HIGH

    def __post_init__(self):
        if not isinstance(self.everywhere, Class) or self.everywhere is Class.SKIP:
            raise ValueError(f"everywhere must be high or low, got {self._word(self.everywhere)}")

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        return torch.full_like(super().classes(layout), int(self.everywhere))


@dataclass(frozen=True)
class Diagonal(Policy):
    """DMA (arXiv 2604.03950): sink tiles and a band around the diagonal HIGH, the rest LOW.

    window: tokens. 128 is the diagonal tile alone; each further 256 (causal: 128) adds a tile on either side
        (causal: before it). 0 is no band. Other widths round up. A tuple has a width for each head of the queries.
    sink: tokens at the start of the keys, rounded up to tiles; on the grid, text stands there.
    near: "sequence" for a band of the flattened sequence; "grid" for as many boxes, those nearest on the grid.
    """

    window: int | tuple[int, ...] = TILE
    sink: int = TILE
    near: str = "sequence"

    unsaid = (None, "sequence")

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

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        q_tile = torch.arange(tiles(layout.q_length))[:, None]
        k_tile = torch.arange(tiles(layout.k_length))[None, :]
        width = torch.tensor(self.windows)[:, None, None]
        reach = -(-(width - TILE).clamp(min=0) // (TILE if is_causal else 2 * TILE))
        near = _ranks(tile_order) <= 2 * reach if self.on_grid else (q_tile - k_tile).abs() <= reach
        high = ((width > 0) & near) | (k_tile < tiles(self.sink))
        return _protected(torch.where(high, int(Class.HIGH), int(Class.LOW))[None], layout)

    def _word(self, value: Any) -> str:
        return "/".join(map(str, value)) if isinstance(value, tuple) else str(value)  # of each head


@dataclass(frozen=True)
class Neighborhood(Policy):
    """Two nested windows on the grid (generalized neighbourhood attention, arXiv 2504.16922).

    window: keys seen by each query, a side for each dimension of the grid; tiles that it holds are LOW, those beyond
        are skipped, those that its edge cuts are masked. None for the whole grid.
    high: tiles that hold a key within this window are HIGH. None for no such window.
    stride: queries that share one window, a side for each dimension, 1 by default; of `high` too, as far as it goes.
    A window larger than the grid is clamped, and noted.
    """

    window: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    high: tuple[int, ...] | None = None

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
        return neighborhood(grid, self.window, self.stride)[0] if self.window else ()

    def notes(self, grid: Sequence[int]) -> list[str]:
        notes = neighborhood(grid, self.window, self.stride)[1] if self.window else []
        return notes + [f"high: {note}" for note in self._high(grid)[1]]

    def box(self, grid: Sequence[int]) -> tuple[int, ...]:
        return boxes.fitting(self.axes(grid) or self._high(grid)[0])

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        grid = tile_order.tokens.grid
        low = reached(self.axes(grid), tile_order, "visited")
        classes = torch.where(low, int(Class.LOW), int(Class.SKIP))
        if self.high:
            high = reached(self._high(grid)[0], tile_order, "visited")
            classes = torch.where(high, int(Class.HIGH), classes)
        return _protected(classes[None, None], layout)

    def _high(self, grid: Sequence[int]) -> tuple[tuple[Axis, ...], list[str]]:
        if self.high is None:
            return (), []
        stride = self.stride and [min(sides) for sides in zip(self.stride, self.high, strict=False)]
        return neighborhood(grid, self.high, stride)


@dataclass(frozen=True)
class Importance(Policy):
    """The pairs of tiles that matter most for what they hold HIGH, the rest LOW (`routing`).

    budget: of all pairs that the heads of a call visit, the share that is HIGH so, over 0 and up to 1. Heads share it.
    """

    budget: float

    by_content = True

    def __post_init__(self):
        if not _is_share(self.budget) or self.budget > 1:
            raise ValueError(f"budget must be over 0 and at most 1, got {self.budget!r}")

    @property
    def importance(self) -> float:
        return self.budget

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        low = super().classes(layout)
        return _protected(low, layout)


@dataclass(frozen=True)
class SkipSoftmax(Policy):
    """Tiles LOW, and left out where the softmax makes nothing of them (BLASST).

    threshold: of the probability beside the largest that a query has seen, over 0 and under 1.
    """

    threshold: float

    by_content = True
    leaves_out = True

    def __post_init__(self):
        if not _is_share(self.threshold) or self.threshold >= 1:
            raise ValueError(f"threshold must be over 0 and under 1, got {self.threshold!r}")

    @property
    def skip_below(self) -> float | None:
        return self.threshold

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        low = super().classes(layout)
        return _protected(low, layout)


@dataclass(frozen=True)
class Union(Policy):
    """The more precise of several policies' classes, and all that they do by content."""

    members: tuple[Policy, ...]

    def __post_init__(self):
        if len({heads for member in self.members if (heads := member.heads)}) > 1:
            raise ValueError(f"policies for different numbers of heads can't unite: {self}")
        if len([member for member in self.members if isinstance(member, Neighborhood)]) > 1:
            raise ValueError(f"two neighbourhoods can't unite, give one of them a `high` window: {self}")

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
        return self.skip_below is not None or all(member.leaves_out for member in self._of_place)

    @property
    def importance(self) -> float:
        return max(member.importance for member in self.members)

    @property
    def skip_below(self) -> float | None:
        return max((member.skip_below for member in self.members if member.skip_below), default=None)

    @property
    def heads(self) -> int | None:
        return next((member.heads for member in self.members if member.heads), None)

    def classes(
        self, layout: Layout, is_causal: bool = False, tile_order: TileOrder | None = None
    ) -> torch.Tensor:
        chosen = [member.classes(layout, is_causal, tile_order) for member in self._of_place]
        classes = chosen[0]
        for other in chosen[1:]:
            classes = torch.minimum(classes, other)
        return classes

    def box(self, grid: Sequence[int]) -> tuple[int, ...]:
        suited = sorted(self._of_place, key=lambda member: not isinstance(member, Neighborhood))
        return suited[0].box(grid)

    def axes(self, grid: Sequence[int]) -> tuple[Axis, ...]:
        first, *others = self._of_place
        return () if others else first.axes(grid)  # all others see every key

    def notes(self, grid: Sequence[int]) -> list[str]:
        return [note for member in self.members for note in member.notes(grid)]

    @property
    def _of_place(self) -> list[Policy]:
        return [member for member in self.members if not member.by_content] or list(self.members)


def reached(axes: Sequence[Axis], tile_order: TileOrder, how: str) -> torch.Tensor:
    """Which KV tiles a neighbourhood reaches from each Q tile: bool `[q_tiles, k_tiles]`, True for those of text.

    how: "visited", that some query sees some of its keys, or "filled", that all see all. Without axes all are reached.
    """
    reach = torch.ones(2 * (tile_order.layout.k_length // TILE,), dtype=torch.bool)
    if axes:
        ranges = [getattr(axis, how)(side, side) for axis, side in zip(axes, tile_order.box, strict=True)]
        reach[tile_order.text_tiles :, tile_order.text_tiles :] = tile_map(ranges, tile_order.boxes)
    return reach


def _ranks(tile_order: TileOrder) -> torch.Tensor:
    """For each Q tile, how many boxes are nearer than each KV tile: int64 `[q_tiles, k_tiles]`; text is far."""
    axes = [side * torch.arange(count) for count, side in zip(tile_order.boxes, tile_order.box, strict=True)]
    boxes_at = torch.cartesian_prod(*axes).view(-1, len(axes)).double()
    ranks = torch.full(2 * (tile_order.layout.k_length // TILE,), 2**62)
    of_boxes = torch.cdist(boxes_at, boxes_at).argsort(stable=True).argsort()
    ranks[tile_order.text_tiles :, tile_order.text_tiles :] = of_boxes
    return ranks


def _protected(classes: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`classes`, in which tiles with text are HIGH."""
    start, stop = layout.text
    if stop > start:
        first, end = start // TILE, tiles(stop)
        classes = classes.clone()
        classes[..., first:end, :] = classes[..., first:end] = int(Class.HIGH)
    return classes


KINDS = {"dense": Dense, "diagonal": Diagonal, "neighborhood": Neighborhood, "importance": Importance,
         "skip_softmax": SkipSoftmax}  # fmt: skip
_CALL = re.compile(r"\s*(\w+)\s*\(([^()]*)\)\s*")


@cache
def parse(words: str) -> Policy:
    """The policy that `words` say. Raises ValueError, in one line, where they say none."""
    members = []
    for part in words.split("|"):
        call = _CALL.fullmatch(part)
        if not call or call[1] not in KINDS:
            raise ValueError(
                f"{part.strip()!r} is no policy: give {', '.join(f'{name}(…)' for name in KINDS)}, or several with |"
            )
        kind, given = KINDS[call[1]], {}
        known = [field.name for field in fields(kind)]
        for argument in filter(None, map(str.strip, call[2].split(","))):
            name, _, value = map(str.strip, argument.partition("="))
            if name not in known or not value:
                raise ValueError(f"{call[1]}({argument}): give {', '.join(f'{name}=…' for name in known)}")
            given[name] = _class(value) if name == "everywhere" else _value(value)
        try:
            members.append(kind(**given))
        except TypeError:
            missing = ", ".join(name for name in known if name not in given)
            raise ValueError(f"{call[1]} needs {missing}") from None
    return members[0] if len(members) == 1 else Union(tuple(members))


def _members(policy: Policy) -> tuple[Policy, ...]:
    return policy.members if isinstance(policy, Union) else (policy,)


def _name(kind: type[Policy]) -> str:
    return next(name for name, known in KINDS.items() if known is kind)


def _value(word: str) -> Any:
    for separator in "x/":
        if re.fullmatch(rf"\d+({separator}\d+)+", word):
            return tuple(map(int, word.split(separator)))
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word


def _class(word: str) -> Class | str:
    return Class.__members__.get(word.upper(), word)


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
