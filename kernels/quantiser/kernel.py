"""The quantiser on the GPU: one pass over Q, K and V writes the elements and scales of every class read later."""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import (
    BF16_MAX,
    FP16_MAX,
    INTERPRETED,
    bf16_words,
    e4m3_words,
    rounded,
    rounded_pairs,
    to_bf16,
    to_e4m3,
    to_e5m2,
    within,
)
from dma_diffusers.kernels.quantiser import reference
from dma_diffusers.kernels.quantiser.elements import e2m1_code, int4_bytes, int8_words, saturated, to_element
from dma_diffusers.kernels.quantiser.tile import (
    NOT_FINITE,
    e8m0_ceil,
    inverse_of,
    joined,
    load_changed_pairs,
    load_pairs,
    load_tile,
    magnitude_bits,
    power_of_two,
    rotated_rows,
    token_at,
    with_rotated_channels,
)
from dma_diffusers.kernels.tiling import layout

TILE = tl.constexpr(layout.TILE)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
SCALE_OF_ZEROS = tl.constexpr(reference.SCALE_OF_ZEROS)


@triton.jit
def under_e4m3_scales(blocks, amax_bits, tensor_scale, ELEMENT: tl.constexpr, Q_MAX: tl.constexpr):
    """Blocks [rows, blocks, BLOCK] that e4m3 scales bring to Q_MAX at this amax: elements, codes, values of the scales.

    Values are as stored, without the tensor scale.
    """
    amax = amax_bits.to(tl.float32, bitcast=True)
    ratio = tl.div_rn(amax, tl.full(amax.shape, Q_MAX, tl.float32))
    ratio = tl.div_rn(ratio, tl.full(amax.shape, 1.0, tl.float32) * tensor_scale)
    bad = amax_bits >= 0x7F800000
    block_scale = to_e4m3(tl.where(bad, 0.0, tl.minimum(ratio, 448.0)))
    code = tl.where(bad, 0x7F, block_scale.to(tl.uint8, bitcast=True).to(tl.int32))
    scale = tl.where(bad, float("nan"), block_scale.to(tl.float32))
    divisor = block_scale.to(tl.float32) * tensor_scale
    empty = divisor == 0.0
    y = tl.div_rn(blocks, tl.where(empty, 1.0, divisor)[:, :, None] + tl.zeros_like(blocks))
    y = tl.where(empty[:, :, None], 0.0, y)
    return to_element(y, ELEMENT, Q_MAX), code, scale


@triton.jit
def _in_blocks(x, tensor_scale, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, Q_MAX: tl.constexpr,
               Q_MAX_BITS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """A tile [128, D] in a block format: elements [128, blocks, BLOCK], codes and values of the scales."""
    blocks = tl.reshape(x, (TILE, D // BLOCK, BLOCK))
    amax_bits = tl.max(magnitude_bits(blocks), axis=2)
    if tensor_scale is not None:  # block scales are E4M3
        y, code, scale = under_e4m3_scales(blocks, amax_bits, tensor_scale, ELEMENT, Q_MAX)
    else:
        code = e8m0_ceil(amax_bits, Q_MAX_BITS)
        scale = power_of_two(code)
        y = to_element(blocks * inverse_of(code)[:, :, None], ELEMENT, Q_MAX)
    return y, code, scale


@triton.jit
def _store_rows(elements, y, place, COLUMNS: tl.constexpr):
    tl.store(elements + place[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], y)


@triton.jit
def reencoded(y, code, top, D: tl.constexpr):
    """Blocks with E8M0 scales as e4m3 numbers under one power of two for each row: [rows, D], its code, exactness.

    top: the exponent of the largest scale for which e4m3 has room, of the element or of each block's element. The
    block of a row that comes nearest to it gets it; others go under it.
    """
    ROWS: tl.constexpr = y.shape[0]
    is_number = (code != 255) & (tl.max(magnitude_bits(y), axis=2) != 0)
    row_code = tl.maximum(tl.max(tl.where(is_number, code - top, 0), axis=1), 1)
    exponent = tl.where(code == 255, 0, tl.maximum(code - row_code[:, None], -127)) + 127
    factor = tl.where(is_number, (exponent << 23).to(tl.float32, bitcast=True), 0.0)
    factor = tl.where(code == 255, float("nan"), factor)
    z = tl.reshape(y * factor[:, :, None], (ROWS, D))
    stored = rounded(z, 3, 2.0**-6)
    inexact = tl.max(
        (((stored != z) & (z == z)) | ((z == 0) & (tl.reshape(y, (ROWS, D)) != 0))).to(tl.int32), 1
    )
    return stored, row_code, inexact


@triton.jit
def _store_words(elements, words, place, COLUMNS: tl.constexpr):
    """Store rows of so many words, each of two neighbouring elements."""
    rows = elements.to(tl.pointer_type(words.dtype), bitcast=True) + place[:, None] * COLUMNS
    tl.store(rows + tl.arange(0, COLUMNS)[None, :], words)


@triton.jit
def _largest(even, odd):
    """The largest magnitude of each row of pairs, as bits."""
    return tl.max(tl.maximum(magnitude_bits(even), magnitude_bits(odd)), axis=1)


@triton.jit
def _encode(
    even, odd, elements, scales, tile, rows, tensor_scale, inexact_rows,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, STORAGE: tl.constexpr,
    Q_MAX: tl.constexpr, Q_MAX_BITS: tl.constexpr, TOP: tl.constexpr, IS_KEY: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write one tile (float32 pairs [128, D/2]) in one format, stored as its lowering stores it."""
    place = tile * TILE + rows
    ONE_SCALE: tl.constexpr = STORAGE == "shared" or (IS_KEY and STORAGE == "tile")
    if ELEMENT == "bf16":
        _store_words(elements, bf16_words(even, odd), place, D // 2)
    elif BLOCK is None:
        amax_bits = _largest(even, odd)
        if ONE_SCALE:
            amax_bits = tl.max(amax_bits, axis=0)
            if ELEMENT == "e4m3" and amax_bits >= NOT_FINITE:  # e4m3 has NaN: other elements need not suffer
                even = tl.where(magnitude_bits(even) >= NOT_FINITE, float("nan"), even)
                odd = tl.where(magnitude_bits(odd) >= NOT_FINITE, float("nan"), odd)
                amax_bits = tl.max(
                    _largest(tl.where(even == even, even, 0.0), tl.where(odd == odd, odd, 0.0)), axis=0
                )
        bad = amax_bits >= NOT_FINITE
        amax = amax_bits.to(tl.float32, bitcast=True)
        ones = tl.full(amax.shape, 1.0, tl.float32)
        scale = tl.maximum(tl.div_rn(amax, ones * Q_MAX), SMALLEST_NORMAL)
        scale = tl.where(amax_bits == 0, SCALE_OF_ZEROS, scale)
        inverse = tl.div_rn(ones, tl.where(bad, 1.0, scale))
        factor = inverse if ONE_SCALE else inverse[:, None]
        even, odd = even * factor, odd * factor
        if ELEMENT == "e4m3":
            words = e4m3_words(even, odd)
        else:
            words = int4_bytes(even, odd) if ELEMENT == "int4" else int8_words(even, odd)
        _store_words(elements, words, place, D // 2)
        scale = tl.where(bad, float("nan"), scale)
        if ONE_SCALE and not IS_KEY:
            tl.store(scales + place, tl.zeros((TILE,), tl.float32) + scale)
        else:
            tl.store(scales + (tile if ONE_SCALE else place), scale)
    else:
        y, code, scale = _in_blocks(joined(even, odd), tensor_scale, ELEMENT, BLOCK, Q_MAX, Q_MAX_BITS, D)
        if STORAGE == "plain":
            _store_rows(elements, to_bf16(tl.reshape(y * scale[:, :, None], (TILE, D))), place, D)
        elif STORAGE == "row":
            stored, row_code, inexact = reencoded(y, code, TOP, D)
            _store_rows(elements, to_e4m3(stored), place, D)
            tl.store(scales + place, power_of_two(row_code))
            tl.atomic_add(inexact_rows, tl.sum(inexact))
        else:
            _store_blocks(elements, scales, tile, rows, y, code, ELEMENT, BLOCK, D)


@triton.jit
def scale_place(row, column, COLUMNS: tl.constexpr):
    """Finds the place of a scale in its tile: in tcgen05's layout 4 columns of 128 rows are 32 runs of 16 bytes."""
    if COLUMNS % 4 == 0:
        place = (column // 4) * 512 + (row % 32) * 16 + (row // 32) * 4 + column % 4
    else:
        place = row * COLUMNS + column
    return place


@triton.jit
def _store_blocks(
    elements, scales, tile, rows, y, code, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr
):
    """Elements row-major, scales in the MMA's layout."""
    COLUMNS: tl.constexpr = D // BLOCK
    place = tile * TILE + rows
    y = tl.reshape(y, (TILE, D))
    if ELEMENT == "e2m1":
        low, high = tl.split(tl.reshape(e2m1_code(y), (TILE, D // 2, 2)))
        _store_rows(elements, (low | (high << 4)).to(tl.uint8), place, D // 2)
    elif ELEMENT == "int4":
        low, high = tl.split(tl.reshape(y, (TILE, D // 2, 2)))
        _store_rows(elements, int4_bytes(low, high), place, D // 2)
    elif ELEMENT == "e5m2":
        _store_rows(elements, to_e5m2(y).to(tl.uint8, bitcast=True), place, D)
    else:  # e2m3 and e3m2 are e4m3 numbers too, which the same MMA multiplies at the same rate
        _store_rows(elements, to_e4m3(y).to(tl.uint8, bitcast=True), place, D)
    place = scale_place(rows[:, None], tl.arange(0, COLUMNS)[None, :], COLUMNS)
    tl.store(scales + tile * TILE * COLUMNS + place, code.to(tl.uint8))


@triton.jit
def _encode_classes(
    even, odd, even_value, odd_value, tile, head, rows, inexact_rows,
    high, high_scales, high_tensor_scale, low, low_scales, low_tensor_scale,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_STORAGE: tl.constexpr,
    HIGH_MAX: tl.constexpr, HIGH_MAX_BITS: tl.constexpr, HIGH_TOP: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_STORAGE: tl.constexpr,
    LOW_MAX: tl.constexpr, LOW_MAX_BITS: tl.constexpr, LOW_TOP: tl.constexpr,
    ROTATED: tl.constexpr, IS_KEY: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write one tile in the classes that are wanted: in bf16 `even` and `odd`, in other formats rotated values."""
    if ROTATED > 1:
        even_value, odd_value = with_rotated_channels(even_value, odd_value, ROTATED, D)
    if high is not None:
        scale = None if high_tensor_scale is None else tl.load(high_tensor_scale + head)
        _encode(
            even if HIGH == "bf16" else even_value, odd if HIGH == "bf16" else odd_value,
            high, high_scales, tile, rows, scale, inexact_rows,
            HIGH, HIGH_BLOCK, HIGH_STORAGE, HIGH_MAX, HIGH_MAX_BITS, HIGH_TOP, IS_KEY, D,
        )  # fmt: skip
    if low is not None:
        scale = None if low_tensor_scale is None else tl.load(low_tensor_scale + head)
        _encode(
            even if LOW == "bf16" else even_value, odd if LOW == "bf16" else odd_value,
            low, low_scales, tile, rows, scale, inexact_rows,
            LOW, LOW_BLOCK, LOW_STORAGE, LOW_MAX, LOW_MAX_BITS, LOW_TOP, IS_KEY, D,
        )  # fmt: skip


@triton.jit
def _stored_at(position):
    """Finds the token of transposed V at a position: of each 16, 8h+2j+p lies at 4j+2h+p (j < 4, h and p < 2).

    An accumulator of the MMA gives each thread two neighbouring columns of every eight, an 8-bit operand takes four
    neighbouring ones of every sixteen: in this order the probabilities stay in the threads that computed them.
    """
    return (position & ~14) | ((position & 2) << 2) | ((position >> 1) & 6)


@triton.jit
def _encode_value(
    v, v_units, plain, half, channel, token_order, batch, head_in_batch, head, tile, tiles, length, token_count,
    stride_b, stride_h, stride_s,
    ROTATED: tl.constexpr, TRANSPOSED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of V in bf16, and in float16 and e4m3 in the units of each channel."""
    rows, columns = tl.arange(0, TILE), tl.arange(0, D)
    slots = tile * TILE + (_stored_at(rows) if TRANSPOSED else rows)
    tokens = token_at(token_order, slots, length, token_count)[:, None]
    inside = (tokens < length) & (columns < HEAD_DIM)[None, :]
    channels = head.to(tl.int64) * D + columns
    value = load_tile(v, batch, head_in_batch, tokens, columns, inside, stride_b, stride_h, stride_s)
    if ROTATED > 1:
        value = rotated_rows(value, ROTATED)
    if plain is not None:
        if v.dtype.element_ty == tl.float32:  # a hidden value is multiplied by 0, which of inf would be NaN
            value = within(value, BF16_MAX)
        _store_rows(plain, to_bf16(value), head.to(tl.int64) * (tiles * TILE) + slots, D)
    if half is not None or channel is not None:
        units = v_units + head.to(tl.int64) * (2 * D) + columns
        # The inverse of a normal power of two is a power of two.
        inverse = ((254 << 23) - tl.load(units).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        is_finite = magnitude_bits(value) < NOT_FINITE
        value = tl.where(inside, value - tl.load(units + D)[None, :], 0.0) * inverse[None, :]
    if half is not None:  # a hidden value may be beyond its range, and beyond float32's in these units
        value_in_half = tl.where(is_finite, saturated(value, FP16_MAX), value).to(tl.float16)
        _store_rows(half, value_in_half, head.to(tl.int64) * (tiles * TILE) + slots, D)
    if channel is not None:
        if INTERPRETED:  # the hardware's conversion saturates
            value = saturated(value, 448.0)
        encoded = to_e4m3(value)
        place = tile * TILE + rows
        if TRANSPOSED:
            tl.store(channel + channels[:, None] * (tiles * TILE) + place[None, :], encoded.trans(1, 0))
        else:
            _store_rows(channel, encoded, head.to(tl.int64) * (tiles * TILE) + place, D)


@triton.jit
def _encode_key(
    k, mean, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    key_mask, token_order, inexact_rows,
    high, high_scales, high_tensor_scale, low, low_scales, low_tensor_scale,
    heads, head, tile, tiles, length, token_count, stride_b, stride_h, stride_s,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_STORAGE: tl.constexpr,
    HIGH_MAX: tl.constexpr, HIGH_MAX_BITS: tl.constexpr, HIGH_TOP: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_STORAGE: tl.constexpr,
    LOW_MAX: tl.constexpr, LOW_MAX_BITS: tl.constexpr, LOW_TOP: tl.constexpr,
    ROTATED: tl.constexpr, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of K."""
    rows = tl.arange(0, TILE)
    place = tile * TILE + rows
    tokens = token_at(token_order, place, length, token_count)
    batch = head // heads
    even, odd = load_changed_pairs(
        k, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE, batch, head % heads, tokens[:, None], length,
        stride_b, stride_h, stride_s, PAIRED, HEAD_DIM, D,
    )  # fmt: skip
    inside = tokens < length
    if key_mask is not None:
        inside &= tl.load(key_mask + batch.to(tl.int64) * (tiles * TILE) + place) != 0
    even_value, odd_value = even, odd
    if mean is not None:
        even_mean, odd_mean = load_pairs(mean, head * D, head >= 0, True, D, D)
        even_value, odd_value = even - even_mean, odd - odd_mean
    even_value, odd_value = (
        tl.where(inside[:, None], even_value, 0.0),
        tl.where(inside[:, None], odd_value, 0.0),
    )
    _encode_classes(
        even, odd, even_value, odd_value, (head * tiles + tile).to(tl.int64), head, rows, inexact_rows,
        high, high_scales, high_tensor_scale, low, low_scales, low_tensor_scale,
        HIGH, HIGH_BLOCK, HIGH_STORAGE, HIGH_MAX, HIGH_MAX_BITS, HIGH_TOP,
        LOW, LOW_BLOCK, LOW_STORAGE, LOW_MAX, LOW_MAX_BITS, LOW_TOP, ROTATED, True, D,
    )  # fmt: skip


@triton.jit
def _encode_query(
    q, mean, factor, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    offset, token_order, inexact_rows,
    high, high_scales, high_tensor_scale, low, low_scales, low_tensor_scale,
    heads, group, head, tile, tiles, length, token_count, stride_b, stride_h, stride_s,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_STORAGE: tl.constexpr,
    HIGH_MAX: tl.constexpr, HIGH_MAX_BITS: tl.constexpr, HIGH_TOP: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_STORAGE: tl.constexpr,
    LOW_MAX: tl.constexpr, LOW_MAX_BITS: tl.constexpr, LOW_TOP: tl.constexpr,
    ROTATED: tl.constexpr, ROUND: tl.constexpr, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of Q. group: how many heads of Q have one of K."""
    rows = tl.arange(0, TILE)
    tokens = token_at(token_order, tile * TILE + rows, length, token_count)
    even, odd = load_changed_pairs(
        q, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE, head // heads, head % heads, tokens[:, None],
        length, stride_b, stride_h, stride_s, PAIRED, HEAD_DIM, D,
    )  # fmt: skip
    place = (head * tiles + tile).to(tl.int64)
    if offset is not None:
        even_mean, odd_mean = load_pairs(mean, head // group * D, head >= 0, True, D, D)
        own_even, own_odd = rounded_pairs(even, odd, tl.bfloat16) if ROUND else (even, odd)
        scores = tl.sum(own_even * even_mean + own_odd * odd_mean, axis=1)
        tl.store(offset + place * TILE + rows, scores * factor)
    _encode_classes(
        even, odd, even * factor, odd * factor, place, head, rows, inexact_rows,
        high, high_scales, high_tensor_scale, low, low_scales, low_tensor_scale,
        HIGH, HIGH_BLOCK, HIGH_STORAGE, HIGH_MAX, HIGH_MAX_BITS, HIGH_TOP,
        LOW, LOW_BLOCK, LOW_STORAGE, LOW_MAX, LOW_MAX_BITS, LOW_TOP, ROTATED, False, D,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first", "q_length", "k_length", "token_count"])
def encode(
    q, k, v, mean, v_units, factor, q_cos, q_sin, k_cos, k_sin,
    q_weight, q_first_weight, k_weight, k_first_weight, eps, first, ROUNDS_TWICE: tl.constexpr, key_mask, offset,
    q_high, q_high_scales, q_high_tensor_scale, q_low, q_low_scales, q_low_tensor_scale,
    k_high, k_high_scales, k_high_tensor_scale, k_low, k_low_scales, k_low_tensor_scale,
    v_plain, v_half, v_channel, token_order, inexact_rows,
    heads, kv_heads, kv_heads_in_all, q_length, k_length, token_count,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_STORAGE: tl.constexpr,
    HIGH_MAX: tl.constexpr, HIGH_MAX_BITS: tl.constexpr, HIGH_TOP: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_STORAGE: tl.constexpr,
    LOW_MAX: tl.constexpr, LOW_MAX_BITS: tl.constexpr, LOW_TOP: tl.constexpr,
    ROTATED: tl.constexpr, ROTATED_VALUES: tl.constexpr, ROUND: tl.constexpr, TRANSPOSED: tl.constexpr,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Encode 128 tokens of V, K or Q ([B, heads, length, HEAD_DIM], any strides): of one head of V, or of HEADS_EACH.

    q and k first go through RMSNorm and RoPE, if there are a `weight` and a `cos` (the `first` tokens may have a weight
    of their own). In bf16 they are then written as they are; other formats encode q·factor, and k less its `mean`
    (as statistics.py gives it, and `v_units`), channels rotated in blocks of ROTATED, 1 for none. Tokens past the
    length, keys that `key_mask` (uint8 [B, tiles·128]) hides from formats other than bf16, and columns past
    HEAD_DIM are written as zeros. `offset` takes factor·q·mean, of q rounded to bf16 if ROUND. v has its channels
    rotated in blocks of ROTATED_VALUES. v_plain and v_half are [B·Hkv, tiles·128, D]; v_channel too, or
    [B·Hkv, D, tiles·128] with tokens as `_stored_at` says if TRANSPOSED.
    `inexact_rows` counts rows that one power of two could not bring into e4m3. None: a tensor of which nothing is
    wanted, or a class of which nothing is.
    With a `token_order` (int32) q_length and k_length are its length: all that is written, and `key_mask`, stand in
    that order, zeros where it names no token. `token_count` is how many there are, None if as many as slots.
    """
    # V comes first, its last head first: that is what the statistics read last, and the L2 cache may still have.
    program = tl.program_id(0)
    k_tiles = tl.cdiv(k_length, TILE)
    if v is not None:
        of_values = kv_heads_in_all * k_tiles
        if program < of_values:
            index = of_values - 1 - program
            head = index // k_tiles
            _encode_value(
                v, v_units, v_plain, v_half, v_channel, token_order,
                head // kv_heads, head % kv_heads, head, index % k_tiles, k_tiles, k_length, token_count,
                v_stride_b, v_stride_h, v_stride_s, ROTATED_VALUES, TRANSPOSED, HEAD_DIM, D,
            )  # fmt: skip
        program -= of_values
    if k is not None:
        of_keys = kv_heads_in_all * k_tiles
        if (program >= 0) & (program < of_keys):
            _encode_key(
                k, mean, k_cos, k_sin, k_weight, k_first_weight, eps, first, ROUNDS_TWICE,
                key_mask, token_order, inexact_rows,
                k_high, k_high_scales, k_high_tensor_scale, k_low, k_low_scales, k_low_tensor_scale,
                kv_heads, program // k_tiles, program % k_tiles, k_tiles, k_length, token_count,
                k_stride_b, k_stride_h, k_stride_s,
                HIGH, HIGH_BLOCK, HIGH_STORAGE, HIGH_MAX, HIGH_MAX_BITS, HIGH_TOP,
                LOW, LOW_BLOCK, LOW_STORAGE, LOW_MAX, LOW_MAX_BITS, LOW_TOP, ROTATED, PAIRED, HEAD_DIM, D,
            )  # fmt: skip
        program -= of_keys
    if q is not None:  # noqa: SIM102 (the compiler decides this, each program the other)
        if program >= 0:
            q_tiles = tl.cdiv(q_length, TILE)
            _encode_query(
                q, mean, factor, q_cos, q_sin, q_weight, q_first_weight, eps, first, ROUNDS_TWICE,
                offset, token_order, inexact_rows,
                q_high, q_high_scales, q_high_tensor_scale, q_low, q_low_scales, q_low_tensor_scale,
                heads, heads // kv_heads, program // q_tiles, program % q_tiles, q_tiles, q_length, token_count,
                q_stride_b, q_stride_h, q_stride_s,
                HIGH, HIGH_BLOCK, HIGH_STORAGE, HIGH_MAX, HIGH_MAX_BITS, HIGH_TOP,
                LOW, LOW_BLOCK, LOW_STORAGE, LOW_MAX, LOW_MAX_BITS, LOW_TOP, ROTATED, ROUND, PAIRED, HEAD_DIM,
                D,
            )  # fmt: skip
