"""The quantisers of training on the GPU: rotation, scaling, rounding and encoding in one pass over a matrix.

The functions of quantisers.py and reference.py define what they write; random numbers are those of random.py.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import loaded_e4m3, rounded, to_bf16, to_e4m3, to_output
from dma_diffusers.kernels.linears.quantiser import E2M1_MAX, four_over_six, store_scales
from dma_diffusers.kernels.quantiser.elements import e2m1_code, to_element
from dma_diffusers.kernels.quantiser.tile import (
    NOT_FINITE,
    butterflies_in_thread,
    butterfly,
    e8m0_ceil,
    inverse_of,
    magnitude_bits,
    power_of_two,
    with_signs,
)
from dma_diffusers.kernels.training import quantisers

QUEST_SCALE, ROOT_TWO_BITS = tl.constexpr(quantisers.QUEST_SCALE), tl.constexpr(quantisers.ROOT_TWO_BITS)
INVERSE_EDEN_TOP = tl.constexpr(1 / quantisers.EDEN_TOP)
# 127
INT8_MAX_BITS = tl.constexpr(0x42FE0000)


@triton.jit
def _hadamard(x):
    """Each 32 columns of x [rows, columns] by the Hadamard matrix over √32."""
    x = butterfly(butterfly(butterflies_in_thread(x, 8), 8), 16)
    factor: tl.constexpr = 32**-0.5
    return x * factor


@triton.jit
def _words(seed, stream, index):
    """The words of a stream at these places (int32)."""
    a, b, c, d = tl.randint4x(seed + (stream.to(tl.int64) << 32), index >> 2)
    lane = index & 3
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d)).to(
        tl.uint32, bitcast=True
    )


@triton.jit
def _uniform(words):
    return (words.to(tl.uint32, bitcast=True) >> 8).to(tl.int32).to(tl.float32) * (2.0**-24)


@triton.jit
def _uniforms_of_rows(seed, stream, rows, first, columns, COLUMNS: tl.constexpr):
    """Uniforms [rows, COLUMNS] from column `first` on of a matrix that is `columns` wide, both multiples of 32."""
    number = rows[:, None] * (columns // 4) + first // 4 + tl.arange(0, COLUMNS // 4)[None, :]
    a, b, c, d = tl.randint4x(seed + (stream.to(tl.int64) << 32), number)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (rows.shape[0], COLUMNS))
    return _uniform(words)


@triton.jit
def _stochastic(x, uniforms, SMALLEST_NORMAL: tl.constexpr, MANTISSA_BITS: tl.constexpr):
    """x as the number beside it below, or above where the uniform says so; magnitudes may go one step too far."""
    bits = x.to(tl.int32, bitcast=True)
    power = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), SMALLEST_NORMAL)
    # 254 stands for twice the exponent of one: this is 1 / power.
    inverse = ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    STEPS: tl.constexpr = 2.0**MANTISSA_BITS
    magnitude = (bits & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    steps = magnitude * inverse * STEPS
    below = tl.floor(steps)
    stepped = (below + (uniforms < steps - below).to(tl.float32)) * (power * (1.0 / STEPS))
    return tl.where(bits < 0, -stepped, stepped)


@triton.jit
def _quest(blocks):
    """Blocks [rows, blocks, 32] over QuEST's scales, not rounded; the codes of the scales."""
    mean = tl.sum(blocks, axis=2) * (1.0 / 32)
    centred = blocks - mean[:, :, None]
    deviation = tl.sqrt_rn(tl.sum(centred * centred, axis=2) * (1.0 / 32))
    square = tl.sqrt_rn(tl.sum(blocks * blocks, axis=2) * (1.0 / 32))
    wanted = (tl.maximum(deviation, square * 0.5) * QUEST_SCALE).to(tl.int32, bitcast=True)
    code = tl.maximum(((wanted - ROOT_TWO_BITS + 0x7FFFFF) >> 23) + 127, 0)
    code = tl.where((wanted >= NOT_FINITE) | (square != square), 255, code)
    return blocks * inverse_of(code)[:, :, None], code


@triton.jit
def _eden(blocks, outside, seed, stream, rows, first, columns):
    """Blocks [rows, blocks, 16] in nvfp4 by MS-EDEN under a power of two `outside`: elements, codes, and scales."""
    ROWS: tl.constexpr = blocks.shape[0]
    BLOCKS: tl.constexpr = blocks.shape[1]
    inverse_outside = ((254 << 23) - outside.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    blocks = blocks * inverse_outside
    amax_bits = tl.max(magnitude_bits(blocks), axis=2)
    bad = amax_bits >= NOT_FINITE
    top = tl.where(bad, 0.0, amax_bits.to(tl.float32, bitcast=True) * INVERSE_EDEN_TOP)
    scale = loaded_e4m3(to_e4m3(tl.minimum(top, 448.0))).to(tl.float32)
    one = tl.full(scale.shape, 1.0, tl.float32)
    inverse = tl.where(scale == 0.0, 0.0, tl.div_rn(one, tl.where(scale == 0.0, 1.0, scale)))
    y = to_element(blocks * inverse[:, :, None], "e2m1", E2M1_MAX)
    exact = tl.sum(tl.reshape(tl.sum(blocks * blocks, axis=2), (ROWS, BLOCKS // 2, 2)), axis=2)
    found = tl.sum(tl.reshape(tl.sum(blocks * y, axis=2) * scale, (ROWS, BLOCKS // 2, 2)), axis=2)
    correction = tl.where(found == 0.0, 1.0, tl.div_rn(exact, tl.where(found == 0.0, 1.0, found)))
    scale = tl.reshape(tl.reshape(scale, (ROWS, BLOCKS // 2, 2)) * correction[:, :, None], (ROWS, BLOCKS))
    index = rows[:, None] * (columns // 16) + first // 16 + tl.arange(0, BLOCKS)[None, :]
    scale = tl.minimum(_stochastic(scale, _uniform(_words(seed, stream, index)), 2.0**-6, 3), 448.0)
    scale = tl.where(bad, float("nan"), scale)
    stored = to_e4m3(scale)
    return y, stored.to(tl.uint8, bitcast=True).to(tl.int32), scale


@triton.jit
def _rounded(x, outside, seed, stream, rows, first, columns, QUANTISER: tl.constexpr, BLOCK: tl.constexpr):
    """x [rows, columns] by a quantiser: elements [rows, blocks, BLOCK], codes of scales, and scales.

    outside: [rows] for four_over_six, a number for ms_eden.
    """
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    blocks = tl.reshape(x, (ROWS, COLUMNS // BLOCK, BLOCK))
    if QUANTISER == "four_over_six":
        y, code, scale = four_over_six(blocks, tl.max(magnitude_bits(blocks), axis=2), outside)
    elif QUANTISER == "ms_eden":
        y, code, scale = _eden(blocks, outside, seed, stream, rows, first, columns)
    else:
        if QUANTISER == "quest":
            y, code = _quest(blocks)
            y = to_element(y, "e2m1", E2M1_MAX)
        elif QUANTISER == "mxint8":
            code = e8m0_ceil(tl.max(magnitude_bits(blocks), axis=2), INT8_MAX_BITS)
            y = to_element(blocks * inverse_of(code)[:, :, None], "int8", 127.0)
        else:
            amax_bits = tl.max(magnitude_bits(blocks), axis=2)
            code = tl.maximum((amax_bits >> 23) - 2, 0)
            code = tl.where(amax_bits >= NOT_FINITE, 255, code)
            y = blocks * 0.75 * inverse_of(code)[:, :, None]
            if QUANTISER == "stochastic":
                uniforms = _uniforms_of_rows(seed, stream, rows, first, columns, COLUMNS)
                y = _stochastic(y, tl.reshape(uniforms, y.shape), 1.0, 1)
            else:
                y = rounded(y, 1, 1.0)
        scale = power_of_two(code)
    return y, code, scale


@triton.jit
def _loaded(source, rows, columns, height, width, stride):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(source + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["height", "towards", "stream"])
def quantise_tiles(
    source, first_outside, outside, seed, elements, scales, height, width, stride, padded, towards, stream,
    FIRST: tl.constexpr, FIRST_BLOCK: tl.constexpr, ROTATES: tl.constexpr,
    QUANTISER: tl.constexpr, BLOCK: tl.constexpr, ROTATES_AT_RANDOM: tl.constexpr,
    TRANSPOSES: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Quantise one tile, P rows and Q columns, of a source `[height, width]`, whose rows lie `stride` apart.

    ROTATES turns its rows in blocks of 32, always in the same way. FIRST, if there is one, rounds them; then they are
    transposed if TRANSPOSES, turned by the signs of the stream `towards` if ROTATES_AT_RANDOM, and rounded by QUANTISER
    with the numbers of `stream`. `padded` is the width of what is written, a multiple of 32.
    elements: e2m1, uint8 `[rows, padded / 2]`, with their scales in tcgen05's layout; or bf16 numbers `[rows, padded]`
    that need the factor outside alone, and no scales (None). first_outside, outside: float32 `[height]` for
    four_over_six, `[1]` for ms_eden. seed: int64 `[1]`. None: a tensor that is not wanted.
    """
    rows = tl.program_id(0) * P + tl.arange(0, P)
    columns = tl.program_id(1) * Q + tl.arange(0, Q)
    x = _loaded(source, rows, columns, height, width, stride)
    if ROTATES:
        x = _hadamard(with_signs(x, columns))
    if FIRST is not None:
        row_outside = None
        if first_outside is not None:
            row_outside = tl.load(first_outside + rows, mask=rows < height, other=1.0)
        y, _, scale = _rounded(x, row_outside, seed, stream, rows, 0, width, FIRST, FIRST_BLOCK)
        x = tl.reshape(y * scale[:, :, None], (P, Q))
        if first_outside is not None:
            x = x * row_outside[:, None]
    if TRANSPOSES:
        x = tl.trans(x)
        rows, columns = columns, rows
        height, first = width, tl.program_id(0) * P
    else:
        first = tl.program_id(1) * Q
    drawn = seed if seed is None else tl.load(seed)
    if ROTATES_AT_RANDOM:
        words = _words(drawn, towards, columns)
        x = _hadamard(x * (1.0 - 2.0 * (words >> 31).to(tl.int32).to(tl.float32))[None, :])
    own_outside = None
    if QUANTISER == "four_over_six":
        own_outside = tl.load(outside + rows, mask=rows < height, other=1.0)
    elif QUANTISER == "ms_eden":
        own_outside = tl.load(outside)
    y, code, scale = _rounded(x, own_outside, drawn, stream, rows, first, padded, QUANTISER, BLOCK)
    WIDTH: tl.constexpr = x.shape[1]
    inside = (rows < height)[:, None]
    if scales is None:
        numbers = to_bf16(tl.reshape(y * scale[:, :, None], x.shape))
        place = rows.to(tl.int64)[:, None] * padded + columns[None, :]
        tl.store(elements + place, numbers, mask=inside & (columns < padded)[None, :])
    else:
        low, high = tl.split(tl.reshape(e2m1_code(y), (x.shape[0], WIDTH // 2, 2)))
        pairs = first // 2 + tl.arange(0, WIDTH // 2)
        place = rows.to(tl.int64)[:, None] * (padded // 2) + pairs[None, :]
        tl.store(
            elements + place, (low | (high << 4)).to(tl.uint8), mask=inside & (pairs < padded // 2)[None, :]
        )
        number = first // BLOCK + tl.arange(0, WIDTH // BLOCK)
        store_scales(scales, code, rows[:, None], number[None, :], padded // BLOCK)


@triton.jit(do_not_specialize=["height", "factor"])
def finish_tiles(
    product, source, out, height, width, product_stride, stride, factor,
    CLIPS: tl.constexpr, ROTATES: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient of a source `[height, width]`, from that of its rounded numbers, times `factor`.

    CLIPS hides what QuEST clips; ROTATES turns rows back. out: contiguous, in the dtype of the source.
    """
    rows = tl.program_id(0) * P + tl.arange(0, P)
    columns = tl.program_id(1) * Q + tl.arange(0, Q)
    gradient = _loaded(product, rows, columns, height, width, product_stride) * factor
    if CLIPS:
        x = _loaded(source, rows, columns, height, width, stride)
        if ROTATES:
            x = _hadamard(with_signs(x, columns))
        scaled, _ = _quest(tl.reshape(x, (P, Q // 32, 32)))
        kept = tl.reshape(tl.abs(scaled) <= E2M1_MAX, (P, Q))
        gradient = tl.where(kept, gradient, 0.0)
    if ROTATES:
        gradient = with_signs(_hadamard(gradient), columns)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    place = rows.to(tl.int64)[:, None] * width + columns[None, :]
    tl.store(out + place, to_output(gradient, out.dtype.element_ty), mask=inside)
