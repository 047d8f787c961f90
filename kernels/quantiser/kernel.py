"""The quantiser on the GPU: one pass over Q or K writes the elements and scales of every class read later."""

import triton
import triton.language as tl

from dma_diffusers.kernels.rounding import to_e4m3, to_e5m2

TILE = tl.constexpr(128)


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
def _saturated(y, LARGEST: tl.constexpr):
    """y within ±LARGEST; NaN stays NaN."""
    return tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))


@triton.jit
def _e2m1(y):
    """Round to nearest even onto e2m1 codes; |y| beyond 6 saturates."""
    magnitude = tl.abs(y)
    code = (magnitude > 0.25).to(tl.int32) + (magnitude >= 0.75).to(tl.int32)
    code += (magnitude > 1.25).to(tl.int32) + (magnitude >= 1.75).to(tl.int32)
    code += (magnitude > 2.5).to(tl.int32) + (magnitude >= 3.5).to(tl.int32)
    code += (magnitude > 5.0).to(tl.int32)
    sign = (y.to(tl.int32, bitcast=True) >> 28) & 8
    return sign | code


@triton.jit
def _e8m0_ceil(amax_bits, Q_MAX_BITS: tl.constexpr):
    """The E8M0 code of 2^ceil(log2(amax / q_max)), which never clips; 255 (NaN) where amax is not finite."""
    # float32 bits count exponents in steps of 2^23; the distance to q_max, rounded up, is the exponent
    code = tl.maximum(((amax_bits - Q_MAX_BITS + 0x7FFFFF) >> 23) + 127, 0)
    return tl.where(amax_bits >= 0x7F800000, 255, code)


@triton.jit
def _encode(
    x, elements, scales, tile, rows, tensor_scale,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, Q_MAX: tl.constexpr, Q_MAX_BITS: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Write one tile `x` (float32 [128, D]) in one format: elements row-major, scales in the MMA's layout."""
    COLUMNS: tl.constexpr = D // BLOCK
    blocks = tl.reshape(x, (TILE, COLUMNS, BLOCK))
    amax_bits = tl.max(_magnitude_bits(blocks), axis=2)
    if BLOCK == 16:  # E4M3 block scales under a float32 tensor scale
        amax = amax_bits.to(tl.float32, bitcast=True)
        ratio = tl.div_rn(amax, tl.full(amax.shape, Q_MAX, tl.float32))
        ratio = tl.div_rn(ratio, tl.full(amax.shape, 1.0, tl.float32) * tensor_scale)
        bad = amax_bits >= 0x7F800000
        block_scale = to_e4m3(tl.where(bad, 0.0, tl.minimum(ratio, 448.0)))
        code = tl.where(bad, 0x7F, block_scale.to(tl.uint8, bitcast=True).to(tl.int32))
        divisor = block_scale.to(tl.float32) * tensor_scale
        empty = divisor == 0.0
        y = tl.div_rn(blocks, tl.where(empty, 1.0, divisor)[:, :, None] + tl.zeros_like(blocks))
        y = tl.where(empty[:, :, None], 0.0, y)
    else:
        code = _e8m0_ceil(amax_bits, Q_MAX_BITS)
        y = blocks * ((254 - tl.minimum(code, 254)) << 23).to(tl.float32, bitcast=True)[:, :, None]
    y = tl.reshape(y, (TILE, D))
    if ELEMENT == "e2m1":
        low, high = tl.split(tl.reshape(_e2m1(y), (TILE, D // 2, 2)))
        place = (tile * TILE + rows[:, None]) * (D // 2) + tl.arange(0, D // 2)[None, :]
        tl.store(elements + place, (low | (high << 4)).to(tl.uint8))
    else:
        y = _saturated(y, Q_MAX)
        encoded = (to_e4m3(y) if ELEMENT == "e4m3" else to_e5m2(y)).to(tl.uint8, bitcast=True)
        tl.store(elements + (tile * TILE + rows[:, None]) * D + tl.arange(0, D)[None, :], encoded)
    row, column = rows[:, None], tl.arange(0, COLUMNS)[None, :]
    if COLUMNS % 4 == 0:  # tcgen05's scale layout: 4 columns of 128 rows are 32 runs of 16 bytes
        place = (column // 4) * 512 + (row % 32) * 16 + (row // 32) * 4 + column % 4
    else:
        place = row * COLUMNS + column
    tl.store(scales + tile * TILE * COLUMNS + place, code.to(tl.uint8))


@triton.jit(do_not_specialize=["length"])
def quantise(
    x, mean, factor,
    high_elements, high_scales, high_tensor_scale, low_elements, low_scales, low_tensor_scale,
    heads, length, head_dim, stride_b, stride_h, stride_s,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_MAX: tl.constexpr, HIGH_MAX_BITS: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_MAX: tl.constexpr, LOW_MAX_BITS: tl.constexpr,
    SMOOTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Encode one 128-row tile of one head of `x` ([B, H, S, head_dim], any strides) in the classes asked for.

    (x − mean)·factor is encoded; rows past `length` and columns past `head_dim` are written as zeros.
    """
    tile_in_head, head = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, TILE), tl.arange(0, D)
    tokens = (tile_in_head * TILE + rows)[:, None]
    inside = (tokens < length) & (columns[None, :] < head_dim)
    value = _load_tile(x, head // heads, head % heads, tokens, columns, inside, stride_b, stride_h, stride_s)
    if SMOOTH:
        value -= tl.load(mean + head * head_dim + columns, mask=columns < head_dim, other=0.0)[None, :]
    value = tl.where(inside, value * factor, 0.0)
    tile = head.to(tl.int64) * tl.num_programs(0) + tile_in_head
    if HIGH is not None:
        scale = tl.load(high_tensor_scale + head) if HIGH_BLOCK == 16 else 1.0
        _encode(
            value, high_elements, high_scales, tile, rows, scale, HIGH, HIGH_BLOCK, HIGH_MAX, HIGH_MAX_BITS, D
        )
    if LOW is not None:
        scale = tl.load(low_tensor_scale + head) if LOW_BLOCK == 16 else 1.0
        _encode(value, low_elements, low_scales, tile, rows, scale, LOW, LOW_BLOCK, LOW_MAX, LOW_MAX_BITS, D)


@triton.jit(do_not_specialize=["length"])
def quantise_value(
    v, v_scale, elements, heads, length, head_dim, stride_b, stride_h, stride_s, D: tl.constexpr
):
    """One 128-row tile of v / v_scale in e4m3; `v_scale` is float32 [B·H, D], powers of two."""
    tile_in_head, head = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, TILE), tl.arange(0, D)
    tokens = (tile_in_head * TILE + rows)[:, None]
    inside = (tokens < length) & (columns[None, :] < head_dim)
    value = _load_tile(v, head // heads, head % heads, tokens, columns, inside, stride_b, stride_h, stride_s)
    y = value / tl.load(v_scale + head * D + columns)[None, :]
    tile = head.to(tl.int64) * tl.num_programs(0) + tile_in_head
    encoded = to_e4m3(_saturated(y, 448.0)).to(tl.uint8, bitcast=True)
    tl.store(elements + (tile * TILE + rows[:, None]) * D + columns[None, :], encoded)
