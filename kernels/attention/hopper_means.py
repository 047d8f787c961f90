"""The loops of the sm_90 kernel over tiles of means, in Gluon: 128 sub-tiles take part in the softmax as 128 keys.

Every warpgroup walks every such tile, before any tile of keys, so that its sums begin at zero. A word of bits, one for
each four columns, says which of them its Q tile takes.
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
from dma_diffusers.kernels.tiling import layout, precision_map

MEANS_TILES = gl.constexpr(precision_map.MEANS_TILES)  # KV tiles of one tile of means
COLUMNS = gl.constexpr(TILE.value // MEANS_TILES.value)  # of one KV tile
LOG_SUBTILE = gl.constexpr(float(layout.SUBTILE.bit_length() - 1))
# The least factor of int8 products, under which all scores lie within 2^-4, and the least of them below by 2^5.
SMALLEST = gl.constexpr(2.0**-25)
# A code of e4m3 counts eighths of a binade, as far as 1 + x/8 is 2^(x/8): on average that is too much by so many.
ONE, EXCESS = gl.constexpr(56.0), gl.constexpr(0.4567)
_CODES = gl.constexpr("""{
    .reg .b32 low, high, anchor;
    mov.b32 anchor, 0x66006600;
    cvt.rn.relu.f16x2.f32 low, $2, $1;
    cvt.rn.relu.f16x2.f32 high, $4, $3;
    add.rn.f16x2 low, low, anchor;
    add.rn.f16x2 high, high, anchor;
    prmt.b32 $0, low, high, 0x6420;
}""")  # 0x6600 is 1536, to which a float16 number below 512 is added as an integer

# While measuring.
IN_CODES = gl.constexpr(True)
EARLY = gl.constexpr(True)


@gluon.constexpr_function
def least_of(dtype):
    """What stands for the products of a column that is not taken."""
    return -(2**30) if dtype == gl.int32 else float("-inf")


@gluon.jit
def end_of_means(bits, below, words):
    """Finds the end of the tiles of means of which a program's Q tiles, whose words lie `below` apart, take a part."""
    end = words
    taken = words * 0
    while (end > 0) & (taken == 0):
        taken = gl.load(bits + end - 1) | gl.load(bits + below + end - 1)
        end -= (taken == 0).to(gl.int32)
    return end


@gluon.jit
def load_means(
    ring, barriers, k, v, batch, kv_head, end, LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr
):
    """Load tiles of means into the ring, from its first slot on; returns the first slot left."""
    n = 0
    for tile in range(end):
        n = load_tile(ring, barriers, n, k, v, batch, kv_head, tile * TILE, LOW, D, SLOTS)
    return n


@gluon.jit
def _taken(s, factor, word, tile, log_counts, k_length, ALIKE: gl.constexpr):
    """Products of one tile, of which s·factor + LOG_SUBTILE is the score; the least where a column is not taken.

    ALIKE says that all keys up to the last are seen.
    """
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, s.type.layout))
    if not ALIKE or (tile + 1) * (MEANS_TILES * TILE) > k_length:
        counts = gl.load(log_counts + tile * TILE + columns)
        missing = (gl.maximum(counts, -1.0) - LOG_SUBTILE)[None, :] * (1.0 / factor)[:, None]
        s = gl.where((counts >= 0)[None, :], s + missing.to(s.dtype), least_of(s.dtype))
    if word != -1:
        # Threads differ in one of these bits. Shifted first, it leaves constants to shift by.
        own = (word >> ((columns & COLUMNS) // COLUMNS)) >> ((columns & ~7) // COLUMNS)
        s = gl.where(((own & 1) != 0)[None, :], s, least_of(s.dtype))
    return s


@gluon.jit
def low_means_phase(
    m, q, factor, ones, ring, barriers, k_scales, own_scales, word, log_counts, end, k_length,
    ALIKE: gl.constexpr, ELEMENT: gl.constexpr, STORAGE: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles of means in e4m3 or int8; returns the sums, l [64, 8] and m, as `low_phase` takes them."""
    products: gl.constexpr = products_layout(TILE, 32)
    sums: gl.constexpr = products_layout(D, 32)
    total: gl.constexpr = products_layout(8, 32)
    _, low_keys, low_values = views(ring, SLOTS, D)
    nothing = gl.zeros((ROWS, TILE), gl.int32 if ELEMENT == "int8" else gl.float32, products)
    no_sums = gl.zeros((ROWS, D), gl.float32, sums)
    no_total = gl.zeros((ROWS, 8), gl.float32, total)
    accumulator = gl.zeros((ROWS, D), gl.float32, sums)
    l = gl.zeros((ROWS, 8), gl.float32, total)
    if end > 0:
        mbarrier.wait(barriers.index(0), 0)
        if EARLY:
            s = warpgroup_mma(q, low_keys.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
        for tile in range(end):
            slot = tile % SLOTS
            own_factor = factor
            if STORAGE == "tile":
                own_factor *= gl.load(k_scales + (own_scales + tile))
            if not EARLY:
                mbarrier.wait(barriers.index(slot), tile // SLOTS & 1)
                s = warpgroup_mma(q, low_keys.index(2 * slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(0, deps=(s,))
            if STORAGE == "row":
                columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, products))
                s = s.to(gl.float32) * gl.load(k_scales + (own_scales + tile * TILE + columns))[None, :]
            own_factor = gl.maximum(own_factor, SMALLEST, propagate_nan=PROPAGATE_NAN)
            s = _taken(s, own_factor, gl.load(word + tile), tile, log_counts, k_length, ALIKE)
            largest = gl.max(s, axis=1)
            m_new = gl.maximum(m, largest.to(gl.float32) * own_factor + (LOG_SUBTILE - P_SHIFT))
            m_new = gl.where(largest > least_of(s.dtype), m_new, m)
            rescale = gl.exp2(m - m_new)
            m = m_new
            if IN_CODES:
                addend = (ONE - EXCESS + 8.0 * LOG_SUBTILE) - 8.0 * m
                addend = gl.where(largest > least_of(s.dtype), addend, float("-inf"))
                x = s.to(gl.float32) * (8.0 * own_factor)[:, None] + addend[:, None]
            else:
                addend = gl.where(largest > least_of(s.dtype), LOG_SUBTILE - m, float("-inf"))
                x = gl.exp2(s.to(gl.float32) * own_factor[:, None] + addend[:, None]).to(gl.float8e4nv)
            x = gl.reshape(x, (ROWS, TILE // 16, 2, 4, 2))
            x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), (ROWS, TILE))
            p = gl.convert_layout(x, gl.DotOperandLayout(0, sums, 4), assert_trivial=True)
            if IN_CODES:
                p = gl.inline_asm_elementwise(_CODES, "=r,r,r,r,r", [p], gl.int8, is_pure=True, pack=4)
                p = p.to(gl.float8e4nv, bitcast=True)
            p_again = gl.convert_layout(p, gl.DotOperandLayout(0, total, 4), assert_trivial=True)
            v = low_values.index(2 * slot + 1).permute((1, 0))
            of_sums = gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
            if EARLY:
                added = warpgroup_mma(p, v, accumulator * of_sums, is_async=True)
                counted = warpgroup_mma(p_again, ones.permute((1, 0)), no_total, use_acc=False, is_async=True)
                following = gl.minimum(tile + 1, end - 1)
                next_slot = following % SLOTS
                mbarrier.wait(barriers.index(next_slot), following // SLOTS & 1)
                k = low_keys.index(2 * next_slot).permute((1, 0))
                s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
                accumulator, counted, s = warpgroup_mma_wait(0, deps=(added, counted, s))
            else:
                added = warpgroup_mma(p, v, no_sums, use_acc=False, is_async=True)
                counted = warpgroup_mma(p_again, ones.permute((1, 0)), no_total, use_acc=False, is_async=True)
                added, counted = warpgroup_mma_wait(0, deps=(added, counted))
                accumulator = accumulator * of_sums + added
            l = l * gl.convert_layout(rescale, gl.SliceLayout(1, total))[:, None] + counted
            mbarrier.arrive(barriers.index(SLOTS + slot), count=1)
    return accumulator, l, m


@gluon.jit
def high_means_phase(
    accumulator, l, m, q, scale_log2, ring, barriers, word, log_counts, end, k_length,
    ALIKE: gl.constexpr, NUMBERS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles of means in bf16; l is [64]. Smoothed means leave the scores nothing to lose."""
    numbers, _, _ = views(ring, SLOTS, D)
    products: gl.constexpr = products_layout(TILE, 16)
    sums: gl.constexpr = products_layout(D, 16)
    nothing = gl.zeros((ROWS, TILE), gl.float32, products)
    factor = gl.full((ROWS,), 1.0, gl.float32, gl.SliceLayout(1, products))
    if NUMBERS == "bf16":  # the model's own, into which nothing is folded
        factor *= scale_log2
    for tile in range(end):
        n = 2 * tile
        keys, values = n % SLOTS, (n + 1) % SLOTS
        mbarrier.wait(barriers.index(keys), n // SLOTS & 1)
        s = warpgroup_mma(q, numbers.index(keys).permute((1, 0)), nothing, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(barriers.index(SLOTS + keys), count=1)
        s = _taken(s, factor, gl.load(word + tile), tile, log_counts, k_length, ALIKE)
        m_new = gl.maximum(m, gl.max(s, axis=1) * factor + (LOG_SUBTILE - P_SHIFT))
        p = gl.exp2(s * factor[:, None] + (LOG_SUBTILE - m_new)[:, None])
        rescale = gl.exp2(m - m_new)
        m = m_new
        l = l * rescale + gl.sum(p, axis=1)
        accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
        p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, sums, 2), assert_trivial=True)
        mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
        accumulator = warpgroup_mma(p, numbers.index(values), accumulator, is_async=True)
        accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
        mbarrier.arrive(barriers.index(SLOTS + values), count=1)
    return accumulator, l, m
