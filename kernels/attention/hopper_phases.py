"""The loops of the sm_90 kernel (hopper.py), in Gluon: loading KV tiles, and attending to those of one class."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from dma_diffusers.kernels.attention.kernel import LOOKED_AT, P_SHIFT, PATIENCE
from dma_diffusers.kernels.quantiser.kernel import SMALLEST_NORMAL
from dma_diffusers.kernels.tiling import layout, precision_map

TILE = gl.constexpr(layout.TILE)
ROWS = gl.constexpr(precision_map.SHARED_ROWS)  # of one warpgroup
PROPAGATE_NAN = gl.constexpr(tl.PropagateNan.ALL)
VISITORS = gl.constexpr(
    precision_map.SHARED_TILE_BITS
)  # from this bit on, an entry of a block list tells who visits the tile

# Triton 3.6 knows them by other names.
copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
view = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


@gluon.constexpr_function
def products_layout(columns, k):
    """The layout of a warpgroup's sums of products [64, columns] in its registers."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, k])


@gluon.constexpr_function
def tile_layout(columns, bits):
    """The layout of rows of so many numbers in shared memory."""
    return gl.NVMMASharedLayout(min(columns * bits // 8, 128), bits, rank=2)


@gluon.jit
def views(ring, SLOTS: gl.constexpr, D: gl.constexpr):
    """The ring's slots as they are read: each holds K or V in bf16 numbers, or in its two halves K and V of LOW."""
    high = view(ring, gl.bfloat16, [SLOTS, TILE, D], tile_layout(D, 16))
    low_values = view(ring, gl.float8e4nv, [2 * SLOTS, D, TILE], tile_layout(TILE, 8))
    return high, ring, low_values


@gluon.jit
def ends_of(ends, HAS_HIGH: gl.constexpr):
    """Reads where the phases of a block list end."""
    high_end = 0
    if HAS_HIGH:
        high_end = gl.load(ends)
    return high_end, gl.load(ends + 1), gl.load(ends + 2)


@gluon.jit
def load_tile(
    ring, barriers, n, k, v, batch, kv_head, token, LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr
):
    """Load K and V of the tile that begins at a token into the ring's n-th slot; returns the first slot left."""
    high, low_keys, low_values = views(ring, SLOTS, D)
    slot = n % SLOTS
    mbarrier.wait(barriers.index(SLOTS + slot), (n // SLOTS & 1) ^ 1)
    mbarrier.expect(barriers.index(slot), 2 * TILE * D)
    if LOW:
        keys, values = low_keys.index(2 * slot), low_values.index(2 * slot + 1)
        copy(k, [batch, kv_head, token, 0], barriers.index(slot), keys.reshape([1, 1, TILE, D]))
        copy(v, [batch, kv_head, 0, token], barriers.index(slot), values.reshape([1, 1, D, TILE]))
    else:
        copy(k, [batch, kv_head, token, 0], barriers.index(slot), high.index(slot).reshape([1, 1, TILE, D]))
        n += 1
        slot = n % SLOTS
        mbarrier.wait(barriers.index(SLOTS + slot), (n // SLOTS & 1) ^ 1)
        mbarrier.expect(barriers.index(slot), 2 * TILE * D)
        copy(v, [batch, kv_head, token, 0], barriers.index(slot), high.index(slot).reshape([1, 1, TILE, D]))
    return n + 1


@gluon.jit
def load_phase(
    ring, barriers, n, k, v, batch, kv_head, indices, entries, first, last,
    LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Load the KV tiles of one phase into the ring, from its n-th slot on; returns the first slot left."""
    next_entry = gl.load(indices + (entries + first))
    for step in range(first, last):
        token = (next_entry & ((1 << VISITORS) - 1)) * TILE
        next_entry = gl.load(indices + (entries + step + 1))
        n = load_tile(ring, barriers, n, k, v, batch, kv_head, token, LOW, D, SLOTS)
    return n


@gluon.jit
def _seen(s, tile, key_mask, fine_mask, guards, k_length, q_tokens, CAUSAL: gl.constexpr):
    """Scores [64, 128] of one tile, −inf where a query doesn't see a key."""
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, s.type.layout))
    if fine_mask is not None:  # as FineMask.seen has it
        slots = gl.cdiv(k_length, TILE) * TILE
        known = q_tokens < slots
        first = gl.load(fine_mask + q_tokens, mask=known, other=0)
        last = gl.load(fine_mask + (slots + q_tokens), mask=known, other=0) | guards
        low = gl.load(fine_mask + (2 * slots + tile * TILE + columns)) | guards
        high = gl.load(fine_mask + (3 * slots + tile * TILE + columns))
        inside = (low[None, :] - first[:, None]) & (last[:, None] - high[None, :])
        seen = (inside & guards) == guards
    else:
        # Threads differ in two bits of their columns. Taken from the limit, they leave constants to compare with; whole
        # columns would take a register each, throughout the loop.
        limit = (
            gl.minimum(q_tokens + 1, k_length)[:, None]
            if CAUSAL
            else gl.full_like(q_tokens, k_length)[:, None]
        )
        seen = (columns & ~6)[None, :] < limit - tile * TILE - (columns & 6)[None, :]
    if key_mask is not None:
        seen = seen & (gl.load(key_mask + tile * TILE + columns) != 0)[None, :]
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _larger(x, y):
    return gl.maximum(x, y, propagate_nan=PROPAGATE_NAN)


@gluon.jit
def _largest(s, skip_below):
    """The rows' largest s, float32; with a threshold, under which a tile may be skipped, NaN if any is."""
    if skip_below is None or s.dtype == gl.int32:
        return gl.max(s, axis=1).to(gl.float32)
    else:
        return gl.reduce(s, 1, _larger).to(gl.float32)


@gluon.jit
def _counts(top, m, factor, shift, skip_below, kept):
    """Says whether a tile counts, as `_counts` of kernel.py does."""
    if skip_below is None:
        return True
    else:
        counts = (kept >= PATIENCE) & (kept % LOOKED_AT != 0)
        if not counts:
            counts = _any_counts(top, m, factor, shift, skip_below)
        return counts


@gluon.jit
def _any_counts(top, m, factor, shift, skip_below):
    is_below = top * factor - (shift + P_SHIFT) < m + skip_below
    counts = gl.max(gl.reshape(is_below.to(gl.int32) ^ 1, (4, 2, 8)), axis=1)  # of a thread's two rows
    # Each warp reads what all have found, which costs one barrier; a reduction over all rows would cost two.
    each_warp: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    return gl.max(gl.reshape(gl.convert_layout(counts, each_warp), (32,)), axis=0) != 0


@gluon.jit
def token_at(token_order, place, length, tokens):
    """As the quantiser's `token_at`."""
    if token_order is not None:
        token = gl.load(token_order + place, mask=place < length, other=-1)
        place = gl.where((token >= 0) & (token < tokens), token, length)
    return place


@gluon.jit
def _probabilities(s, top, m, factor, shift):
    """exp2(s·factor − shift − m)·2^8 under a new m, which `top`, the rows' largest s, may raise; m; what rescales."""
    m_new = gl.maximum(m, top * factor - (shift + P_SHIFT))
    return gl.exp2(s * factor[:, None] - (m_new + shift)[:, None]), m_new, gl.exp2(m - m_new)


@gluon.jit
def high_phase(
    accumulator, l, m, kept, q, softmax_scale_log2, offset, ones, ring, barriers, n, indices, entries, first, last,
    warpgroup, key_mask, fine_mask, guards, k_length, q_tokens, q_rows, known, skip_below, counter,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, NUMBERS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles in bf16; l is [64]: eight columns, as in `low_phase`, would spill more. The MMA sums a tile's."""
    numbers, _, _ = views(ring, SLOTS, D)
    products: gl.constexpr = products_layout(TILE, 16)
    sums: gl.constexpr = products_layout(D, 16)
    total: gl.constexpr = products_layout(8, 16)
    nothing = gl.zeros((ROWS, TILE), gl.float32, products)
    no_total = gl.zeros((ROWS, 8), gl.float32, total)
    row: gl.constexpr = gl.SliceLayout(1, products)
    factor = gl.full((ROWS,), 1.0, gl.float32, row)
    shift = gl.zeros((ROWS,), gl.float32, row)
    if NUMBERS == "bf16":  # the model's own: neither folded nor smoothed
        factor *= softmax_scale_log2
        if offset is not None:
            shift = gl.load(offset + q_rows, mask=known, other=0.0, volatile=True)
    next_entry = gl.load(indices + (entries + first))
    for step in range(first, last):
        entry = next_entry
        next_entry = gl.load(indices + (entries + step + 1))  # long before it is asked for
        keys, values = n % SLOTS, (n + 1) % SLOTS
        mbarrier.wait(barriers.index(keys), n // SLOTS & 1)
        if (entry >> (VISITORS + warpgroup)) & 1:
            s = warpgroup_mma(q, numbers.index(keys).permute((1, 0)), nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            mbarrier.arrive(barriers.index(SLOTS + keys), count=1)
            if MASKED or key_mask is not None:
                tile = entry & ((1 << VISITORS) - 1)
                s = _seen(s, tile, key_mask, fine_mask, guards, k_length, q_tokens, MASKED and CAUSAL)
            top = _largest(s, skip_below)
            if _counts(top, m, factor, shift, skip_below, kept):
                kept += 1
                p, m, rescale = _probabilities(s, top, m, factor, shift)
                l *= rescale
                accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
                p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, sums, 2), assert_trivial=True)
                p_again = gl.convert_layout(p, gl.DotOperandLayout(0, total, 2), assert_trivial=True)
                mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
                accumulator = warpgroup_mma(p, numbers.index(values), accumulator, is_async=True)
                counted = warpgroup_mma(p_again, ones.permute((1, 0)), no_total, use_acc=False, is_async=True)
                accumulator, counted = warpgroup_mma_wait(0, deps=(accumulator, counted))
                l += gl.convert_layout(gl.max(counted, axis=1), row)
            else:
                kept = 0
                if counter is not None:
                    gl.atomic_add(counter[0], 1, mask=counter[1], sem="relaxed")
                mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
        else:
            mbarrier.arrive(barriers.index(SLOTS + keys), count=1)
            mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
        mbarrier.arrive(barriers.index(SLOTS + values), count=1)
        n += 2
    return accumulator, l, m, kept


@gluon.jit
def low_products(q, k, nothing, factor, k_scales, own_scales, tile, STORAGE: gl.constexpr):
    """Returns products of q with the keys of a tile, [64, 128], and the rows' factor by which they become scores."""
    own_factor = factor
    if STORAGE == "tile":
        own_factor *= gl.load(k_scales + (own_scales + tile))
    s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    if STORAGE == "row":
        columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, s.type.layout))
        s = s.to(gl.float32) * gl.load(k_scales + (own_scales + tile * TILE + columns))[None, :]
    return s, own_factor


@gluon.jit
def low_phase(
    accumulator, l, m, kept, q, factor, ones, ring, barriers, n, k_scales, own_scales,
    indices, entries, first, last, warpgroup,
    key_mask, fine_mask, guards, k_length, q_tokens, skip_below, counter,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, ELEMENT: gl.constexpr, STORAGE: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles in e4m3 or int8; l is [64, 8], all columns alike: the MMA sums what it multiplies.

    V's tokens lie in the order in which the probabilities' registers are an operand's (quantiser/kernel.py).
    """
    products: gl.constexpr = products_layout(TILE, 32)
    sums: gl.constexpr = products_layout(D, 32)
    total: gl.constexpr = products_layout(8, 32)
    _, low_keys, low_values = views(ring, SLOTS, D)
    nothing = gl.zeros((ROWS, TILE), gl.int32 if ELEMENT == "int8" else gl.float32, products)
    no_sums = gl.zeros((ROWS, D), gl.float32, sums)
    no_total = gl.zeros((ROWS, 8), gl.float32, total)
    no_shift = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, products))
    next_entry = gl.load(indices + (entries + first))
    for step in range(first, last):
        entry = next_entry
        next_entry = gl.load(indices + (entries + step + 1))  # long before it is asked for
        slot = n % SLOTS
        mbarrier.wait(barriers.index(slot), n // SLOTS & 1)
        if (entry >> (VISITORS + warpgroup)) & 1:
            tile = entry & ((1 << VISITORS) - 1)
            s, own_factor = low_products(
                q, low_keys.index(2 * slot), nothing, factor, k_scales, own_scales, tile, STORAGE
            )
            if MASKED or key_mask is not None:
                s = _seen(
                    s.to(gl.float32), tile, key_mask, fine_mask, guards, k_length, q_tokens, MASKED and CAUSAL
                )
                # 0·−inf is NaN
                own_factor = gl.maximum(own_factor, SMALLEST_NORMAL, propagate_nan=PROPAGATE_NAN)
            top = _largest(s, skip_below)
            if _counts(top, m, own_factor, no_shift, skip_below, kept):
                kept += 1
                p, m, rescale = _probabilities(s.to(gl.float32), top, m, own_factor, no_shift)
                p = gl.reshape(p.to(gl.float8e4nv), (ROWS, TILE // 16, 2, 4, 2))
                p = gl.reshape(gl.permute(p, (0, 1, 3, 2, 4)), (ROWS, TILE))
                p = gl.convert_layout(p, gl.DotOperandLayout(0, sums, 4), assert_trivial=True)
                p_again = gl.convert_layout(p, gl.DotOperandLayout(0, total, 4), assert_trivial=True)
                v = low_values.index(2 * slot + 1).permute((1, 0))
                added = warpgroup_mma(p, v, no_sums, use_acc=False, is_async=True)
                counted = warpgroup_mma(p_again, ones.permute((1, 0)), no_total, use_acc=False, is_async=True)
                added, counted = warpgroup_mma_wait(0, deps=(added, counted))
                # FP8 MMA keeps 13 bits of a sum: no more than a tile's goes through it
                accumulator = (
                    accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None] + added
                )
                l = l * gl.convert_layout(rescale, gl.SliceLayout(1, total))[:, None] + counted
            else:
                kept = 0
                if counter is not None:
                    gl.atomic_add(counter[0], 1, mask=counter[1], sem="relaxed")
        mbarrier.arrive(barriers.index(SLOTS + slot), count=1)
        n += 1
    return accumulator, l, m, kept
