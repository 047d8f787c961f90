"""Routing on the GPU: pool every tile, score every pair, find the least level that is upgraded, write the block lists.

The kernels compute what reference.py defines, by the same formulas; their products are in TF32, whose rounding is about
as fine as the levels.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.quantiser.tile import is_last, joined, load_changed_pairs, token_at
from dma_diffusers.kernels.routing import reference
from dma_diffusers.kernels.tiling import layout, precision_map

TILE = tl.constexpr(layout.TILE)
HIGH, LOW, MASKED = (tl.constexpr(int(phase)) for phase in precision_map.LOOPS)
UNVISITED = tl.constexpr(precision_map.UNVISITED)
SAMPLE_STRIDE = tl.constexpr(reference.SAMPLE_STRIDE)
LEVELS = tl.constexpr(reference.LEVELS)
BINS = tl.constexpr(reference.BINS)
LOWEST = tl.constexpr(reference.LOWEST)
LN_2 = tl.constexpr(reference.LN_2)
FARTHEST = tl.constexpr(reference.FARTHEST)
MINUS_INFINITY = tl.constexpr(-1.0e30)
SHARED_TILE_BITS = tl.constexpr(precision_map.SHARED_TILE_BITS)


@triton.jit
def _mean_and_variance(
    x, mean, factor, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    mask, token_order, index, heads, length, token_count,
    stride_b, stride_h, stride_s,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The mean and the variance of each channel of (x − mean)·factor over the sample of a tile, float32 [D] each.

    Both are NaN if no token of the sample counts. x goes through norm and RoPE first.
    index: the number of the tile among those of all heads. mask: uint8 [B, tiles·128], 0 for slots that don't count.
    """
    tiles = tl.cdiv(length, TILE)
    head, slots = index // tiles, index % tiles * TILE + tl.arange(0, TILE // SAMPLE_STRIDE) * SAMPLE_STRIDE
    batch, columns = head // heads, tl.arange(0, D)
    tokens = token_at(token_order, slots, length, token_count)
    if mask is not None:
        tokens = tl.where(tl.load(mask + batch.to(tl.int64) * (tiles * TILE) + slots) != 0, tokens, length)
    count = tl.sum((tokens < length).to(tl.float32), axis=0)
    tokens = tokens[:, None]
    even, odd = load_changed_pairs(
        x, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE, batch, head % heads, tokens, length,
        stride_b, stride_h, stride_s, PAIRED, HEAD_DIM, D,
    )  # fmt: skip
    value = joined(even, odd)
    # Two sums take two instructions a number; a spread that survived rounding to bf16 comes out right to .1 %.
    middle = tl.sum(value, axis=0) / count
    variance = tl.sum(value * value, axis=0) / count - middle * middle
    variance = tl.where(variance < 0.0, 0.0, variance)
    if mean is not None:
        middle -= tl.load(mean + head * D + columns)
    return middle * factor, variance * (factor * factor)


@triton.jit
def _store_pool(pools, index, mean, variance, D: tl.constexpr):
    offsets = index.to(tl.int64) * (2 * D) + tl.arange(0, D)
    tl.store(pools + offsets, mean)
    tl.store(pools + offsets + D, variance)


@triton.jit(do_not_specialize=["first", "q_length", "k_length", "token_count"])
def pool(
    q, k, v, mean, factor, q_cos, q_sin, k_cos, k_sin,
    q_weight, q_first_weight, k_weight, k_first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    key_mask, token_order, q_pools, k_pools, v_pools,
    heads, kv_heads, kv_heads_in_all, q_length, k_length, token_count,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pool one tile of one head of V, K or Q; the arguments are those of the quantiser's `encode`.

    q_pools: float32 [B·H, q_tiles, 2, D], the mean and the variance of each channel.
    k_pools: float32 [B·Hkv, k_tiles, 2, D], the same over keys that are seen.
    v_pools: float32 [B·Hkv, k_tiles], the sum of the channels' variances over the same keys.
    """
    index = tl.program_id(0)
    of_keys = kv_heads_in_all * tl.cdiv(k_length, TILE)
    if index < of_keys:
        _, variance = _mean_and_variance(
            v, None, 1.0, None, None, None, None, None, None, False, key_mask, token_order, index, kv_heads,
            k_length, token_count, v_stride_b, v_stride_h, v_stride_s, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        tl.store(v_pools + index, tl.sum(variance, axis=0))
    elif index < 2 * of_keys:
        index -= of_keys
        middle, variance = _mean_and_variance(
            k, mean, 1.0, k_cos, k_sin, k_weight, k_first_weight, eps, first, ROUNDS_TWICE,
            key_mask, token_order, index, kv_heads, k_length, token_count,
            k_stride_b, k_stride_h, k_stride_s, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        _store_pool(k_pools, index, middle, variance, D)
    else:
        index -= 2 * of_keys
        middle, variance = _mean_and_variance(
            q, None, factor, q_cos, q_sin, q_weight, q_first_weight, eps, first, ROUNDS_TWICE,
            None, token_order, index, heads, q_length, token_count,
            q_stride_b, q_stride_h, q_stride_s, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        _store_pool(q_pools, index, middle, variance, D)


@triton.jit
def _log_mean_exp(deviation):
    within = tl.minimum(deviation, FARTHEST)
    return within * LN_2 * (deviation - within * 0.5)


@triton.jit
def _pool(pools, tiles, count, D: tl.constexpr):
    """The means and the variances of some tiles, [tiles, D] each; zeros for numbers that are not below `count`."""
    offsets = tiles[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    inside = (tiles < count)[:, None]
    return tl.load(pools + offsets, mask=inside, other=0.0), tl.load(
        pools + offsets + D, mask=inside, other=0.0
    )


@triton.jit
def _scores(q_mean, q_variance, k_pools, k_tile, k_tiles, D: tl.constexpr):
    """The mean and the standard deviation of the scores of some pairs, [q tiles, k tiles] each."""
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
    """Score the pairs of ROWS Q tiles of one head: write their levels, and count the LOW pairs in each binade.

    q_pools, k_pools, v_pools: what `pool` wrote. phases: uint8 [H or 1, q_tiles, k_tiles].
    levels: int16 [B·H, q_tiles, k_tiles], −1 for pairs that aren't LOW.
    histogram: int32 [B, 2, BINS], zeros at first; [:, 0] receives the counts.
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
    histogram += batch * (2 * BINS)
    q_mean, q_variance = _pool(q_pools, q_tile, q_tiles, D)

    largest = tl.full((ROWS,), MINUS_INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        pairs = q_tile[:, None] * k_tiles + k_tile[None, :]
        inside = (q_tile < q_tiles)[:, None] & (k_tile < k_tiles)[None, :]
        mean, deviation = _scores(q_mean, q_variance, k_pools, k_tile, k_tiles, D)
        mean_exp = mean + _log_mean_exp(deviation)
        phase = tl.load(phases + pairs, mask=inside, other=UNVISITED)
        is_visited = (phase != UNVISITED) & (mean_exp == mean_exp)
        mean_exp = tl.where(is_visited, mean_exp, float("-inf"))
        larger = tl.maximum(largest, tl.max(mean_exp, axis=1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(mean_exp - larger[:, None]), axis=1)
        largest = larger
    # A Q tile that visits nothing has the sum 0, which has no logarithm.
    log_total = tl.where(total == 0.0, 0.0, largest + tl.log2(tl.maximum(total, 1.0)))

    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        pairs = q_tile[:, None] * k_tiles + k_tile[None, :]
        inside = (q_tile < q_tiles)[:, None] & (k_tile < k_tiles)[None, :]
        mean, deviation = _scores(q_mean, q_variance, k_pools, k_tile, k_tiles, D)
        spread = tl.load(v_pools + k_tile, mask=k_tile < k_tiles, other=1.0)
        root_mean_square = mean + 0.5 * _log_mean_exp(2.0 * deviation)
        importance = root_mean_square - log_total[:, None] + (0.5 * tl.log2(spread))[None, :]
        phase = tl.load(phases + pairs, mask=inside, other=UNVISITED)
        is_offered = (phase == LOW) & (importance == importance)
        level = tl.minimum(tl.maximum((importance - LOWEST) * BINS, 0.0), LEVELS - 1.0).to(tl.int32)
        tl.store(levels + pairs, tl.where(is_offered, level, -1).to(tl.int16), mask=inside)
        counts += tl.histogram(tl.ravel(level // BINS), BINS, mask=tl.ravel(is_offered))
    tl.atomic_add(histogram + tl.arange(0, BINS), counts, mask=counts != 0, sem="relaxed")


@triton.jit
def _least_bin(histogram, allowed):
    """The first bin of the top bins that hold at most `allowed` pairs together, and how many more are allowed."""
    counts = tl.load(histogram + tl.arange(0, BINS))
    fits = tl.cumsum(counts, axis=0, reverse=True) <= allowed
    return tl.sum((~fits).to(tl.int32), axis=0), allowed - tl.sum(tl.where(fits, counts, 0), axis=0)


@triton.jit(do_not_specialize=["allowed", "pairs"])
def count_steps(levels, histogram, allowed, pairs, BLOCK: tl.constexpr):
    """Count the pairs in each level of the binade that is upgraded in part, among BLOCK pairs of a batch entry.

    levels: int16 [B, pairs]. histogram: what `score` wrote; [:, 1] receives the counts.
    """
    batch, pair = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    histogram += batch * (2 * BINS)
    binade, _ = _least_bin(histogram, allowed)
    level = tl.load(levels + batch.to(tl.int64) * pairs + pair, mask=pair < pairs, other=-1).to(tl.int32)
    counts = tl.histogram(level % BINS, BINS, mask=(level >= 0) & (level // BINS == binade - 1))
    tl.atomic_add(histogram + BINS + tl.arange(0, BINS), counts, mask=counts != 0, sem="relaxed")


@triton.jit
def _least_level(histogram, allowed):
    """The least level that is upgraded: at most `allowed` pairs have it or a higher one."""
    binade, left = _least_bin(histogram, allowed)
    step, _ = _least_bin(histogram + BINS, left)
    return tl.maximum((binade - 1) * BINS + step, 0)


@triton.jit
def _visitors(
    phases, levels, least, first_row, k_tile, q_tiles, k_tiles, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """The blocks of a program that visit some KV tiles, one int32 [tiles] for each phase, with a bit for each block."""
    high, low, masked = tl.zeros_like(k_tile), tl.zeros_like(k_tile), tl.zeros_like(k_tile)
    for block in tl.static_range(BLOCKS):
        q_tile = (first_row + block * ROWS) // TILE
        pair = q_tile * k_tiles + k_tile
        inside = k_tile < tl.where(q_tile < q_tiles, k_tiles, 0)
        phase = tl.load(phases + pair, mask=inside, other=UNVISITED)
        level = tl.load(levels + pair, mask=inside, other=-1)
        is_upgraded = level.to(tl.int32) >= least
        high |= ((phase == HIGH) | is_upgraded).to(tl.int32) << block
        low |= ((phase == LOW) & ~is_upgraded).to(tl.int32) << block
        masked |= (phase == MASKED).to(tl.int32) << block
    return high, low, masked


@triton.jit
def _write(indices, start, k_tile, visitors, BLOCKS: tl.constexpr):
    """Write the entries of the visited KV tiles, from `start` on; return where they end."""
    visited = (visitors != 0).to(tl.int32)
    entry = k_tile if BLOCKS == 1 else k_tile | (visitors << SHARED_TILE_BITS)
    tl.store(indices + (start + tl.cumsum(visited, axis=0) - visited), entry, mask=visitors != 0)
    return start + tl.sum(visited, axis=0)


@triton.jit(do_not_specialize=["allowed", "q_tiles", "k_tiles", "programs", "length"])
def write_block_lists(
    levels, histogram, finished, allowed, phases, indices, bounds, heads, q_tiles, k_tiles, programs, length,
    phases_stride_h,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the block list of one program: BLOCKS blocks of ROWS queries of one head.

    With one block it is a list of `PrecisionMap`, with several a list of its `shared`.
    indices: int32 [B·H, programs, length]. bounds: int32 [B·H, programs, 3]. levels, histogram: what `score` and
    `count_steps` wrote. allowed: how many pairs of a batch entry may be upgraded.
    finished: int32 [1], 0 at first, counts the programs that are done; the last one returns the histogram to zeros.
    """
    head, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    batch, head_in_batch = head // heads, head % heads
    phases += head_in_batch.to(tl.int64) * phases_stride_h
    levels += head.to(tl.int64) * q_tiles * k_tiles
    indices += tl.program_id(0).to(tl.int64) * length
    bounds += tl.program_id(0) * 3
    least = _least_level(histogram + batch * (2 * BINS), allowed)
    first_row = program * BLOCKS * ROWS

    high_end, low_entries = 0, 0
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        high, low, _ = _visitors(phases, levels, least, first_row, k_tile, q_tiles, k_tiles, BLOCKS, ROWS)
        high_end += tl.sum((high != 0).to(tl.int32), axis=0)
        low_entries += tl.sum((low != 0).to(tl.int32), axis=0)
    high_next, low_next, masked_next = 0, high_end, high_end + low_entries
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        high, low, masked = _visitors(
            phases, levels, least, first_row, k_tile, q_tiles, k_tiles, BLOCKS, ROWS
        )
        high_next = _write(indices, high_next, k_tile, high, BLOCKS)
        low_next = _write(indices, low_next, k_tile, low, BLOCKS)
        masked_next = _write(indices, masked_next, k_tile, masked, BLOCKS)
    tl.store(bounds, high_next)
    tl.store(bounds + 1, low_next)
    tl.store(bounds + 2, masked_next)
    if is_last(finished, tl.num_programs(0)):
        for entry in range(tl.num_programs(0) // (heads * programs)):
            tl.store(histogram + entry * (2 * BINS) + tl.arange(0, 2 * BINS), tl.zeros((2 * BINS,), tl.int32))
