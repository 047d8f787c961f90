"""Narrowing casts, to nearest even everywhere, and operands of matrix products.

On a GPU these are the hardware's conversions. Triton's interpreter truncates to bfloat16, loses the carry
of a float8 that rounds up to the next power of two, knows no NaN in float8, multiplies bfloat16 matrices as raw
integers, and takes E4M3 block scales for E8M0. There, rounding is done in float32 first, and products are float32.
"""

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FP16_MAX, BF16_MAX = (tl.constexpr(torch.finfo(dtype).max) for dtype in (torch.float16, torch.bfloat16))


@triton.jit
def rounded(x, MANTISSA_BITS: tl.constexpr, SMALLEST_NORMAL: tl.constexpr):
    """float32 x to nearest even at the given precision."""
    return rounded_beside(x, SMALLEST_NORMAL, 1.5 * 2.0 ** (23 - MANTISSA_BITS))


@triton.jit
def rounded_beside(x, smallest_normal, anchor):
    """float32 x to nearest even; `anchor` is 1.5·2^(23 − mantissa bits), and may differ from element to element.

    Added to 1.5·2^23 steps, a number loses what lies below one step.
    """
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    beside = tl.maximum(power, smallest_normal) * anchor
    return (x + beside) - beside


@triton.jit
def _rounded_to_bf16(x):
    """float32 x at bfloat16's precision; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def to_e4m3(x):
    """float32 within ±448 (or NaN) to e4m3."""
    if INTERPRETED:
        bits = rounded(x, 3, 2.0**-6).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        y = tl.where(x == x, bits, 0x7F).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        y = x.to(tl.float8e4nv)
    return y


@triton.jit
def to_e5m2(x):
    """float32 within ±57344 to e5m2."""
    if INTERPRETED:
        x = rounded(x, 2, 2.0**-14)
    return x.to(tl.float8e5)


@triton.jit
def to_bf16(x):
    """float32 to bfloat16."""
    return (_rounded_to_bf16(x) if INTERPRETED else x).to(tl.bfloat16)


@triton.jit
def within(x, LARGEST: tl.constexpr):
    """float32 x with its finite numbers brought within ±LARGEST; infinities and NaN stay."""
    inf: tl.constexpr = float("inf")
    return tl.where((x > LARGEST) & (x < inf), LARGEST, tl.where((x < -LARGEST) & (x > -inf), -LARGEST, x))


@triton.jit
def to_output(x, dtype: tl.constexpr):
    """float32 to the dtype of an output tensor; what is finite stays so."""
    if dtype == tl.float16:  # V's largest number, rounded up in bf16 or e4m3, is beyond it
        x = within(x, FP16_MAX)
    if INTERPRETED and dtype == tl.bfloat16:
        x = _rounded_to_bf16(x)
    return x.to(dtype)


@triton.jit
def bf16_operand(x):
    """float32 to bfloat16, for a matrix product."""
    return _rounded_to_bf16(x) if INTERPRETED else x.to(tl.bfloat16)


@triton.jit
def e4m3_operand(x):
    """float32 within ±448 to e4m3, for a matrix product."""
    return rounded(x, 3, 2.0**-6) if INTERPRETED else x.to(tl.float8e4nv)


@triton.jit
def loaded_bf16(x):
    """A bfloat16 tile as loaded, for a matrix product."""
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def loaded_e4m3(x):
    """An e4m3 tile as loaded, for a matrix product."""
    if INTERPRETED:
        is_nan = (x.to(tl.uint8, bitcast=True) & 0x7F) == 0x7F
        x = tl.where(is_nan, float("nan"), x.to(tl.float32))
    return x


@triton.jit
def decoded_nvfp4(packed, scales, D: tl.constexpr):
    """NVFP4 elements [ROWS, D/2] and block scales as a bf16 operand [ROWS, D], exactly."""
    codes = tl.reshape(tl.join(packed & 15, packed >> 4), (packed.shape[0], D)).to(tl.int32)
    exponent, mantissa = (codes >> 1) & 3, codes & 1
    half = mantissa.to(tl.float32) * 0.5
    value = tl.where(exponent == 0, half, (1.0 + half) * (1 << tl.maximum(exponent - 1, 0)).to(tl.float32))
    value = tl.where(codes >= 8, -value, value)
    value = tl.reshape(value, (packed.shape[0], D // 16, 16)) * loaded_e4m3(scales).to(tl.float32)[:, :, None]
    return bf16_operand(tl.reshape(value, (packed.shape[0], D)))
