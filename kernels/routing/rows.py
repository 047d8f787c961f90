"""Importance on the GPU by a sample of each Q tile's rows: their scores with a sample of the keys, in bf16.

One kernel changes and rounds the sampled tokens, each once. Of the other, a program takes the rows of several Q tiles.
It walks the keys once, and notes what each row sees in each KV tile; once it knows the rows' sums, it turns these notes
into probabilities. So nothing is as large as rows × keys of all heads.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import loaded_bf16, to_bf16
from dma_diffusers.kernels.quantiser.tile import joined, load_changed_pairs
from dma_diffusers.kernels.routing import reference
from dma_diffusers.kernels.routing.kernel import (
    LEAST_EXPONENT,
    LEAST_SHARE,
    TILE,
    UNVISITED,
    sampled_tokens,
    store_levels,
)

ROWS, KEYS = tl.constexpr(reference.ROWS), tl.constexpr(reference.KEYS)
K_TILES = tl.constexpr(4)  # so many are multiplied at once
LARGEST = tl.constexpr(reference.LARGEST)


@triton.jit
def _sampled(
    x, mean, factor, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    mask, token_order, head, tile, heads, length, token_count, stride_b, stride_h, stride_s,
    COUNT: tl.constexpr, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """COUNT tokens of a tile, (x − mean)·factor, bfloat16 [COUNT, D]; NaN for those that don't count or are too large.

    The other arguments are those of `_means_and_variances`; head: among those of all batch entries.
    """
    number, columns, batch = tl.arange(0, COUNT), tl.arange(0, D), head // heads
    tokens = sampled_tokens(tile, number, TILE // COUNT, mask, batch, token_order, length, token_count)
    tokens = tokens[:, None]
    even, odd = load_changed_pairs(
        x, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE, batch, head % heads, tokens, length,
        stride_b, stride_h, stride_s, PAIRED, HEAD_DIM, D,
    )  # fmt: skip
    value = joined(even, odd)
    if mean is not None:
        value -= tl.load(mean + head * D + columns)[None, :]
    value *= factor
    is_large = tl.max((tl.abs(value) < LARGEST).to(tl.int32) ^ 1, axis=1)[:, None] != 0  # or NaN
    return to_bf16(tl.where((tokens < length) & ~is_large, value, float("nan")))


@triton.jit(do_not_specialize=["first", "q_length", "k_length", "token_count"])
def sample(
    q, k, mean, factor, q_cos, q_sin, k_cos, k_sin,
    q_weight, q_first_weight, k_weight, k_first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    key_mask, token_order, rows, keys, heads, kv_heads, kv_heads_in_all, q_length, k_length, token_count,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write the sampled tokens of one tile of one head of K or Q; the arguments are those of `pool`.

    rows: bfloat16 [B·H, q_tiles, ROWS, D].
    keys: bfloat16 [B·Hkv, ⌈k_tiles / 4⌉, KEYS/2, 4, 2, D]; KEYS/2 and 2 number the keys of one of four KV tiles. An MMA
    gives each of four threads two of every eight columns: which are of one tile so, and no thread asks another for a
    sum. The keys of tiles past the last one are NaN.
    """
    columns, index = tl.arange(0, D)[None, :], tl.program_id(0)
    k_tiles = tl.cdiv(tl.cdiv(k_length, TILE), K_TILES) * K_TILES
    if index < kv_heads_in_all * k_tiles:
        head, tile, number = index // k_tiles, index % k_tiles, tl.arange(0, KEYS)
        key = _sampled(
            k, mean, 1.0, k_cos, k_sin, k_weight, k_first_weight, eps, first, ROUNDS_TWICE,
            key_mask, token_order, head, tile, kv_heads, k_length, token_count, k_stride_b, k_stride_h, k_stride_s,
            KEYS, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        place = (
            (tile // K_TILES * (KEYS // 2) + number // 2) * (2 * K_TILES) + tile % K_TILES * 2 + number % 2
        )
        keys += head.to(tl.int64) * k_tiles * (KEYS * D)
        tl.store(keys + place[:, None] * D + columns, key)
    else:
        index -= kv_heads_in_all * k_tiles
        q_tiles = tl.cdiv(q_length, TILE)
        row = _sampled(
            q, None, factor, q_cos, q_sin, q_weight, q_first_weight, eps, first, ROUNDS_TWICE,
            None, token_order, index // q_tiles, index % q_tiles, heads, q_length, token_count,
            q_stride_b, q_stride_h, q_stride_s, ROWS, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        rows += index.to(tl.int64) * (ROWS * D)
        tl.store(rows + tl.arange(0, ROWS)[:, None] * D + columns, row)


@triton.jit
def _row_sums(x, Q_TILES: tl.constexpr):
    """The sums over the rows of each Q tile: [columns of x, Q_TILES]."""
    return tl.sum(tl.reshape(x, (x.shape[0], Q_TILES, ROWS)), axis=2)


@triton.jit
def _tile_sums(x):
    """The sums over the keys of each KV tile: [rows, KV tiles] of [rows, KEYS/2, KV tiles, 2]."""
    return tl.sum(tl.sum(x, axis=3), axis=1)


@triton.jit(do_not_specialize=["q_tiles", "k_tiles", "blocks"])
def score_rows(
    rows, keys, v_pools, phases, notes, levels, heads, kv_heads, q_tiles, k_tiles, phases_stride_h, blocks,
    POWER: tl.constexpr, Q_TILES: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Score the pairs of Q_TILES Q tiles of one head after those of another: the results are those of `score`.

    The arguments are those of `score`, and what `sample` wrote. v_pools: None where importance is by mass.
    notes: float32 [programs, ⌈k_tiles / 4⌉·4, Q_TILES·ROWS], a program's own room. blocks: how many Q_TILES there are
    in all.
    """
    groups, blocks_of_head = tl.cdiv(k_tiles, K_TILES), tl.cdiv(q_tiles, Q_TILES)
    row, columns, four = tl.arange(0, Q_TILES * ROWS), tl.arange(0, D)[None, :], tl.arange(0, K_TILES)
    notes += tl.program_id(0).to(tl.int64) * groups * (Q_TILES * ROWS * K_TILES)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        head, first_tile = block // blocks_of_head, block % blocks_of_head * Q_TILES
        batch, head_in_batch = head // heads, head % heads
        kv_head = batch * kv_heads + head_in_batch // (heads // kv_heads)
        of_head = phases + head_in_batch.to(tl.int64) * phases_stride_h
        q_tile = (first_tile + row // ROWS)[:, None]
        own_rows = rows + (head.to(tl.int64) * q_tiles + first_tile) * (ROWS * D)
        queries = tl.load(own_rows + row[:, None] * D + columns, mask=q_tile < q_tiles, other=0.0)
        own_keys = keys + kv_head.to(tl.int64) * groups * (K_TILES * KEYS * D)

        largest = tl.full((Q_TILES * ROWS, K_TILES), -LARGEST, tl.float32)
        total = tl.zeros((Q_TILES * ROWS, K_TILES), tl.float32)
        for group in tl.range(0, groups, num_stages=STAGES):
            # The phase is loaded first: for a load after the product, sums would change their layout.
            k_tile = group * K_TILES + four[None, :]
            inside = (q_tile < q_tiles) & (k_tile < k_tiles)
            phase = tl.load(of_head + q_tile * k_tiles + k_tile, mask=inside, other=UNVISITED)
            key = group * (K_TILES * KEYS) + tl.arange(0, K_TILES * KEYS)
            key = tl.load(own_keys + key[:, None] * D + columns)
            scores = tl.dot(loaded_bf16(queries), loaded_bf16(key).trans(1, 0))
            scores = tl.maximum(scores, -LARGEST)  # NaN, too
            scores = tl.reshape(scores, (Q_TILES * ROWS, KEYS // 2, K_TILES, 2))
            top = tl.max(tl.max(scores, axis=3), axis=1)
            counts = (phase != UNVISITED) & (tl.abs(top) < LARGEST)
            larger = tl.maximum(largest, tl.where(counts, top, -LARGEST))
            share = tl.exp2(scores - larger[:, None, :, None])
            mass = _tile_sums(share)
            total = total * tl.exp2(largest - larger) + tl.where(counts, mass, 0.0)
            largest = larger
            # A row's sum is no less than 2^larger, so this raises no share beyond the least one.
            noted = tl.maximum(_tile_sums(share * share) if POWER == 2 else mass, LEAST_SHARE)
            note = tl.where(counts, larger + tl.log2(noted) / POWER, float("-inf"))
            tl.store(notes + k_tile * (Q_TILES * ROWS) + row[:, None], note)

        larger = tl.max(largest, axis=1)
        total = tl.sum(total * tl.exp2(largest - larger[:, None]), axis=1)
        is_row = total > 0.0
        log_total = larger + tl.log2(tl.where(is_row, total, 1.0))
        rows_counted = _row_sums(is_row.to(tl.float32)[None, :], Q_TILES)
        tl.debug_barrier()  # the whole program has noted
        for first in range(0, k_tiles, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            place = column[:, None] * (Q_TILES * ROWS) + row[None, :]
            found = tl.load(notes + place, mask=(column < k_tiles)[:, None], other=float("-inf"))
            is_counted = is_row[None, :] & (found > float("-inf"))
            exponent = tl.where(is_counted, POWER * (found - log_total[None, :]), 0.0)
            squares = tl.where(is_counted, tl.exp2(tl.maximum(exponent, LEAST_EXPONENT)), 0.0)
            summed = _row_sums(squares, Q_TILES)
            importance = tl.log2(summed / tl.maximum(rows_counted, 1.0))
            if POWER == 2:
                spread = tl.load(
                    v_pools + kv_head.to(tl.int64) * k_tiles + column, mask=column < k_tiles, other=1.0
                )
                importance = 0.5 * (importance + tl.log2(spread)[:, None])
            tile = first_tile + tl.arange(0, Q_TILES)[None, :]
            store_levels(
                levels + head.to(tl.int64) * q_tiles * k_tiles, of_head, importance, summed > 0.0,
                tile * k_tiles + column[:, None], (column < k_tiles)[:, None] & (tile < q_tiles),
            )  # fmt: skip
        tl.debug_barrier()  # the whole program has read its notes
