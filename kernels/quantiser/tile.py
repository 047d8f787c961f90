"""Tokens of one head, loaded and rotated, for every kernel of the quantiser."""

import triton
import triton.language as tl

NOT_FINITE = tl.constexpr(0x7F800000)  # and above: magnitudes, as bits


@triton.jit
def magnitude_bits(x):
    """|x| as int32 bits: ordered like the magnitudes, with infinities and NaN above every finite number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


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
