"""Q·K of one class: an MMA of block-scaled, e4m3, int8 or bf16 numbers, as the lowering stores its format.

Of integers of four bits two lie in a byte, an even channel in its low half and the odd one after it in its high half.
Q·K is the product of even channels plus that of odd ones, so no channel moves to another place.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.attention.loads import load_block_scales, load_row_scales
from dma_diffusers.kernels.device.rounding import (
    INTERPRETED,
    bf16_operand,
    decoded_nvfp4,
    loaded_bf16,
    loaded_e4m3,
)
from dma_diffusers.kernels.device.tritons import TRITON
from dma_diffusers.kernels.quantiser.tile import power_of_two
from dma_diffusers.kernels.tiling import layout

TILE = tl.constexpr(layout.TILE)
# Before Triton 3.9, dot_scaled can't start from nothing in a loop.
STARTS_FROM_NOTHING = tl.constexpr(TRITON >= (3, 9))
# Before Triton 3.8, int8 numbers don't get to tcgen05. As bf16 numbers they do, with the same products and sums.
INT8_IN_TCGEN05 = tl.constexpr(TRITON >= (3, 8))
# Left in the high half of a byte, an integer is 16 times as large; a product of two is so many times as large.
PACKED_PRODUCTS = tl.constexpr(256.0)
_SPLIT = tl.constexpr("""{
    shl.b32 $0, $2, 4;
    and.b32 $0, $0, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0;
}""")


@triton.jit
def halves_of(packed):
    """16 times the low and 16 times the high integer of each byte, int8."""
    if INTERPRETED:
        even, odd = packed << 4, packed & -16
    else:  # four bytes at once
        even, odd = tl.inline_asm_elementwise(
            _SPLIT, "=&r,=r,r", [packed], (tl.int8, tl.int8), is_pure=True, pack=4
        )
    return even, odd


@triton.jit
def scaled_halves_of(packed, scales, BLOCK: tl.constexpr):
    """The numbers of the low and of the high integers [ROWS, D/2] under block scales [ROWS, D/BLOCK], exact in bf16."""
    even, odd = halves_of(packed)
    if scales.dtype == tl.float8e4nv:  # noqa: SIM108 (the compiler decides this)
        factor = loaded_e4m3(scales).to(tl.float32)
    else:
        factor = power_of_two(scales.to(tl.int32))
    factor = tl.broadcast_to((factor * 0.0625)[:, :, None], (packed.shape[0], scales.shape[1], BLOCK // 2))
    factor = tl.reshape(factor, packed.shape)
    return bf16_operand(even.to(tl.float32) * factor), bf16_operand(odd.to(tl.float32) * factor)


@triton.jit
def _sum_of_products(q, k, WIDENED: tl.constexpr = False):
    """Q·Kᵀ of pairs of halves: int32 of int8 numbers, unless they are WIDENED to bf16, else float32."""
    q_even, q_odd = q
    k_even, k_odd = k
    if WIDENED:
        q_even, q_odd = q_even.to(tl.bfloat16), q_odd.to(tl.bfloat16)
        k_even, k_odd = k_even.to(tl.bfloat16), k_odd.to(tl.bfloat16)
    s = tl.dot(q_even, tl.trans(k_even))
    return tl.dot(q_odd, tl.trans(k_odd), s, out_dtype=s.dtype)  # which Triton 3.6 doesn't take from s


@triton.jit
def products(q, q_scales, k, k_scales, kv_tile, part, zero, ELEMENT: tl.constexpr, STORAGE: tl.constexpr,
              BLOCK: tl.constexpr, D: tl.constexpr, TCGEN05: tl.constexpr):  # fmt: skip
    """Q·Kᵀ of ROWS queries and KEYS keys: int32 of int8 numbers, if they are multiplied as such, else float32.

    part: which of a tile's runs of KEYS keys they are. The caller still multiplies by the factors of rows, and of the
    tile where the storage is "tile". q is a pair of its halves where two elements share a byte.
    """
    if STORAGE == "packed":
        scales = load_row_scales(k_scales, kv_tile, part * k.shape[0], k.shape[0], D // BLOCK)
        s = _sum_of_products(q, scaled_halves_of(k, scales, BLOCK))
    elif ELEMENT == "int4":
        s = _sum_of_products(q, halves_of(k), TCGEN05 and not INT8_IN_TCGEN05)
    elif STORAGE == "block":
        scales = load_block_scales(k_scales, kv_tile, part, k.shape[0], D // BLOCK)
        if INTERPRETED and q_scales.dtype == tl.float8e4nv:
            s = tl.dot(decoded_nvfp4(q, q_scales, D), tl.trans(decoded_nvfp4(k, scales, D)))
        elif STARTS_FROM_NOTHING:
            s = tl.dot_scaled(q, q_scales, ELEMENT, tl.trans(k), scales, ELEMENT)
        else:
            accumulator = (
                tl.zeros((q.shape[0], k.shape[0]), tl.float32) + zero
            )  # known to be zero at run time only
            s = tl.dot_scaled(q, q_scales, ELEMENT, tl.trans(k), scales, ELEMENT, accumulator)
    elif STORAGE == "plain":
        s = tl.dot(loaded_bf16(q), tl.trans(loaded_bf16(k)))
    elif ELEMENT == "int8" and TCGEN05 and not INT8_IN_TCGEN05:
        s = tl.dot(q.to(tl.bfloat16), tl.trans(k.to(tl.bfloat16)))
    elif ELEMENT == "int8":
        s = tl.dot(q, tl.trans(k))
    else:
        s = tl.dot(loaded_e4m3(q), tl.trans(loaded_e4m3(k)))
        if STORAGE == "row":
            scales = k_scales + (kv_tile.to(tl.int64) * TILE + part * k.shape[0])
            s *= tl.load(scales + tl.arange(0, k.shape[0]))[None, :]
    return s
