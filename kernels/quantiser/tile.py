"""The quantiser's common steps: finding tokens, loading those of one head, norm and RoPE, finding powers of two."""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import to_bf16

E4M3_MAX_BITS = tl.constexpr(0x43E00000)  # 448
NOT_FINITE = tl.constexpr(0x7F800000)  # and above: magnitudes, as bits


@triton.jit
def magnitude_bits(x):
    """|x| as int32 bits: ordered like the magnitudes, with infinities and NaN above every finite number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def token_at(token_order, place, length, tokens):
    """Finds the token at each of `length` slots, `length` where none stands; without a token order the slot itself.

    tokens: how many there are, None for one at each slot.
    """
    if token_order is not None:
        token = tl.load(token_order + place, mask=place < length, other=-1)
        place = tl.where((token >= 0) & (token < (length if tokens is None else tokens)), token, length)
    return place


@triton.jit
def load_tile(x, batch, head, tokens, columns, inside, stride_b, stride_h, stride_s):
    """float32 [tokens, columns] of one head, zeros outside."""
    place = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tokens.to(tl.int64) * stride_s
    return tl.load(x + place + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_changed(
    x, cos, sin, weight, first_weight, eps, first, batch, head, tokens, columns, inside, length,
    stride_b, stride_h, stride_s, rope_stride_s, rope_stride_d, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """float32 [tokens, D] of one head behind RMSNorm, if there is a `weight`, and RoPE, if there is a `cos`."""
    value = load_tile(x, batch, head, tokens, columns, inside, stride_b, stride_h, stride_s)
    if weight is not None:
        value = normalised(value, weight, first_weight, eps, first, tokens, columns, HEAD_DIM)
        if x.dtype.element_ty == tl.bfloat16:
            value = to_bf16(value).to(tl.float32)
        else:
            value = value.to(x.dtype.element_ty).to(tl.float32)
    if cos is not None:
        value = rotated(value, cos, sin, tokens, length, rope_stride_s, rope_stride_d, HEAD_DIM, D)
    return value


@triton.jit
def normalised(x, weight, first_weight, eps, first, tokens, columns, HEAD_DIM: tl.constexpr):
    """float32 [tokens, D] behind RMSNorm; the `first` tokens have the `first_weight`, if there is one."""
    total = tl.sum(x * x, axis=1)
    deviation = tl.sqrt_rn(tl.div_rn(total, tl.full(total.shape, HEAD_DIM, tl.float32)) + eps)
    inside = columns < HEAD_DIM
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    if first_weight is not None:
        of_first = tl.load(first_weight + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        weights = tl.where(tokens < first, of_first, weights)
    return x * tl.div_rn(tl.full(deviation.shape, 1.0, tl.float32), deviation)[:, None] * weights


@triton.jit
def rotated(x, cos, sin, tokens, length, stride_s, stride_d, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """float32 [tokens, D], channels 2i and 2i+1 turned by the angle i of their token."""
    ROWS: tl.constexpr = x.shape[0]
    pairs = tl.arange(0, D // 2)[None, :]
    inside = (tokens < length) & (2 * pairs < HEAD_DIM)
    place = tokens.to(tl.int64) * stride_s + pairs * stride_d
    c = tl.load(cos + place, mask=inside, other=0.0)
    s = tl.load(sin + place, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (ROWS, D))


@triton.jit
def e8m0_ceil(amax_bits, Q_MAX_BITS: tl.constexpr):
    """The E8M0 code of 2^ceil(log2(amax / q_max)), which never clips; 255 (NaN) where amax is not finite."""
    # float32 bits count exponents in steps of 2^23; the distance to q_max, rounded up, is the exponent
    code = tl.maximum(((amax_bits - Q_MAX_BITS + 0x7FFFFF) >> 23) + 127, 0)
    return tl.where(amax_bits >= 0x7F800000, 255, code)


@triton.jit
def power_of_two(code):
    """The number of an E8M0 code."""
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_last(finished, programs):
    """Tells whether this program is the last of so many to come here; it then sees what the others stored.

    `finished` is zero before the first comes and after the last: a launch may be repeated with its arguments.
    """
    tl.debug_barrier()  # the whole program has stored
    last = tl.atomic_add(finished, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(finished, 0)
    return last
