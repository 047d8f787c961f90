"""The loops of the sm_90 kernel (hopper.py) over tiles of means, in Gluon.

A tile of means has 128 sub-tiles, which take part in the softmax as 128 keys. Every warpgroup walks all of them; a
word of bits says which columns its Q tile takes, four to a bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.attention.hopper_phases import (
    PROPAGATE_NAN,
    ROWS,
    TILE,
    load_tile,
    low_products,
    products_layout,
    views,
)
from dma_diffusers.kernels.attention.kernel import P_SHIFT
from dma_diffusers.kernels.quantiser.kernel import SMALLEST_NORMAL
from dma_diffusers.kernels.tiling import layout, precision_map

MEANS_TILES = gl.constexpr(precision_map.MEANS_TILES)  # KV tiles of one tile of means
COLUMNS = gl.constexpr(TILE.value // MEANS_TILES.value)  # of one KV tile
LOG_SUBTILE = gl.constexpr(float(layout.SUBTILE.bit_length() - 1))
# Products of int8 numbers lie within 2^21: under this factor, scores within 2^-4, those of `_least_of` below by 2^5.
LEAST_FACTOR = gl.constexpr(2.0**-25)
CODE_OF_ONE = gl.constexpr(reference.CODE_OF_ONE - reference.CODE_EXCESS)
# 0x6600 is 1536, at which float16 numbers are integers.
_TO_CODES = gl.constexpr("""{
    .reg .b32 low, high, anchor;
    mov.b32 anchor, 0x66006600;
    cvt.rn.relu.f16x2.f32 low, $2, $1;
    cvt.rn.relu.f16x2.f32 high, $4, $3;
    add.rn.f16x2 low, low, anchor;
    add.rn.f16x2 high, high, anchor;
    prmt.b32 $0, low, high, 0x6420;
}""")


@gluon.jit
def end_of_means(words, own_words, below, count):
    """Finds the end of the tiles of means of which a program's two Q tiles, whose words lie `below` apart, take any."""
    end = count
    taken = count * 0
    while (end > 0) & (taken == 0):
        taken = gl.load(words + (own_words + end - 1)) | gl.load(words + (own_words + below + end - 1))
        end -= (taken == 0).to(gl.int32)
    return end


@gluon.jit
def load_means(
    ring, barriers, n, k, v, batch, kv_head, end, LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr
):
    """Load the tiles of means into the ring, from its n-th slot on."""
    for tile in range(end):
        n = load_tile(ring, barriers, n, k, v, batch, kv_head, tile * TILE, LOW, D, SLOTS)


@gluon.constexpr_function
def _least_of(dtype):
    """Gives the number that stands for the products of columns that are not taken."""
    return -(2**30) if dtype == gl.int32 else float("-inf")


@gluon.jit
def _taken(s, factor, word, log_counts, own_counts, is_whole):
    """Products of which s·factor + LOG_SUBTILE is the score. is_whole: whether 32 keys are seen in each sub-tile."""
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, s.type.layout))
    if not is_whole:
        counts = gl.load(log_counts + (own_counts + columns))
        added = (gl.maximum(counts, 0.0) - LOG_SUBTILE)[None, :] * (1.0 / factor)[:, None]
        s = gl.where((counts >= 0.0)[None, :], s + added.to(s.dtype), _least_of(s.dtype))
    if word != -1:
        # Threads differ in the lowest bit of the shift. Shifted by that first, they go on with constants.
        own = word >> ((columns & COLUMNS) // COLUMNS)
        takes = (own >> ((columns & ~(2 * COLUMNS - 1)) // COLUMNS)) & 1 != 0
        s = gl.where(takes[None, :], s, _least_of(s.dtype))
    return s


@gluon.jit
def low_means_phase(
    accumulator, l, m, q, factor, ones, ring, barriers, n, k_scales, own_scales, words, own_words,
    log_counts, own_counts, whole, last,
    ELEMENT: gl.constexpr, STORAGE: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles of means in e4m3 or int8, as `low_phase` walks others. whole: so many lack no key."""
    products: gl.constexpr = products_layout(TILE, 32)
    sums: gl.constexpr = products_layout(D, 32)
    total: gl.constexpr = products_layout(8, 32)
    _, low_keys, low_values = views(ring, SLOTS, D)
    nothing = gl.zeros((ROWS, TILE), gl.int32 if ELEMENT == "int8" else gl.float32, products)
    no_sums = gl.zeros((ROWS, D), gl.float32, sums)
    no_total = gl.zeros((ROWS, 8), gl.float32, total)
    for tile in range(last):
        slot = n % SLOTS
        mbarrier.wait(barriers.index(slot), n // SLOTS & 1)
        word = gl.load(words + (own_words + tile))
        if word != 0:
            s, own_factor = low_products(
                q, low_keys.index(2 * slot), nothing, factor, k_scales, own_scales, tile, STORAGE
            )
            LEAST: gl.constexpr = LEAST_FACTOR if s.dtype == gl.int32 else SMALLEST_NORMAL  # 0·−inf is NaN
            own_factor = gl.maximum(own_factor, LEAST, propagate_nan=PROPAGATE_NAN)
            s = _taken(s, own_factor, word, log_counts, own_counts + tile * TILE, tile < whole)
            top = gl.max(s, axis=1)
            m_new = gl.maximum(m, top.to(gl.float32) * own_factor + (LOG_SUBTILE - P_SHIFT))
            m_new = gl.where(top > _least_of(s.dtype), m_new, m)
            rescale = gl.exp2(m - m_new)
            m = m_new
            addend = gl.where(top > _least_of(s.dtype), LOG_SUBTILE - m, float("-inf"))
            x = s.to(gl.float32) * (8.0 * own_factor)[:, None] + (8.0 * addend + CODE_OF_ONE)[:, None]
            x = gl.reshape(x, (ROWS, TILE // 16, 2, 4, 2))
            x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), (ROWS, TILE))
            p = gl.convert_layout(x, gl.DotOperandLayout(0, sums, 4), assert_trivial=True)
            p = gl.inline_asm_elementwise(_TO_CODES, "=r,r,r,r,r", [p], gl.int8, is_pure=True, pack=4)
            p = p.to(gl.float8e4nv, bitcast=True)
            p_again = gl.convert_layout(p, gl.DotOperandLayout(0, total, 4), assert_trivial=True)
            v = low_values.index(2 * slot + 1).permute((1, 0))
            added = warpgroup_mma(p, v, no_sums, use_acc=False, is_async=True)
            counted = warpgroup_mma(p_again, ones.permute((1, 0)), no_total, use_acc=False, is_async=True)
            added, counted = warpgroup_mma_wait(0, deps=(added, counted))
            accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None] + added
            l = l * gl.convert_layout(rescale, gl.SliceLayout(1, total))[:, None] + counted
        mbarrier.arrive(barriers.index(SLOTS + slot), count=1)
        n += 1
    return accumulator, l, m


@gluon.jit
def high_means_phase(
    accumulator, l, m, q, softmax_scale_log2, ones, ring, barriers, n, words, own_words,
    log_counts, own_counts, whole, last,
    NUMBERS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles of means in bf16, as `high_phase` walks others; but all of them are smoothed."""
    numbers, _, _ = views(ring, SLOTS, D)
    products: gl.constexpr = products_layout(TILE, 16)
    sums: gl.constexpr = products_layout(D, 16)
    total: gl.constexpr = products_layout(8, 16)
    nothing = gl.zeros((ROWS, TILE), gl.float32, products)
    row: gl.constexpr = gl.SliceLayout(1, products)
    no_total = gl.zeros((ROWS, 8), gl.float32, total)
    factor = gl.full((ROWS,), 1.0, gl.float32, row)
    if NUMBERS == "bf16":
        factor *= softmax_scale_log2
    for tile in range(last):
        keys, values = n % SLOTS, (n + 1) % SLOTS
        mbarrier.wait(barriers.index(keys), n // SLOTS & 1)
        word = gl.load(words + (own_words + tile))
        s = warpgroup_mma(q, numbers.index(keys).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(barriers.index(SLOTS + keys), count=1)
        s = _taken(s, factor, word, log_counts, own_counts + tile * TILE, tile < whole)
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor + (LOG_SUBTILE - P_SHIFT))
        p = gl.exp2(s * factor[:, None] + (LOG_SUBTILE - m_new)[:, None])
        rescale = gl.exp2(m - m_new)
        m = m_new
        l *= rescale
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, sums, 2), assert_trivial=True)
        p_again = gl.convert_layout(p, gl.DotOperandLayout(0, total, 2), assert_trivial=True)
        mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
        accumulator = warpgroup_mma(p, numbers.index(values), accumulator, is_async=True)
        counted = warpgroup_mma(p_again, ones.permute((1, 0)), no_total, use_acc=False, is_async=True)
        accumulator, counted = warpgroup_mma_wait(0, deps=(accumulator, counted))
        l += gl.convert_layout(gl.max(counted, axis=1), row)
        mbarrier.arrive(barriers.index(SLOTS + values), count=1)
        n += 2
    return accumulator, l, m
