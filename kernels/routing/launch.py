"""Runs the kernels of routing, which turn q, k and v into the block lists that the attention kernel reads."""

import math

import torch

from dma_diffusers.kernels.call import Memory
from dma_diffusers.kernels.device.launch import Launcher, multiprocessors
from dma_diffusers.kernels.quantiser.launch import Source, are_paired, of_norms
from dma_diffusers.kernels.quantiser.operands import padded_dim
from dma_diffusers.kernels.routing import kernel, rows
from dma_diffusers.kernels.routing.reference import BINS, KEYS, LEVELS, ROWS, SUBTILES, Pools, Routing
from dma_diffusers.kernels.tiling.layout import TILE, tiles
from dma_diffusers.kernels.tiling.precision_map import (
    MEANS_TILES,
    SHARED_BLOCKS,
    SHARED_ROWS,
    Phase,
    PrecisionMap,
)


def pooled(
    source: Source,
    mean: torch.Tensor | None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> Pools:
    """The reference's pools of scaled q, of k less its mean, and of v; channels past the head dimension are zeros.

    Hidden keys are left out of the pools of k and v. mean: float32 `[B·Hkv, D]`, the mean of k; None for none.
    """
    (batch, heads, _, head_dim), kv_heads = source.q.shape, source.k.shape[1]
    q_length, k_length, token_count = source.lengths
    dim = padded_dim(head_dim)
    of_q, of_k = (batch, heads, tiles(q_length)), (batch, kv_heads, tiles(k_length))
    shapes = (*of_q, 2, dim), (*of_k[:2], of_k[2] * SUBTILES, 2, dim), of_k
    pools = Pools(*(launcher.empty(shape, torch.float32, source.q.device) for shape in shapes))
    # One warp spills if it rotates, and is still faster than two.
    launcher(
        kernel.pool, (math.prod(of_q) + 2 * math.prod(of_k),),
        source.q, source.k, source.v, mean, source.softmax_scale_log2, *source.rope_tables, *of_norms(source.norms),
        source.key_mask, source.token_order, *pools, heads, kv_heads, batch * kv_heads, q_length, k_length, token_count,
        *source.strides,
        PAIRED=are_paired(source.q, source.k, source.v, *of_norms(source.norms)[:4]), HEAD_DIM=head_dim, D=dim,
        num_warps=max(dim // 128, 1), enable_fp_fusion=True,
    )  # fmt: skip
    return pools


def spread_of_values(source: Source, launcher: Launcher) -> torch.Tensor:
    """The pools of v alone, as of `pooled`."""
    v, head_dim = source.v, source.k.shape[-1]
    _, k_length, token_count = source.lengths
    of_k = (*v.shape[:2], tiles(k_length))
    v_pools = launcher.empty(of_k, torch.float32, v.device)
    launcher(
        kernel.pool, (math.prod(of_k),),
        None, None, v, None, 1.0, *[None] * 4, *of_norms(None), source.key_mask, source.token_order,
        None, None, v_pools, 1, v.shape[1], math.prod(v.shape[:2]), 1, k_length, token_count,
        *[0] * 6, *source.strides[6:],
        PAIRED=are_paired(v), HEAD_DIM=head_dim, D=padded_dim(head_dim),
        num_warps=max(padded_dim(head_dim) // 128, 1), enable_fp_fusion=True,
    )  # fmt: skip
    return v_pools


def route(
    pools: Pools,
    routing: Routing,
    is_shared: bool = False,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> PrecisionMap:
    """The reference's map, or its `shared` block lists, made on the device without waiting for it.

    pools: contiguous; channels past the head dimension are zeros. is_shared: gives the `shared` block lists.
    `indices` of the result is as long as the longest possible list, and undefined past the end of each list.
    Raises ValueError for 2^31 pairs of tiles or more in a batch entry.
    """
    (batch, heads, q_tiles, _, dim), (kv_heads, k_tiles) = pools.q.shape, pools.v.shape[1:]
    levels = _empty_levels(batch, heads, routing, pools.q.device, launcher)
    # The fastest blocks without spills, of those that were timed on an H200.
    at_once, columns, warps = (32, 64, 8) if dim <= 128 else (16, 32, 4)
    blocks = batch * heads * -(-q_tiles // at_once)
    notes = launcher.empty((blocks, at_once, k_tiles), torch.float32, pools.q.device)
    launcher(
        kernel.score, (blocks,),
        *pools, routing.phases, notes, levels, heads, kv_heads, q_tiles, k_tiles,
        _stride(routing.phases),
        POWER=1 if routing.by_mass else 2, ROWS=at_once, COLUMNS=columns, D=dim,
        num_warps=warps, num_stages=1, enable_fp_fusion=True, maxnreg=255,
    )  # fmt: skip
    return _block_lists(_chosen(levels, routing, None, launcher), routing, is_shared, launcher)


def route_call(
    source: Source,
    mean: torch.Tensor | None,
    routing: Routing,
    memory: Memory | None = None,
    is_shared: bool = False,
    target: str | None = None,
    launcher: Launcher = Launcher(),  # noqa: B008 (it never changes)
) -> PrecisionMap:
    """The reference's map of a call, as of `route`; by pools or rows or memory.

    mean: as of `pooled`. memory: contiguous; read or written, as it says. target: the architecture to
    tune for, None for any. Raises ValueError as `route` does.
    """
    if memory is not None and memory.is_read:
        return _block_lists(memory, routing, is_shared, launcher)
    if routing.by_rows:
        levels = _levels_of_rows(source, mean, routing, target, launcher)
        return _block_lists(_chosen(levels, routing, memory, launcher), routing, is_shared, launcher)
    return route(pooled(source, mean, launcher), routing, is_shared, launcher)


def _empty_levels(
    batch: int, heads: int, routing: Routing, device: torch.device, launcher: Launcher
) -> torch.Tensor:
    """Makes room for the levels of pairs, int16 `[B, H, q_tiles, k_tiles]`; raises ValueError as `route` does."""
    q_tiles, k_tiles = routing.phases.shape[2:]
    pairs = heads * q_tiles * k_tiles
    if pairs >= 2**31:
        raise ValueError(
            f"routing chooses among fewer than 2^31 pairs of tiles in a batch entry, not {pairs}"
        )
    return launcher.empty((batch, heads, q_tiles, k_tiles), torch.int16, device)


def _levels_of_rows(
    source: Source, mean: torch.Tensor | None, routing: Routing, target: str | None, launcher: Launcher
) -> torch.Tensor:
    """The levels of pairs by a sample of each Q tile's rows, and of the keys."""
    (batch, heads, _, head_dim), kv_heads, device = source.q.shape, source.k.shape[1], source.q.device
    q_length, k_length, token_count = source.lengths
    q_tiles, k_tiles, dim = tiles(q_length), tiles(k_length), padded_dim(head_dim)
    levels = _empty_levels(batch, heads, routing, device, launcher)
    v_pools = None if routing.by_mass else spread_of_values(source, launcher)
    groups, at_once = -(-k_tiles // rows.K_TILES.value), rows.K_TILES.value
    of_q, of_k = (batch * heads, q_tiles, ROWS), (batch * kv_heads, groups * at_once, KEYS)
    sampled = [launcher.empty((*shape, dim), torch.bfloat16, device) for shape in (of_q, of_k)]
    launcher(
        rows.sample, (math.prod(of_q[:2]) + math.prod(of_k[:2]),),
        source.q, source.k, mean, source.softmax_scale_log2, *source.rope_tables, *of_norms(source.norms),
        source.key_mask, source.token_order, *sampled,
        heads, kv_heads, batch * kv_heads, q_length, k_length, token_count, *source.strides[:6],
        PAIRED=are_paired(source.q, source.k, *of_norms(source.norms)[:4]), HEAD_DIM=head_dim, D=dim,
        num_warps=dim // 32, enable_fp_fusion=True,
    )  # fmt: skip
    # Two programs share a multiprocessor, where they don't spill for it.
    q_tiles_at_once, stages = (8, 2) if dim <= 128 else (4, 1)
    blocks = batch * heads * -(-q_tiles // q_tiles_at_once)
    programs = min(blocks, 2 * multiprocessors(device))
    notes = launcher.empty((programs, groups * at_once, q_tiles_at_once * ROWS), torch.float32, device)
    launcher(
        rows.score_rows, (programs,),
        *sampled, v_pools, routing.phases, notes, levels,
        heads, kv_heads, q_tiles, k_tiles, _stride(routing.phases), blocks,
        POWER=1 if routing.by_mass else 2, Q_TILES=q_tiles_at_once, COLUMNS=32, STAGES=stages, D=dim,
        num_warps=8, enable_fp_fusion=True, maxnreg=128 if target == "sm_90" and dim <= 128 else 255,
    )  # fmt: skip
    return levels


def _chosen(levels: torch.Tensor, routing: Routing, memory: Memory | None, launcher: Launcher) -> Memory:
    """The pairs that are chosen by their levels, in this memory if there is one."""
    batch, heads, q_tiles, k_tiles = levels.shape
    if memory is None:
        shape = (batch, heads, q_tiles, -(-k_tiles // MEANS_TILES))
        high = launcher.empty(shape, torch.int32, levels.device)
        memory = Memory(
            high=high,
            left=None if routing.rest is None else launcher.empty(shape, torch.int32, levels.device),
        )
    histogram = finished = allowed = None
    if routing.shares is None:
        histogram = launcher.counters((batch, 2, BINS), levels.device)
        finished = launcher.counters((1,), levels.device)
        allowed, pairs = routing.allowed(heads), heads * q_tiles * k_tiles
        for of_steps in (False, True):
            launcher(
                kernel.count, (-(-pairs // 4096), batch),
                levels, histogram, allowed, pairs, STEPS=of_steps, BLOCK=4096, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    shares = routing.shares
    launcher(
        kernel.choose, (batch * heads * q_tiles,),
        levels, routing.phases, histogram, finished, allowed, shares, memory.high, memory.left,
        heads, q_tiles, k_tiles, ((LEVELS + 1) * k_tiles).bit_length(),
        _stride(routing.phases), 0 if shares is None else _stride(shares),
        COLUMNS=128, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return memory


def _block_lists(memory: Memory, routing: Routing, is_shared: bool, launcher: Launcher) -> PrecisionMap:
    """The block lists of the pairs that were chosen."""
    batch, heads, q_tiles, _ = memory.high.shape
    k_tiles, device = routing.phases.shape[-1], memory.high.device
    blocks, block_rows = (SHARED_BLOCKS, SHARED_ROWS) if is_shared else (1, TILE)
    programs = -(-q_tiles * TILE // (blocks * block_rows))
    # A program spans two Q tiles, which may visit a KV tile in different phases, and may read one entry ahead.
    length = 2 * k_tiles + 1 if is_shared else k_tiles
    indices = launcher.empty((batch, heads, programs, length), torch.int32, device)
    bounds = launcher.empty((batch, heads, programs, 3), torch.int32, device)
    launcher(
        kernel.write_block_lists, (batch * heads * programs,),
        routing.phases, memory.high, memory.left, indices, bounds,
        heads, q_tiles, k_tiles, programs, length, _stride(routing.phases),
        BLOCKS=blocks, ROWS=block_rows, COLUMNS=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    means = memory.left if routing.rest == Phase.MEAN else None
    return PrecisionMap(indices, bounds, has_high=True, has_low=True, means=means)


def _stride(of_heads: torch.Tensor) -> int:
    """The stride of heads; 0 where all share one."""
    return of_heads.stride(1) if of_heads.shape[1] > 1 else 0
