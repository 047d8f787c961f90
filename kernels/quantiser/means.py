"""The means of sub-tiles on the GPU: one pass over K and V, in which a warp holds whole sub-tiles.

So most of a column's sum is added up within a thread: at 40 × 75,600 × 128 this takes .6 ms on an H200, where the
quantiser's programs of 16 warps took 4.5 ms for it.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import BF16_MAX, to_bf16, within
from dma_diffusers.kernels.quantiser import reference
from dma_diffusers.kernels.quantiser.tile import (
    load_changed_pairs,
    load_pairs,
    load_tile,
    magnitude_bits,
    rotated_rows,
    token_at,
)
from dma_diffusers.kernels.tiling import layout

TILE, SUBTILE = tl.constexpr(layout.TILE), tl.constexpr(layout.SUBTILE)
MEANS_ANCHORED = tl.constexpr(reference.MEANS_ANCHORED)


@triton.jit
def _mean(x, count):
    """The mean of x [32, columns], which is zero where a token isn't seen.

    The terms are multiples of one number for each column, as in the reference: their sum is exact in any order.
    """
    inverse = tl.div_rn(
        tl.full((1, 1), 1.0, tl.float32), tl.full((1, 1), 1.0, tl.float32) * tl.maximum(count, 1.0)
    )
    power = (tl.max(magnitude_bits(x), axis=0) & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.where(power > MEANS_ANCHORED, 0.0, 6.0 * power)[None, :]
    return tl.sum((x * inverse + anchor) - anchor, axis=0)


@triton.jit
def _store(means, x, subtile, columns, D: tl.constexpr):
    """Store some columns of a mean in float32 or, where no other format is made of it, in bfloat16."""
    tl.store(means + subtile * D + columns, to_bf16(x) if means.dtype.element_ty == tl.bfloat16 else x)


@triton.jit
def _store_ends(log_counts, tiles):
    """Store −inf from the last sub-tile up to a whole tile of means."""
    after = tiles * (TILE // SUBTILE) + tl.arange(0, TILE)
    end = tl.cdiv(tiles * (TILE // SUBTILE), TILE) * TILE
    tl.store(log_counts + after, tl.full((TILE,), float("-inf"), tl.float32), mask=after < end)


@triton.jit(do_not_specialize=["first", "length", "token_count"])
def means(
    k, v, mean, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr, key_mask, token_order,
    k_means, v_means, log_counts, heads, heads_in_all, length, token_count,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    ROTATED_VALUES: tl.constexpr, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The means of the four sub-tiles of a tile, of one head of K in the first programs, then of V.

    k first goes through RMSNorm and RoPE, and loses its `mean`, as in kernel.py's `encode`, whose arguments these are.
    k_means and v_means, [B·Hkv, 4·tiles, D], take the means of those keys of each sub-tile that are seen, and of their
    values, rotated in blocks of ROTATED_VALUES; `log_counts`, float32 [B, whole tiles of means], log2 of how many these
    are, −inf past the end.
    """
    tiles = tl.cdiv(length, TILE)
    program = tl.program_id(0)
    head, tile = program // tiles % heads_in_all, program % tiles
    batch, head_in_batch = head // heads, head % heads
    is_of_keys = program < heads_in_all * tiles
    log_counts += batch.to(tl.int64) * (tl.cdiv(tiles * (TILE // SUBTILE), TILE) * TILE)
    for part in range(TILE // SUBTILE):
        subtile = tile * (TILE // SUBTILE) + part
        slots = subtile * SUBTILE + tl.arange(0, SUBTILE)
        tokens = token_at(token_order, slots, length, token_count)
        seen = tokens < length
        if key_mask is not None:
            seen &= tl.load(key_mask + batch.to(tl.int64) * (tiles * TILE) + slots) != 0
        count = tl.sum(seen.to(tl.int32), axis=0).to(tl.float32)
        place = head.to(tl.int64) * tiles * (TILE // SUBTILE) + subtile
        if is_of_keys:
            even, odd = load_changed_pairs(
                k, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE, batch, head_in_batch, tokens[:, None],
                length, k_stride_b, k_stride_h, k_stride_s, PAIRED, HEAD_DIM, D,
            )  # fmt: skip
            if mean is not None:
                even_mean, odd_mean = load_pairs(mean, head * D, head >= 0, True, D, D)
                even, odd = even - even_mean, odd - odd_mean
            even = _mean(tl.where(seen[:, None], even, 0.0), count)
            odd = _mean(tl.where(seen[:, None], odd, 0.0), count)
            pairs = 2 * tl.arange(0, D // 2)
            _store(k_means, even, place, pairs, D)
            _store(k_means, odd, place, pairs + 1, D)
            if head_in_batch == 0:
                own = tl.where(count == 0.0, float("-inf"), tl.log2(tl.maximum(count, 1.0)))
                tl.store(log_counts + subtile, own)
        else:
            columns = tl.arange(0, D)
            inside = (tokens < length)[:, None] & (columns < HEAD_DIM)[None, :]
            value = load_tile(
                v, batch, head_in_batch, tokens[:, None], columns, inside, v_stride_b, v_stride_h, v_stride_s
            )
            if ROTATED_VALUES > 1:
                value = rotated_rows(value, ROTATED_VALUES)
            value = _mean(tl.where(seen[:, None], value, 0.0), count)
            if v.dtype.element_ty == tl.float32 and v_means.dtype.element_ty == tl.bfloat16:
                value = within(value, BF16_MAX)
            _store(v_means, value, place, columns, D)
    if is_of_keys & (head_in_batch == 0) & (tile == tiles - 1):
        _store_ends(log_counts, tiles)
