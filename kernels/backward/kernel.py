"""The kernels of attention's backward: one for dQ, which follows the map's block lists, one for dK and dV.

Products are of bf16 numbers and summed in float32; those of a class with `q_scales` are of INT8 numbers, but for the
output's gradient and V. The reference beside this file defines what is correct.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.attention.loads import load_rows, load_values
from dma_diffusers.kernels.device.rounding import bf16_operand, loaded_bf16, to_bf16, to_output
from dma_diffusers.kernels.quantiser.elements import nearest_bits
from dma_diffusers.kernels.quantiser.tile import load_tile, magnitude_bits, token_at
from dma_diffusers.kernels.tiling import precision_map
from dma_diffusers.kernels.tiling.layout import SUBTILE

TILE, MEANS_TILES = tl.constexpr(128), tl.constexpr(precision_map.MEANS_TILES)
SUBTILES = tl.constexpr(TILE.value // SUBTILE)  # of a tile
INT8_MAX = tl.constexpr(127.0)
LN_2, LOG2_E = tl.constexpr(0.6931471805599453), tl.constexpr(1.4426950408889634)


@triton.jit
def _to_int8(x, amax):
    """float32 x as integers of which the magnitude `amax`, which broadcasts to x, is 127."""
    factor = INT8_MAX / tl.where(amax == 0.0, 1.0, amax)
    return nearest_bits(x * factor).to(tl.int8)


@triton.jit
def _rows_in_int8(x):
    """Rows of float32 numbers as integers, and the scale of each row."""
    amax = tl.max(magnitude_bits(x), axis=1).to(tl.float32, bitcast=True)  # NaN if one of them is
    return _to_int8(x, amax[:, None]), amax * (1 / INT8_MAX)


@triton.jit(do_not_specialize=["q_length", "token_count"])
def prepare(
    out_gradient, out, lse, lse_gradient, offset, token_order, prepared, transposed, scales, delta, lse_2,
    smoothed_lse_2, heads, q_length, token_count,
    gradient_stride_b, gradient_stride_h, gradient_stride_s, out_stride_b, out_stride_h, out_stride_s,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Prepares one tile of rows, in the order of slots, as the other kernels read it.

    `prepared` [B·H, tiles·128, D] takes the output's gradient in bf16. `transposed` [B·H, D, tiles·128] takes it in
    INT8 under the tile's scale, which `scales` [B·H·tiles] takes; both may be None. `delta` [B·H·tiles·128] takes its
    products with the output, less the gradient of the log-sum-exp, if there is one. `lse_2` takes the log-sum-exp in
    base 2, and `smoothed_lse_2` the same less `offset`, which smoothing takes from a row's scores: +inf for rows that
    see no key, whose probabilities are thereby 0. The strides of out_gradient and of out [B, H, tokens, HEAD_DIM] are
    free but for the last, lse and lse_gradient are contiguous.
    """
    tiles = tl.cdiv(q_length, TILE)
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    slots, columns = tile * TILE + tl.arange(0, TILE), tl.arange(0, D)
    tokens = token_at(token_order, slots, q_length, token_count)
    is_row = tokens < q_length
    inside = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    batch, head_in_batch = head // heads, head % heads
    gradient = to_bf16(load_tile(
        out_gradient, batch, head_in_batch, tokens[:, None], columns, inside,
        gradient_stride_b, gradient_stride_h, gradient_stride_s,
    ))  # fmt: skip
    result = load_tile(
        out, batch, head_in_batch, tokens[:, None], columns, inside, out_stride_b, out_stride_h, out_stride_s
    )
    place = head.to(tl.int64) * (tiles * TILE) + slots
    tl.store(prepared + place[:, None] * D + columns[None, :], gradient)
    if transposed is not None:
        amax = tl.max(tl.max(magnitude_bits(gradient.to(tl.float32)), axis=1), axis=0)
        amax = amax.to(tl.float32, bitcast=True)
        numbers = _to_int8(gradient.to(tl.float32), amax)
        length = tiles * TILE
        row = transposed + head.to(tl.int64) * length * D
        tl.store(row + columns[:, None] * length + slots[None, :], tl.trans(numbers))
        tl.store(scales + tl.program_id(0), amax * (1 / INT8_MAX))
    product = tl.sum(gradient.to(tl.float32) * result, axis=1)
    own = head.to(tl.int64) * (q_length if token_count is None else token_count) + tokens
    if lse_gradient is not None:
        product -= tl.load(lse_gradient + own, mask=is_row, other=0.0)
    log_sum = tl.load(lse + own, mask=is_row, other=float("-inf"))
    log_sum = tl.where(log_sum == float("-inf"), float("inf"), log_sum * LOG2_E)
    tl.store(delta + place, product)
    tl.store(lse_2 + place, log_sum)
    if offset is not None:
        tl.store(smoothed_lse_2 + place, log_sum - tl.load(offset + place))


@triton.jit
def _seen(queries, keys, key_mask, fine_mask, guards, k_length, CAUSAL: tl.constexpr):
    """Says which keys each query sees, of shapes that broadcast."""
    if fine_mask is not None:  # as FineMask.seen has it
        slots = tl.cdiv(k_length, TILE) * TILE
        first, last = tl.load(fine_mask + queries), tl.load(fine_mask + slots + queries) | guards
        low = tl.load(fine_mask + 2 * slots + keys) | guards
        high = tl.load(fine_mask + 3 * slots + keys)
        seen = ((low - first) & (last - high) & guards) == guards
    elif CAUSAL:
        seen = (keys <= queries) & (keys < k_length)
    else:
        seen = keys < k_length
    if key_mask is not None:
        seen &= tl.load(key_mask + keys) != 0
    return seen


@triton.jit
def _probabilities(
    products, scale, lse, queries, keys, word, log_counts, key_mask, fine_mask, guards, k_length,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The probabilities of a block, from its products and their scale; rows' numbers, queries and keys broadcast."""
    exponent = products * scale - lse
    if log_counts is not None:
        exponent += tl.load(log_counts + keys)
    p = tl.exp2(exponent)
    if log_counts is not None:
        p = tl.where((word >> (keys // SUBTILES % MEANS_TILES)) & 1 != 0, p, 0.0)
    elif MASKED or key_mask is not None:
        p = tl.where(_seen(queries, keys, key_mask, fine_mask, guards, k_length, MASKED and CAUSAL), p, 0.0)
    return p


@triton.jit
def _as_e4m3(p):
    """Probabilities with the precision of e4m3, as the reference's `rounded_p` has them."""
    bits = (p.to(tl.int32, bitcast=True) + 0x80000) & -0x100000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _query_phase(
    dq, weighted, total, of_p, sums, sums_of_p, q_elements, k_elements, v, lse, factor, q_scales, k_scales, transposed,
    gradient, row_delta, batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
    indices, first, last, words, log_counts, key_mask, fine_mask, guards, k_length,
    SUMS: tl.constexpr, CORRECTS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds dS·K of the KV tiles `indices[first:last]`, all of one class, for ROWS queries from `start` on.

    Without `indices` they are the tiles of means from `first` to `last`, each with its word of bits in `words`.
    CORRECTS: `weighted` adds P·K, `total` the rows of P∘(dP − delta) and `of_p` those of P; there are no INT8 products
    then. SUMS: `sums` adds the rows of dS, `sums_of_p` those of P.
    """
    queries = start + tl.arange(0, ROWS)
    rows = (batch * heads + head_in_batch).to(tl.int64) * (q_tiles * TILE) + queries
    q = load_rows(q_elements, batch, head_in_batch, heads, start, q_tiles * TILE, True, ROWS, D)
    row_lse = tl.load(lse + rows)
    if q_scales is not None:
        row_scales = tl.load(q_scales + rows)
    PARTS: tl.constexpr = TILE // KEYS
    for step in tl.range(first * PARTS, last * PARTS, num_stages=STAGES):
        tile = step // PARTS
        if indices is not None:
            tile = tl.load(indices + tile)
        k_start = tile * TILE + (step - step // PARTS * PARTS) * KEYS
        k = load_rows(k_elements, batch, kv_head, kv_heads, k_start, k_tiles * TILE, True, KEYS, D)
        value = load_rows(v, batch, kv_head, kv_heads, k_start, k_tiles * TILE, True, KEYS, D)
        word = None
        if words is not None:
            word = tl.load(words + tile)
        if q_scales is not None:
            k_scale = tl.load(k_scales + (batch * kv_heads + kv_head) * k_tiles + tile)
            products, scale = tl.dot(q, tl.trans(k)).to(tl.float32), (row_scales * k_scale)[:, None]
        else:
            products, scale = tl.dot(loaded_bf16(q), tl.trans(loaded_bf16(k))), factor
        p = _probabilities(
            products, scale, row_lse[:, None],
            queries[:, None], (k_start + tl.arange(0, KEYS))[None, :], word, log_counts, key_mask, fine_mask, guards,
            k_length, MASKED, CAUSAL,
        )  # fmt: skip
        if CORRECTS:
            weighted = tl.dot(bf16_operand(p), loaded_bf16(k), weighted)
            row_of_p = tl.sum(p, axis=1)
            of_p += row_of_p
            if SUMS:
                sums_of_p += row_of_p
        dp = tl.dot(loaded_bf16(gradient), tl.trans(loaded_bf16(value)))
        ds = p * (dp - row_delta[:, None])
        if CORRECTS:
            total += tl.sum(ds, axis=1)
        if SUMS:
            sums += tl.sum(ds, axis=1)
        if q_scales is not None:
            numbers, scales = _rows_in_int8(ds)
            of_channels = load_values(
                transposed, batch, kv_head, kv_heads, k_start, k_tiles * TILE, True, True, KEYS, D
            )
            dq += tl.dot(numbers, of_channels).to(tl.float32) * (scales * k_scale)[:, None]
        else:
            dq = tl.dot(bf16_operand(ds), loaded_bf16(k), dq)
    return dq, weighted, total, of_p, sums, sums_of_p


@triton.jit(do_not_specialize=[
    "q_length", "k_length", "token_count", "map_stride_b", "map_stride_h", "map_length", "means_stride_b",
    "means_stride_h"
])  # fmt: skip
def query_gradients(
    q_high, k_high, v_high, high_lse, high_factor, high_q_scales, high_k_scales, high_transposed,
    q_low, k_low, v_low, low_lse, low_factor, low_q_scales, low_k_scales, low_transposed,
    mean_q, mean_k, mean_v, mean_lse, mean_factor, mean_q_scales, mean_k_scales, mean_transposed,
    gradient, delta, lse_gradient, k_mean, softmax_scale_log2, indices, bounds, means, log_counts,
    key_mask, fine_mask, token_order, dq, heads, kv_heads, q_length, k_length, token_count, guards, head_dim,
    map_stride_b, map_stride_h, map_length, means_stride_b, means_stride_h, stride_b, stride_h, stride_s,
    HIGH: tl.constexpr, LOW: tl.constexpr, MEAN: tl.constexpr, CORRECTS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKS_ALL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of ROWS queries of one head, over the KV tiles of their block list.

    HIGH, LOW: whether keys of such a class are "raw" or "smoothed"; None for a class without tiles. MEAN: whether there
    are such tiles. MASKED ones are HIGH, or LOW in a map without HIGH tiles. Operands are bf16 [B, heads, tiles·128,
    D], of means whole tiles too. Products times the `factor` of a class, less its `lse`, are exponents of 2. A class
    with `q_scales` [B·H·tiles·128] and `k_scales` [B·Hkv·tiles] has q and k in INT8, and k `transposed` [B, Hkv, D,
    tiles·128] as well: Hopper multiplies 8-bit numbers only where those that are summed over lie side by side.
    k_mean: float32 [B·Hkv, D], what smoothed keys have lost; None if none have lost it, or if all have and there is no
    lse_gradient.
    CORRECTS: `delta`, which starts as `prepare` has it, becomes the sum of P∘dP less the lse_gradient (float32 [B, H,
    tokens], or None), over that of P, since the output has rounded probabilities (Attn-QAT, arXiv 2603.00040).
    """
    q_tiles, k_tiles = tl.cdiv(q_length, TILE), tl.cdiv(k_length, TILE)
    blocks = tl.cdiv(q_length, ROWS)
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest rows first
    start = block * ROWS
    batch, head_in_batch = head // heads, head % heads
    kv_head = head_in_batch // (heads // kv_heads)
    row = (batch * map_stride_b + head_in_batch * map_stride_h + start // TILE).to(tl.int64)
    tiles = indices + row * map_length
    high_end = tl.load(bounds + row * 3)
    low_end = tl.load(bounds + row * 3 + 1)
    end = tl.load(bounds + row * 3 + 2)
    own_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * (k_tiles * TILE)
    wide_mask = own_mask if MASKS_ALL else None
    queries, channels = start + tl.arange(0, ROWS), tl.arange(0, D)
    rows = head.to(tl.int64) * (q_tiles * TILE) + queries
    own_gradient = load_rows(gradient, batch, head_in_batch, heads, start, q_tiles * TILE, True, ROWS, D)
    row_delta = tl.load(delta + rows)

    accumulator = tl.zeros((ROWS, D), tl.float32)
    weighted = tl.zeros((ROWS, D), tl.float32) if CORRECTS else accumulator
    total = tl.zeros((ROWS,), tl.float32)
    of_p, sums, sums_of_p = total, total, total
    tokens = token_at(token_order, queries, q_length, token_count)
    if lse_gradient is not None:
        own = head.to(tl.int64) * (q_length if token_count is None else token_count) + tokens
        row_gradient = tl.load(lse_gradient + own, mask=tokens < q_length, other=0.0)
        if CORRECTS:
            total -= row_gradient
        # Each row of dS adds up to this, and the log-sum-exp has the mean's score.
        sums -= row_gradient
    HIGH_SUMS: tl.constexpr = k_mean is not None and HIGH == "raw"
    LOW_SUMS: tl.constexpr = k_mean is not None and LOW == "raw"
    if HIGH is not None:
        accumulator, weighted, total, of_p, sums, sums_of_p = _query_phase(
            accumulator, weighted, total, of_p, sums, sums_of_p, q_high, k_high, v_high,
            high_lse, high_factor, high_q_scales, high_k_scales, high_transposed, own_gradient, row_delta,
            batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
            tiles, 0, high_end, None, None, wide_mask, None, guards, k_length,
            HIGH_SUMS, CORRECTS, False, CAUSAL, ROWS, KEYS, D, STAGES,
        )  # fmt: skip
        accumulator, weighted, total, of_p, sums, sums_of_p = _query_phase(
            accumulator, weighted, total, of_p, sums, sums_of_p, q_high, k_high, v_high,
            high_lse, high_factor, high_q_scales, high_k_scales, high_transposed, own_gradient, row_delta,
            batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
            tiles, low_end, end, None, None, own_mask, fine_mask, guards, k_length,
            HIGH_SUMS, CORRECTS, True, CAUSAL, ROWS, KEYS, D, STAGES,
        )  # fmt: skip
    if LOW is not None:
        accumulator, weighted, total, of_p, sums, sums_of_p = _query_phase(
            accumulator, weighted, total, of_p, sums, sums_of_p, q_low, k_low, v_low,
            low_lse, low_factor, low_q_scales, low_k_scales, low_transposed, own_gradient, row_delta,
            batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
            tiles, high_end, low_end, None, None, wide_mask, None, guards, k_length,
            LOW_SUMS, CORRECTS, False, CAUSAL, ROWS, KEYS, D, STAGES,
        )  # fmt: skip
        if HIGH is None:
            accumulator, weighted, total, of_p, sums, sums_of_p = _query_phase(
                accumulator, weighted, total, of_p, sums, sums_of_p, q_low, k_low, v_low,
                low_lse, low_factor, low_q_scales, low_k_scales, low_transposed, own_gradient, row_delta,
                batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
                tiles, low_end, end, None, None, own_mask, fine_mask, guards, k_length,
                LOW_SUMS, CORRECTS, True, CAUSAL, ROWS, KEYS, D, STAGES,
            )  # fmt: skip
    if MEAN:
        mean_tiles = tl.cdiv(k_tiles, MEANS_TILES)
        of_means = (batch * means_stride_b + head_in_batch * means_stride_h + start // TILE).to(tl.int64)
        accumulator, weighted, total, of_p, sums, sums_of_p = _query_phase(
            accumulator, weighted, total, of_p, sums, sums_of_p, mean_q, mean_k, mean_v,
            mean_lse, mean_factor, mean_q_scales, mean_k_scales, mean_transposed, own_gradient, row_delta,
            batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, mean_tiles, start,
            None, 0, mean_tiles, means + of_means * mean_tiles, log_counts + batch * (mean_tiles * TILE),
            None, None, guards, k_length,
            False, CORRECTS, False, CAUSAL, ROWS, KEYS, D, STAGES,
        )  # fmt: skip

    if CORRECTS:
        total /= tl.where(of_p > 0.0, of_p, 1.0)
        accumulator -= total[:, None] * weighted
        sums -= total * sums_of_p
        tl.store(delta + rows, row_delta + total)
    if k_mean is not None:
        mean = tl.load(k_mean + (batch * kv_heads + kv_head) * D + channels)
        accumulator -= sums[:, None] * mean[None, :]
    place = batch.to(tl.int64) * stride_b + head_in_batch.to(tl.int64) * stride_h
    place = place + tokens[:, None].to(tl.int64) * stride_s + channels[None, :]
    inside = (tokens < q_length)[:, None] & (channels < head_dim)[None, :]
    result = accumulator * (softmax_scale_log2 * LN_2)
    tl.store(dq + place, to_output(result, dq.dtype.element_ty), mask=inside)


@triton.jit
def _key_phase(
    dk, dv, q_elements, k_elements, v, lse, factor, q_scales, k_scales, transposed,
    gradient, int8_gradient, gradient_scales, delta, batch, head_in_batch, heads, kv_head, kv_heads,
    q_tiles, k_tiles, start, indices, first, last, words, log_counts, key_mask, fine_mask, guards, k_length,
    ROUNDS: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds dSᵀ·Q and Pᵀ·dO of the Q tiles `indices[first:last]`, all of one class, for KEYS keys from `start` on.

    Without `indices` they are the Q tiles from `first` to `last`, and the keys are means: `words` has each Q tile's
    word of bits for this tile of means. ROUNDS: Pᵀ·dO has the probabilities as FP8 P·V had them.
    """
    keys = (start + tl.arange(0, KEYS))[:, None]
    k = load_rows(k_elements, batch, kv_head, kv_heads, start, k_tiles * TILE, True, KEYS, D)
    value = load_rows(v, batch, kv_head, kv_heads, start, k_tiles * TILE, True, KEYS, D)
    head = batch * heads + head_in_batch
    # The factor would else be a part of every product.
    dk *= 1 / factor
    if q_scales is not None:
        k_scale = tl.load(k_scales + (batch * kv_heads + kv_head) * k_tiles + start // TILE)
    PARTS: tl.constexpr = TILE // ROWS
    for step in tl.range(first * PARTS, last * PARTS, num_stages=STAGES):
        tile = step // PARTS
        if indices is not None:
            tile = tl.load(indices + tile)
        q_start = tile * TILE + (step - step // PARTS * PARTS) * ROWS
        queries = q_start + tl.arange(0, ROWS)
        rows = head.to(tl.int64) * (q_tiles * TILE) + queries
        q = load_rows(q_elements, batch, head_in_batch, heads, q_start, q_tiles * TILE, True, ROWS, D)
        own_gradient = load_rows(
            gradient, batch, head_in_batch, heads, q_start, q_tiles * TILE, True, ROWS, D
        )
        word = None
        if words is not None:
            word = tl.load(words + tile * tl.cdiv(tl.cdiv(k_length, TILE), MEANS_TILES))
        if q_scales is not None:
            row_scales = tl.load(q_scales + rows)
            products, scale = tl.dot(k, tl.trans(q)).to(tl.float32), (row_scales * k_scale)[None, :]
        else:
            products, scale = tl.dot(loaded_bf16(k), tl.trans(loaded_bf16(q))), factor
        p = _probabilities(
            products, scale,
            tl.load(lse + rows)[None, :], queries[None, :], keys, word, log_counts, key_mask, fine_mask, guards,
            k_length, MASKED, CAUSAL,
        )  # fmt: skip
        if q_scales is None:
            dv = tl.dot(bf16_operand(_as_e4m3(p) if ROUNDS else p), loaded_bf16(own_gradient), dv)
        dp = tl.dot(loaded_bf16(value), tl.trans(loaded_bf16(own_gradient)))
        ds = p * (dp - tl.load(delta + rows)[None, :])
        if q_scales is None:
            dk = tl.dot(bf16_operand(ds), loaded_bf16(q), dk)
        else:
            # Both wait for dS, since registers don't hold P, sums and an INT8 product at once.
            of_p, p_scales = _rows_in_int8(p)
            of_ds, ds_scales = _rows_in_int8(ds * row_scales[None, :])
            p_scales *= tl.load(gradient_scales + head * q_tiles + tile)
            of_channels = load_values(
                int8_gradient, batch, head_in_batch, heads, q_start, q_tiles * TILE, True, True, ROWS, D
            )
            dv += tl.dot(of_p, of_channels).to(tl.float32) * p_scales[:, None]
            of_channels = load_values(
                transposed, batch, head_in_batch, heads, q_start, q_tiles * TILE, True, True, ROWS, D
            )
            dk += tl.dot(of_ds, of_channels).to(tl.float32) * ds_scales[:, None]
    return dk * factor, dv


@triton.jit(do_not_specialize=[
    "q_length", "k_length", "token_count", "map_stride_b", "map_stride_h", "map_length"
])  # fmt: skip
def key_gradients(
    q_high, k_high, v_high, high_lse, high_factor, high_q_scales, high_k_scales, high_transposed,
    q_low, k_low, v_low, low_lse, low_factor, low_q_scales, low_k_scales, low_transposed,
    gradient, int8_gradient, gradient_scales, delta, indices, bounds, dk_of_means, dv_of_means,
    key_mask, fine_mask, token_order, dk, dv, heads, kv_heads, q_length, k_length, token_count, guards, head_dim,
    map_stride_b, map_stride_h, map_length, stride_b, stride_h, stride_s,
    HIGH: tl.constexpr, HIGH_ROUNDS: tl.constexpr, LOW: tl.constexpr, LOW_ROUNDS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKS_ALL: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys of one head, over the Q tiles that the transposed map's lists name for their tile.

    Arguments are as `query_gradients` has them, but it is q that is `transposed`; int8_gradient and gradient_scales are
    as `prepare` wrote them, None without INT8. dk_of_means, dv_of_means: float32 [B·Hkv, tiles of means·128, D], as
    `mean_gradients` gives them: the share of each key in its sub-tile. dk and dv have the same strides.
    """
    q_tiles, k_tiles = tl.cdiv(q_length, TILE), tl.cdiv(k_length, TILE)
    blocks = tl.cdiv(k_length, KEYS)
    kv, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = block * KEYS
    batch, kv_head = kv // kv_heads, kv % kv_heads
    group = heads // kv_heads
    own_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * (k_tiles * TILE)
    wide_mask = own_mask if MASKS_ALL else None
    keys, channels = start + tl.arange(0, KEYS), tl.arange(0, D)
    tokens = token_at(token_order, keys, k_length, token_count)
    dk_sum, dv_sum = tl.zeros((KEYS, D), tl.float32), tl.zeros((KEYS, D), tl.float32)
    if dk_of_means is not None:
        is_seen = tokens < k_length
        if key_mask is not None:
            is_seen &= tl.load(own_mask + keys) != 0
        subtiles = kv.to(tl.int64) * (tl.cdiv(k_tiles, MEANS_TILES) * TILE) + keys // (TILE // SUBTILES)
        place = subtiles[:, None] * D + channels[None, :]
        dk_sum += tl.load(dk_of_means + place, mask=is_seen[:, None], other=0.0)
        dv_sum += tl.load(dv_of_means + place, mask=is_seen[:, None], other=0.0)
    for head_in_batch in range(kv_head * group, (kv_head + 1) * group):
        row = (batch * map_stride_b + head_in_batch * map_stride_h + start // TILE).to(tl.int64)
        tiles = indices + row * map_length
        high_end = tl.load(bounds + row * 3)
        low_end = tl.load(bounds + row * 3 + 1)
        end = tl.load(bounds + row * 3 + 2)
        if HIGH is not None:
            dk_sum, dv_sum = _key_phase(
                dk_sum, dv_sum, q_high, k_high, v_high, high_lse, high_factor, high_q_scales, high_k_scales,
                high_transposed, gradient, int8_gradient, gradient_scales, delta,
                batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
                tiles, 0, high_end, None, None, wide_mask, None, guards, k_length,
                HIGH_ROUNDS, False, CAUSAL, ROWS, KEYS, D, STAGES,
            )  # fmt: skip
            dk_sum, dv_sum = _key_phase(
                dk_sum, dv_sum, q_high, k_high, v_high, high_lse, high_factor, high_q_scales, high_k_scales,
                high_transposed, gradient, int8_gradient, gradient_scales, delta,
                batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
                tiles, low_end, end, None, None, own_mask, fine_mask, guards, k_length,
                HIGH_ROUNDS, True, CAUSAL, ROWS, KEYS, D, STAGES,
            )  # fmt: skip
        if LOW is not None:
            dk_sum, dv_sum = _key_phase(
                dk_sum, dv_sum, q_low, k_low, v_low, low_lse, low_factor, low_q_scales, low_k_scales,
                low_transposed, gradient, int8_gradient, gradient_scales, delta,
                batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
                tiles, high_end, low_end, None, None, wide_mask, None, guards, k_length,
                LOW_ROUNDS, False, CAUSAL, ROWS, KEYS, D, STAGES,
            )  # fmt: skip
            if HIGH is None:
                dk_sum, dv_sum = _key_phase(
                    dk_sum, dv_sum, q_low, k_low, v_low, low_lse, low_factor, low_q_scales, low_k_scales,
                    low_transposed, gradient, int8_gradient, gradient_scales, delta,
                    batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, start,
                    tiles, low_end, end, None, None, own_mask, fine_mask, guards, k_length,
                    LOW_ROUNDS, True, CAUSAL, ROWS, KEYS, D, STAGES,
                )  # fmt: skip
    place = batch.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    place = place + tokens[:, None].to(tl.int64) * stride_s + channels[None, :]
    inside = (tokens < k_length)[:, None] & (channels < head_dim)[None, :]
    tl.store(dk + place, to_output(dk_sum * LN_2, dk.dtype.element_ty), mask=inside)
    tl.store(dv + place, to_output(dv_sum, dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["q_length", "k_length", "means_stride_b", "means_stride_h"])
def mean_gradients(
    mean_q, mean_k, mean_v, mean_lse, mean_factor, mean_q_scales, mean_k_scales, mean_transposed,
    gradient, int8_gradient, gradient_scales, delta, means, log_counts, dk, dv,
    heads, kv_heads, q_length, k_length, means_stride_b, means_stride_h,
    ROUNDS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS means of one head, over all Q tiles, divided by the number of keys of each.

    dk, dv: float32 [B·Hkv, tiles of means·128, D]; dk still lacks the factor ln 2.
    """
    q_tiles, k_tiles = tl.cdiv(q_length, TILE), tl.cdiv(k_length, TILE)
    mean_tiles = tl.cdiv(k_tiles, MEANS_TILES)
    blocks = mean_tiles * (TILE // KEYS)
    kv, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start = block * KEYS
    batch, kv_head = kv // kv_heads, kv % kv_heads
    group = heads // kv_heads
    own_counts = log_counts + batch * (mean_tiles * TILE)
    dk_sum, dv_sum = tl.zeros((KEYS, D), tl.float32), tl.zeros((KEYS, D), tl.float32)
    for head_in_batch in range(kv_head * group, (kv_head + 1) * group):
        row = (batch * means_stride_b + head_in_batch * means_stride_h).to(tl.int64)
        dk_sum, dv_sum = _key_phase(
            dk_sum, dv_sum, mean_q, mean_k, mean_v, mean_lse, mean_factor, mean_q_scales, mean_k_scales,
            mean_transposed, gradient, int8_gradient, gradient_scales, delta, batch, head_in_batch, heads, kv_head,
            kv_heads, q_tiles, mean_tiles, start, None, 0, q_tiles, means + row * mean_tiles + start // TILE,
            own_counts, None, None, None, k_length,
            ROUNDS, False, False, ROWS, KEYS, D, STAGES,
        )  # fmt: skip
    keys = start + tl.arange(0, KEYS)
    # A mean of which no key is seen has −inf for a count.
    share = tl.exp2(-tl.maximum(tl.load(own_counts + keys), 0.0))[:, None]
    place = (kv.to(tl.int64) * (mean_tiles * TILE) + keys)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dk + place, dk_sum * share)
    tl.store(dv + place, dv_sum * share)
