"""Precision maps hold the class of every pair (Q tile, KV tile), as block lists that the kernels follow.

The block list of a Q tile names the KV tiles that it visits, in three contiguous phases, each of one kind of tile:
HIGH, LOW, and MASKED. In MASKED tiles some query doesn't see some key (the causal diagonal, the end of the keys, empty
slots); they are HIGH too, or LOW in a map that has nothing HIGH. With one loop for each phase, no loop has to look at
the class of a tile (DMA, arXiv 2604.03950).

A MEAN tile stands in no list. Its sub-tiles of 32 tokens take part in the softmax through their means, all MEAN tiles
of a Q tile together: one bit for each KV tile says which these are.
"""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TypeVar

import torch
import torch.nn.functional as F

from dma_diffusers.kernels.tiling.layout import SUBTILE, TILE, Layout, tiles

T = TypeVar("T")

# Shared block lists serve one program of this many blocks of queries, each of this many rows.
SHARED_BLOCKS, SHARED_ROWS = 3, 64
SHARED_TILE_BITS = 24  # the low bits of a shared entry, which hold the KV tile
MEANS_TILES = (
    SUBTILE  # so many KV tiles have as many sub-tiles as a tile has tokens, and share a word of bits
)


class Class(IntEnum):
    """The precision that a policy chooses for one pair of tiles; smaller numbers are more precise."""

    HIGH = 0
    LOW = 1
    MEAN = 2
    SKIP = 3


class Phase(IntEnum):
    """How the kernels take a pair of tiles: in one of the loops over block lists, or through its means."""

    HIGH = 0
    LOW = 1
    MASKED = 2
    MEAN = 3


LOOPS = (Phase.HIGH, Phase.LOW, Phase.MASKED)  # each over one kind of tile, in the order in which they run
UNVISITED = len(Phase)  # stands for the phase of a pair that the kernels leave out


@dataclass(frozen=True)
class PrecisionMap:
    """The block list of each Q tile: the KV tiles that it visits, in the kernels' order.

    indices: int32 `[B or 1, H or 1, q_tiles, n]`, numbers of KV tiles, ascending within each phase. Entries past
        the end of a list mean nothing.
    bounds: int32 `[B or 1, H or 1, q_tiles, 3]`, where each phase ends in `indices`.
    has_high, has_low: whether any Q tile visits tiles of that class; masked ones are HIGH if any tile is.
    means: int32 `[B or 1, H or 1, q_tiles, ceil(k_tiles / 32)]`: bit t of word w is set if the Q tile takes KV tile
        32·w + t through its means; None if no pair is MEAN.
    """

    indices: torch.Tensor
    bounds: torch.Tensor
    has_high: bool
    has_low: bool
    means: torch.Tensor | None = None

    @property
    def has_mean(self) -> bool:
        """True if any Q tile takes a KV tile through its means."""
        return self.means is not None

    def to(self, device: torch.device) -> "PrecisionMap":
        """The same map on `device`."""
        means = None if self.means is None else self.means.to(device)
        return replace(self, indices=self.indices.to(device), bounds=self.bounds.to(device), means=means)

    @cached_property
    def shared(self) -> "PrecisionMap":
        """The same map as shared block lists, each for a program of 192 queries: three blocks of 64 rows.

        A shared list names every KV tile that one of the blocks visits, once for each phase: an entry of `indices`
        holds the KV tile in its lowest 24 bits and above them one bit for each block, set if that block's Q tile
        visits it. `indices` is one entry longer than the longest list, because programs may read one entry ahead.
        `means` stays as it is, a row for each Q tile.
        """
        device = self.indices.device
        both = torch.cat((self.indices.cpu(), self.bounds.cpu()), dim=-1)
        both, of_head = both.unique(dim=1, return_inverse=True)  # many heads share a few windows
        tile_indices, tile_bounds = both[..., :-3], both[..., -3:]
        q_tiles = tile_indices.shape[-2]
        programs = -(-q_tiles * TILE // (SHARED_BLOCKS * SHARED_ROWS))
        k_tiles = int(tile_indices.max()) + 1
        position = torch.arange(tile_indices.shape[-1])
        ends = tile_bounds[..., None]
        starts = torch.cat((torch.zeros_like(ends[..., :1, :]), ends[..., :-1, :]), dim=-2)
        in_phase = (position >= starts) & (position < ends)  # [..., q_tiles, phases, n]
        tile = tile_indices[..., None, :].expand(in_phase.shape).long()
        visits = torch.zeros(*in_phase.shape[:-1], k_tiles, dtype=torch.int32)
        visits.scatter_add_(-1, tile, in_phase.int())

        block = torch.arange(programs * SHARED_BLOCKS)
        q_tile = block * SHARED_ROWS // TILE
        of_block = visits[..., q_tile.clamp(max=q_tiles - 1), :, :] * (q_tile < q_tiles).int()[:, None, None]
        of_block = of_block.unflatten(-3, (programs, SHARED_BLOCKS))
        bits = 1 << torch.arange(SHARED_TILE_BITS, SHARED_TILE_BITS + SHARED_BLOCKS, dtype=torch.int32)
        of_block *= bits[:, None, None]
        visitors = of_block.sum(-3, dtype=torch.int32)  # [..., programs, phases, k_tiles]
        entries = (visitors + torch.arange(k_tiles, dtype=torch.int32)).flatten(-2)
        visited_first = (visitors == 0).flatten(-2).to(torch.uint8).argsort(dim=-1, stable=True)
        bounds = (visitors > 0).sum(-1).cumsum(-1)
        lists = F.pad(entries.gather(-1, visited_first), (0, 1))
        indices = lists[..., : int(bounds[..., -1].max()) + 1]
        indices, bounds = (x.index_select(1, of_head).to(device) for x in (indices, bounds.int()))
        return replace(self, indices=indices, bounds=bounds)

    def phases(self, k_tiles: int) -> torch.Tensor:
        """The phase of `LOOPS` that takes each pair, 3 if none does: int64 `[B or 1, H or 1, q_tiles, k_tiles]`."""
        *shape, q_tiles, length = self.indices.shape
        position = torch.arange(length, device=self.indices.device)
        phase = (position[:, None] >= self.bounds[..., None, :]).sum(-1)
        phases = phase.new_full((*shape, q_tiles, k_tiles), len(LOOPS))
        # Entries past the end of a list may be any number, and come after all phases.
        return phases.scatter_reduce_(-1, self.indices.long().clamp(0, k_tiles - 1), phase, "amin")

    def transposed(self, k_tiles: int) -> "PrecisionMap":
        """The same pairs as block lists of Q tiles, one for each of `k_tiles` KV tiles; `means` stays as it is.

        It is made where the map is, and nothing waits for a device.
        """
        phases = self.phases(k_tiles).mT
        counts = torch.stack([(phases == phase).sum(-1) for phase in LOOPS], dim=-1)
        indices = phases.argsort(dim=-1, stable=True).int().contiguous()
        return replace(self, indices=indices, bounds=counts.cumsum(-1).int().contiguous())

    def used(self, high: T, low: T) -> tuple[T | None, T | None]:
        """The values for HIGH and for LOW, with None for a class without tiles."""
        return high if self.has_high else None, low if self.has_low else None


def causal_classes(classes: torch.Tensor) -> torch.Tensor:
    """A copy of `classes` for a causal mask.

    Tiles that lie wholly above the diagonal are skipped. Those on it, of which a query sees a part, are LOW rather than
    MEAN.
    """
    q_tile = torch.arange(classes.shape[-2])[:, None]
    k_tile = torch.arange(classes.shape[-1])[None, :]
    classes = torch.where((k_tile == q_tile) & (classes == Class.MEAN), int(Class.LOW), classes)
    return torch.where(k_tile > q_tile, int(Class.SKIP), classes)


def cut_tiles(layout: Layout, is_causal: bool, token_order: torch.Tensor | None = None) -> torch.Tensor:
    """True for tiles cut by the end of the keys, empty slots or a causal mask: bool `[q_tiles, k_tiles]`.

    token_order: as `build_map` takes it.
    """
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
    """The phase that takes each pair of tiles, `UNVISITED` if none does: integers of `classes`' shape.

    MEAN tiles are never MASKED: hidden keys count for no mean. The arguments are those of `build_map`. Raises
    ValueError if `classes` doesn't have the layout's shape.
    """
    expected = (tiles(layout.q_length), tiles(layout.k_length))
    if classes.ndim != 4 or tuple(classes.shape[-2:]) != expected:
        raise ValueError(f"classes must be [B or 1, H or 1, *{expected}], got {list(classes.shape)}")
    if is_causal:
        classes = causal_classes(classes)
    masked = cut_tiles(layout, is_causal, token_order)
    masked = masked if cut is None else masked | cut
    phases = torch.where(masked, int(Phase.MASKED), classes)
    phases = torch.where(classes == Class.MEAN, int(Phase.MEAN), phases)
    return torch.where(classes == Class.SKIP, UNVISITED, phases)


def build_map(
    classes: torch.Tensor,
    layout: Layout,
    is_causal: bool = False,
    token_order: torch.Tensor | None = None,
    cut: torch.Tensor | None = None,
) -> PrecisionMap:
    """The map of a policy's classes.

    classes: integers of `Class`, `[B or 1, H or 1, q_tiles, k_tiles]`.
    is_causal: query i sees keys 0 … i, as with `scaled_dot_product_attention(is_causal=True)`; token indices count.
    token_order: integers `[Sk]`, the token in each slot of `layout`, −1 for empty slots, which are hidden as keys.
    cut: bool `[q_tiles, k_tiles]`, further tiles in which some query doesn't see some key.
    Raises ValueError if `classes` doesn't have the layout's shape.
    """
    phases = visiting_phases(classes, layout, is_causal, token_order, cut)
    return map_of(phases, has_high=bool(((classes == Class.HIGH) & (phases != UNVISITED)).any()))


def map_of(phases: torch.Tensor, has_high: bool) -> PrecisionMap:
    """The map of what `visiting_phases` gives. has_high: whether MASKED tiles are HIGH."""
    in_order = phases.argsort(dim=-1, stable=True)
    counts = torch.stack([(phases == phase).sum(-1) for phase in LOOPS], dim=-1)
    bounds = counts.cumsum(-1)
    longest = max(int(bounds[..., -1].max()), 1)
    has_low = bool(counts[..., Phase.LOW if has_high else slice(Phase.LOW, None)].any())
    indices = in_order[..., :longest].int().contiguous()
    is_mean = phases == Phase.MEAN
    means = means_of(is_mean) if is_mean.any() else None
    return PrecisionMap(indices, bounds.int().contiguous(), has_high, has_low, means)


def means_of(is_mean: torch.Tensor) -> torch.Tensor:
    """`PrecisionMap.means` of the pairs that are MEAN. is_mean: bool `[B or 1, H or 1, q_tiles, k_tiles]`."""
    words = F.pad(is_mean, (0, -is_mean.shape[-1] % MEANS_TILES)).unflatten(-1, (-1, MEANS_TILES))
    bits = 1 << torch.arange(MEANS_TILES, device=is_mean.device)
    return (words * bits).sum(-1).int().contiguous()  # the 32nd bit is the sign
