"""Importance on the GPU by a sample of each Q tile's rows: their scores with all keys, one product of bf16 numbers.

A program takes the rows of several Q tiles. It walks the keys once, and notes what each row sees in each KV tile; once
it knows the rows' sums, it turns these notes into probabilities. So nothing is as large as rows × keys of all heads.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import bf16_operand
from dma_diffusers.kernels.quantiser.tile import joined, load_changed_pairs, token_at
from dma_diffusers.kernels.routing import reference
from dma_diffusers.kernels.routing.kernel import (
    BINS,
    LEAST_EXPONENT,
    MINUS_INFINITY,
    TILE,
    UNVISITED,
    add_binades,
    binades_of,
    store_levels,
)

ROWS = tl.constexpr(reference.ROWS)
MEANING = tl.constexpr(3.0e38)  # scores beyond it are not finite, or nearly so


@triton.jit
def _row_sums(x, Q_TILES: tl.constexpr):
    """The sums over the rows of each Q tile: [columns of x, Q_TILES]."""
    return tl.sum(tl.reshape(x, (x.shape[0], Q_TILES, ROWS)), axis=2)


@triton.jit(do_not_specialize=["first", "q_length", "k_length", "token_count", "blocks"])
def score_rows(
    q, k, mean, factor, q_cos, q_sin, k_cos, k_sin,
    q_weight, q_first_weight, k_weight, k_first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    key_mask, token_order, v_pools, phases, notes, levels, histogram,
    heads, kv_heads, q_length, k_length, token_count,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, phases_stride_h, blocks,
    POWER: tl.constexpr, Q_TILES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Score the pairs of Q_TILES Q tiles of one head after those of another: the results are those of `score`.

    The arguments are those of `pool` and of `score`. v_pools: None where importance is by mass.
    notes: float32 [programs, k_tiles, Q_TILES·ROWS], a program's own room. blocks: how many Q_TILES there are in all.
    KEYS: so many keys are multiplied at once.
    """
    q_tiles, k_tiles = tl.cdiv(q_length, TILE), tl.cdiv(k_length, TILE)
    row, columns = tl.arange(0, Q_TILES * ROWS), tl.arange(0, D)
    place = row % ROWS * (TILE // ROWS) + (row % ROWS + row % ROWS // (TILE // ROWS)) % (TILE // ROWS)
    notes += tl.program_id(0).to(tl.int64) * k_tiles * (Q_TILES * ROWS)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        head = block // tl.cdiv(q_tiles, Q_TILES)
        first_tile = block % tl.cdiv(q_tiles, Q_TILES) * Q_TILES
        batch, head_in_batch = head // heads, head % heads
        kv_head = head_in_batch // (heads // kv_heads)
        q_tile = first_tile + row // ROWS
        tokens = token_at(token_order, q_tile * TILE + place, q_length, token_count)
        even, odd = load_changed_pairs(
            q, q_cos, q_sin, q_weight, q_first_weight, eps, first, ROUNDS_TWICE, batch, head_in_batch,
            tokens[:, None], q_length, q_stride_b, q_stride_h, q_stride_s, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        queries = bf16_operand(joined(even, odd) * factor)
        of_head = phases + head_in_batch.to(tl.int64) * phases_stride_h

        largest = tl.full((Q_TILES * ROWS,), MINUS_INFINITY, tl.float32)
        total = tl.zeros((Q_TILES * ROWS,), tl.float32)
        for k_tile in range(0, k_tiles):
            top = tl.full((Q_TILES * ROWS,), MINUS_INFINITY, tl.float32)
            mass, square = tl.zeros_like(top), tl.zeros_like(top)
            for part in range(0, TILE // KEYS):
                slots = k_tile * TILE + part * KEYS + tl.arange(0, KEYS)
                k_tokens = token_at(token_order, slots, k_length, token_count)
                if key_mask is not None:
                    is_seen = tl.load(key_mask + batch.to(tl.int64) * (k_tiles * TILE) + slots) != 0
                    k_tokens = tl.where(is_seen, k_tokens, k_length)
                k_even, k_odd = load_changed_pairs(
                    k, k_cos, k_sin, k_weight, k_first_weight, eps, first, ROUNDS_TWICE, batch, kv_head,
                    k_tokens[:, None], k_length, k_stride_b, k_stride_h, k_stride_s, PAIRED, HEAD_DIM, D,
                )  # fmt: skip
                keys = joined(k_even, k_odd)
                if mean is not None:
                    keys -= tl.load(mean + (batch * kv_heads + kv_head) * D + columns)[None, :]
                scores = tl.dot(queries, bf16_operand(keys).trans(1, 0))
                counts = (k_tokens < k_length)[None, :] & (tl.abs(scores) < MEANING)
                scores = tl.where(counts, scores, float("-inf"))
                larger = tl.maximum(top, tl.max(scores, axis=1))
                share, shrunk = tl.exp2(scores - larger[:, None]), tl.exp2(top - larger)
                mass = mass * shrunk + tl.sum(share, axis=1)
                if POWER == 2:
                    square = square * (shrunk * shrunk) + tl.sum(share * share, axis=1)
                top = larger
            log_mass = tl.where(mass > 0.0, top + tl.log2(tl.where(mass > 0.0, mass, 1.0)), float("-inf"))
            note = log_mass
            if POWER == 2:
                note = tl.where(
                    mass > 0.0, top + 0.5 * tl.log2(tl.where(mass > 0.0, square, 1.0)), float("-inf")
                )
            tl.store(notes + k_tile * (Q_TILES * ROWS) + row, note)
            phase = tl.load(of_head + q_tile * k_tiles + k_tile, mask=q_tile < q_tiles, other=UNVISITED)
            log_mass = tl.where(phase != UNVISITED, log_mass, float("-inf"))
            larger = tl.maximum(largest, log_mass)
            total = total * tl.exp2(largest - larger) + tl.exp2(log_mass - larger)
            largest = larger

        is_row = (tokens < q_length) & (total > 0.0)
        log_total = largest + tl.log2(tl.where(is_row, total, 1.0))
        rows_counted = _row_sums(is_row.to(tl.float32)[None, :], Q_TILES)
        binades = tl.zeros((BINS,), tl.int32)
        tl.debug_barrier()  # the whole program has noted
        for first_column in range(0, k_tiles, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            there = (column < k_tiles)[:, None]
            noted = tl.load(notes + column[:, None] * (Q_TILES * ROWS) + row[None, :], mask=there, other=0.0)
            is_counted = is_row[None, :] & (noted > float("-inf")) & there
            exponent = tl.where(is_counted, POWER * (noted - log_total[None, :]), 0.0)
            squares = tl.where(is_counted, tl.exp2(tl.maximum(exponent, LEAST_EXPONENT)), 0.0)
            summed = _row_sums(squares, Q_TILES)
            importance = tl.log2(summed / tl.maximum(rows_counted, 1.0))
            if POWER == 2:
                spread = tl.load(
                    v_pools + (batch * kv_heads + kv_head).to(tl.int64) * k_tiles + column,
                    mask=column < k_tiles, other=1.0,
                )  # fmt: skip
                importance = 0.5 * (importance + tl.log2(spread)[:, None])
            tile = first_tile + tl.arange(0, Q_TILES)
            level, is_offered = store_levels(
                levels + head.to(tl.int64) * q_tiles * k_tiles, of_head, importance, summed > 0.0,
                tile[None, :] * k_tiles + column[:, None], there & (tile < q_tiles)[None, :],
            )  # fmt: skip
            if histogram is not None:
                binades += binades_of(level, is_offered)
        if histogram is not None:
            add_binades(histogram, batch, binades)
        tl.debug_barrier()  # the whole program has read its notes
