"""The loops of the sm_90 kernel (hopper.py) over tiles of means, in Gluon.

A tile of means has 128 sub-tiles, which take part in the softmax as 128 keys. Every warpgroup walks all of them; a
word of bits says which columns its Q tile takes, four to a bit.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from dma_diffusers.kernels.attention.hopper_phases import (
    PROPAGATE_NAN,
    ROWS,
    TILE,
    load_tile,
    products_layout,
    views,
)
from dma_diffusers.kernels.attention.kernel import P_SHIFT
from dma_diffusers.kernels.quantiser.kernel import SMALLEST_NORMAL
from dma_diffusers.kernels.tiling import layout, precision_map

MEANS_TILES = gl.constexpr(precision_map.MEANS_TILES)  # KV tiles of one tile of means
COLUMNS = gl.constexpr(TILE.value // MEANS_TILES.value)  # of one KV tile
LOG_SUBTILE = gl.constexpr(float(layout.SUBTILE.bit_length() - 1))
# Products of int8 numbers are smaller by half than what stands for those of columns that are not taken, times 2^-9.
# Under the least factor, scores lie within 2^-4, and those of such columns below them by 2^5.
NOT_TAKEN, LEAST_FACTOR = gl.constexpr(-(2**30)), gl.constexpr(2.0**-25)
IN_CODES = gl.constexpr(True)  # while measuring: probabilities by their codes, or by exp2
# Codes of e4m3 count eighths of a binade, if 1 + x/8 is taken for 2^(x/8): on average, they are too large by so many.
CODE_OF_ONE, EXCESS = gl.constexpr(56.0), gl.constexpr(0.4567)
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
def end_of_means(words, below, count):
    """Finds the end of the tiles of means of which a program's two Q tiles, whose words lie `below` apart, take any."""
    end = count
    taken = count * 0
    while (end > 0) & (taken == 0):
        taken = gl.load(words + end - 1) | gl.load(words + below + end - 1)
        end -= (taken == 0).to(gl.int32)
    return end


@gluon.jit
def load_means(
    ring, barriers, n, k, v, batch, kv_head, end, LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr
):
    """Load the tiles of means into the ring, from its n-th slot on."""
    for tile in range(end):
        n = load_tile(ring, barriers, n, k, v, batch, kv_head, tile * TILE, LOW, D, SLOTS)


@gluon.jit
def _takes(word, columns):
    """Says which columns of a tile of means a Q tile takes."""
    # Threads differ in the lowest bit of the shift. Shifted by that first, they go on with constants.
    word = word >> ((columns & COLUMNS) // COLUMNS)
    return (word >> ((columns & ~(2 * COLUMNS - 1)) // COLUMNS)) & 1 != 0


@gluon.jit
def _scores(s, factor, word, log_counts, COUNTED: gl.constexpr):
    """Scores of sub-tiles as x, factor and addend: x·factor + addend; of columns that are not taken, no larger one.

    Unless COUNTED, 32 keys are seen in each that is taken.
    """
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, s.type.layout))
    if COUNTED:
        counts = gl.load(log_counts + columns)
        s = s.to(gl.float32) * factor[:, None] + counts[None, :]
        s = gl.where(_takes(word, columns)[None, :], s, float("-inf"))
        factor, addend = gl.full_like(factor, 1.0), gl.zeros_like(factor)
    else:
        LEAST: gl.constexpr = LEAST_FACTOR if s.dtype == gl.int32 else SMALLEST_NORMAL  # 0·−inf is NaN
        factor = gl.maximum(factor, LEAST, propagate_nan=PROPAGATE_NAN)
        addend = gl.full_like(factor, LOG_SUBTILE)
        if word != -1:
            OTHER: gl.constexpr = NOT_TAKEN if s.dtype == gl.int32 else float("-inf")
            s = gl.where(_takes(word, columns)[None, :], s, OTHER)
    return s, factor, addend


@gluon.jit
def low_means_phase(
    accumulator, l, m, q, factor, ones, ring, barriers, n, k_scales, words, log_counts, first, last,
    COUNTED: gl.constexpr, ELEMENT: gl.constexpr, STORAGE: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles of means in e4m3 or int8, as `low_phase` walks others."""
    products: gl.constexpr = products_layout(TILE, 32)
    sums: gl.constexpr = products_layout(D, 32)
    total: gl.constexpr = products_layout(8, 32)
    _, low_keys, low_values = views(ring, SLOTS, D)
    nothing = gl.zeros((ROWS, TILE), gl.int32 if ELEMENT == "int8" else gl.float32, products)
    no_sums = gl.zeros((ROWS, D), gl.float32, sums)
    no_total = gl.zeros((ROWS, 8), gl.float32, total)
    for tile in range(first, last):
        slot = n % SLOTS
        mbarrier.wait(barriers.index(slot), n // SLOTS & 1)
        word = gl.load(words + tile)
        if word != 0:
            own_factor = factor
            if STORAGE == "tile":
                own_factor *= gl.load(k_scales + tile)
            k = low_keys.index(2 * slot).permute((1, 0))
            s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            if STORAGE == "row":
                columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, products))
                s = s.to(gl.float32) * gl.load(k_scales + tile * TILE + columns)[None, :]
            x, own_factor, addend = _scores(s, own_factor, word, log_counts + tile * TILE, COUNTED)
            m_new = gl.maximum(m, gl.max(x, axis=1).to(gl.float32) * own_factor + (addend - P_SHIFT))
            rescale = gl.exp2(m - m_new)
            m = m_new
            if IN_CODES:
                x = x.to(gl.float32) * (8.0 * own_factor)[:, None] + (
                    8.0 * (addend - m) + (CODE_OF_ONE - EXCESS)
                )[:, None]
            else:
                x = gl.exp2(x.to(gl.float32) * own_factor[:, None] + (addend - m)[:, None]).to(gl.float8e4nv)
            x = gl.reshape(x, (ROWS, TILE // 16, 2, 4, 2))
            x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), (ROWS, TILE))
            p = gl.convert_layout(x, gl.DotOperandLayout(0, sums, 4), assert_trivial=True)
            if IN_CODES:
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
    accumulator, l, m, q, softmax_scale_log2, ring, barriers, n, words, log_counts, last,
    NUMBERS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles of means in bf16, as `high_phase` walks others; but all of them are smoothed."""
    numbers, _, _ = views(ring, SLOTS, D)
    products: gl.constexpr = products_layout(TILE, 16)
    sums: gl.constexpr = products_layout(D, 16)
    nothing = gl.zeros((ROWS, TILE), gl.float32, products)
    factor = gl.full((ROWS,), 1.0, gl.float32, gl.SliceLayout(1, products))
    if NUMBERS == "bf16":
        factor *= softmax_scale_log2
    for tile in range(last):
        keys, values = n % SLOTS, (n + 1) % SLOTS
        mbarrier.wait(barriers.index(keys), n // SLOTS & 1)
        word = gl.load(words + tile)
        s = warpgroup_mma(q, numbers.index(keys).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(barriers.index(SLOTS + keys), count=1)
        s, _, _ = _scores(s, factor, word, log_counts + tile * TILE, True)
        m_new = gl.maximum(m, gl.max(s, axis=1) - P_SHIFT)
        p = gl.exp2(s - m_new[:, None])
        rescale = gl.exp2(m - m_new)
        m = m_new
        l = l * rescale + gl.sum(p, axis=1)
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, sums, 2), assert_trivial=True)
        mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
        accumulator = warpgroup_mma(p, numbers.index(values), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(barriers.index(SLOTS + values), count=1)
        n += 2
    return accumulator, l, m
