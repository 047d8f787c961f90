"""The quantiser's common steps: finding tokens, loading those of one head, turning them, finding powers of two."""

import triton
import triton.language as tl

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
def e8m0_ceil(amax_bits, q_max_bits):
    """The E8M0 code of 2^ceil(log2(amax / q_max)), which never clips; 255 (NaN) where amax is not finite."""
    # float32 bits count exponents in steps of 2^23; the distance to q_max, rounded up, is the exponent
    code = tl.maximum(((amax_bits - q_max_bits + 0x7FFFFF) >> 23) + 127, 0)
    return tl.where(amax_bits >= 0x7F800000, 255, code)


@triton.jit
def inverse_of(code):
    """The factor that divides by the number of an E8M0 code; 0 for NaN, of which anything makes NaN or 0."""
    return ((254 - tl.minimum(code, 254)) << 23).to(tl.float32, bitcast=True)


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
