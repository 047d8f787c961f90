"""Elements in Triton: float32 numbers rounded to those that an element has, and their codes."""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import rounded
from dma_diffusers.kernels.quantiser.tile import magnitude_bits


@triton.jit
def saturated(y, LARGEST: tl.constexpr):
    """y within ±LARGEST; NaN stays NaN."""
    return tl.where(y > LARGEST, LARGEST, tl.where(y < -LARGEST, -LARGEST, y))


@triton.jit
def to_element(y, ELEMENT: tl.constexpr, Q_MAX: tl.constexpr):
    """float32 y as the nearest number that the element has."""
    y = saturated(y, Q_MAX)
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
    else:  # an integer
        y = (y + 1.5 * 2.0**23) - 1.5 * 2.0**23
    return y


@triton.jit
def nearest_bits(x):
    """int32 whose low bits are, in two's complement, the integers nearest to x within ±2^22; of NaN, anything."""
    magic: tl.constexpr = 1.5 * 2.0**23
    return (x + magic).to(tl.int32, bitcast=True)


@triton.jit
def int8_words(low, high):
    """float32 numbers, which must round to within ±127, as int8, two in an int16 word."""
    return ((nearest_bits(low) & 0xFF) | (nearest_bits(high) << 8)).to(tl.int16)


@triton.jit
def int4_bytes(low, high):
    """float32 numbers, which must round to within ±7, as int4, two in an int8 byte."""
    return ((nearest_bits(low) & 0xF) | (nearest_bits(high) << 4)).to(tl.int8)


@triton.jit
def e2m1_code(y):
    """The codes of float32 numbers that e2m1 has."""
    bits = magnitude_bits(y)
    code = tl.where(
        bits >= 0x3F800000, (bits >> 22) - 252, (bits != 0).to(tl.int32)
    )  # 1.0 is code 2, .5 code 1
    return ((y.to(tl.int32, bitcast=True) >> 28) & 8) | code
