"""The quantiser on the GPU: one pass over Q or K writes the elements and scales of every class read later."""

import triton
import triton.language as tl

from dma_diffusers.kernels.rounding import rounded, to_bf16, to_e4m3, to_e5m2

TILE = tl.constexpr(128)
SMALLEST_NORMAL = tl.constexpr(2.0**-126)
NOT_FINITE = tl.constexpr(0x7F800000)  # and above: magnitudes, as bits


@triton.jit
def _magnitude_bits(x):
    """|x| as int32 bits: ordered like the magnitudes, with infinities and NaN above every finite number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load_tile(x, batch, head, tokens, columns, inside, stride_b, stride_h, stride_s):
    """float32 [128, D] of one head, zeros outside."""
    place = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tokens.to(tl.int64) * stride_s
    return tl.load(x + place + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rotated(x, cos, sin, tokens, length, head_dim, stride_s, stride_d, D: tl.constexpr):
    """float32 [128, D], channels 2i and 2i+1 turned by the angle i of their token."""
    pairs = tl.arange(0, D // 2)[None, :]
    inside = (tokens < length) & (2 * pairs < head_dim)
    place = tokens.to(tl.int64) * stride_s + pairs * stride_d
    c = tl.load(cos + place, mask=inside, other=0.0)
    s = tl.load(sin + place, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, (TILE, D // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (TILE, D))


@triton.jit
def _saturated(y, LARGEST: tl.constexpr):
    """y within ±LARGEST; NaN stays NaN."""
    return tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))


@triton.jit
def _to_element(y, ELEMENT: tl.constexpr, Q_MAX: tl.constexpr):
    """float32 y as the nearest number that the element has."""
    y = _saturated(y, Q_MAX)
    if ELEMENT == "e4m3":
        y = rounded(y, 3, 2.0**-6)
    elif ELEMENT == "e5m2":
        y = rounded(y, 2, 2.0**-14)
    elif ELEMENT == "e2m3":
        y = rounded(y, 3, 1.0)
    elif ELEMENT == "e3m2":
        y = rounded(y, 2, 0.25)
    elif ELEMENT == "e2m1":
        y = rounded(y, 1, 1.0)
    return y


@triton.jit
def _to_int8(y):
    """float32 y, which must round to within ±127, as int8: of NaN, anything."""
    return (y + 1.5 * 2.0**23).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e2m1_code(y):
    """The codes of float32 numbers that e2m1 has."""
    bits = _magnitude_bits(y)
    code = tl.where(
        bits >= 0x3F800000, (bits >> 22) - 252, (bits != 0).to(tl.int32)
    )  # 1.0 is code 2, .5 code 1
    return ((y.to(tl.int32, bitcast=True) >> 28) & 8) | code


@triton.jit
def _e8m0_ceil(amax_bits, Q_MAX_BITS: tl.constexpr):
    """The E8M0 code of 2^ceil(log2(amax / q_max)), which never clips; 255 (NaN) where amax is not finite."""
    # float32 bits count exponents in steps of 2^23; the distance to q_max, rounded up, is the exponent
    code = tl.maximum(((amax_bits - Q_MAX_BITS + 0x7FFFFF) >> 23) + 127, 0)
    return tl.where(amax_bits >= 0x7F800000, 255, code)


@triton.jit
def _power_of_two(code):
    """The number of an E8M0 code."""
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _in_blocks(x, tensor_scale, ELEMENT: tl.constexpr, BLOCK: tl.constexpr, Q_MAX: tl.constexpr,
               Q_MAX_BITS: tl.constexpr, D: tl.constexpr):  # fmt: skip
    """A tile [128, D] in a block format: elements [128, blocks, BLOCK], codes and values of the scales."""
    blocks = tl.reshape(x, (TILE, D // BLOCK, BLOCK))
    amax_bits = tl.max(_magnitude_bits(blocks), axis=2)
    if BLOCK == 16:  # E4M3 block scales under a float32 tensor scale
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
    else:
        code = _e8m0_ceil(amax_bits, Q_MAX_BITS)
        scale = _power_of_two(code)
        y = blocks * ((254 - tl.minimum(code, 254)) << 23).to(tl.float32, bitcast=True)[:, :, None]
    return _to_element(y, ELEMENT, Q_MAX), code, scale


@triton.jit
def _store_rows(elements, y, place, COLUMNS: tl.constexpr):
    tl.store(elements + place[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], y)


@triton.jit
def _reencoded(y, code, TOP: tl.constexpr, D: tl.constexpr):
    """Blocks with E8M0 scales as e4m3 numbers under one power of two for each row: [128, D], its code, exactness.

    A row's largest scale becomes 2^TOP, the largest that e4m3 has room for; smaller blocks go under it.
    """
    is_number = (code != 255) & (tl.max(_magnitude_bits(y), axis=2) != 0)
    row_code = tl.maximum(tl.max(tl.where(is_number, code, 0), axis=1) - TOP, 1)
    exponent = tl.where(code == 255, 0, tl.maximum(code - row_code[:, None], -127)) + 127
    factor = tl.where(is_number, (exponent << 23).to(tl.float32, bitcast=True), 0.0)
    factor = tl.where(code == 255, float("nan"), factor)
    z = tl.reshape(y * factor[:, :, None], (TILE, D))
    stored = rounded(z, 3, 2.0**-6)
    inexact = tl.max(
        (((stored != z) & (z == z)) | ((z == 0) & (tl.reshape(y, (TILE, D)) != 0))).to(tl.int32), 1
    )
    return stored, row_code, inexact


@triton.jit
def _encode(
    x, elements, scales, tile, rows, tensor_scale, inexact_rows,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, STORAGE: tl.constexpr,
    Q_MAX: tl.constexpr, Q_MAX_BITS: tl.constexpr, TOP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Write one tile `x` (float32 [128, D]) in one format, stored as its lowering stores it."""
    place = tile * TILE + rows
    if ELEMENT == "bf16":
        _store_rows(elements, to_bf16(x), place, D)
    elif BLOCK is None:
        amax_bits = tl.max(_magnitude_bits(x), axis=1)
        if STORAGE == "tile":
            amax_bits = tl.max(amax_bits, axis=0)
            if ELEMENT == "e4m3" and amax_bits >= NOT_FINITE:  # e4m3 has NaN: other elements need not suffer
                is_bad = _magnitude_bits(x) >= NOT_FINITE
                amax_bits = tl.max(tl.max(tl.where(is_bad, 0, _magnitude_bits(x)), axis=1), axis=0)
                x = tl.where(is_bad, float("nan"), x)
        bad = amax_bits >= NOT_FINITE
        amax = amax_bits.to(tl.float32, bitcast=True)
        ones = tl.full(amax.shape, 1.0, tl.float32)
        scale = tl.where(amax_bits == 0, 1.0, tl.maximum(tl.div_rn(amax, ones * Q_MAX), SMALLEST_NORMAL))
        inverse = tl.div_rn(ones, tl.where(bad, 1.0, scale))
        y = x * (inverse if STORAGE == "tile" else inverse[:, None])
        if ELEMENT == "int8":
            _store_rows(elements, _to_int8(y), place, D)
        else:
            _store_rows(elements, to_e4m3(y), place, D)
        tl.store(scales + (tile if STORAGE == "tile" else place), tl.where(bad, float("nan"), scale))
    else:
        y, code, scale = _in_blocks(x, tensor_scale, ELEMENT, BLOCK, Q_MAX, Q_MAX_BITS, D)
        if STORAGE == "plain":
            _store_rows(elements, to_bf16(tl.reshape(y * scale[:, :, None], (TILE, D))), place, D)
        elif STORAGE == "row":
            stored, row_code, inexact = _reencoded(y, code, TOP, D)
            _store_rows(elements, to_e4m3(stored), place, D)
            tl.store(scales + place, _power_of_two(row_code))
            tl.atomic_add(inexact_rows, tl.sum(inexact))
        else:
            _store_blocks(elements, scales, tile, rows, y, code, ELEMENT, BLOCK, D)


@triton.jit
def scale_place(row, column, COLUMNS: tl.constexpr):
    """Where a tile's scale lies: in tcgen05's layout 4 columns of 128 rows are 32 runs of 16 bytes."""
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
        low, high = tl.split(tl.reshape(_e2m1_code(y), (TILE, D // 2, 2)))
        _store_rows(elements, (low | (high << 4)).to(tl.uint8), place, D // 2)
    elif ELEMENT == "e5m2":
        _store_rows(elements, to_e5m2(y).to(tl.uint8, bitcast=True), place, D)
    else:  # e2m3 and e3m2 are e4m3 numbers too, which the same MMA multiplies at the same rate
        _store_rows(elements, to_e4m3(y).to(tl.uint8, bitcast=True), place, D)
    place = scale_place(rows[:, None], tl.arange(0, COLUMNS)[None, :], COLUMNS)
    tl.store(scales + tile * TILE * COLUMNS + place, code.to(tl.uint8))


@triton.jit(do_not_specialize=["length"])
def quantise(
    x, mean, factor, cos, sin, key_mean, key_mask, offset,
    high_elements, high_scales, high_tensor_scale, low_elements, low_scales, low_tensor_scale, inexact_rows,
    heads, heads_per_key_head, length, head_dim, stride_b, stride_h, stride_s, rope_stride_s, rope_stride_d,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_STORAGE: tl.constexpr,
    HIGH_MAX: tl.constexpr, HIGH_MAX_BITS: tl.constexpr, HIGH_TOP: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_STORAGE: tl.constexpr,
    LOW_MAX: tl.constexpr, LOW_MAX_BITS: tl.constexpr, LOW_TOP: tl.constexpr,
    ROUND: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Encode one 128-row tile of one head of `x` ([B, H, S, head_dim], any strides) in the classes asked for.

    x is rotated by `cos` and `sin` if they are given. In bf16 it is then written as it is; other formats encode
    (x − mean)·factor, mean or no mean. Rows past `length`, rows that `key_mask` (uint8 [B, tiles·128]) hides from
    formats other than bf16, and columns past `head_dim` are written as zeros.
    `offset` takes factor·x·key_mean, of x rounded to bf16 if ROUND. `inexact_rows` counts rows that one
    power of two could not bring into e4m3.
    """
    tiles = tl.cdiv(length, TILE)
    head, tile_in_head = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows, columns = tl.arange(0, TILE), tl.arange(0, D)
    tokens = (tile_in_head * TILE + rows)[:, None]
    inside = (tokens < length) & (columns[None, :] < head_dim)
    x = _load_tile(x, head // heads, head % heads, tokens, columns, inside, stride_b, stride_h, stride_s)
    if cos is not None:
        x = _rotated(x, cos, sin, tokens, length, head_dim, rope_stride_s, rope_stride_d, D)
    tile = tl.program_id(0).to(tl.int64)
    if offset is not None:
        own_mean = key_mean + (head // heads_per_key_head).to(tl.int64) * head_dim + columns
        product = (to_bf16(x).to(tl.float32) if ROUND else x) * tl.load(
            own_mean, mask=columns < head_dim, other=0.0
        )
        tl.store(offset + tile * TILE + rows, tl.sum(product, axis=1) * factor)
    value = x
    if mean is not None:
        own_mean = mean + head.to(tl.int64) * head_dim + columns
        value -= tl.load(own_mean, mask=columns < head_dim, other=0.0)[None, :]
    if key_mask is not None:
        seen = tl.load(key_mask + (head // heads).to(tl.int64) * (tiles * TILE) + tile_in_head * TILE + rows)
        inside &= (seen != 0)[:, None]
    value = tl.where(inside, value * factor, 0.0)
    if HIGH is not None:
        scale = tl.load(high_tensor_scale + head) if HIGH_BLOCK == 16 else 1.0
        _encode(
            x if HIGH == "bf16" else value, high_elements, high_scales, tile, rows, scale, inexact_rows,
            HIGH, HIGH_BLOCK, HIGH_STORAGE, HIGH_MAX, HIGH_MAX_BITS, HIGH_TOP, D,
        )  # fmt: skip
    if LOW is not None:
        scale = tl.load(low_tensor_scale + head) if LOW_BLOCK == 16 else 1.0
        _encode(
            x if LOW == "bf16" else value, low_elements, low_scales, tile, rows, scale, inexact_rows,
            LOW, LOW_BLOCK, LOW_STORAGE, LOW_MAX, LOW_MAX_BITS, LOW_TOP, D,
        )  # fmt: skip


@triton.jit
def _stored_at(position):
    """Which token of transposed V is stored at a position: of each 16, 8h+2j+p at 4j+2h+p (j < 4, h and p < 2).

    An accumulator of the MMA gives each thread two neighbouring columns of every eight, an 8-bit operand takes four
    neighbouring ones of every sixteen: in this order the probabilities stay in the threads that computed them.
    """
    return (position & ~14) | ((position & 2) << 2) | ((position >> 1) & 6)


@triton.jit(do_not_specialize=["length"])
def quantise_value(
    v, v_scale, elements, heads, length, head_dim, stride_b, stride_h, stride_s,
    TRANSPOSED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One 128-row tile of v / v_scale in e4m3; `v_scale` is float32 [B·H, D], powers of two.

    elements: [B·H, tiles·128, D], or [B·H, D, tiles·128] with tokens as `_stored_at` says if TRANSPOSED.
    """
    tiles = tl.cdiv(length, TILE)
    head, tile_in_head = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    rows, columns = tl.arange(0, TILE), tl.arange(0, D)
    place = tile_in_head * TILE + rows
    tokens = (tile_in_head * TILE + (_stored_at(rows) if TRANSPOSED else rows))[:, None]
    inside = (tokens < length) & (columns[None, :] < head_dim)
    value = _load_tile(v, head // heads, head % heads, tokens, columns, inside, stride_b, stride_h, stride_s)
    channels = head.to(tl.int64) * D + columns
    encoded = to_e4m3(_saturated(value / tl.load(v_scale + channels)[None, :], 448.0)).to(
        tl.uint8, bitcast=True
    )
    if TRANSPOSED:
        tl.store(elements + channels[:, None] * (tiles * TILE) + place[None, :], encoded.trans(1, 0))
    else:
        _store_rows(elements, encoded, tl.program_id(0).to(tl.int64) * TILE + rows, D)
