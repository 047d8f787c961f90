"""Routing on the GPU: pool every tile, score every pair, choose those that are taken, write the block lists.

The kernels compute what reference.py defines, by the same formulas; their products are in TF32, whose rounding is about
as fine as the levels.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.quantiser.tile import is_last, joined, load_changed_pairs, token_at
from dma_diffusers.kernels.routing import reference
from dma_diffusers.kernels.tiling import layout, precision_map

TILE = tl.constexpr(layout.TILE)
HIGH, LOW, MASKED, MEAN = (tl.constexpr(int(phase)) for phase in precision_map.Phase)
UNVISITED = tl.constexpr(precision_map.UNVISITED)
SAMPLE_STRIDE = tl.constexpr(reference.SAMPLE_STRIDE)
SUBTILES = tl.constexpr(reference.SUBTILES)
LEVELS = tl.constexpr(reference.LEVELS)
BINS = tl.constexpr(reference.BINS)
LOWEST = tl.constexpr(reference.LOWEST)
LN_2 = tl.constexpr(reference.LN_2)
FARTHEST = tl.constexpr(reference.FARTHEST)
MINUS_INFINITY = tl.constexpr(-1.0e30)
LEAST_EXPONENT = tl.constexpr(float(reference.LEAST_EXPONENT))
LEAST_SHARE = tl.constexpr(2.0**reference.LEAST_EXPONENT)
SHARED_TILE_BITS = tl.constexpr(precision_map.SHARED_TILE_BITS)
MEANS_TILES = tl.constexpr(precision_map.MEANS_TILES)


@triton.jit
def sampled_tokens(tile, number, STRIDE: tl.constexpr, mask, batch, token_order, length, token_count):
    """The tokens that have some numbers in a tile's staggered sample, which takes one of every STRIDE slots.

    `length` stands where none counts. mask: uint8 [B, tiles·128], 0 for slots that don't count.
    """
    slots = tile * TILE + number * STRIDE + (number + number // STRIDE) % STRIDE
    tokens = token_at(token_order, slots, length, token_count)
    if mask is not None:
        place = batch.to(tl.int64) * (tl.cdiv(length, TILE) * TILE) + slots
        tokens = tl.where(tl.load(mask + place, mask=slots < length, other=0) != 0, tokens, length)
    return tokens


@triton.jit
def _means_and_variances(
    x, mean, factor, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    mask, token_order, index, heads, length, token_count,
    stride_b, stride_h, stride_s,
    PARTS: tl.constexpr, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The mean and the variance of each channel of (x − mean)·factor over a tile's sample, float32 [PARTS, D] each.

    Both are NaN where no token of the sample counts. x goes through norm and RoPE first.
    index: the number of the tile among those of all heads. mask: uint8 [B, tiles·128], 0 for slots that don't count.
    """
    tiles = tl.cdiv(length, TILE)
    head, four = index // tiles, tl.arange(0, TILE // SAMPLE_STRIDE)
    batch, columns = head // heads, tl.arange(0, D)
    tokens = sampled_tokens(index % tiles, four, SAMPLE_STRIDE, mask, batch, token_order, length, token_count)
    count = _sums((tokens < length).to(tl.float32)[:, None], PARTS)
    tokens = tokens[:, None]
    even, odd = load_changed_pairs(
        x, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE, batch, head % heads, tokens, length,
        stride_b, stride_h, stride_s, PAIRED, HEAD_DIM, D,
    )  # fmt: skip
    value = joined(even, odd)
    middle = _sums(value, PARTS) / count
    parts = tl.reshape(value, (PARTS, value.shape[0] // PARTS, D)) - middle[:, None, :]
    counts = tl.reshape((tokens < length).to(tl.float32), (PARTS, value.shape[0] // PARTS, 1))
    variance = tl.sum(parts * parts * counts, axis=1) / count
    if mean is not None:
        middle -= tl.load(mean + head * D + columns)[None, :]
    return middle * factor, variance * (factor * factor)


@triton.jit
def _sums(x, PARTS: tl.constexpr):
    """The sums of the rows of each of PARTS equal parts of x: [PARTS, columns of x]."""
    return tl.sum(tl.reshape(x, (PARTS, x.shape[0] // PARTS, x.shape[1])), axis=1)


@triton.jit
def _store_pools(pools, index, mean, variance, PARTS: tl.constexpr, D: tl.constexpr):
    part = index.to(tl.int64) * PARTS + tl.arange(0, PARTS)
    offsets = part[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    tl.store(pools + offsets, mean)
    tl.store(pools + offsets + D, variance)


@triton.jit(do_not_specialize=["first", "q_length", "k_length", "token_count"])
def pool(
    q, k, v, mean, factor, q_cos, q_sin, k_cos, k_sin,
    q_weight, q_first_weight, k_weight, k_first_weight, eps, first, ROUNDS_TWICE: tl.constexpr,
    key_mask, token_order, q_pools, k_pools, v_pools,
    heads, kv_heads, kv_heads_in_all, q_length, k_length, token_count,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pool one tile of one head of V, K or Q; the arguments are those of the quantiser's `encode`.

    q_pools: float32 [B·H, q_tiles, 2, D], the mean and the variance of each channel.
    k_pools: float32 [B·Hkv, 4·k_tiles, 2, D], the same of each sub-tile over keys that are seen.
    v_pools: float32 [B·Hkv, k_tiles], the sum of the channels' variances over the same keys. Where q_pools and k_pools
    are None, these alone are wanted.
    """
    index = tl.program_id(0)
    of_keys = kv_heads_in_all * tl.cdiv(k_length, TILE)
    if index < of_keys:
        _, v_variance = _means_and_variances(
            v, None, 1.0, None, None, None, None, None, None, False, key_mask, token_order, index, kv_heads,
            k_length, token_count, v_stride_b, v_stride_h, v_stride_s, 1, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        tl.store(v_pools + index, tl.sum(v_variance))
    elif k_pools is not None:  # which the compiler knows
        if index < 2 * of_keys:
            index -= of_keys
            k_middle, k_variance = _means_and_variances(
                k, mean, 1.0, k_cos, k_sin, k_weight, k_first_weight, eps, first, ROUNDS_TWICE,
                key_mask, token_order, index, kv_heads, k_length, token_count,
                k_stride_b, k_stride_h, k_stride_s, SUBTILES, PAIRED, HEAD_DIM, D,
            )  # fmt: skip
            _store_pools(k_pools, index, k_middle, k_variance, SUBTILES, D)
        else:
            index -= 2 * of_keys
            q_middle, q_variance = _means_and_variances(
                q, None, factor, q_cos, q_sin, q_weight, q_first_weight, eps, first, ROUNDS_TWICE,
                None, token_order, index, heads, q_length, token_count,
                q_stride_b, q_stride_h, q_stride_s, 1, PAIRED, HEAD_DIM, D,
            )  # fmt: skip
            _store_pools(q_pools, index, q_middle, q_variance, 1, D)


@triton.jit
def _log_mean_exp(deviation):
    within = tl.minimum(deviation, FARTHEST)
    return within * LN_2 * (deviation - within * 0.5)


@triton.jit
def _pool(pools, index, inside, D: tl.constexpr):
    """The means and the variances of some pools, [numbers, D] each; zeros where not `inside`."""
    offsets = index[:, None] * (2 * D) + tl.arange(0, D)[None, :]
    inside = inside[:, None]
    return tl.load(pools + offsets, mask=inside, other=0.0), tl.load(
        pools + offsets + D, mask=inside, other=0.0
    )


@triton.jit
def _scores(q_mean, q_variance, k_pools, subtile, inside, D: tl.constexpr):
    """The mean and the standard deviation of the scores of some pairs, [Q tiles, KV sub-tiles] each."""
    k_mean, k_variance = _pool(k_pools, subtile, inside, D)
    score = tl.dot(q_mean, k_mean.trans(1, 0))
    variance = tl.dot(q_variance, (k_mean * k_mean + k_variance).trans(1, 0))
    variance = tl.dot(q_mean * q_mean, k_variance.trans(1, 0), variance)
    return score, tl.sqrt(variance)


@triton.jit
def store_levels(levels, phases, importance, is_known, pairs, inside):
    """Write the levels of some pairs: −1 for all but those that are offered, which are LOW and of known importance."""
    phase = tl.load(phases + pairs, mask=inside, other=UNVISITED)
    is_offered = (phase == LOW) & is_known & (importance == importance)
    level = tl.minimum(tl.maximum((importance - LOWEST) * BINS, 0.0), LEVELS - 1.0).to(tl.int32)
    tl.store(levels + pairs, tl.where(is_offered, level, -1).to(tl.int16), mask=inside)


@triton.jit(do_not_specialize=["q_tiles", "k_tiles"])
def score(
    q_pools, k_pools, v_pools, phases, notes, levels, heads, kv_heads, q_tiles, k_tiles, phases_stride_h,
    POWER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Score the pairs of ROWS Q tiles of one head: write their levels.

    A program walks the pools of keys once. It notes the sum of each pair, of which it knows the share at the end.

    q_pools, k_pools, v_pools: what `pool` wrote. phases: uint8 [H or 1, q_tiles, k_tiles].
    notes: float32 [B·H, ⌈q_tiles / ROWS⌉·ROWS, k_tiles], room for the notes.
    levels: int16 [B·H, q_tiles, k_tiles], −1 for pairs that aren't LOW.
    POWER: 1 for importance by mass, else 2.
    """
    blocks, row = tl.cdiv(q_tiles, ROWS), tl.arange(0, ROWS)[:, None]
    head, q_tile = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    batch, head_in_batch = head // heads, head % heads
    kv_head = batch * kv_heads + head_in_batch // (heads // kv_heads)
    q_pools += head.to(tl.int64) * q_tiles * (2 * D)
    k_pools += kv_head.to(tl.int64) * k_tiles * (SUBTILES * 2 * D)
    v_pools += kv_head.to(tl.int64) * k_tiles
    phases += head_in_batch.to(tl.int64) * phases_stride_h
    notes += tl.program_id(0).to(tl.int64) * k_tiles * ROWS
    levels += head.to(tl.int64) * q_tiles * k_tiles
    q_mean, q_variance = _pool(q_pools, q_tile, q_tile < q_tiles, D)

    largest = tl.full((ROWS,), MINUS_INFINITY, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        inside = (q_tile < q_tiles)[:, None] & (k_tile < k_tiles)[None, :]
        phase = tl.load(phases + q_tile[:, None] * k_tiles + k_tile[None, :], mask=inside, other=UNVISITED)
        summed = tl.zeros((ROWS, COLUMNS), tl.float32)
        for part in range(SUBTILES):
            mean, deviation = _scores(
                q_mean, q_variance, k_pools, k_tile * SUBTILES + part, k_tile < k_tiles, D
            )
            mean_exp = mean + _log_mean_exp(deviation)
            counts = (phase != UNVISITED) & (mean_exp == mean_exp)
            mean_exp = tl.where(counts, mean_exp, float("-inf"))
            larger = tl.maximum(largest, tl.max(mean_exp, axis=1))
            shrunk = tl.exp2(largest - larger)
            total = total * shrunk + tl.sum(tl.exp2(mean_exp - larger[:, None]), axis=1)
            largest = larger
            # Least sums stay over 0, so that a sum of 0 says that no sub-tile counts.
            exponent = POWER * (mean - larger[:, None]) + _log_mean_exp(POWER * deviation)
            share = tl.where(counts, tl.exp2(tl.maximum(exponent, LEAST_EXPONENT)), 0.0)
            least = tl.where(counts | (summed > 0.0), LEAST_SHARE, 0.0)
            summed = summed * (shrunk if POWER == 1 else shrunk * shrunk)[:, None] + share
            summed = tl.maximum(summed, least)
        note = tl.log2(summed) + POWER * largest[:, None]
        tl.store(notes + row * k_tiles + k_tile[None, :], note, mask=(k_tile < k_tiles)[None, :])
    # A Q tile that visits nothing has the sum 0, which has no logarithm.
    log_total = tl.where(total == 0.0, 0.0, largest + tl.log2(tl.maximum(total, 1.0)))

    tl.debug_barrier()  # the whole program has noted
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        pairs = q_tile[:, None] * k_tiles + k_tile[None, :]
        inside = (q_tile < q_tiles)[:, None] & (k_tile < k_tiles)[None, :]
        note = tl.load(notes + row * k_tiles + k_tile[None, :], mask=inside, other=float("-inf"))
        importance = note - POWER * log_total[:, None]
        if POWER == 2:
            spread = tl.load(v_pools + k_tile, mask=k_tile < k_tiles, other=1.0)
            importance = 0.5 * (importance + tl.log2(spread)[None, :])
        store_levels(levels, phases, importance, note > float("-inf"), pairs, inside)


@triton.jit
def _least_bin(histogram, allowed):
    """The first bin of the top bins that hold at most `allowed` pairs together, and how many more are allowed."""
    counts = tl.load(histogram + tl.arange(0, BINS))
    fits = tl.cumsum(counts, axis=0, reverse=True) <= allowed
    return tl.sum((~fits).to(tl.int32), axis=0), allowed - tl.sum(tl.where(fits, counts, 0), axis=0)


@triton.jit(do_not_specialize=["allowed", "pairs"])
def count(levels, histogram, allowed, pairs, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the pairs in each binade, among BLOCK pairs of a batch entry.

    It is a kernel of its own, because Triton may flatten levels and a mask in different orders before `tl.histogram`.

    levels: int16 [B, pairs]. histogram: int32 [B, 2, BINS], zeros at first; [:, 0] receives the counts.
    STEPS: counts the pairs in each level of the binade that is upgraded in part; [:, 1] receives these.
    """
    batch, pair = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    histogram += batch * (2 * BINS)
    level = tl.load(levels + batch.to(tl.int64) * pairs + pair, mask=pair < pairs, other=-1).to(tl.int32)
    place, is_counted = level // BINS, level >= 0
    if STEPS:
        binade, _ = _least_bin(histogram, allowed)
        place, is_counted = level % BINS, is_counted & (place == binade - 1)
        histogram += BINS
    counts = tl.histogram(place, BINS, mask=is_counted)
    tl.atomic_add(histogram + tl.arange(0, BINS), counts, mask=counts != 0, sem="relaxed")


@triton.jit
def _least_level(histogram, allowed):
    """The least level that is upgraded: at most `allowed` pairs have it or a higher one."""
    binade, left = _least_bin(histogram, allowed)
    step, _ = _least_bin(histogram + BINS, left)
    return tl.maximum((binade - 1) * BINS + step, 0)


@triton.jit
def _keys(levels, phase, pair, k_tile, k_tiles, inside):
    """A number for each LOW pair of a Q tile, larger for more important ones, all different; −1 for other pairs."""
    level = tl.load(levels + pair, mask=inside, other=-1).to(tl.int32)
    return tl.where(phase == LOW, (level + 1) * k_tiles + (k_tiles - 1 - k_tile), -1)


@triton.jit
def _least_keys(levels, phases, shares, q_tile, k_tiles, bits, COLUMNS: tl.constexpr):
    """The least `_keys` of the pairs of one Q tile that become HIGH, and that become HIGH or stay LOW."""
    highs, kept = tl.load(shares), tl.load(shares + 1)
    least_high, least_kept = 0, 0
    for place in range(bits):
        bit = 1 << (bits - 1 - place)
        above_high, above_kept = 0, 0
        for first in range(0, k_tiles, COLUMNS):
            k_tile = first + tl.arange(0, COLUMNS)
            pair, inside = q_tile * k_tiles + k_tile, k_tile < k_tiles
            phase = tl.load(phases + pair, mask=inside, other=UNVISITED)
            key = _keys(levels, phase, pair, k_tile, k_tiles, inside)
            both = (key >= (least_high | bit)).to(tl.int32) | ((key >= (least_kept | bit)).to(tl.int32) << 16)
            both = tl.sum(both, axis=0)
            above_high += both & 0xFFFF
            above_kept += both >> 16
        least_high = tl.where(above_high >= highs, least_high | bit, least_high)
        least_kept = tl.where(above_kept >= kept, least_kept | bit, least_kept)
    return least_high, least_kept


@triton.jit
def _store_bits(words, is_set, word, count, COLUMNS: tl.constexpr):
    bits = is_set.to(tl.int32) << (tl.arange(0, COLUMNS) % MEANS_TILES)
    bits = tl.sum(tl.reshape(bits, (COLUMNS // MEANS_TILES, MEANS_TILES)), axis=1)
    tl.store(words + word, bits, mask=word < count)


@triton.jit(do_not_specialize=["allowed", "q_tiles", "k_tiles", "bits"])
def choose(
    levels, phases, histogram, finished, allowed, shares, high, left, heads, q_tiles, k_tiles, bits, phases_stride_h,
    shares_stride_h,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Choose the pairs of one Q tile that become HIGH, and those that are MEAN, or left out.

    levels, histogram: what `score` and `count` wrote. allowed: how many pairs of a batch entry may be upgraded.
    finished: int32 [1], 0 at first, counts the programs that are done; the last one returns the histogram to zeros.
    shares: int32 [H or 1, q_tiles, 2], how many pairs become HIGH, and how many become HIGH or stay LOW; None where
    the histogram decides, which is None else. bits: how many a key has (`_keys`).
    high, left: int32 [B·H, q_tiles, ⌈k_tiles / 32⌉], a bit for each LOW pair that becomes HIGH, and for each pair that
    is MEAN by its phase, or LOW and left; `left` is None where the rest stays LOW.
    """
    head, q_tile = tl.program_id(0) // q_tiles, tl.program_id(0) % q_tiles
    phases += (head % heads).to(tl.int64) * phases_stride_h
    levels += head.to(tl.int64) * q_tiles * k_tiles
    least_high, least_kept = 0, 0
    if shares is None:
        # The first of the keys with the least level that is upgraded.
        least = _least_level(histogram + head // heads * (2 * BINS), allowed)
        least_high = (least + 1) * k_tiles
    else:
        shares += (head % heads) * shares_stride_h + q_tile * 2
        least_high, least_kept = _least_keys(levels, phases, shares, q_tile, k_tiles, bits, COLUMNS)
    words = tl.cdiv(k_tiles, MEANS_TILES)
    high += tl.program_id(0).to(tl.int64) * words
    if left is not None:
        left += tl.program_id(0).to(tl.int64) * words
    for first in range(0, words, COLUMNS // MEANS_TILES):
        k_tile = first * MEANS_TILES + tl.arange(0, COLUMNS)
        word = first + tl.arange(0, COLUMNS // MEANS_TILES)
        pair, inside = q_tile * k_tiles + k_tile, k_tile < k_tiles
        phase = tl.load(phases + pair, mask=inside, other=UNVISITED)
        key = _keys(levels, phase, pair, k_tile, k_tiles, inside)
        _store_bits(high, (phase == LOW) & (key >= least_high), word, words, COLUMNS)
        if left is not None:
            is_left = (phase == MEAN) | ((phase == LOW) & (key < least_kept))
            _store_bits(left, is_left, word, words, COLUMNS)
    if finished is not None:  # noqa: SIM102 (`and` would compile both)
        if is_last(finished, tl.num_programs(0)):
            for entry in range(tl.num_programs(0) // (heads * q_tiles)):
                tl.store(
                    histogram + entry * (2 * BINS) + tl.arange(0, 2 * BINS), tl.zeros((2 * BINS,), tl.int32)
                )


@triton.jit
def _is_set(words, k_tile, inside):
    """Tells whether the bits of some KV tiles are set."""
    word = tl.load(words + k_tile // MEANS_TILES, mask=inside, other=0)
    return ((word >> (k_tile % MEANS_TILES)) & 1) != 0


@triton.jit
def _visitors(
    phases, high, left, first_row, k_tile, q_tiles, k_tiles, BLOCKS: tl.constexpr, ROWS: tl.constexpr
):
    """The blocks of a program that visit some KV tiles, one int32 [tiles] for each phase, with a bit for each block."""
    in_high, in_low, masked = tl.zeros_like(k_tile), tl.zeros_like(k_tile), tl.zeros_like(k_tile)
    words = tl.cdiv(k_tiles, MEANS_TILES)
    for block in tl.static_range(BLOCKS):
        q_tile = (first_row + block * ROWS) // TILE
        inside = k_tile < tl.where(q_tile < q_tiles, k_tiles, 0)
        phase = tl.load(phases + q_tile * k_tiles + k_tile, mask=inside, other=UNVISITED)
        is_upgraded = (phase == LOW) & _is_set(high + q_tile * words, k_tile, inside)
        is_low = (phase == LOW) & ~is_upgraded
        if left is not None:
            is_low &= ~_is_set(left + q_tile * words, k_tile, inside)
        in_high |= ((phase == HIGH) | is_upgraded).to(tl.int32) << block
        in_low |= is_low.to(tl.int32) << block
        masked |= (phase == MASKED).to(tl.int32) << block
    return in_high, in_low, masked


@triton.jit
def _write(indices, start, k_tile, visitors, BLOCKS: tl.constexpr):
    """Write the entries of the visited KV tiles, from `start` on; return where they end."""
    visited = (visitors != 0).to(tl.int32)
    entry = k_tile if BLOCKS == 1 else k_tile | (visitors << SHARED_TILE_BITS)
    tl.store(indices + (start + tl.cumsum(visited, axis=0) - visited), entry, mask=visitors != 0)
    return start + tl.sum(visited, axis=0)


@triton.jit(do_not_specialize=["q_tiles", "k_tiles", "programs", "length"])
def write_block_lists(
    phases, chosen_high, left, indices, bounds, heads, q_tiles, k_tiles, programs, length, phases_stride_h,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the block list of one program: BLOCKS blocks of ROWS queries of one head.

    With one block it is a list of `PrecisionMap`, with several a list of its `shared`.
    chosen_high, left: what `choose` wrote. indices: int32 [B·H, programs, length]. bounds: int32 [B·H, programs, 3].
    """
    head, program = tl.program_id(0) // programs, tl.program_id(0) % programs
    phases += (head % heads).to(tl.int64) * phases_stride_h
    chosen_high += head.to(tl.int64) * q_tiles * tl.cdiv(k_tiles, MEANS_TILES)
    if left is not None:
        left += head.to(tl.int64) * q_tiles * tl.cdiv(k_tiles, MEANS_TILES)
    indices += tl.program_id(0).to(tl.int64) * length
    bounds += tl.program_id(0) * 3
    first_row = program * BLOCKS * ROWS

    high_end, low_entries = 0, 0
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        high, low, _ = _visitors(phases, chosen_high, left, first_row, k_tile, q_tiles, k_tiles, BLOCKS, ROWS)
        high_end += tl.sum((high != 0).to(tl.int32), axis=0)
        low_entries += tl.sum((low != 0).to(tl.int32), axis=0)
    high_next, low_next, masked_next = 0, high_end, high_end + low_entries
    for first in range(0, k_tiles, COLUMNS):
        k_tile = first + tl.arange(0, COLUMNS)
        high, low, masked = _visitors(
            phases, chosen_high, left, first_row, k_tile, q_tiles, k_tiles, BLOCKS, ROWS
        )
        high_next = _write(indices, high_next, k_tile, high, BLOCKS)
        low_next = _write(indices, low_next, k_tile, low, BLOCKS)
        masked_next = _write(indices, masked_next, k_tile, masked, BLOCKS)
    tl.store(bounds, high_next)
    tl.store(bounds + 1, low_next)
    tl.store(bounds + 2, masked_next)
