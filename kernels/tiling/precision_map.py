"""Precision maps: which class each pair (Q tile, KV tile) gets, as the kernel block lists it.

The kernel of one Q tile block lists three contiguous phases, each of one kind of tile: HIGH, LOW, and MASKED, the
tiles that a fine mask cuts (the causal diagonal, the end of the keys), which are HIGH too, or LOW in a map that has
nothing HIGH. Splitting the block list keeps precision out of the loops' bodies (DMA, arXiv 2604.03950).
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.layout import Layout

T = TypeVar("T")

TILE = 128
# A shared block list's program: so many blocks of so many queries; entries hold the KV tile in their lowest bits.
SHARED_BLOCKS, SHARED_ROWS, SHARED_TILE_BITS = 3, 64, 24


class Class(IntEnum):
    """What a policy says of one pair of tiles."""

    HIGH = 0
    LOW = 1
    SKIP = 2


class Phase(IntEnum):
    """The kernel's loops over one class each, in the order in which they run."""

    HIGH = 0
    LOW = 1
    MASKED = 2


UNVISITED = len(Phase)


def tiles(length: int) -> int:
    """How many map tiles `length` tokens take."""
    return -(-length // TILE)


@dataclass(frozen=True)
class PrecisionMap:
    """For each Q tile, the KV tiles it visits, in the kernel's order.

    indices: int32 `[B or 1, H or 1, q_tiles, n]`, KV tile numbers (in `shared`, more), ascending within each phase.
    bounds: int32 `[B or 1, H or 1, q_tiles, 3]`, where each phase ends in `indices`.
    has_high, has_low: whether any Q tile visits tiles of that class; masked ones are HIGH if any tile is.
    """

    indices: torch.Tensor
    bounds: torch.Tensor
    has_high: bool
    has_low: bool

    def to(self, device: torch.device) -> "PrecisionMap":
        """The same map on `device`."""
        return replace(self, indices=self.indices.to(device), bounds=self.bounds.to(device))

    @cached_property
    def shared(self) -> "PrecisionMap":
        """The block lists of programs of 192 queries: three blocks of 64, each of which visits its own Q tile's KV tiles.

        An entry of `indices` is a KV tile, and from bit 24 on, which of the blocks visit it; the longest block list is
        followed by one more entry, which a program may read ahead.
        """
        device = self.indices.device
        own = torch.cat((self.indices.cpu(), self.bounds.cpu()), dim=-1)
        own, of_head = own.unique(dim=1, return_inverse=True)  # many heads share a few windows
        own_indices, own_bounds = own[..., :-3], own[..., -3:]
        q_tiles = own_indices.shape[-2]
        programs = -(-q_tiles * TILE // (SHARED_BLOCKS * SHARED_ROWS))
        k_tiles = int(own_indices.max()) + 1
        place = torch.arange(own_indices.shape[-1])
        ends = own_bounds[..., None]
        starts = torch.cat((torch.zeros_like(ends[..., :1, :]), ends[..., :-1, :]), dim=-2)
        is_visited = (place >= starts) & (place < ends)  # [..., q_tiles, phases, n]
        tile = own_indices[..., None, :].expand(is_visited.shape).long()
        visits = torch.zeros(*is_visited.shape[:-1], k_tiles, dtype=torch.int32)
        visits.scatter_add_(-1, tile, is_visited.int())

        block = torch.arange(programs * SHARED_BLOCKS)
        own_tile = block * SHARED_ROWS // TILE
        of_block = (
            visits[..., own_tile.clamp(max=q_tiles - 1), :, :] * (own_tile < q_tiles).int()[:, None, None]
        )
        of_block = of_block.unflatten(-3, (programs, SHARED_BLOCKS))
        bits = 1 << torch.arange(SHARED_TILE_BITS, SHARED_TILE_BITS + SHARED_BLOCKS)
        visitors = (of_block * bits[:, None, None]).sum(-3)  # [..., programs, phases, k_tiles]
        entries = (visitors + torch.arange(k_tiles)).flatten(-2)
        is_walked = (visitors > 0).flatten(-2)
        walked_first = (~is_walked).int().argsort(dim=-1, stable=True)
        bounds = (visitors > 0).sum(-1).cumsum(-1)
        block_lists = F.pad(entries.gather(-1, walked_first), (0, 1))
        indices = block_lists[..., : int(bounds[..., -1].max()) + 1].int()
        indices, bounds = (x.index_select(1, of_head).to(device) for x in (indices, bounds.int()))
        return replace(self, indices=indices, bounds=bounds)

    @property
    def block_lists(self) -> list[torch.Tensor]:
        """All tensors that kernels read of the map."""
        shared = vars(self).get("shared")
        return [self.indices, self.bounds, *((shared.indices, shared.bounds) if shared else ())]

    def used(self, high: T, low: T) -> tuple[T | None, T | None]:
        """What is said of HIGH and of LOW, None for a class without tiles."""
        return high if self.has_high else None, low if self.has_low else None


def causal_classes(classes: torch.Tensor) -> torch.Tensor:
    """`classes` without the tiles that lie wholly above the diagonal."""
    q_tile = torch.arange(classes.shape[-2])[:, None]
    k_tile = torch.arange(classes.shape[-1])[None, :]
    return torch.where(k_tile > q_tile, int(Class.SKIP), classes)


def cut_tiles(layout: Layout, is_causal: bool, token_order: torch.Tensor | None = None) -> torch.Tensor:
    """Which tiles a fine mask cuts: bool `[q_tiles, k_tiles]`."""
    q_tiles, k_tiles = tiles(layout.q_length), tiles(layout.k_length)
    cut = torch.zeros(q_tiles, k_tiles, dtype=torch.bool)
    if layout.k_length % TILE:
        cut[:, -1] = True
    if token_order is not None:
        cut |= F.pad(token_order.cpu() < 0, (0, -len(token_order) % TILE)).view(-1, TILE).any(-1)
    if is_causal:
        cut |= torch.arange(k_tiles)[None, :] == torch.arange(q_tiles)[:, None]
    return cut


def visiting_phases(
    classes: torch.Tensor,
    layout: Layout,
    is_causal: bool = False,
    token_order: torch.Tensor | None = None,
    cut: torch.Tensor | None = None,
) -> torch.Tensor:
    """The phase that visits each pair of tiles, `UNVISITED` for none: integers of `classes`' shape.

    classes, order, cut: as of `build_map`.
    """
    expected = (tiles(layout.q_length), tiles(layout.k_length))
    if classes.ndim != 4 or tuple(classes.shape[-2:]) != expected:
        raise ValueError(f"classes must be [B or 1, H or 1, *{expected}], got {list(classes.shape)}")
    if is_causal:
        classes = causal_classes(classes)
    skipped = classes == Class.SKIP
    masked = cut_tiles(layout, is_causal, token_order)
    masked = masked if cut is None else masked | cut
    phases = torch.where(masked, int(Phase.MASKED), classes)
    return torch.where(skipped, UNVISITED, phases)


def build_map(
    classes: torch.Tensor,
    layout: Layout,
    is_causal: bool = False,
    token_order: torch.Tensor | None = None,
    cut: torch.Tensor | None = None,
) -> PrecisionMap:
    """The map that a policy's classes give.

    classes: integers of `Class`, `[B or 1, H or 1, q_tiles, k_tiles]`. A causal mask compares token indices,
    query i seeing keys 0 … i, as `scaled_dot_product_attention(is_causal=True)` does.
    token_order: integers `[Sk]`, the token that stands at each slot of `layout`, −1 where none does: such keys are hidden.
    cut: bool `[q_tiles, k_tiles]`, other tiles of which not every query sees all keys.
    """
    phases = visiting_phases(classes, layout, is_causal, token_order, cut)
    return map_of(phases, has_high=bool(((classes == Class.HIGH) & (phases != UNVISITED)).any()))


def map_of(phases: torch.Tensor, has_high: bool) -> PrecisionMap:
    """The map of these `visiting_phases`; has_high: whether MASKED tiles are HIGH."""
    walked = phases.argsort(dim=-1, stable=True)
    counts = torch.stack([(phases == phase).sum(-1) for phase in Phase], dim=-1)
    bounds = counts.cumsum(-1)
    longest = max(int(bounds[..., -1].max()), 1)
    has_low = bool(counts[..., Phase.LOW if has_high else slice(Phase.LOW, None)].any())
    indices = walked[..., :longest].int().contiguous()
    return PrecisionMap(indices, bounds.int().contiguous(), has_high, has_low)
