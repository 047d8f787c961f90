"""The product of a linear layer on the GPU: block-scaled MMAs of all groups, in one float32 accumulator.

Elements and scales come through tensor descriptors, TMA where there is one, which pads rows and channels with zeros.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import INTERPRETED, decoded_nvfp4, to_output


@triton.jit
def _scales(descriptor, tile, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Block scales [ROWS, COLUMNS], out of tcgen05's layout."""
    scales = descriptor.load([0, tile * (ROWS // 128), step * (COLUMNS // 4), 0, 0])
    scales = tl.reshape(scales, (ROWS // 128, COLUMNS // 4, 32, 4, 4))
    return tl.reshape(tl.trans(scales, 0, 3, 2, 1, 4), (ROWS, COLUMNS))


@triton.jit
def _add_products(
    accumulator, x, x_scales, weight, weight_scales, x_tile, weight_tile, width,
    ELEMENT: tl.constexpr, BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The accumulator plus the products of `width` channels, K at a time."""
    BYTES: tl.constexpr = K // 2 if ELEMENT == "e2m1" else K
    for step in tl.range(0, tl.cdiv(width, K), num_stages=STAGES):
        a = x.load([x_tile * M, step * BYTES])
        b = weight.load([weight_tile * N, step * BYTES])
        a_scales = _scales(x_scales, x_tile, step, M, K // BLOCK)
        b_scales = _scales(weight_scales, weight_tile, step, N, K // BLOCK)
        if INTERPRETED and BLOCK == 16:  # it takes E4M3 scales for E8M0
            accumulator += tl.dot(decoded_nvfp4(a, a_scales, K), tl.trans(decoded_nvfp4(b, b_scales, K)))
        else:
            accumulator = tl.dot_scaled(a, a_scales, ELEMENT, tl.trans(b), b_scales, ELEMENT, accumulator)
    return accumulator


@triton.jit(do_not_specialize=["rows", "narrow_width", "wide_width"])
def multiply(
    x_narrow, x_narrow_scales, x_wide, x_wide_scales, x_row_scales,
    narrow, narrow_scales, wide, wide_scales, row_scales,
    bias, out, rows, out_features, narrow_width, wide_width, zero,
    BLOCK: tl.constexpr, M: tl.constexpr, N: tl.constexpr, NARROW_K: tl.constexpr, WIDE_K: tl.constexpr,
    BESIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of M rows and N output channels of out `[rows, out_features]`: x·weightᵀ + bias.

    x and weight are as `quantise_rows` and `LinearWeight` have them: 4-bit channels narrow, the others wide, None where
    there are none; row scales (nvfp4) multiply the sum. zero is 0.0, which the compiler must not know: before 3.9,
    Triton can't start from nothing. BESIDE tiles of rows share the weight's tile in the L2 cache.
    """
    x_tiles, weight_tiles = tl.cdiv(rows, M), tl.cdiv(out_features, N)
    program = tl.program_id(0)
    first = program // (BESIDE * weight_tiles) * BESIDE
    height = tl.minimum(x_tiles - first, BESIDE)
    x_tile = first + program % (BESIDE * weight_tiles) % height
    weight_tile = program % (BESIDE * weight_tiles) // height
    accumulator = tl.zeros((M, N), tl.float32) + zero
    if narrow is not None:
        accumulator = _add_products(
            accumulator, x_narrow, x_narrow_scales, narrow, narrow_scales, x_tile, weight_tile, narrow_width,
            "e2m1", BLOCK, M, N, NARROW_K, STAGES,
        )  # fmt: skip
    if wide is not None:
        accumulator = _add_products(
            accumulator, x_wide, x_wide_scales, wide, wide_scales, x_tile, weight_tile, wide_width,
            "e4m3", BLOCK, M, N, WIDE_K, STAGES,
        )  # fmt: skip
    own_rows, columns = x_tile * M + tl.arange(0, M), weight_tile * N + tl.arange(0, N)
    if row_scales is not None:
        of_x = tl.load(x_row_scales + own_rows, mask=own_rows < rows, other=0.0)
        of_weight = tl.load(row_scales + columns, mask=columns < out_features, other=0.0)
        accumulator = accumulator * of_x[:, None] * of_weight[None, :]
    if bias is not None:
        accumulator += tl.load(bias + columns, mask=columns < out_features, other=0.0).to(tl.float32)[None, :]
    place = own_rows[:, None].to(tl.int64) * out_features + columns[None, :]
    inside = (own_rows < rows)[:, None] & (columns < out_features)[None, :]
    tl.store(out + place, to_output(accumulator, out.dtype.element_ty), mask=inside)
