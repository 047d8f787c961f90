"""Runs the kernels of routing, which turn q, k and v into the block lists that the attention kernel reads."""

import math

import torch

from dma_diffusers.kernels.device.launch import Run, run
from dma_diffusers.kernels.quantiser.launch import padded_dim, tables_of
from dma_diffusers.kernels.quantiser.reference import Rope
from dma_diffusers.kernels.routing import kernel
from dma_diffusers.kernels.routing.reference import BINS, Pools, Routing
from dma_diffusers.kernels.tiling.layout import TILE, tiles
from dma_diffusers.kernels.tiling.precision_map import SHARED_BLOCKS, SHARED_ROWS, PrecisionMap


def pooled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mean: torch.Tensor | None,
    factor: float,
    *,
    q_rope: Rope | None = None,
    k_rope: Rope | None = None,
    key_mask: torch.Tensor | None = None,
    token_order: torch.Tensor | None = None,
    run: Run = run,
) -> Pools:
    """The reference's pools of q·factor, of k less its mean, and of v; channels past the head dimension are zeros.

    The arguments are those of the quantiser's `encode`; hidden keys are left out of K's pools.
    mean: float32 `[B·Hkv, D]`, the mean of k; None for none.
    """
    (batch, heads, q_length, head_dim), (kv_heads, k_length) = q.shape, k.shape[1:3]
    token_count = None
    if token_order is not None:
        token_count = None if len(token_order) == k_length else k_length
        q_length = k_length = len(token_order)
    dim = padded_dim(head_dim)
    of_q, of_k = (batch, heads, tiles(q_length)), (batch, kv_heads, tiles(k_length))
    shapes = (*of_q, 2, dim), (*of_k, 2, dim), of_k
    pools = Pools(*(torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes))
    (q_tables, q_rope_strides), (k_tables, k_rope_strides) = tables_of(q_rope), tables_of(k_rope)
    # One warp spills if it rotates, and is still faster than two.
    run(
        kernel.pool, (math.prod(of_q) + 2 * math.prod(of_k),),
        q, k, v, mean, factor, *q_tables, *k_tables, key_mask, token_order, *pools,
        heads, kv_heads, batch * kv_heads, q_length, k_length, token_count,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *q_rope_strides, *k_rope_strides,
        HEAD_DIM=head_dim, D=dim, num_warps=max(dim // 128, 1), enable_fp_fusion=True,
    )  # fmt: skip
    return pools


def route(pools: Pools, routing: Routing, is_shared: bool = False, run: Run = run) -> PrecisionMap:
    """The reference's map, or its `shared` block lists, made on the device without waiting for it.

    pools: contiguous; channels past the head dimension are zeros. is_shared: gives the `shared` block lists.
    `indices` of the result is as long as the longest possible list, and undefined past the end of each list.
    Raises ValueError for 2^31 pairs of tiles or more in a batch entry.
    """
    (batch, heads, q_tiles, _, dim), (kv_heads, k_tiles) = pools.q.shape, pools.k.shape[1:3]
    pairs = heads * q_tiles * k_tiles
    if pairs >= 2**31:
        raise ValueError(
            f"routing chooses among fewer than 2^31 pairs of tiles in a batch entry, not {pairs}"
        )
    device, phases = pools.q.device, routing.phases
    stride = phases.stride(1) if phases.shape[1] > 1 else 0
    levels = torch.empty(batch, heads, q_tiles, k_tiles, dtype=torch.int16, device=device)
    histogram = torch.zeros(batch, 2, BINS, dtype=torch.int32, device=device)
    allowed = routing.allowed(heads)
    rows, columns = 16, 64 if dim <= 128 else 32
    run(
        kernel.score, (batch * heads * -(-q_tiles // rows),),
        *pools, phases, levels, histogram, heads, kv_heads, q_tiles, k_tiles, stride,
        ROWS=rows, COLUMNS=columns, D=dim, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    run(
        kernel.count_steps, (-(-pairs // 4096), batch),
        levels, histogram, allowed, pairs, BLOCK=4096, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    blocks, rows = (SHARED_BLOCKS, SHARED_ROWS) if is_shared else (1, TILE)
    programs = -(-q_tiles * TILE // (blocks * rows))
    # A program spans two Q tiles, which may visit a KV tile in different phases, and may read one entry ahead.
    length = 2 * k_tiles + 1 if is_shared else k_tiles
    indices = torch.empty(batch, heads, programs, length, dtype=torch.int32, device=device)
    bounds = torch.empty(batch, heads, programs, 3, dtype=torch.int32, device=device)
    run(
        kernel.write_block_lists, (batch * heads * programs,),
        levels, histogram, allowed, phases, indices, bounds,
        heads, q_tiles, k_tiles, programs, length, stride,
        BLOCKS=blocks, ROWS=rows, COLUMNS=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return PrecisionMap(indices, bounds, has_high=True, has_low=True)
