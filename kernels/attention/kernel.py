"""The fused attention kernel: contiguous phases of one class each, one online softmax across them.

Written for `tl.dot_scaled` and host tensor descriptors: on Blackwell Q·K is a native block-scaled MMA and the
descriptors are TMA loads; elsewhere Triton emulates the products. The reference beside this file defines
what is correct.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.rounding import bf16_operand, e4m3_operand, loaded_bf16, loaded_e4m3, to_output

TILE = tl.constexpr(128)
# P is stored as exp2(s − m)·2^8, clear of e4m3's subnormals; the shift cancels in the division by l.
P_SHIFT = tl.constexpr(8.0)
LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _load_scales(descriptor, tile, COLUMNS: tl.constexpr):
    """The scales of one tile, [128, COLUMNS]."""
    if COLUMNS % 4 == 0:
        scales = tl.reshape(descriptor.load([0, tile, 0, 0, 0]), (1, COLUMNS // 4, 32, 4, 4))
        scales = tl.reshape(tl.trans(scales, 0, 3, 2, 1, 4), (TILE, COLUMNS))
    else:
        scales = tl.reshape(descriptor.load([tile, 0]), (TILE, COLUMNS))
    return scales


@triton.jit
def _decode_nvfp4(packed, scales, D: tl.constexpr):
    """NVFP4 to bfloat16, exactly (an e2m1 times an e4m3 has at most six significant bits)."""
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (TILE, D)).to(tl.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    half = mantissa.to(tl.float32) * 0.5
    value = tl.where(exponent == 0, half, (1.0 + half) * (1 << tl.maximum(exponent - 1, 0)).to(tl.float32))
    value = tl.where(codes >= 8, -value, value)
    value = tl.reshape(value, (TILE, D // 16, 16)) * scales.to(tl.float32)[:, :, None]
    return bf16_operand(tl.reshape(value, (TILE, D)))


@triton.jit
def _scores(q, q_scales, k, k_scales, zero, ELEMENT: tl.constexpr, DECODE: tl.constexpr, D: tl.constexpr):
    """Q·Kᵀ of one pair of tiles, float32 [128, 128]."""
    if DECODE:
        return tl.dot(_decode_nvfp4(q, q_scales, D), tl.trans(_decode_nvfp4(k, k_scales, D)))
    # Triton 3.6 to 3.8 can't compile a fresh zero accumulator here; one that is zero at run time they can.
    accumulator = tl.zeros((TILE, TILE), tl.float32) + zero
    return tl.dot_scaled(q, q_scales, ELEMENT, tl.trans(k), k_scales, ELEMENT, accumulator)


@triton.jit
def _phase(
    accumulator, l, m, q, q_scales, factor, k_elements, k_scales, v,
    batch, kv_head, kv_heads, k_tiles, indices, first, last, key_mask, k_length, q_tokens, zero,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, DECODE: tl.constexpr, LOW_PV: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Walk the KV tiles `indices[first:last]`, all of one class."""
    for step in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(indices + step)
        kv_tile = (batch * kv_heads + kv_head) * k_tiles + tile
        k = k_elements.load([kv_tile * TILE, 0])
        scales = _load_scales(k_scales, kv_tile, D // BLOCK)
        s = _scores(q, q_scales, k, scales, zero, ELEMENT, DECODE, D) * factor
        if MASKED or KEY_MASK:
            tokens = tile * TILE + tl.arange(0, TILE)
            seen = (tl.load(key_mask + tokens) != 0)[None, :] if KEY_MASK else (tokens < k_length)[None, :]
            if MASKED and CAUSAL:
                seen = seen & (tokens[None, :] <= q_tokens[:, None])
            s = tl.where(seen, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1) - P_SHIFT)
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        l = l * rescale + tl.sum(p, axis=1)
        accumulator = accumulator * rescale[:, None]
        if LOW_PV:
            value = v.load([kv_tile * TILE, 0])
            accumulator = tl.dot(e4m3_operand(p), loaded_e4m3(value), accumulator)
        else:
            value = tl.reshape(v.load([batch, kv_head, tile * TILE, 0]), (TILE, D))
            accumulator = tl.dot(bf16_operand(p), loaded_bf16(value), accumulator)
        m = m_new
    return accumulator, l, m


@triton.jit(do_not_specialize=["q_length", "k_length", "map_stride_b", "map_stride_h", "map_length"])
def attend(
    q_high, q_high_scales, k_high, k_high_scales, v_high,
    q_low, q_low_scales, k_low, k_low_scales, v_low,
    v_scale, factors, indices, bounds, key_mask, out, lse,
    heads, kv_heads, q_length, k_length, head_dim, map_stride_b, map_stride_h, map_length,
    out_stride_b, out_stride_h, out_stride_s, zero,
    HIGH: tl.constexpr, HIGH_BLOCK: tl.constexpr, HIGH_DECODE: tl.constexpr,
    LOW: tl.constexpr, LOW_BLOCK: tl.constexpr, LOW_DECODE: tl.constexpr,
    CAUSAL: tl.constexpr, KEY_MASK: tl.constexpr, D: tl.constexpr,
    STAGES: tl.constexpr, MASKED_STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one Q tile of one head.

    The phases are HIGH, LOW and MASKED (maps.py); HIGH and MASKED read `v_high` (bfloat16, the model's own
    tensor), LOW reads `v_low` (e4m3 under `v_scale`, a power of two for each channel). `factors` [B·H, 2]
    undoes the tensor scales of HIGH and LOW. `key_mask` is uint8 [B, whole tiles], 0 past the keys. A class that
    the map doesn't use is None.
    """
    q_tile, head = tl.program_id(0), tl.program_id(1)
    q_tiles, k_tiles = tl.num_programs(0), tl.cdiv(k_length, TILE)
    batch, head_in_batch = head // heads, head % heads
    kv_head = head_in_batch // (heads // kv_heads)
    row = batch * map_stride_b + head_in_batch * map_stride_h + q_tile
    indices += row.to(tl.int64) * map_length
    high_end = tl.load(bounds + row * 3)
    low_end = tl.load(bounds + row * 3 + 1)
    end = tl.load(bounds + row * 3 + 2)
    q_tokens = q_tile * TILE + tl.arange(0, TILE)
    channels = tl.arange(0, D)
    key_mask += batch.to(tl.int64) * (k_tiles * TILE)

    q_row = head * q_tiles + q_tile
    m = tl.full((TILE,), LOWEST, tl.float32)
    l = tl.zeros((TILE,), tl.float32)
    accumulator = tl.zeros((TILE, D), tl.float32)
    if HIGH is not None:
        q = q_high.load([q_row * TILE, 0])
        q_scales = _load_scales(q_high_scales, q_row, D // HIGH_BLOCK)
        accumulator, l, m = _phase(
            accumulator, l, m, q, q_scales, tl.load(factors + head * 2), k_high, k_high_scales, v_high,
            batch, kv_head, kv_heads, k_tiles, indices, 0, high_end, key_mask, k_length, q_tokens, zero,
            HIGH, HIGH_BLOCK, HIGH_DECODE, False, False, CAUSAL, KEY_MASK, D, STAGES,
        )  # fmt: skip
    if LOW is not None:
        v_unit = tl.load(v_scale + (batch * kv_heads + kv_head) * D + channels)[None, :]
        accumulator = accumulator / v_unit
        q = q_low.load([q_row * TILE, 0])
        q_scales = _load_scales(q_low_scales, q_row, D // LOW_BLOCK)
        accumulator, l, m = _phase(
            accumulator, l, m, q, q_scales, tl.load(factors + head * 2 + 1), k_low, k_low_scales, v_low,
            batch, kv_head, kv_heads, k_tiles, indices, high_end, low_end, key_mask, k_length, q_tokens, zero,
            LOW, LOW_BLOCK, LOW_DECODE, True, False, CAUSAL, KEY_MASK, D, STAGES,
        )  # fmt: skip
        accumulator = accumulator * v_unit
    if HIGH is not None:
        q = q_high.load([q_row * TILE, 0])
        q_scales = _load_scales(q_high_scales, q_row, D // HIGH_BLOCK)
        accumulator, l, m = _phase(
            accumulator, l, m, q, q_scales, tl.load(factors + head * 2), k_high, k_high_scales, v_high,
            batch, kv_head, kv_heads, k_tiles, indices, low_end, end, key_mask, k_length, q_tokens, zero,
            HIGH, HIGH_BLOCK, HIGH_DECODE, False, True, CAUSAL, KEY_MASK, D, MASKED_STAGES,
        )  # fmt: skip

    nothing_seen = l == 0.0
    result = accumulator / tl.where(nothing_seen, 1.0, l)[:, None]
    place = batch.to(tl.int64) * out_stride_b + head_in_batch.to(tl.int64) * out_stride_h
    place = place + q_tokens[:, None].to(tl.int64) * out_stride_s + channels[None, :]
    inside = (q_tokens < q_length)[:, None] & (channels < head_dim)[None, :]
    tl.store(out + place, to_output(result, out.dtype.element_ty), mask=inside)
    log_sum = tl.where(nothing_seen, float("-inf"), m + tl.log2(tl.where(nothing_seen, 1.0, l)))
    tl.store(lse + head.to(tl.int64) * q_length + q_tokens, log_sum, mask=q_tokens < q_length)
