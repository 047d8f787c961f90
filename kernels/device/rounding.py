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
def halves(words, dtype: tl.constexpr):
    """The two numbers of each word as float32, the one at the lower address first."""
    if dtype == tl.bfloat16:
        low, high = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    elif dtype == tl.float16:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        low = words.to(tl.int32).to(tl.float32, bitcast=True)
        high = (words >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def bf16_words(low, high):
    """float32 numbers rounded to bfloat16, two in an int32 word."""
    if INTERPRETED:
        low = _rounded_to_bf16(low).to(tl.int32, bitcast=True)
        high = _rounded_to_bf16(high).to(tl.int32, bitcast=True)
        words = ((low >> 16) & 0xFFFF) | (high & -65536)
    else:
        words = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1
        )
    return words


@triton.jit
def e4m3_words(low, high):
    """float32 numbers within ±448 (or NaN) rounded to e4m3, two in an int16 word."""
    if INTERPRETED:
        low = to_e4m3(low).to(tl.uint8, bitcast=True).to(tl.int32)
        high = to_e4m3(high).to(tl.uint8, bitcast=True).to(tl.int32)
        words = (low | (high << 8)).to(tl.int16)
    else:
        words = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;", "=h,f,f", [low, high], tl.int16, is_pure=True, pack=1
        )
    return words


@triton.jit
def rounded_pairs(low, high, dtype: tl.constexpr):
    """float32 numbers rounded to `dtype`, again as float32."""
    if dtype == tl.bfloat16:
        low, high = halves(bf16_words(low, high), dtype)
    else:
        low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)
    return low, high


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
def fp16_operand(x):
    """float32 within ±65504 to float16, for a matrix product."""
    x = x.to(tl.float16)
    if INTERPRETED:
        x = x.to(tl.float32)
    return x


@triton.jit
def e4m3_operand(x):
    """float32 within ±448 to e4m3, for a matrix product."""
    return rounded(x, 3, 2.0**-6) if INTERPRETED else x.to(tl.float8e4nv)


@triton.jit
def operand_of_values(p, VALUES: tl.constexpr):
    """Probabilities, float32, in the format in which values of this storage are multiplied by them."""
    if VALUES == "channel":
        p = e4m3_operand(p)
    elif VALUES == "half":
        p = fp16_operand(p)
    else:
        p = bf16_operand(p)
    return p


@triton.jit
def rounded_for_values(p, VALUES: tl.constexpr):
    """Probabilities, float32, rounded as `operand_of_values` rounds them, and float32 again, for registers to sum.

    e4m3 is rounded to by arithmetic: to convert there and back took Hopper's few conversions, and ptxas made garbage of
    the sum where it stood in a branch.
    """
    return rounded(p, 3, 2.0**-6) if VALUES == "channel" else operand_of_values(p, VALUES).to(tl.float32)


@triton.jit
def ones_for(x, COLUMNS: tl.constexpr):
    """Ones in x's dtype, by which an operand x of a matrix product is summed. Triton 3.6 makes no e4m3 of a number."""
    if x.dtype == tl.float8e4nv:
        ones = tl.full((x.shape[1], COLUMNS), 0x38, tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        ones = tl.full((x.shape[1], COLUMNS), 1.0, x.dtype)
    return ones


@triton.jit
def loaded_bf16(x):
    """A bfloat16 or float16 tile as loaded, for a matrix product."""
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
