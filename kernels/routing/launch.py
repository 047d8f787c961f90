"""Runs the kernels of routing, which turn q, k and v into the block lists that the attention kernel reads."""

import math

import torch

from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.quantiser.launch import Source, are_paired, of_norms
from dma_diffusers.kernels.quantiser.operands import padded_dim
from dma_diffusers.kernels.routing import kernel
from dma_diffusers.kernels.routing.reference import BINS, SUBTILES, Pools, Routing
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
    pairs = heads * q_tiles * k_tiles
    if pairs >= 2**31:
        raise ValueError(
            f"routing chooses among fewer than 2^31 pairs of tiles in a batch entry, not {pairs}"
        )
    device, phases = pools.q.device, routing.phases
    stride = phases.stride(1) if phases.shape[1] > 1 else 0
    levels = launcher.empty((batch, heads, q_tiles, k_tiles), torch.int16, device)
    histogram = finished = allowed = of_tiles = means = None
    if routing.shares is None:
        histogram, finished = launcher.counters((batch, 2, BINS), device), launcher.counters((1,), device)
        allowed = routing.allowed(heads)
    # The fastest blocks without spills, of those that were timed on an H200.
    rows, columns, warps = (32, 64, 8) if dim <= 128 else (16, 32, 4)
    launcher(
        kernel.score, (batch * heads * -(-q_tiles // rows),),
        *pools, phases, levels, histogram, heads, kv_heads, q_tiles, k_tiles, stride,
        POWER=1 if routing.by_mass else 2, ROWS=rows, COLUMNS=columns, D=dim,
        num_warps=warps, num_stages=1, enable_fp_fusion=True, maxnreg=255,
    )  # fmt: skip
    if routing.shares is None:
        launcher(
            kernel.count_steps, (-(-pairs // 4096), batch),
            levels, histogram, allowed, pairs, BLOCK=4096, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    else:
        shares = routing.shares
        of_tiles = launcher.empty((batch, heads, q_tiles, 2), torch.int32, device)
        if routing.rest == Phase.MEAN:
            means = launcher.empty((batch, heads, q_tiles, -(-k_tiles // MEANS_TILES)), torch.int32, device)
        launcher(
            kernel.rank, (batch * heads * q_tiles,),
            levels, phases, shares, of_tiles, means, heads, q_tiles, k_tiles, stride,
            shares.stride(1) if shares.shape[1] > 1 else 0,
            COLUMNS=256, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    blocks, rows = (SHARED_BLOCKS, SHARED_ROWS) if is_shared else (1, TILE)
    programs = -(-q_tiles * TILE // (blocks * rows))
    # A program spans two Q tiles, which may visit a KV tile in different phases, and may read one entry ahead.
    length = 2 * k_tiles + 1 if is_shared else k_tiles
    indices = launcher.empty((batch, heads, programs, length), torch.int32, device)
    bounds = launcher.empty((batch, heads, programs, 3), torch.int32, device)
    launcher(
        kernel.write_block_lists, (batch * heads * programs,),
        levels, histogram, finished, allowed, of_tiles, phases, indices, bounds,
        heads, q_tiles, k_tiles, programs, length, stride,
        BLOCKS=blocks, ROWS=rows, COLUMNS=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return PrecisionMap(indices, bounds, has_high=True, has_low=True, means=means)
