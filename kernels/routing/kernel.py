"""Routing on the GPU, in three kernels: score every pair, find the least level that is upgraded, write the walks.

What reference.py defines, from the same formulas; products are in TF32, which is as fine as the levels are.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels import maps
from dma_diffusers.kernels.routing import reference

TILE = tl.constexpr(maps.TILE)
HIGH, LOW, MASKED = (tl.constexpr(int(phase)) for phase in maps.Phase)
UNVISITED = tl.constexpr(maps.UNVISITED)
LEVELS = tl.constexpr(reference.LEVELS)
LN_2 = tl.constexpr(reference.LN_2)
FARTHEST = tl.constexpr(reference.FARTHEST)
LOWEST = tl.constexpr(-1.0e30)
SHARED_TILE_BITS = tl.constexpr(maps.SHARED_TILE_BITS)


@triton.jit
def _log_mean_exp(deviation):
    within = tl.minimum(deviation, FARTHEST)
    return LN_2 * within * (deviation - within * 0.5)


@triton.jit
def _pool(pools, tiles, count, D: tl.constexpr):
    """Means and variances of some tiles, [tiles, D]; zeros past the `count` there are."""
    place = tiles[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    inside = (tiles < count)[:, None]
    return tl.load(pools + place, mask=inside, other=0.0), tl.load(pools + place + D, mask=inside, other=0.0)


@triton.jit
def _scores(q_mean, q_variance, k_pools, k_tile, k_tiles, D: tl.constexpr):
    """Mean and standard deviation of the scores of some pairs, [q tiles, k tiles]."""
    k_mean, k_variance = _pool(k_pools, k_tile, k_tiles, D)
    score = tl.dot(q_mean, k_mean.trans(1, 0))
    variance = tl.dot(q_variance, (k_mean * k_mean + k_variance).trans(1, 0))
    variance = tl.dot(q_mean * q_mean, k_variance.trans(1, 0), variance)
    return score, tl.sqrt(variance)


@triton.jit(do_not_specialize=["q_tiles", "k_tiles"])
def score(
    q_pools, k_pools, v_pools, phases, levels, histogram, heads, kv_heads, q_tiles, k_tiles, phases_stride_h,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The levels of ROWS Q tiles of one head, and how many LOW pairs of its batch entry have each.

    q_pools: float32 [B·H, q_tiles, 2, D], means and variances; k_pools likewise; v_pools: float32 [B·Hkv, k_tiles].
    phases: uint8 [H or 1, q_tiles, k_tiles]. levels: int16 [B·H, q_tiles, k_tiles], −1 for pairs that aren't LOW.
    histogram: int32 [B, LEVELS], zeros.
    """
    blocks = tl.cdiv(q_tiles, ROWS)
    head, q_tile = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    batch, head_in_batch = head // heads, head % heads
    kv_head = batch * kv_heads + head_in_batch // (heads // kv_heads)
    q_pools += head.to(tl.int64) * q_tiles * (2 * D)
    k_pools += kv_head.to(tl.int64) * k_tiles * (2 * D)
    v_pools += kv_head.to(tl.int64) * k_tiles
    phases += head_in_batch.to(tl.int64) * phases_stride_h
    levels += head.to(tl.int64) * q_tiles * k_tiles
    histogram += batch * LEVELS
    q_mean, q_variance = _pool(q_pools, q_tile, q_tiles, D)

    largest = tl.full((ROWS,), LOWEST, tl.float32)
    whole = tl.zeros((ROWS,), tl.float32)
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        place = q_tile[:, None] * k_tiles + k_tile[None, :]
        inside = (q_tile < q_tiles)[:, None] & (k_tile < k_tiles)[None, :]
        mean, deviation = _scores(q_mean, q_variance, k_pools, k_tile, k_tiles, D)
        mass = mean + _log_mean_exp(deviation)
        phase = tl.load(phases + place, mask=inside, other=UNVISITED)
        mass = tl.where((phase != UNVISITED) & (mass == mass), mass, float("-inf"))
        larger = tl.maximum(largest, tl.max(mass, axis=1))
        whole = whole * tl.exp2(largest - larger) + tl.sum(tl.exp2(mass - larger[:, None]), axis=1)
        largest = larger
    whole = tl.where(whole == 0.0, 0.0, largest + tl.log2(tl.maximum(whole, 1.0)))  # 0: nothing is visited

    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        place = q_tile[:, None] * k_tiles + k_tile[None, :]
        inside = (q_tile < q_tiles)[:, None] & (k_tile < k_tiles)[None, :]
        mean, deviation = _scores(q_mean, q_variance, k_pools, k_tile, k_tiles, D)
        spread = tl.load(v_pools + k_tile, mask=k_tile < k_tiles, other=0.0)
        root = mean + 0.5 * _log_mean_exp(2.0 * deviation)
        importance = tl.exp2(root - whole[:, None]) * tl.sqrt(spread)[None, :]
        phase = tl.load(phases + place, mask=inside, other=UNVISITED)
        level = importance.to(tl.int32, bitcast=True) >> 16
        level = tl.where((phase == LOW) & (importance == importance), level, -1)
        tl.store(levels + place, level.to(tl.int16), mask=inside)
        tl.atomic_add(histogram + level, 1, mask=level >= 0, sem="relaxed")


@triton.jit(do_not_specialize=["allowed"])
def find_least(histogram, allowed, least):
    """The least level of one batch entry that is upgraded: no more pairs than are allowed have it or a higher one.

    histogram: int32 [B, LEVELS]. least: int32 [B].
    """
    batch = tl.program_id(0)
    counts = tl.load(histogram + batch * LEVELS + (LEVELS - 1 - tl.arange(0, LEVELS)))
    is_beyond = tl.cumsum(counts, axis=0) > allowed
    tl.store(least + batch, tl.sum(is_beyond.to(tl.int32), axis=0))


@triton.jit
def _visitors(
    phases, levels, least, first_row, k_tile, q_tiles, k_tiles, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """Which of a program's blocks visit some KV tiles in each phase: three of int32 [tiles], a bit for each block."""
    high, low, masked = tl.zeros_like(k_tile), tl.zeros_like(k_tile), tl.zeros_like(k_tile)
    for block in tl.static_range(BLOCKS):
        q_tile = (first_row + block * ROWS) // TILE
        place = q_tile * k_tiles + k_tile
        inside = k_tile < tl.where(q_tile < q_tiles, k_tiles, 0)
        phase = tl.load(phases + place, mask=inside, other=UNVISITED)
        level = tl.load(levels + place, mask=inside, other=-1)
        is_upgraded = level.to(tl.int32) >= least
        high |= ((phase == HIGH) | is_upgraded).to(tl.int32) << block
        low |= ((phase == LOW) & ~is_upgraded).to(tl.int32) << block
        masked |= (phase == MASKED).to(tl.int32) << block
    return high, low, masked


@triton.jit
def _write(indices, start, k_tile, visitors, BLOCKS: tl.constexpr):
    """The entries of those tiles that are visited, from `start` on; returns where they end."""
    visited = (visitors != 0).to(tl.int32)
    entry = k_tile if BLOCKS == 1 else k_tile | (visitors << SHARED_TILE_BITS)
    tl.store(indices + (start + tl.cumsum(visited, axis=0) - visited), entry, mask=visitors != 0)
    return start + tl.sum(visited, axis=0)


@triton.jit(do_not_specialize=["q_tiles", "k_tiles", "programs", "length"])
def write_walks(
    levels, least, phases, indices, bounds, heads, q_tiles, k_tiles, programs, length, phases_stride_h,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The walk of one program of BLOCKS blocks of ROWS queries of one head: as of maps.py, `shared` of several blocks.

    indices: int32 [B·H, programs, length]. bounds: int32 [B·H, programs, 3]. The rest as of `score` and `find_least`.
    """
    head, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    batch, head_in_batch = head // heads, head % heads
    phases += head_in_batch.to(tl.int64) * phases_stride_h
    levels += head.to(tl.int64) * q_tiles * k_tiles
    indices += tl.program_id(0).to(tl.int64) * length
    bounds += tl.program_id(0) * 3
    own_least = tl.load(least + batch)
    first_row = program * BLOCKS * ROWS

    high_end, low_entries = 0, 0
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        high, low, _ = _visitors(phases, levels, own_least, first_row, k_tile, q_tiles, k_tiles, BLOCKS, ROWS)
        high_end += tl.sum((high != 0).to(tl.int32), axis=0)
        low_entries += tl.sum((low != 0).to(tl.int32), axis=0)
    high_place, low_place, masked_place = 0, high_end, high_end + low_entries
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        high, low, masked = _visitors(
            phases, levels, own_least, first_row, k_tile, q_tiles, k_tiles, BLOCKS, ROWS
        )
        high_place = _write(indices, high_place, k_tile, high, BLOCKS)
        low_place = _write(indices, low_place, k_tile, low, BLOCKS)
        masked_place = _write(indices, masked_place, k_tile, masked, BLOCKS)
    tl.store(bounds, high_place)
    tl.store(bounds + 1, low_place)
    tl.store(bounds + 2, masked_place)
