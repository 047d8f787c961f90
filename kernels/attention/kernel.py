"""The fused attention kernel: contiguous phases of one class each, one online softmax across them.

Q·K of a class is a block-scaled MMA (`tl.dot_scaled`), or a plain one of e4m3, int8 or bf16 numbers, as the
lowering stores its format. Tiles come through tensor descriptors, TMA where there is one. The reference beside
this file defines what is correct.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.attention.exponential import multiply_add, shared_exp2
from dma_diffusers.kernels.attention.loads import load_row_scales, load_rows, load_values
from dma_diffusers.kernels.attention.products import PACKED_PRODUCTS, halves_of, products, scaled_halves_of
from dma_diffusers.kernels.attention.units import counted, in_units, log_of_sum, out_of_units
from dma_diffusers.kernels.device.rounding import (
    INTERPRETED,
    loaded_bf16,
    loaded_e4m3,
    ones_for,
    operand_of_values,
    rounded_for_values,
    to_output,
)
from dma_diffusers.kernels.quantiser.kernel import SMALLEST_NORMAL
from dma_diffusers.kernels.quantiser.tile import token_at
from dma_diffusers.kernels.tiling import precision_map
from dma_diffusers.kernels.tiling.layout import SUBTILE

TILE, MEANS_TILES = tl.constexpr(128), tl.constexpr(precision_map.MEANS_TILES)
SUBTILES = tl.constexpr(TILE.value // SUBTILE)  # of a tile
# P is stored as exp2(s − m)·2^8, clear of e4m3's subnormals; the shift cancels in the division by l.
P_SHIFT = tl.constexpr(8.0)
LOWEST = tl.constexpr(-1.0e30)
PATIENCE, LOOKED_AT = tl.constexpr(reference.PATIENCE), tl.constexpr(reference.LOOKED_AT)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _in_order_of_v(p):
    """Puts columns into the order of transposed V's tokens (`_stored_at` of the quantiser)."""
    runs = tl.reshape(p, (p.shape[0], p.shape[1] // 16, 2, 4, 2))
    return tl.reshape(tl.permute(runs, (0, 1, 3, 2, 4)), p.shape)


@triton.jit
def _below(limit, KEYS: tl.constexpr, TCGEN05: tl.constexpr):
    """Says which of KEYS columns are below a limit, int32 [ROWS or 1, 1]: bool [ROWS or 1, KEYS].

    The threads of an accumulator differ in the half of the columns that they hold (tcgen05), or in the pair of each
    eight. That part of a column is subtracted from the limit, so that the rest is a constant of the machine code; whole
    columns would take a register each, throughout the loop.
    """
    if TCGEN05:
        parts = (tl.arange(0, 2) * (KEYS // 2))[None, :, None]
        below = tl.arange(0, KEYS // 2)[None, None, :] < limit[:, :, None] - parts
    else:
        parts = (tl.arange(0, 4) * 2)[None, None, :, None]
        constants = (tl.arange(0, KEYS // 8) * 8)[:, None, None] + tl.arange(0, 2)[None, None, :]
        below = constants[None, :, :, :] < limit[:, :, None, None] - parts
    return tl.reshape(below, (limit.shape[0], KEYS))


@triton.jit
def _seen(
    start, key_mask, fine_mask, guards, k_length, q_tokens, CAUSAL: tl.constexpr, KEYS: tl.constexpr,
    TCGEN05: tl.constexpr,
):  # fmt: skip
    """Says which keys from `start` on each query sees: bool [1 or ROWS, KEYS]."""
    columns = tl.arange(0, KEYS)
    if fine_mask is not None:  # as FineMask.seen has it
        slots = tl.cdiv(k_length, TILE) * TILE
        first, last = tl.load(fine_mask + q_tokens), tl.load(fine_mask + slots + q_tokens) | guards
        low = tl.load(fine_mask + 2 * slots + start + columns) | guards
        high = tl.load(fine_mask + 3 * slots + start + columns)
        inside = (low[None, :] - first[:, None]) & (last[:, None] - high[None, :])
        seen = (inside & guards) == guards
    elif CAUSAL:
        seen = _below((tl.minimum(q_tokens + 1, k_length) - start)[:, None], KEYS, TCGEN05)
    else:
        seen = _below(tl.full((1, 1), 0, tl.int32) + (k_length - start), KEYS, TCGEN05)
    if key_mask is not None:
        unmasked = (tl.load(key_mask + start + columns) != 0)[None, :]
        seen = (seen & unmasked) if CAUSAL or fine_mask is not None else unmasked
    return seen


@triton.jit
def _taken(word, KEYS: tl.constexpr, TCGEN05: tl.constexpr):
    """Says which of KEYS sub-tiles belong to KV tiles whose bit in the word is set: bool [1, KEYS].

    As in `_below`, the part of a column in which threads differ is taken from the word, and the rest is a constant.
    """
    if TCGEN05:
        words = word >> (tl.arange(0, 2) * (KEYS // SUBTILES // 2))[:, None]
        taken = words & (1 << tl.arange(0, KEYS // 2) // SUBTILES)[None, :]
    else:
        words = word >> (tl.arange(0, 4) // 2)[None, :, None]
        taken = words & (1 << tl.arange(0, KEYS // 8) * 2)[:, None, None]
        taken, _ = tl.broadcast(taken, tl.zeros((1, 1, 2), tl.int32))
    return tl.reshape(taken != 0, (1, KEYS))


@triton.jit
def _scores_of_means(s, factor, word, log_counts, TCGEN05: tl.constexpr):
    """The scores of KEYS sub-tiles: −inf where no key is seen, and for KV tiles whose bit of the word isn't set."""
    weights = tl.load(log_counts + tl.arange(0, s.shape[1]))[None, :]
    s = multiply_add(s.to(tl.float32), factor[:, None], weights, TCGEN05)
    return tl.where(_taken(word, s.shape[1], TCGEN05), s, float("-inf"))


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(s, skip_below):
    """Returns the largest s of each row; NaN if any is NaN and tiles may be skipped."""
    if skip_below is None or s.dtype == tl.int32:
        top = tl.max(s, axis=1)
    elif INTERPRETED:  # which takes long over a function of ours
        top = tl.where(tl.max((s != s).to(tl.int32), axis=1) != 0, float("nan"), tl.max(s, axis=1))
    else:
        top = tl.reduce(s, 1, _larger)
    return top


@triton.jit
def _counts(highest, m, skip_below, kept):
    """Says whether the tile counts: in some row a probability is 2^skip_below or more of the largest so far, or NaN.

    A block that has kept many tiles in a row doesn't look; the tile then counts.
    """
    if skip_below is None:
        return True
    else:
        looks = (kept < PATIENCE) | (kept % LOOKED_AT == 0)
        # A row of columns rather than a column of rows: Triton before 3.8 fails over a reduction to a scalar here.
        counts = ((highest < m + skip_below).to(tl.int32) ^ 1)[None, :]
        return (tl.max(counts, axis=1).item() != 0) | ~looks


@triton.jit
def _with_unit_scales(x, y):
    """x·y of e4m3 numbers as a block-scaled product whose scales are all one."""
    x_scales = tl.full((x.shape[0], x.shape[1] // 32), 127, tl.uint8)
    y_scales = tl.full((y.shape[1], y.shape[0] // 32), 127, tl.uint8)
    return tl.dot_scaled(x, x_scales, "e4m3", y, y_scales, "e4m3")


@triton.jit
def _add_values(
    accumulator, l, rescale, p, value, v, batch, kv_head, kv_heads, start, length,
    VALUES: tl.constexpr, V_TRANSPOSED: tl.constexpr, ARE_WHOLE: tl.constexpr, D: tl.constexpr,
    TCGEN05: tl.constexpr, UNIT_SCALES: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Returns accumulator·rescale + p·V; V from the key `start` on is `value`, or is loaded now.

    With COUNTS, l is [ROWS, COUNTS], all columns alike, and l·rescale + p·ones is returned, too: the MMA sums what it
    multiplies. Without, l is left as it is.
    """
    IS_FP8: tl.constexpr = VALUES == "channel"
    # p is narrowed first: before Triton 3.8, the compiler would keep both it and the accumulator in registers.
    probabilities = operand_of_values(p, VALUES)
    if COUNTS > 0:
        ones = ones_for(probabilities, COUNTS)
        l *= rescale[:, None]
    if TCGEN05 or not IS_FP8:
        accumulator = multiply_add(accumulator, rescale[:, None], tl.zeros_like(accumulator), TCGEN05)
    if value is None:
        value = load_values(
            v, batch, kv_head, kv_heads, start, length, IS_FP8 and V_TRANSPOSED, ARE_WHOLE, p.shape[1], D
        )
    if IS_FP8:
        if V_TRANSPOSED:
            probabilities = _in_order_of_v(probabilities)
        if TCGEN05:
            accumulator = tl.dot(probabilities, loaded_e4m3(value), accumulator)
            if COUNTS > 0:
                l = tl.dot(probabilities, ones, l)
        elif UNIT_SCALES and not INTERPRETED:
            accumulator = accumulator * rescale[:, None] + _with_unit_scales(probabilities, value)
            if COUNTS > 0:
                l += _with_unit_scales(probabilities, ones)
        else:  # FP8 MMA before tcgen05 keeps 13 bits of a sum: no more than a tile's goes through it
            accumulator = accumulator * rescale[:, None] + tl.dot(probabilities, loaded_e4m3(value))
            if COUNTS > 0:
                l += tl.dot(probabilities, ones)
    else:
        accumulator = tl.dot(probabilities, loaded_bf16(value), accumulator)
        if COUNTS > 0:
            l = tl.dot(probabilities, ones, l)
    return accumulator, l


@triton.jit
def _phase(
    accumulator, l, m, kept, q_elements, q_scales, q_tensor_scale, k_elements, k_scales, k_tensor_scale, v,
    softmax_scale_log2, offset, batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, k_rows, v_rows,
    indices, first, last, words, log_counts, key_mask, fine_mask, guards, k_length, start, skip_below, skipped, zero,
    ELEMENT: tl.constexpr, STORAGE: tl.constexpr, BLOCK: tl.constexpr, VALUES: tl.constexpr,
    V_TRANSPOSED: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    EXP_SHARE: tl.constexpr, TCGEN05: tl.constexpr, UNIT_SCALES: tl.constexpr, COUNTS: tl.constexpr,
    KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Visits the KV tiles `indices[first:last]`, all of one class, for ROWS queries from `start` on, KEYS keys
    at a time.

    Without `indices` they are the tiles of means from `first` to `last`, each with its word of bits in `words`.
    k_rows, v_rows: of one head, where operands are pointers.
    """
    head = batch * heads + head_in_batch
    q_tokens = start + tl.arange(0, ROWS)
    COLUMNS: tl.constexpr = D // 2 if ELEMENT == "int4" else D
    q = load_rows(q_elements, batch, head_in_batch, heads, start, q_tiles * TILE, True, ROWS, COLUMNS)
    if STORAGE == "row" or STORAGE == "tile":
        row_factor = tl.load(q_scales + (head.to(tl.int64) * q_tiles) * TILE + q_tokens)
    elif ELEMENT == "bf16":
        row_factor = tl.zeros((ROWS,), tl.float32) + softmax_scale_log2
    elif q_tensor_scale is not None:
        scale = tl.load(q_tensor_scale + head) * tl.load(k_tensor_scale + batch * kv_heads + kv_head)
        row_factor = tl.zeros((ROWS,), tl.float32) + tl.maximum(scale, SMALLEST_NORMAL)  # 0·−inf is NaN
    else:
        row_factor = tl.full((ROWS,), 1.0, tl.float32)
    if BLOCK is not None:
        q_scales = load_row_scales(q_scales, head * q_tiles + start // TILE, start % TILE, ROWS, D // BLOCK)
    if STORAGE == "packed":
        q = scaled_halves_of(q, q_scales, BLOCK)
    elif ELEMENT == "int4":
        q = halves_of(q)
        row_factor *= 1 / PACKED_PRODUCTS
    if offset is None or ELEMENT != "bf16":
        shift = tl.zeros((ROWS,), tl.float32)
    else:
        shift = tl.load(offset + (head.to(tl.int64) * q_tiles) * TILE + q_tokens)
    PARTS: tl.constexpr = TILE // KEYS
    if COUNTS > 0:
        l = tl.broadcast_to(l[:, None], (ROWS, COUNTS))
    ARE_WHOLE: tl.constexpr = log_counts is None  # bf16 means need not fill a tile
    for step in tl.range(first * PARTS, last * PARTS, num_stages=STAGES):
        tile = step // PARTS
        if indices is not None:
            tile = tl.load(indices + tile)
        kv_tile = (batch * kv_heads + kv_head) * k_tiles + tile
        part = step - step // PARTS * PARTS
        k_start = tile * TILE + part * KEYS
        k = load_rows(k_elements, batch, kv_head, kv_heads, k_start, k_rows, ARE_WHOLE, KEYS, COLUMNS)
        s = products(q, q_scales, k, k_scales, kv_tile, part, zero, ELEMENT, STORAGE, BLOCK, D, TCGEN05)
        factor = row_factor
        if STORAGE == "tile":
            factor *= tl.load(k_scales + kv_tile)
        if log_counts is not None:
            word = tl.load(words + tile) >> part * (KEYS // SUBTILES)
            s = _scores_of_means(s, factor, word, log_counts + k_start, TCGEN05)
            factor = tl.full((ROWS,), 1.0, tl.float32)
        if MASKED or key_mask is not None:
            seen = _seen(
                k_start, key_mask, fine_mask, guards, k_length, q_tokens, MASKED and CAUSAL, KEYS, TCGEN05
            )
            s = tl.where(seen, s.to(tl.float32), float("-inf"))
            if STORAGE == "tile":  # 0·−inf is NaN
                factor = tl.maximum(factor, SMALLEST_NORMAL, propagate_nan=tl.PropagateNan.ALL)
        value = None
        if skip_below is not None:  # outside the branch, so that it is loaded ahead
            value = load_values(
                v, batch, kv_head, kv_heads, k_start, v_rows, VALUES == "channel" and V_TRANSPOSED,
                ARE_WHOLE, KEYS, D,
            )  # fmt: skip
        # A score is s·factor − shift; the maximum is taken over s, so that the exponent is one fused multiply-add,
        # and of int8 products before they are converted: Hopper compares three integers at once.
        highest = _largest(s, skip_below).to(tl.float32) * factor - (shift + P_SHIFT)
        if _counts(highest, m, skip_below, kept):
            kept += 1
            m_new = tl.maximum(m, highest)
            p = shared_exp2(
                multiply_add(s.to(tl.float32), factor[:, None], -(m_new + shift)[:, None], TCGEN05), EXP_SHARE
            )
            rescale = tl.exp2(m - m_new)
            if COUNTS == 0:
                p = rounded_for_values(p, VALUES)
                l = l * rescale + tl.sum(p, axis=1)
            m = m_new
            if not TCGEN05:
                accumulator, l = _add_values(
                    accumulator, l, rescale, p, value, v, batch, kv_head, kv_heads, k_start, v_rows,
                    VALUES, V_TRANSPOSED, ARE_WHOLE, D, TCGEN05, UNIT_SCALES, COUNTS,
                )  # fmt: skip
        else:
            kept = 0
            if skipped is not None:
                tl.atomic_add(skipped, ROWS // 64, sem="relaxed")
            if TCGEN05:
                p = tl.zeros((ROWS, KEYS), tl.float32)
                rescale = tl.full((ROWS,), 1.0, tl.float32)
        if TCGEN05:  # asynchronous, so outside the branch; of a skipped tile it adds 0
            accumulator, l = _add_values(
                accumulator, l, rescale, p, value, v, batch, kv_head, kv_heads, k_start, v_rows,
                VALUES, V_TRANSPOSED, ARE_WHOLE, D, TCGEN05, UNIT_SCALES, COUNTS,
            )  # fmt: skip
    if COUNTS > 0:
        l = tl.max(l, axis=1)
    return accumulator, l, m, kept


@triton.jit(do_not_specialize=[
    "q_length", "k_length", "token_count", "map_stride_b", "map_stride_h", "map_length", "total", "means_stride_b",
    "means_stride_h"
])  # fmt: skip
def attend(
    q_high, q_high_scales, q_high_tensor_scale, k_high, k_high_scales, k_high_tensor_scale, v_high,
    q_low, q_low_scales, q_low_tensor_scale, k_low, k_low_scales, k_low_tensor_scale, v_low,
    v_units, softmax_scale_log2, offset, indices, bounds, key_mask, fine_mask, token_order, out, lse,
    heads, kv_heads, q_length, k_length, token_count, guards, head_dim, map_stride_b, map_stride_h, map_length,
    out_stride_b, out_stride_h, out_stride_s, skip_below, skipped, total, zero,
    mean_q, mean_q_scales, mean_q_tensor_scale, mean_k, mean_k_scales, mean_k_tensor_scale, mean_v,
    means, log_counts, means_stride_b, means_stride_h,
    HIGH: tl.constexpr, HIGH_STORAGE: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_VALUES: tl.constexpr,
    LOW: tl.constexpr, LOW_STORAGE: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_VALUES: tl.constexpr,
    MEAN: tl.constexpr, MEAN_STORAGE: tl.constexpr, MEAN_BLOCK: tl.constexpr, MEAN_VALUES: tl.constexpr,
    CAUSAL: tl.constexpr, MASKS_ALL: tl.constexpr, V_TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, EXP_SHARE: tl.constexpr, TCGEN05: tl.constexpr,
    UNIT_SCALES: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, MASKED_STAGES: tl.constexpr,
    MEAN_STAGES: tl.constexpr, COUNTS: tl.constexpr,
):  # fmt: skip
    """Attention of ROWS queries of one head.

    The phases are HIGH, LOW and MASKED (precision_map.py); MASKED tiles are HIGH, or LOW in a map without HIGH tiles.
    MEAN follows: tiles of further keys, `mean_k` and `mean_v` [B, Hkv, 4·tiles of keys, D], each the mean of a sub-tile
    that stands for 2^`log_counts` ([B, whole tiles]) keys. `means` [.., q_tiles, tiles of means] has a bit for each KV
    tile that a Q tile takes so (`PrecisionMap.means`). Their keys are smoothed, if any are, in bf16 too.
    A class is None where the map has no tile of it. Each class has its element, storage and block of Q·K, and the
    storage of V: "plain" is bfloat16, "channel" is e4m3 and "half" float16 in `v_units` [B·Hkv, 2, D], for each channel
    the power of two by which V was divided, and the mean that it had lost before.
    Products of bf16 numbers are multiplied here by `softmax_scale_log2`, others by the scales of rows, tiles or
    tensors, where there are any.
    `offset` [B·H·tiles·128] is what smoothing takes from a row's scores: bf16 scores, which were not smoothed,
    lose it, and `lse` regains it; None without smoothing. `lse` is None where it is not wanted.
    `key_mask` is uint8 [B, whole tiles], 0 past the keys; only MASKED tiles look at it unless MASKS_ALL.
    TCGEN05 says that accumulators lie in tensor memory. UNIT_SCALES makes FP8 P·V a block-scaled product whose scales
    are all one: the numbers are the same, and sm_120 multiplies them at twice the rate (triton#11320).
    COUNTS: by so many columns of ones the MMA sums the probabilities; 0 leaves that to registers.
    `skip_below`: a KV tile is skipped, without exponentials and P·V, where all probabilities of the ROWS queries lie
    below 2^skip_below of their row's largest so far; None never skips. `skipped` (int32 [B·H], or None) then counts
    such tiles, times ROWS/64. (BLASST, arXiv 2512.12087)
    With a `token_order` (int32) q_length and k_length are its length, and all that is read stands in that order; the
    result of a slot is stored in the row of the token that stands there, if any. `token_count` is how many rows `out`
    and `lse` have, None if as many as there are slots. `fine_mask` (fine_mask.py; int32 [4, whole tiles], with its
    `guards`) says in MASKED tiles who sees whom, in place of the length and the causal mask; it hides empty slots, or
    `key_mask` does.
    """
    q_tiles, k_tiles = tl.cdiv(q_length, TILE), tl.cdiv(k_length, TILE)
    rows = k_tiles * TILE
    blocks = tl.cdiv(q_length, ROWS)
    for work in tl.range(tl.program_id(0), total, tl.num_programs(0), num_stages=1, disable_licm=True):
        # The condition always holds, but Triton before 3.9 moves nothing out from under it. Without it, disable_licm is
        # overlooked there, and constants of each phase take registers throughout all of them.
        if work < total:
            head, block = work // blocks, work % blocks
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
            q_tokens = start + tl.arange(0, ROWS)
            channels = tl.arange(0, D)
            own_mask = None if key_mask is None else key_mask + batch.to(tl.int64) * (k_tiles * TILE)
            wide_mask = own_mask if MASKS_ALL else None

            m = tl.full((ROWS,), LOWEST, tl.float32)
            if skip_below is not None:  # a row that is no query's holds on to no tile
                is_query = token_at(token_order, q_tokens, q_length, token_count) < q_length
                m = tl.where(is_query, m, -m)
            own_skipped = None if skipped is None else skipped + head
            l = tl.zeros((ROWS,), tl.float32)
            accumulator = tl.zeros((ROWS, D), tl.float32)
            kept = 0
            # A class in FP8 or fp16 sums values in their channels' units.
            HIGH_UNITS: tl.constexpr = HIGH is not None and HIGH_VALUES != "plain"
            LOW_UNITS: tl.constexpr = LOW is not None and LOW_VALUES != "plain"
            MEAN_UNITS: tl.constexpr = MEAN is not None and MEAN_VALUES != "plain"
            own_units = None
            if HIGH_UNITS or LOW_UNITS or MEAN_UNITS:
                own_units = v_units + (batch * kv_heads + kv_head).to(tl.int64) * (2 * D) + channels
            log_own = tl.full((ROWS,), float("-inf"), tl.float32)
            log_before = log_own
            if HIGH is not None:
                accumulator, l, m, kept = _phase(
                    accumulator, l, m, kept, q_high, q_high_scales, q_high_tensor_scale,
                    k_high, k_high_scales, k_high_tensor_scale, v_high, softmax_scale_log2, offset,
                    batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, rows, rows,
                    tiles, 0, high_end, None, None, wide_mask, None, guards,
                    k_length, start, skip_below, own_skipped, zero,
                    HIGH, HIGH_STORAGE, HIGH_BLOCK, HIGH_VALUES, V_TRANSPOSED, False, CAUSAL, ROWS, D,
                    EXP_SHARE, TCGEN05, UNIT_SCALES, COUNTS, KEYS, STAGES,
                )  # fmt: skip
            if LOW is not None:
                if LOW_UNITS and HIGH is not None and not HIGH_UNITS:
                    accumulator = in_units(accumulator, own_units)
                    log_before = log_of_sum(l, m)
                elif HIGH_UNITS and not LOW_UNITS:
                    accumulator = out_of_units(accumulator, own_units)
                    log_own = counted(log_own, l, m, log_before)
                accumulator, l, m, kept = _phase(
                    accumulator, l, m, kept, q_low, q_low_scales, q_low_tensor_scale,
                    k_low, k_low_scales, k_low_tensor_scale, v_low, softmax_scale_log2, offset,
                    batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, rows, rows,
                    tiles, high_end, low_end, None, None, wide_mask, None, guards,
                    k_length, start, skip_below, own_skipped, zero,
                    LOW, LOW_STORAGE, LOW_BLOCK, LOW_VALUES, V_TRANSPOSED, False, CAUSAL, ROWS, D,
                    EXP_SHARE, TCGEN05, UNIT_SCALES, COUNTS, KEYS, STAGES,
                )  # fmt: skip
                if HIGH is None:
                    accumulator, l, m, kept = _phase(
                        accumulator, l, m, kept, q_low, q_low_scales, q_low_tensor_scale,
                        k_low, k_low_scales, k_low_tensor_scale, v_low, softmax_scale_log2, offset,
                        batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, rows, rows,
                        tiles, low_end, end, None, None, own_mask, fine_mask, guards, k_length, start,
                        skip_below, own_skipped, zero,
                        LOW, LOW_STORAGE, LOW_BLOCK, LOW_VALUES, V_TRANSPOSED, True, CAUSAL, ROWS, D,
                        EXP_SHARE, TCGEN05, UNIT_SCALES, COUNTS, KEYS, MASKED_STAGES,
                    )  # fmt: skip
                if LOW_UNITS and not HIGH_UNITS:
                    accumulator = out_of_units(accumulator, own_units)
                    log_own = counted(log_own, l, m, log_before)
                elif HIGH_UNITS and not LOW_UNITS:
                    accumulator = in_units(accumulator, own_units)
                    log_before = log_of_sum(l, m)
            if HIGH is not None:
                accumulator, l, m, kept = _phase(
                    accumulator, l, m, kept, q_high, q_high_scales, q_high_tensor_scale,
                    k_high, k_high_scales, k_high_tensor_scale, v_high, softmax_scale_log2, offset,
                    batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, k_tiles, rows, rows,
                    tiles, low_end, end, None, None, own_mask, fine_mask, guards,
                    k_length, start, skip_below, own_skipped, zero,
                    HIGH, HIGH_STORAGE, HIGH_BLOCK, HIGH_VALUES, V_TRANSPOSED, True, CAUSAL, ROWS, D,
                    EXP_SHARE, TCGEN05, UNIT_SCALES, COUNTS, KEYS, MASKED_STAGES,
                )  # fmt: skip
            if HIGH_UNITS:
                accumulator = out_of_units(accumulator, own_units)
                log_own = counted(log_own, l, m, log_before)
            if MEAN is not None:
                if MEAN_UNITS:
                    accumulator = in_units(accumulator, own_units)
                    log_before = log_of_sum(l, m)
                mean_tiles = tl.cdiv(k_tiles, MEANS_TILES)
                # Encoded means fill whole tiles, those in bf16 do not.
                subtiles, rows_of_means = k_tiles * SUBTILES, mean_tiles * TILE
                own_row = (batch * means_stride_b + head_in_batch * means_stride_h + start // TILE).to(
                    tl.int64
                )
                accumulator, l, m, kept = _phase(
                    accumulator, l, m, kept, mean_q, mean_q_scales, mean_q_tensor_scale,
                    mean_k, mean_k_scales, mean_k_tensor_scale, mean_v, softmax_scale_log2, None,
                    batch, head_in_batch, heads, kv_head, kv_heads, q_tiles, mean_tiles,
                    subtiles if MEAN == "bf16" else rows_of_means, rows_of_means if MEAN_UNITS else subtiles,
                    None, 0, mean_tiles, means + own_row * mean_tiles, log_counts + batch * (mean_tiles * TILE),
                    None, None, guards, k_length, start, None, None, zero,
                    MEAN, MEAN_STORAGE, MEAN_BLOCK, MEAN_VALUES, V_TRANSPOSED, False, CAUSAL, ROWS, D,
                    EXP_SHARE, TCGEN05, UNIT_SCALES, COUNTS, KEYS, MEAN_STAGES,
                )  # fmt: skip
                if MEAN_UNITS:
                    accumulator = out_of_units(accumulator, own_units)
                    log_own = counted(log_own, l, m, log_before)

            nothing_seen = l == 0.0
            if own_units is not None:  # noqa: SIM102 (the compiler decides this, each program the other)
                # This always holds: behind a branch, no mean is loaded before `out_of_units` is done with its units.
                if k_length > 0:
                    share = tl.exp2(log_own - m)
                    accumulator += share[:, None] * tl.load(own_units + D)[None, :]
            result = accumulator / tl.where(nothing_seen, 1.0, l)[:, None]
            out_rows = token_at(token_order, q_tokens, q_length, token_count)
            place = batch.to(tl.int64) * out_stride_b + head_in_batch.to(tl.int64) * out_stride_h
            place = place + out_rows[:, None].to(tl.int64) * out_stride_s + channels[None, :]
            inside = (out_rows < q_length)[:, None] & (channels < head_dim)[None, :]
            tl.store(out + place, to_output(result, out.dtype.element_ty), mask=inside)
            if lse is not None:
                log_sum = m + tl.log2(tl.where(nothing_seen, 1.0, l))
                if offset is not None:
                    log_sum += tl.load(offset + (head.to(tl.int64) * q_tiles) * TILE + q_tokens)
                log_sum = tl.where(nothing_seen, float("-inf"), log_sum * LN_2)
                lse_rows = head.to(tl.int64) * (q_length if token_count is None else token_count) + out_rows
                tl.store(lse + lse_rows, log_sum, mask=out_rows < q_length)
