"""The quantiser of linear layers on the GPU: prologue, permutation and encoding in one pass over the input.

A program handles one row. The reference (reference.py) and the codecs define what it writes.
"""

import struct

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import loaded_e4m3, rounded_beside, to_e4m3
from dma_diffusers.kernels.formats import E2M1, E2M3, E3M2, E4M3
from dma_diffusers.kernels.formats.element import FloatElement
from dma_diffusers.kernels.formats.scale import FOUR_OVER_SIX_MAX
from dma_diffusers.kernels.linears.prologue import GELU_FACTOR
from dma_diffusers.kernels.quantiser.elements import e2m1_code
from dma_diffusers.kernels.quantiser.kernel import SMALLEST_NORMAL, reencoded, scale_place, under_e4m3_scales
from dma_diffusers.kernels.quantiser.tile import (
    NOT_FINITE,
    e8m0_ceil,
    inverse_of,
    magnitude_bits,
    power_of_two,
)


def _constants(element: FloatElement) -> list[tl.constexpr]:
    """Bits of the element's maximum, its smallest normal number, the anchor of its rounding, its room in e4m3."""
    bits = struct.unpack("<i", struct.pack("<f", element.max))[0]
    room = 0
    while element.max * 2 ** (room + 1) <= E4M3.max:
        room += 1
    anchor = 1.5 * 2.0 ** (23 - element.mantissa_bits)
    return [tl.constexpr(value) for value in (bits, 2.0**element.emin, anchor, room)]


E2M1_BITS, E2M1_NORMAL, E2M1_ANCHOR, E2M1_TOP = _constants(E2M1)
E2M3_BITS, E2M3_NORMAL, E2M3_ANCHOR, E2M3_TOP = _constants(E2M3)
E3M2_BITS, E3M2_NORMAL, E3M2_ANCHOR, E3M2_TOP = _constants(E3M2)
E4M3_BITS, E4M3_NORMAL, E4M3_ANCHOR, E4M3_TOP = _constants(E4M3)
E2M1_MAX = tl.constexpr(E2M1.max)
LARGEST_ROW = tl.constexpr(FOUR_OVER_SIX_MAX * E2M1.max)
# The bits of e2m1, moved into those of e4m3, are the number less this factor.
E2M1_IN_E4M3 = tl.constexpr(64.0)
GELU_TWICE, GELU_CUBE = tl.constexpr(GELU_FACTOR), tl.constexpr(0.044715)


@triton.jit
def _by_group(channel, four_end, six_end, FOUR: tl.constexpr, SIX: tl.constexpr, EIGHT: tl.constexpr):
    """The constant of the element in which each channel is stored: 4-bit channels come first, then those of 6 bits."""
    return tl.where(channel < four_end, FOUR, tl.where(channel < six_end, SIX, EIGHT))


@triton.jit
def _room(channel, four_end, six_end, SIX: tl.constexpr):
    """The exponent of the largest scale for which e4m3 has room, for the element of each channel."""
    return _by_group(channel, four_end, six_end, E2M1_TOP, E3M2_TOP if SIX == "e3m2" else E2M3_TOP, E4M3_TOP)


@triton.jit
def _after_prologue(row, permutation, columns, inside, scale, shift, eps, in_features,
                    NORMALISES: tl.constexpr, GELU: tl.constexpr):  # fmt: skip
    """A row of x, float32 [1, K], permuted, after LayerNorm, modulation and GELU as `Prologue` has them, then zeros.

    scale and shift are those of this row, already permuted.
    """
    # The row is gathered from the L1 cache: Triton's gather of registers takes kilobytes of them for a whole row.
    channels = columns if permutation is None else tl.load(permutation + columns, mask=inside, other=0)
    value = tl.load(row + channels, mask=inside, other=0.0).to(tl.float32)
    if NORMALISES:
        ordered = tl.load(row + columns, mask=inside, other=0.0).to(tl.float32)
        mean = (tl.sum(ordered, axis=1) / in_features)[:, None]
        centred = tl.where(inside, ordered - mean, 0.0)
        variance = (tl.sum(centred * centred, axis=1) / in_features)[:, None]
        value = tl.where(inside, (value - mean) * (1.0 / tl.sqrt(variance + eps)), 0.0)
    if scale is not None:
        factor = 1.0 + tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
        value = value * factor + tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    if GELU:
        value = value / (1.0 + tl.exp((value + value * value * value * GELU_CUBE) * -GELU_TWICE))
    return value


@triton.jit
def _in_nvfp4(blocks, amax_bits):
    """Blocks [1, blocks, 16] in nvfp4 with four-over-six scales: elements, codes of scales, the scale of the row."""
    bits = magnitude_bits(blocks)
    finite = tl.where(bits < NOT_FINITE, bits, 0)
    amax = tl.max(tl.max(finite, axis=2), axis=1).to(tl.float32, bitcast=True)
    row_scale = tl.maximum(tl.div_rn(amax, tl.full(amax.shape, LARGEST_ROW, tl.float32)), SMALLEST_NORMAL)
    y, code, _ = four_over_six(blocks, amax_bits, row_scale)
    return y, code, row_scale


@triton.jit
def four_over_six(blocks, amax_bits, row_scale):
    """Blocks [rows, blocks, 16] under the better of two scales: elements, codes of scales, values without the row's."""
    larger = (amax_bits.to(tl.float32, bitcast=True) * 1.5).to(tl.int32, bitcast=True)
    better = _squared_error(blocks, larger, row_scale) < _squared_error(blocks, amax_bits, row_scale)
    # A third division: keeping what the first two gave takes registers that a long row doesn't have.
    return under_e4m3_scales(
        blocks, tl.where(better, larger, amax_bits), row_scale[:, None], "e2m1", E2M1_MAX
    )


@triton.jit
def _squared_error(blocks, amax_bits, row_scale):
    """The squared error of each block under the scale that brings this amax to the element's maximum."""
    y, _, scale = under_e4m3_scales(blocks, amax_bits, row_scale[:, None], "e2m1", E2M1_MAX)
    error = y * (scale * row_scale[:, None])[:, :, None] - blocks
    return tl.sum(error * error, axis=2)


@triton.jit
def store_scales(scales, code, row, number, width):
    """The scales of one part of each row, in tcgen05's layout; zeros fill the last four of them up."""
    place = (row // 128).to(tl.int64) * (tl.cdiv(width, 4) * 512) + scale_place(row % 128, number, 4)
    code = tl.where(number < width, code, 0)
    tl.store(scales + place, code.to(tl.uint8), mask=number < tl.cdiv(width, 4) * 4)


@triton.jit(do_not_specialize=["rows_in_batch", "four_end", "six_end", "eps"])
def quantise_rows(
    x, permutation, scale, shift, narrow, narrow_scales, wide, wide_scales, row_scales,
    x_stride, rows_in_batch, in_features, four_end, six_end, eps,
    NORMALISES: tl.constexpr, GELU: tl.constexpr, SIX: tl.constexpr, BLOCK: tl.constexpr,
    REENCODES: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Encode one row of x `[rows, in_features]`, after its prologue and in the order of `permutation` (int32).

    Channels before `four_end` are stored in e2m1, those before `six_end` in `SIX`, the others in e4m3. narrow, wide and
    their scales are those of `LinearWeight`, with the rows of x for those of the weight. BLOCK is 32, or 16 for nvfp4,
    whose `row_scales` (float32 `[rows]`) multiply the block scales.
    REENCODES writes them as e4m3 numbers into `wide` `[rows, in_features]` alone, the power of two of each row into
    `row_scales`. scale and shift: `[batches, in_features]`, already permuted. None: a tensor that is not wanted.
    """
    row = tl.program_id(0)
    columns = tl.arange(0, K)[None, :]
    inside = columns < in_features
    own = (row // rows_in_batch).to(tl.int64) * in_features
    value = _after_prologue(
        x + row.to(tl.int64) * x_stride, permutation, columns, inside,
        scale if scale is None else scale + own, shift if shift is None else shift + own, eps, in_features,
        NORMALISES, GELU,
    )  # fmt: skip
    BLOCKS: tl.constexpr = K // BLOCK
    blocks = tl.reshape(value, (1, BLOCKS, BLOCK))
    amax_bits = tl.max(magnitude_bits(blocks), axis=2)
    number = tl.arange(0, BLOCKS)[None, :]
    channel = number * BLOCK
    if BLOCK == 16:
        y, code, row_scale = _in_nvfp4(blocks, amax_bits)
        tl.store(row_scales + row + tl.arange(0, 1), row_scale)
    else:
        IS_E3M2: tl.constexpr = SIX == "e3m2"
        q_max_bits = _by_group(
            channel, four_end, six_end, E2M1_BITS, E3M2_BITS if IS_E3M2 else E2M3_BITS, E4M3_BITS
        )
        normal = _by_group(
            channel, four_end, six_end, E2M1_NORMAL, E3M2_NORMAL if IS_E3M2 else E2M3_NORMAL, E4M3_NORMAL
        )
        anchor = _by_group(
            channel, four_end, six_end, E2M1_ANCHOR, E3M2_ANCHOR if IS_E3M2 else E2M3_ANCHOR, E4M3_ANCHOR
        )
        code = e8m0_ceil(amax_bits, q_max_bits)
        y = rounded_beside(blocks * inverse_of(code)[:, :, None], normal[:, :, None], anchor[:, :, None])
    if REENCODES:
        top = _room(channel, four_end, six_end, SIX)
        stored, row_code, _ = reencoded(y, code, top, K)
        tl.store(wide + row.to(tl.int64) * in_features + columns, to_e4m3(stored), mask=inside)
        tl.store(row_scales + row + tl.arange(0, 1), power_of_two(row_code))
    else:
        if narrow is not None:
            low, high = tl.split(tl.reshape(e2m1_code(y), (1, K // 2, 2)))
            pairs = tl.arange(0, K // 2)[None, :]
            place = row.to(tl.int64) * (four_end // 2) + pairs
            tl.store(narrow + place, (low | (high << 4)).to(tl.uint8), mask=pairs < four_end // 2)
            store_scales(narrow_scales, code, row, number, four_end // BLOCK)
        if wide is not None:
            place = row.to(tl.int64) * (in_features - four_end) + columns - four_end
            tl.store(wide + place, to_e4m3(tl.reshape(y, (1, K))), mask=inside & (columns >= four_end))
            # Blocks that are not wide ones stand for those that fill up the last four.
            number = (number - four_end // BLOCK) & (BLOCKS - 1)
            store_scales(wide_scales, code, row, number, (in_features - four_end) // BLOCK)


@triton.jit(do_not_specialize=["four_end", "six_end"])
def reencode_rows(
    narrow, narrow_scales, wide, wide_scales, out, row_scales, in_features, four_end, six_end,
    SIX: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """One row of a weight in MX formats as e4m3 `[rows, in_features]` under a power of two, float32 `[rows]`.

    Arguments are those of `quantise_rows`, which writes the same numbers for the same groups.
    """
    row = tl.program_id(0)
    columns, number = tl.arange(0, K)[None, :], tl.arange(0, K // 32)[None, :]
    inside, channel = columns < in_features, number * 32
    bits = tl.zeros((1, K), tl.int32)
    code = tl.zeros((1, K // 32), tl.int32)
    if narrow is not None:
        place = row.to(tl.int64) * (four_end // 2) + columns // 2
        byte = tl.load(narrow + place, mask=columns < four_end, other=0).to(tl.int32) >> (columns % 2 * 4)
        bits += ((byte & 8) << 4) | ((byte & 7) << 2)
        code += _loaded_scales(narrow_scales, row, number, four_end // 32)
    if wide is not None:
        place = row.to(tl.int64) * (in_features - four_end) + columns - four_end
        is_wide = inside & (columns >= four_end)
        bits += tl.load(wide + place, mask=is_wide, other=0.0).to(tl.uint8, bitcast=True).to(tl.int32)
        code += _loaded_scales(wide_scales, row, number - four_end // 32, (in_features - four_end) // 32)
    value = loaded_e4m3(bits.to(tl.uint8).to(tl.float8e4nv, bitcast=True)).to(tl.float32)
    y = tl.reshape(value, (1, K // 32, 32)) * tl.where(channel < four_end, E2M1_IN_E4M3, 1.0)[:, :, None]
    top = _room(channel, four_end, six_end, SIX)
    stored, row_code, _ = reencoded(y, code, top, K)
    tl.store(out + row.to(tl.int64) * in_features + columns, to_e4m3(stored), mask=inside)
    tl.store(row_scales + row + tl.arange(0, 1), power_of_two(row_code))


@triton.jit
def _loaded_scales(scales, row, number, width):
    """The codes of one part of a row, from tcgen05's layout; zeros for blocks that are not in it."""
    place = (row // 128).to(tl.int64) * (tl.cdiv(width, 4) * 512) + scale_place(row % 128, number, 4)
    return tl.load(scales + place, mask=(number >= 0) & (number < width), other=0).to(tl.int32)
