"""The fused attention kernel for sm_90, in Gluon: one warp loads for three warpgroups of 64 queries of one head.

It block lists the same phases as kernel.py over the same operands, for HIGH in bf16 numbers and LOW in e4m3 or int8.
Every K and V that comes from L2, whose bandwidth binds one warpgroup by itself, serves all three, and while one
waits for its products, the others take exponentials. hopper.md tells what was tried.
"""

import torch
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dma_diffusers.kernels.attention.kernel import LN_2, LOOKED_AT, LOWEST, P_SHIFT, PATIENCE
from dma_diffusers.kernels.device.rounding import to_output
from dma_diffusers.kernels.quantiser.kernel import SMALLEST_NORMAL
from dma_diffusers.kernels.tiling import layout, precision_map

TILE = gl.constexpr(layout.TILE)
WARPGROUPS = gl.constexpr(precision_map.SHARED_BLOCKS)
ROWS = gl.constexpr(precision_map.SHARED_ROWS)  # of one warpgroup
QUERIES = precision_map.SHARED_BLOCKS * precision_map.SHARED_ROWS  # of one program
PROPAGATE_NAN = gl.constexpr(tl.PropagateNan.ALL)
VISITORS = gl.constexpr(
    precision_map.SHARED_TILE_BITS
)  # from this bit on, an entry of a block list tells who visits the tile
ONE = gl.constexpr(0x38)  # in e4m3

# Triton 3.6 knows them by other names.
_copy = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_memory = gl.shared_memory_descriptor
_view = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Loads `[1, 1, rows, columns]` of a `[B, H, S, D]` tensor into shared memory, swizzled as MMA reads it."""
    row_bytes = columns * x.element_size()
    layout = gl.NVMMASharedLayout(min(row_bytes, 128), 8 * x.element_size(), rank=4)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns], layout)


@gluon.constexpr_function
def _products_layout(columns, k):
    """How a warpgroup's sums of products [64, columns] lie in its registers."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, k])


@gluon.constexpr_function
def _tile_layout(columns, bits):
    """How rows of so many numbers lie in shared memory."""
    return gl.NVMMASharedLayout(min(columns * bits // 8, 128), bits, rank=2)


@gluon.jit
def _views(ring, SLOTS: gl.constexpr, D: gl.constexpr):
    """What each slot of the ring may hold: K or V in bf16 numbers; or K and V of LOW, in its two halves."""
    high = _view(ring, gl.bfloat16, [SLOTS, TILE, D], _tile_layout(D, 16))
    low_values = _view(ring, gl.float8e4nv, [2 * SLOTS, D, TILE], _tile_layout(TILE, 8))
    return high, ring, low_values


@gluon.jit
def _ends(ends, HAS_HIGH: gl.constexpr):
    """Where the phases of a block list end."""
    high_end = 0
    if HAS_HIGH:
        high_end = gl.load(ends)
    return high_end, gl.load(ends + 1), gl.load(ends + 2)


@gluon.jit
def _load_phase(
    ring, barriers, n, k, v, batch, kv_head, indices, entries, first, last,
    LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Load the KV tiles of one phase into the ring, from its n-th slot on; returns the first slot left."""
    high, low_keys, low_values = _views(ring, SLOTS, D)
    next_entry = gl.load(indices + (entries + first))
    for step in range(first, last):
        token = (next_entry & ((1 << VISITORS) - 1)) * TILE
        next_entry = gl.load(indices + (entries + step + 1))
        slot = n % SLOTS
        mbarrier.wait(barriers.index(SLOTS + slot), (n // SLOTS & 1) ^ 1)
        mbarrier.expect(barriers.index(slot), 2 * TILE * D)
        if LOW:
            keys, values = low_keys.index(2 * slot), low_values.index(2 * slot + 1)
            _copy(k, [batch, kv_head, token, 0], barriers.index(slot), keys.reshape([1, 1, TILE, D]))
            _copy(v, [batch, kv_head, 0, token], barriers.index(slot), values.reshape([1, 1, D, TILE]))
        else:
            _copy(
                k, [batch, kv_head, token, 0], barriers.index(slot), high.index(slot).reshape([1, 1, TILE, D])
            )
            n += 1
            slot = n % SLOTS
            mbarrier.wait(barriers.index(SLOTS + slot), (n // SLOTS & 1) ^ 1)
            mbarrier.expect(barriers.index(slot), 2 * TILE * D)
            _copy(
                v, [batch, kv_head, token, 0], barriers.index(slot), high.index(slot).reshape([1, 1, TILE, D])
            )
        n += 1
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
    elif CAUSAL:
        seen = columns[None, :] < gl.minimum(q_tokens + 1, k_length)[:, None] - tile * TILE
    else:
        seen = (columns < k_length - tile * TILE)[None, :]
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
    """Whether of any row a probability is 2^skip_below or more of the largest so far, or NaN; or nobody looks."""
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
def _token_at(token_order, place, length, tokens):
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
def _high_phase(
    accumulator, l, m, kept, q, softmax_scale_log2, offset, ring, barriers, n, indices, entries, first, last, warpgroup,
    key_mask, fine_mask, guards, k_length, q_tokens, q_rows, known, skip_below, counter,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, NUMBERS: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles in bf16; l is [64]."""
    numbers, _, _ = _views(ring, SLOTS, D)
    products: gl.constexpr = _products_layout(TILE, 16)
    sums: gl.constexpr = _products_layout(D, 16)
    nothing = gl.zeros((ROWS, TILE), gl.float32, products)
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
                l = l * rescale + gl.sum(p, axis=1)
                accumulator = accumulator * gl.convert_layout(rescale, gl.SliceLayout(1, sums))[:, None]
                p = gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, sums, 2), assert_trivial=True)
                mbarrier.wait(barriers.index(values), (n + 1) // SLOTS & 1)
                accumulator = warpgroup_mma(p, numbers.index(values), accumulator, is_async=True)
                accumulator = warpgroup_mma_wait(0, deps=(accumulator,))
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
def _low_phase(
    accumulator, l, m, kept, q, factor, ones, ring, barriers, n, k_scales, own_scales,
    indices, entries, first, last, warpgroup,
    key_mask, fine_mask, guards, k_length, q_tokens, skip_below, counter,
    MASKED: gl.constexpr, CAUSAL: gl.constexpr, ELEMENT: gl.constexpr, STORAGE: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Walk tiles in e4m3 or int8; l is [64, 8], all columns alike: the MMA sums what it multiplies.

    V's tokens lie in the order in which the probabilities' registers are an operand's (quantiser/kernel.py).
    """
    products: gl.constexpr = _products_layout(TILE, 32)
    sums: gl.constexpr = _products_layout(D, 32)
    total: gl.constexpr = _products_layout(8, 32)
    _, low_keys, low_values = _views(ring, SLOTS, D)
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
            own_factor = factor
            if STORAGE == "tile":
                own_factor *= gl.load(k_scales + (own_scales + tile))
            k = low_keys.index(2 * slot).permute((1, 0))
            s = warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=(s,))
            if STORAGE == "row":
                columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, products))
                s = s.to(gl.float32) * gl.load(k_scales + (own_scales + tile * TILE + columns))[None, :]
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


@gluon.jit
def _load(
    sources, smem, place, block_list,
    HIGH: gl.constexpr, LOW: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: Q, and K and V of every tile that a warpgroup visits."""
    q_high, k_high, v_high, q_low, k_low, v_low = sources
    q_high_smem, q_low_smem, ring, barriers = smem
    batch, head_in_batch, kv_head, start = place
    indices, own_entries, bounds, own_ends = block_list
    size: gl.constexpr = (2 if HIGH is not None else 0) + (1 if LOW is not None else 0)
    for warpgroup in gl.static_range(WARPGROUPS):
        own_ready = barriers.index(2 * SLOTS + warpgroup)
        mbarrier.expect(own_ready, ROWS * D * size)
        rows = [batch, head_in_batch, start + warpgroup * ROWS, 0]
        if HIGH is not None:
            _copy(q_high, rows, own_ready, q_high_smem.index(warpgroup).reshape([1, 1, ROWS, D]))
        if LOW is not None:
            _copy(q_low, rows, own_ready, q_low_smem.index(warpgroup).reshape([1, 1, ROWS, D]))
    high_end, low_end, end = _ends(bounds + own_ends, HIGH is not None)
    n = 0
    if HIGH is not None:
        n = _load_phase(
            ring, barriers, n, k_high, v_high, batch, kv_head, indices, own_entries, 0, high_end, False, D, SLOTS
        )  # fmt: skip
    if LOW is not None:
        n = _load_phase(
            ring, barriers, n, k_low, v_low, batch, kv_head, indices, own_entries, high_end, low_end, True, D, SLOTS
        )  # fmt: skip
    if HIGH is not None:
        _load_phase(
            ring, barriers, n, k_high, v_high, batch, kv_head, indices, own_entries, low_end, end, False, D, SLOTS
        )  # fmt: skip
    else:
        _load_phase(
            ring, barriers, n, k_low, v_low, batch, kv_head, indices, own_entries, low_end, end, True, D, SLOTS
        )  # fmt: skip


@gluon.jit
def _attend(
    warpgroup: gl.constexpr, given,
    HIGH: gl.constexpr, LOW: gl.constexpr, LOW_STORAGE: gl.constexpr, CAUSAL: gl.constexpr, MASKS_ALL: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of 64 queries."""
    high_sums: gl.constexpr = _products_layout(D, 16)
    sums: gl.constexpr = _products_layout(D, 32)
    counts: gl.constexpr = _products_layout(8, 32)
    row: gl.constexpr = gl.SliceLayout(1, _products_layout(TILE, 16))
    low_row: gl.constexpr = gl.SliceLayout(1, _products_layout(TILE, 32))
    out_row: gl.constexpr = gl.SliceLayout(1, high_sums)
    (
        smem, ones, scales, softmax_scale_log2, offset, key_mask, fine_mask, token_order, out, lse, head, kv_row,
        start, block_list, q_length, k_length, token_count, guards, head_dim, out_stride_s, skip_below, skipped,
    ) = given  # fmt: skip
    q_high_smem, q_low_smem, ring, barriers = smem
    q_scales, k_scales, v_scale = scales
    indices, own_entries, bounds, own_ends = block_list
    high_end, low_end, end = _ends(bounds + own_ends, HIGH is not None)
    q_tokens = start + warpgroup * ROWS + gl.arange(0, ROWS, layout=row)
    # The last program's last warpgroups may lie past the whole tiles that the quantiser wrote.
    q_rows = head * (gl.cdiv(q_length, TILE) * TILE) + q_tokens
    known = q_tokens < gl.cdiv(q_length, TILE) * TILE
    wide_mask = key_mask if MASKS_ALL else None

    tokens = q_length if token_count is None else token_count
    m = gl.full((ROWS,), LOWEST, gl.float32, row)
    if skip_below is not None:  # a row that is no query's holds on to no tile
        m = gl.where(_token_at(token_order, q_tokens, q_length, tokens) < q_length, m, -m)
    l = gl.zeros((ROWS,), gl.float32, row)
    accumulator = gl.zeros((ROWS, D), gl.float32, high_sums)
    counter = None if skipped is None else (skipped, start + warpgroup * ROWS < q_length)
    mbarrier.wait(barriers.index(2 * SLOTS + warpgroup), 0)
    n, kept = 0, 0
    if HIGH is not None:
        accumulator, l, m, kept = _high_phase(
            accumulator, l, m, kept, q_high_smem.index(warpgroup), softmax_scale_log2, offset, ring, barriers, n,
            indices, own_entries, 0, high_end, warpgroup, wide_mask, None, None, k_length, q_tokens, q_rows, known,
            skip_below, counter, False, CAUSAL, HIGH, D, SLOTS,
        )  # fmt: skip
    if LOW is not None:
        v_units = v_scale + (kv_row * D + gl.arange(0, D, layout=gl.SliceLayout(0, sums)))
        own_scales = kv_row * gl.cdiv(k_length, TILE) * (1 if LOW_STORAGE == "tile" else TILE)
        factor = gl.convert_layout(gl.load(q_scales + q_rows, mask=known, other=1.0), low_row)
        low_sums = gl.convert_layout(accumulator, sums)
        if HIGH is not None:
            low_sums = low_sums / gl.load(v_units)[None, :]
        low_l = gl.convert_layout(l, gl.SliceLayout(1, counts))[:, None] + gl.zeros(
            (ROWS, 8), gl.float32, counts
        )
        low_m, low_tokens = gl.convert_layout(m, low_row), gl.convert_layout(q_tokens, low_row)
        low_sums, low_l, low_m, kept = _low_phase(
            low_sums, low_l, low_m, kept, q_low_smem.index(warpgroup), factor, ones, ring, barriers, 2 * high_end,
            k_scales, own_scales, indices, own_entries, high_end, low_end, warpgroup, wide_mask, None, None,
            k_length, low_tokens,
            skip_below, counter, False, CAUSAL, LOW, LOW_STORAGE, D, SLOTS,
        )  # fmt: skip
        if HIGH is None:
            low_sums, low_l, low_m, kept = _low_phase(
                low_sums, low_l, low_m, kept, q_low_smem.index(warpgroup), factor, ones, ring, barriers, low_end,
                k_scales, own_scales, indices, own_entries, low_end, end, warpgroup, key_mask, fine_mask, guards,
                k_length, low_tokens,
                skip_below, counter, True, CAUSAL, LOW, LOW_STORAGE, D, SLOTS,
            )  # fmt: skip
        # volatile: read anew, not kept in registers throughout the loop
        accumulator = gl.convert_layout(low_sums * gl.load(v_units, volatile=True)[None, :], high_sums)
        l = gl.convert_layout(gl.max(low_l, axis=1), row)
        m = gl.convert_layout(low_m, row)
    if HIGH is not None:
        accumulator, l, m, kept = _high_phase(
            accumulator, l, m, kept, q_high_smem.index(warpgroup), softmax_scale_log2, offset, ring, barriers,
            high_end + low_end, indices, own_entries, low_end, end, warpgroup, key_mask, fine_mask, guards, k_length, q_tokens, q_rows, known,
            skip_below, counter, True, CAUSAL, HIGH, D, SLOTS,
        )  # fmt: skip

    nothing_seen = l == 0.0
    l = gl.where(nothing_seen, 1.0, l)
    result = accumulator * gl.convert_layout(1.0 / l, out_row)[:, None]
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, high_sums))
    q_tokens = _token_at(token_order, q_tokens, q_length, tokens)
    out_tokens = gl.convert_layout(q_tokens, out_row)
    slots = out_tokens[:, None].to(gl.int64) * out_stride_s + channels[None, :]
    inside = (out_tokens < q_length)[:, None] & (channels < head_dim)[None, :]
    gl.store(out + slots, to_output(result, out.dtype.element_ty), mask=inside)
    if lse is not None:
        log_sum = m + gl.log2(l)
        if offset is not None:
            log_sum += gl.load(offset + q_rows, mask=known, other=0.0)
        log_sum = gl.where(nothing_seen, float("-inf"), log_sum * LN_2)
        gl.store(lse + head.to(gl.int64) * tokens + q_tokens, log_sum, mask=q_tokens < q_length)


@gluon.jit(do_not_specialize=[
    "q_length", "k_length", "token_count", "map_stride_b", "map_stride_h", "map_length"
])  # fmt: skip
def attend_hopper(
    q_high, q_high_scales, q_high_tensor_scale, k_high, k_high_scales, k_high_tensor_scale, v_high,
    q_low, q_low_scales, q_low_tensor_scale, k_low, k_low_scales, k_low_tensor_scale, v_low,
    v_scale, softmax_scale_log2, offset, indices, bounds, key_mask, fine_mask, token_order, out, lse,
    heads, kv_heads, q_length, k_length, token_count, guards, head_dim, map_stride_b, map_stride_h, map_length,
    out_stride_b, out_stride_h, out_stride_s, skip_below, skipped,
    HIGH: gl.constexpr, HIGH_STORAGE: gl.constexpr, HIGH_BLOCK: gl.constexpr, HIGH_VALUES: gl.constexpr,
    LOW: gl.constexpr, LOW_STORAGE: gl.constexpr, LOW_BLOCK: gl.constexpr, LOW_VALUES: gl.constexpr,
    CAUSAL: gl.constexpr, MASKS_ALL: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 192 queries of one head; arguments as in kernel.py's `attend`, but for what follows.

    `indices` and `bounds` are a map's `shared` block lists (precision_map.py). HIGH is read as bf16 numbers without
    tensor scales, its V in bf16 ("plain"); LOW as e4m3 or int8 ones under scales of K's tiles or tokens, its V in e4m3
    ("channel"). Other scales and block sizes are not looked at.
    Each warpgroup skips tiles by itself.
    """
    blocks = gl.cdiv(q_length, WARPGROUPS * ROWS)
    head, block = gl.program_id(0) // blocks, gl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest block lists first
    batch, head_in_batch = head // heads, head % heads
    kv_head = head_in_batch // (heads // kv_heads)
    row = batch * map_stride_b + head_in_batch * map_stride_h + block
    if key_mask is not None:
        key_mask += batch.to(gl.int64) * (gl.cdiv(k_length, TILE) * TILE)

    low_element: gl.constexpr = gl.int8 if LOW == "int8" else gl.float8e4nv
    ring = gl.allocate_shared_memory(low_element, [2 * SLOTS, TILE, D], _tile_layout(D, 8))
    if HIGH is not None:
        q_high_smem = gl.allocate_shared_memory(gl.bfloat16, [WARPGROUPS, ROWS, D], _tile_layout(D, 16))
    else:
        q_high_smem: gl.constexpr = None
    if LOW is not None:
        q_low_smem = gl.allocate_shared_memory(low_element, [WARPGROUPS, ROWS, D], _tile_layout(D, 8))
        ones = gl.allocate_shared_memory(gl.uint8, [8, TILE], _tile_layout(TILE, 8))
        ones.store(gl.full((8, TILE), ONE, gl.uint8, gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])))
        ones = _view(ones, gl.float8e4nv, [8, TILE], _tile_layout(TILE, 8))
        fence_async_shared()
    else:
        q_low_smem: gl.constexpr = None
        ones: gl.constexpr = None
    # Of each slot: that it is full, that it is empty; of each warpgroup: that its Q is there.
    barriers = gl.allocate_shared_memory(gl.int64, [2 * SLOTS + WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=1)
        mbarrier.init(barriers.index(SLOTS + slot), count=WARPGROUPS)
    for warpgroup in gl.static_range(WARPGROUPS):
        mbarrier.init(barriers.index(2 * SLOTS + warpgroup), count=1)

    # A partition keeps what it is given in registers: as few and as far computed as can be.
    smem = (q_high_smem, q_low_smem, ring, barriers)
    start = block * (WARPGROUPS * ROWS)
    block_list = (indices, row * map_length, bounds, row * 3)
    kv_row = batch * kv_heads + kv_head
    scales = (q_low_scales, k_low_scales, v_scale)
    out += batch.to(gl.int64) * out_stride_b + head_in_batch.to(gl.int64) * out_stride_h
    if skipped is not None:
        skipped += head
    given = (
        smem, ones, scales, softmax_scale_log2, offset, key_mask, fine_mask, token_order, out, lse, head, kv_row,
        start, block_list, q_length, k_length, token_count, guards, head_dim, out_stride_s, skip_below, skipped,
    )  # fmt: skip
    sources = (q_high, k_high, v_high, q_low, k_low, v_low)
    place = (batch, head_in_batch, kv_head, start)
    gl.warp_specialize(
        [
            (_attend, (0, given, HIGH, LOW, LOW_STORAGE, CAUSAL, MASKS_ALL, D, SLOTS)),
            (_attend, (1, given, HIGH, LOW, LOW_STORAGE, CAUSAL, MASKS_ALL, D, SLOTS)),
            (_attend, (2, given, HIGH, LOW, LOW_STORAGE, CAUSAL, MASKS_ALL, D, SLOTS)),
            (_load, (sources, smem, place, block_list, HIGH, LOW, D, SLOTS)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )
