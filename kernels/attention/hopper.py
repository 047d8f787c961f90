"""The fused attention kernel for sm_90, in Gluon: one warp loads for three warpgroups of 64 queries of one head.

It visits the same phases as kernel.py over the same operands, for HIGH in bf16 numbers and LOW in e4m3 or int8.
Every K and V that comes from L2, whose bandwidth binds one warpgroup by itself, serves all three, and while one
waits for its products, the others take exponentials. The loops stand in
hopper_phases.py; hopper.md tells what was tried.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from dma_diffusers.kernels.attention.hopper_means import (
    MEANS_TILES,
    end_of_means,
    high_means_phase,
    load_means,
    low_means_phase,
)
from dma_diffusers.kernels.attention.hopper_phases import (
    ROWS,
    TILE,
    copy,
    ends_of,
    high_phase,
    load_phase,
    low_phase,
    products_layout,
    tile_layout,
    token_at,
    view,
)
from dma_diffusers.kernels.attention.hopper_split import joined, own_share, place_of
from dma_diffusers.kernels.attention.kernel import LN_2, LOWEST
from dma_diffusers.kernels.device.rounding import to_output
from dma_diffusers.kernels.tiling import precision_map

WARPGROUPS = gl.constexpr(precision_map.SHARED_BLOCKS)
QUERIES = precision_map.SHARED_BLOCKS * precision_map.SHARED_ROWS  # of one program
ONE = gl.constexpr(0x38)  # in e4m3
STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


def descriptor(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Loads `[1, 1, rows, columns]` of a `[B, H, S, D]` tensor into shared memory, swizzled as MMA reads it."""
    row_bytes = columns * x.element_size()
    layout = gl.NVMMASharedLayout(min(row_bytes, 128), 8 * x.element_size(), rank=4)
    return TensorDescriptor.from_tensor(x, [1, 1, rows, columns], layout)


@gluon.jit
def _load(
    sources, smem, place, block_list, of_means,
    HIGH: gl.constexpr, LOW: gl.constexpr, MEAN: gl.constexpr, MEAN_STORAGE: gl.constexpr,
    D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The loading warp: Q, K and V of every tile that a warpgroup visits, and the tiles of means."""
    q_high, k_high, v_high, q_low, k_low, v_low, k_means, v_means = sources
    q_high_smem, q_low_smem, ring, barriers = smem
    batch, head_in_batch, kv_head, start = place
    indices, own_entries, bounds, own_ends, piece, pieces = block_list
    size: gl.constexpr = (0 if q_high_smem is None else 2) + (0 if q_low_smem is None else 1)
    for warpgroup in gl.static_range(WARPGROUPS):
        own_ready = barriers.index(2 * SLOTS + warpgroup)
        mbarrier.expect(own_ready, ROWS * D * size)
        rows = [batch, head_in_batch, start + warpgroup * ROWS, 0]
        if q_high_smem is not None:
            copy(q_high, rows, own_ready, q_high_smem.index(warpgroup).reshape([1, 1, ROWS, D]))
        if q_low_smem is not None:
            copy(q_low, rows, own_ready, q_low_smem.index(warpgroup).reshape([1, 1, ROWS, D]))
    first, high_end, low_end, end = own_share(*ends_of(bounds + own_ends, HIGH is not None), piece, pieces)
    n = 0
    if HIGH is not None:
        n = load_phase(
            ring, barriers, n, k_high, v_high, batch, kv_head, indices, own_entries, first, high_end, False, D, SLOTS
        )  # fmt: skip
    if LOW is not None:
        n = load_phase(
            ring, barriers, n, k_low, v_low, batch, kv_head, indices, own_entries, high_end, low_end, True, D, SLOTS
        )  # fmt: skip
    if HIGH is not None:
        n = load_phase(
            ring, barriers, n, k_high, v_high, batch, kv_head, indices, own_entries, low_end, end, False, D, SLOTS
        )  # fmt: skip
    elif LOW is not None:
        n = load_phase(
            ring, barriers, n, k_low, v_low, batch, kv_head, indices, own_entries, low_end, end, True, D, SLOTS
        )  # fmt: skip
    if MEAN is not None:
        words, own_words, _, _, _, below, count = of_means
        end = end_of_means(words, own_words, below, count)
        load_means(
            ring, barriers, n, k_means, v_means, batch, kv_head, end, MEAN_STORAGE != "plain", D, SLOTS
        )


@gluon.jit
def _units(x, v_units, kv_row, D: gl.constexpr):
    """The powers of two and the means of V's channels, in the layout of columns of x."""
    # volatile: read anew, not kept in registers throughout the loops
    channels = kv_row * (2 * D) + gl.arange(0, D, layout=gl.SliceLayout(0, x.type.layout))
    return gl.load(v_units + channels, volatile=True), gl.load(v_units + (D + channels), volatile=True)


@gluon.jit
def _in_units(accumulator, l, v_units, kv_row, D: gl.constexpr):
    """Takes V's mean from the sums of l's probabilities, and brings them into the channels' units; l is [64]."""
    scale, mean = _units(accumulator, v_units, kv_row, D)
    l = gl.convert_layout(l, gl.SliceLayout(1, accumulator.type.layout))
    return (accumulator - l[:, None] * mean[None, :]) * (1.0 / scale)[None, :]


@gluon.jit
def _out_of_units(accumulator, l, v_units, kv_row, D: gl.constexpr):
    """Undoes `_in_units`, for the probabilities that l has got since as well. kernel.py adds V's mean at its end."""
    scale, mean = _units(accumulator, v_units, kv_row, D)
    l = gl.convert_layout(l, gl.SliceLayout(1, accumulator.type.layout))
    return accumulator * scale[None, :] + l[:, None] * mean[None, :]


@gluon.jit
def _attend(
    warpgroup: gl.constexpr, given,
    HIGH: gl.constexpr, LOW: gl.constexpr, LOW_STORAGE: gl.constexpr, MEAN: gl.constexpr, MEAN_STORAGE: gl.constexpr,
    CAUSAL: gl.constexpr, MASKS_ALL: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: attention of 64 queries."""
    high_sums: gl.constexpr = products_layout(D, 16)
    sums: gl.constexpr = products_layout(D, 32)
    counts: gl.constexpr = products_layout(8, 32)
    row: gl.constexpr = gl.SliceLayout(1, products_layout(TILE, 16))
    low_row: gl.constexpr = gl.SliceLayout(1, products_layout(TILE, 32))
    out_row: gl.constexpr = gl.SliceLayout(1, high_sums)
    (
        smem, high_ones, ones, scales, softmax_scale_log2, offset, key_mask, fine_mask, token_order, out, lse, head,
        kv_row, start, block_list, of_means, split, q_length, k_length, token_count, guards, head_dim, out_stride_s,
        skip_below, skipped,
    ) = given  # fmt: skip
    q_high_smem, q_low_smem, ring, barriers = smem
    q_scales, k_scales, v_units = scales
    indices, own_entries, bounds, own_ends, piece, pieces = block_list
    first, high_end, low_end, end = own_share(*ends_of(bounds + own_ends, HIGH is not None), piece, pieces)
    q_tokens = start + warpgroup * ROWS + gl.arange(0, ROWS, layout=row)
    # The last program's last warpgroups may lie past the whole tiles that the quantiser wrote.
    q_rows = head * (gl.cdiv(q_length, TILE) * TILE) + q_tokens
    known = q_tokens < gl.cdiv(q_length, TILE) * TILE
    wide_mask = key_mask if MASKS_ALL else None

    tokens = q_length if token_count is None else token_count
    m = gl.full((ROWS,), LOWEST, gl.float32, row)
    if skip_below is not None:  # a row that is no query's holds on to no tile
        m = gl.where(token_at(token_order, q_tokens, q_length, tokens) < q_length, m, -m)
    l = gl.zeros((ROWS,), gl.float32, row)
    accumulator = gl.zeros((ROWS, D), gl.float32, high_sums)
    counter = None if skipped is None else (skipped, start + warpgroup * ROWS < q_length)
    mbarrier.wait(barriers.index(2 * SLOTS + warpgroup), 0)
    n, kept = 0, 0
    if HIGH is not None:
        accumulator, l, m, kept = high_phase(
            accumulator, l, m, kept, q_high_smem.index(warpgroup), softmax_scale_log2, offset, high_ones, ring,
            barriers, n, indices, own_entries, first, high_end, warpgroup, wide_mask, None, None, k_length, q_tokens,
            q_rows, known, skip_below, counter, False, CAUSAL, HIGH, D, SLOTS,
        )  # fmt: skip
    if LOW is not None:
        own_scales = kv_row * gl.cdiv(k_length, TILE) * (1 if LOW_STORAGE == "tile" else TILE)
        factor = gl.convert_layout(gl.load(q_scales + q_rows, mask=known, other=1.0), low_row)
        low_sums = gl.convert_layout(accumulator, sums)
        if HIGH is not None:
            low_sums = _in_units(low_sums, l, v_units, kv_row, D)
        low_l = gl.convert_layout(l, gl.SliceLayout(1, counts))[:, None] + gl.zeros(
            (ROWS, 8), gl.float32, counts
        )
        low_m, low_tokens = gl.convert_layout(m, low_row), gl.convert_layout(q_tokens, low_row)
        low_sums, low_l, low_m, kept = low_phase(
            low_sums, low_l, low_m, kept, q_low_smem.index(warpgroup), factor, ones, ring, barriers,
            2 * (high_end - first), k_scales, own_scales, indices, own_entries, high_end, low_end, warpgroup,
            wide_mask, None, None, k_length, low_tokens,
            skip_below, counter, False, CAUSAL, LOW, LOW_STORAGE, D, SLOTS,
        )  # fmt: skip
        if HIGH is None:
            low_sums, low_l, low_m, kept = low_phase(
                low_sums, low_l, low_m, kept, q_low_smem.index(warpgroup), factor, ones, ring, barriers,
                low_end - first, k_scales, own_scales, indices, own_entries, low_end, end, warpgroup,
                key_mask, fine_mask, guards, k_length, low_tokens,
                skip_below, counter, True, CAUSAL, LOW, LOW_STORAGE, D, SLOTS,
            )  # fmt: skip
        l = gl.convert_layout(gl.max(low_l, axis=1), row)
        accumulator = gl.convert_layout(_out_of_units(low_sums, l, v_units, kv_row, D), high_sums)
        m = gl.convert_layout(low_m, row)
    if HIGH is not None:
        accumulator, l, m, kept = high_phase(
            accumulator, l, m, kept, q_high_smem.index(warpgroup), softmax_scale_log2, offset, high_ones, ring,
            barriers, high_end + low_end - 2 * first, indices, own_entries, low_end, end, warpgroup, key_mask,
            fine_mask, guards, k_length, q_tokens, q_rows, known, skip_below, counter, True, CAUSAL, HIGH, D, SLOTS,
        )  # fmt: skip

    if MEAN is not None:
        words, own_words, log_counts, k_scales, batch, below, count = of_means
        last = end_of_means(words, own_words, below, count)
        if (start + warpgroup * ROWS) // TILE != start // TILE:
            own_words += below
        own_counts = batch * (count * TILE)
        n = end - first
        if HIGH is not None:  # whose K and V take a slot each
            n += high_end - first + end - low_end
        whole = 0
        if key_mask is None and (token_order is None or (token_count is None and fine_mask is None)):
            whole = k_length // (MEANS_TILES * TILE)  # all keys of these are seen
        if MEAN_STORAGE == "plain":
            accumulator, l, m = high_means_phase(
                accumulator, l, m, q_high_smem.index(warpgroup), softmax_scale_log2, high_ones, ring, barriers, n,
                words, own_words, log_counts, own_counts, whole, last, MEAN, D, SLOTS,
            )  # fmt: skip
        else:
            factor = gl.convert_layout(
                gl.load(q_scales + q_rows, mask=known, other=1.0, volatile=True), low_row
            )
            own_scales = kv_row * count * (1 if MEAN_STORAGE == "tile" else TILE)
            low_sums = _in_units(gl.convert_layout(accumulator, sums), l, v_units, kv_row, D)
            low_l = gl.convert_layout(l, gl.SliceLayout(1, counts))[:, None] + gl.zeros(
                (ROWS, 8), gl.float32, counts
            )
            low_m = gl.convert_layout(m, low_row)
            low_sums, low_l, low_m = low_means_phase(
                low_sums, low_l, low_m, q_low_smem.index(warpgroup), factor, ones, ring, barriers, n,
                k_scales, own_scales, words, own_words, log_counts, own_counts, whole, last,
                MEAN, MEAN_STORAGE, D, SLOTS,
            )  # fmt: skip
            l = gl.convert_layout(gl.max(low_l, axis=1), row)
            accumulator = gl.convert_layout(_out_of_units(low_sums, l, v_units, kv_row, D), high_sums)
            m = gl.convert_layout(low_m, row)

    is_whole = True
    if split is not None:  # noqa: SIM102 (the compiler decides this, and the GPU the next)
        if piece >= 0:
            accumulator, l, m, is_whole = joined(accumulator, l, m, split, warpgroup, pieces, D)
    nothing_seen = l == 0.0
    l = gl.where(nothing_seen, 1.0, l)
    result = accumulator * gl.convert_layout(1.0 / l, out_row)[:, None]
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, high_sums))
    q_tokens = token_at(token_order, q_tokens, q_length, tokens)
    out_tokens = gl.convert_layout(q_tokens, out_row)
    slots = out_tokens[:, None].to(gl.int64) * out_stride_s + channels[None, :]
    inside = (out_tokens < q_length)[:, None] & (channels < head_dim)[None, :] & is_whole
    gl.store(out + slots, to_output(result, out.dtype.element_ty), mask=inside)
    if lse is not None:
        log_sum = m + gl.log2(l)
        if offset is not None:
            log_sum += gl.load(offset + q_rows, mask=known, other=0.0)
        log_sum = gl.where(nothing_seen, float("-inf"), log_sum * LN_2)
        gl.store(lse + head.to(gl.int64) * tokens + q_tokens, log_sum, mask=(q_tokens < q_length) & is_whole)


@gluon.jit(do_not_specialize=[
    "q_length", "k_length", "token_count", "map_stride_b", "map_stride_h", "map_length", "whole", "pieces",
    "means_stride_b", "means_stride_h"
])  # fmt: skip
def attend_hopper(
    q_high, q_high_scales, q_high_tensor_scale, k_high, k_high_scales, k_high_tensor_scale, v_high,
    q_low, q_low_scales, q_low_tensor_scale, k_low, k_low_scales, k_low_tensor_scale, v_low,
    v_units, softmax_scale_log2, offset, indices, bounds, key_mask, fine_mask, token_order, out, lse,
    heads, kv_heads, q_length, k_length, token_count, guards, head_dim, map_stride_b, map_stride_h, map_length,
    out_stride_b, out_stride_h, out_stride_s, skip_below, skipped, records, finished, whole, pieces,
    mean_q, mean_q_scales, mean_q_tensor_scale, mean_k, mean_k_scales, mean_k_tensor_scale, mean_v,
    means, log_counts, means_stride_b, means_stride_h,
    HIGH: gl.constexpr, HIGH_STORAGE: gl.constexpr, HIGH_BLOCK: gl.constexpr, HIGH_VALUES: gl.constexpr,
    LOW: gl.constexpr, LOW_STORAGE: gl.constexpr, LOW_BLOCK: gl.constexpr, LOW_VALUES: gl.constexpr,
    MEAN: gl.constexpr, MEAN_STORAGE: gl.constexpr, MEAN_BLOCK: gl.constexpr, MEAN_VALUES: gl.constexpr,
    CAUSAL: gl.constexpr, MASKS_ALL: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Attention of 192 queries of one head; arguments as in kernel.py's `attend`, but for what follows.

    `indices` and `bounds` are a map's `shared` block lists (precision_map.py). HIGH is read as bf16 numbers without
    tensor scales, its V in bf16 ("plain"); LOW as e4m3 or int8 ones under scales of K's tiles or tokens, its V in e4m3
    ("channel"). Other scales and block sizes are not looked at. MEAN multiplies as the one or the other.
    Each warpgroup skips tiles by itself. With `records`, programs from `whole` on are pieces (hopper_split.py).
    """
    blocks = gl.cdiv(q_length, WARPGROUPS * ROWS)
    program, piece = gl.program_id(0), -1
    if records is not None:
        program, piece = place_of(program, whole, pieces)
        split = (records, finished, whole)
    else:
        split: gl.constexpr = None
    head, block = program // blocks, program % blocks
    if CAUSAL:
        block = blocks - 1 - block  # the longest block lists first
    batch, head_in_batch = head // heads, head % heads
    kv_head = head_in_batch // (heads // kv_heads)
    row = batch * map_stride_b + head_in_batch * map_stride_h + block
    if key_mask is not None:
        key_mask += batch.to(gl.int64) * (gl.cdiv(k_length, TILE) * TILE)

    low_element: gl.constexpr = gl.int8 if LOW == "int8" else gl.float8e4nv
    ring = gl.allocate_shared_memory(low_element, [2 * SLOTS, TILE, D], tile_layout(D, 8))
    if HIGH is not None or MEAN_STORAGE == "plain":
        q_high_smem = gl.allocate_shared_memory(gl.bfloat16, [WARPGROUPS, ROWS, D], tile_layout(D, 16))
        high_ones = gl.allocate_shared_memory(gl.bfloat16, [8, TILE], tile_layout(TILE, 16))
        high_ones.store(gl.full((8, TILE), 1.0, gl.bfloat16, STORED))
    else:
        q_high_smem: gl.constexpr = None
        high_ones: gl.constexpr = None
    if LOW is not None:
        q_low_smem = gl.allocate_shared_memory(low_element, [WARPGROUPS, ROWS, D], tile_layout(D, 8))
        ones = gl.allocate_shared_memory(gl.uint8, [8, TILE], tile_layout(TILE, 8))
        ones.store(gl.full((8, TILE), ONE, gl.uint8, STORED))
        ones = view(ones, gl.float8e4nv, [8, TILE], tile_layout(TILE, 8))
    else:
        q_low_smem: gl.constexpr = None
        ones: gl.constexpr = None
    fence_async_shared()
    # Each slot has a barrier that says it is full and one that says it is empty; each warpgroup one for its Q.
    barriers = gl.allocate_shared_memory(gl.int64, [2 * SLOTS + WARPGROUPS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(barriers.index(slot), count=1)
        mbarrier.init(barriers.index(SLOTS + slot), count=WARPGROUPS)
    for warpgroup in gl.static_range(WARPGROUPS):
        mbarrier.init(barriers.index(2 * SLOTS + warpgroup), count=1)

    # A partition keeps what it is given in registers: as few and as far computed as can be.
    smem = (q_high_smem, q_low_smem, ring, barriers)
    start = block * (WARPGROUPS * ROWS)
    block_list = (indices, row * map_length, bounds, row * 3, piece, pieces)
    kv_row = batch * kv_heads + kv_head
    scales = (q_low_scales, k_low_scales, v_units)
    if MEAN is not None:
        count = gl.cdiv(gl.cdiv(k_length, TILE), MEANS_TILES)
        first_tile, q_tiles = start // TILE, gl.cdiv(q_length, TILE)
        own_words = (batch * means_stride_b + head_in_batch * means_stride_h + first_tile) * count
        below = gl.where(first_tile + 1 < q_tiles, count, 0)
        of_means = (means, own_words, log_counts, mean_k_scales, batch, below, count)
    else:
        of_means: gl.constexpr = None
    out += batch.to(gl.int64) * out_stride_b + head_in_batch.to(gl.int64) * out_stride_h
    if skipped is not None:
        skipped += head
    given = (
        smem, high_ones, ones, scales, softmax_scale_log2, offset, key_mask, fine_mask, token_order, out, lse, head,
        kv_row, start, block_list, of_means, split, q_length, k_length, token_count, guards, head_dim, out_stride_s,
        skip_below, skipped,
    )  # fmt: skip
    if HIGH is None and MEAN_STORAGE == "plain":
        q_high = mean_q
    sources = (q_high, k_high, v_high, q_low, k_low, v_low, mean_k, mean_v)
    place = (batch, head_in_batch, kv_head, start)
    gl.warp_specialize(
        [
            (_attend, (0, given, HIGH, LOW, LOW_STORAGE, MEAN, MEAN_STORAGE, CAUSAL, MASKS_ALL, D, SLOTS)),
            (_attend, (1, given, HIGH, LOW, LOW_STORAGE, MEAN, MEAN_STORAGE, CAUSAL, MASKS_ALL, D, SLOTS)),
            (_attend, (2, given, HIGH, LOW, LOW_STORAGE, MEAN, MEAN_STORAGE, CAUSAL, MASKS_ALL, D, SLOTS)),
            (_load, (sources, smem, place, block_list, of_means, HIGH, LOW, MEAN, MEAN_STORAGE, D, SLOTS)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )
