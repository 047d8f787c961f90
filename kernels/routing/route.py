"""Runs the routing's kernels: from the pools that the quantiser leaves to the walks that the attention kernel reads."""

import torch

from dma_diffusers.kernels.maps import SHARED_BLOCKS, SHARED_ROWS, TILE, PrecisionMap
from dma_diffusers.kernels.quantiser.reference import Pools
from dma_diffusers.kernels.routing import kernel
from dma_diffusers.kernels.routing.reference import LEVELS, Routing
from dma_diffusers.kernels.run import Run, run


def route(pools: Pools, routing: Routing, is_shared: bool = False, run: Run = run) -> PrecisionMap:
    """The reference's map, or its `shared` walks, made on the device without waiting for it.

    pools: contiguous; past the head dimension, channels are zeros. `indices` is as long as any walk could be, and what
    no walk takes of it undefined.
    """
    (batch, heads, q_tiles, _, dim), (kv_heads, k_tiles) = pools.q.shape, pools.k.shape[1:3]
    device, phases = pools.q.device, routing.phases
    stride = phases.stride(1) if phases.shape[1] > 1 else 0
    levels = torch.empty(batch, heads, q_tiles, k_tiles, dtype=torch.int16, device=device)
    histogram = torch.zeros(batch, LEVELS, dtype=torch.int32, device=device)
    least = torch.empty(batch, dtype=torch.int32, device=device)
    rows, columns = (32, 64) if dim <= 128 else (16, 32)
    run(
        kernel.score, (batch * heads * -(-q_tiles // rows),),
        *pools, phases, levels, histogram, heads, kv_heads, q_tiles, k_tiles, stride,
        ROWS=rows, COLUMNS=columns, D=dim, num_warps=8, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    run(
        kernel.find_least, (batch,),
        histogram, routing.allowed(heads), least, num_warps=32, enable_fp_fusion=True,
    )  # fmt: skip
    blocks, rows = (SHARED_BLOCKS, SHARED_ROWS) if is_shared else (1, TILE)
    programs = -(-q_tiles * TILE // (blocks * rows))
    # A program spans two Q tiles, which may visit a KV tile in different phases; one more entry may be read ahead.
    length = 2 * k_tiles + 1 if is_shared else k_tiles
    indices = torch.empty(batch, heads, programs, length, dtype=torch.int32, device=device)
    bounds = torch.empty(batch, heads, programs, 3, dtype=torch.int32, device=device)
    run(
        kernel.write_walks, (batch * heads * programs,),
        levels, least, phases, indices, bounds, heads, q_tiles, k_tiles, programs, length, stride,
        BLOCKS=blocks, ROWS=rows, COLUMNS=256, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return PrecisionMap(indices, bounds, has_high=True, has_low=True)
