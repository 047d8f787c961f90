"""The statistics of a whole head that encoding needs first: K's mean, V's mean and its scales.

Each program stores the partial results of a chunk of tokens, and the last one of a head reduces them, always in the
same order: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.quantiser.tile import (
    E4M3_MAX_BITS,
    NOT_FINITE,
    e8m0_ceil,
    is_last,
    load_changed_pairs,
    load_tile,
    magnitude_bits,
    power_of_two,
    rotated_rows,
    with_rotated_channels,
)

# A run of tokens is what 8 warps load with one instruction, of 2 bytes an element. Several are loaded at once, so that
# enough bytes are on their way; fewer of K's, whose sums in float64 take registers, and where V's channels are rotated.
_RUN_ELEMENTS = tl.constexpr(2048)
_KEY_RUNS = tl.constexpr(2)
_VALUE_RUNS = tl.constexpr(8)
_ROTATED_RUNS = tl.constexpr(2)


@triton.jit
def _whole_mean(partials, head, heads, CHUNKS: tl.constexpr, D: tl.constexpr):
    """The mean in one head, of its partial results."""
    columns = tl.arange(0, D)
    place = partials + (head * CHUNKS + tl.arange(0, CHUNKS))[:, None] * D + columns[None, :]
    plane = heads * CHUNKS * D
    leading = tl.load(place, cache_modifier=".cg").to(tl.float64)
    rest = tl.load(place + plane, cache_modifier=".cg").to(tl.float64)
    counts = tl.load(place + 2 * plane, cache_modifier=".cg")
    total = tl.sum(leading + rest, axis=0).to(tl.float32)
    return tl.div_rn(total, tl.maximum(tl.sum(counts, axis=0), 1.0))


@triton.jit
def _store_units(
    partials, v_units, head, heads, SMOOTHS: tl.constexpr, CHUNKS: tl.constexpr, D: tl.constexpr
):
    """Store V's mean in one head, and for each channel the normal power of two that brings the rest within e4m3."""
    columns = tl.arange(0, D)
    place = (head * CHUNKS + tl.arange(0, CHUNKS))[:, None] * D + columns[None, :]
    amax = tl.max(tl.load(partials + place, cache_modifier=".cg"), axis=0)
    mean = tl.zeros((D,), tl.float32)
    if SMOOTHS:
        mean = _whole_mean(partials + heads * CHUNKS * D, head, heads, CHUNKS, D)
        mean = tl.where(amax + tl.abs(mean) < float("inf"), mean, 0.0)
        amax += tl.abs(mean)
    amax_bits = magnitude_bits(amax)
    code = tl.where(amax_bits == 0, 127, tl.maximum(e8m0_ceil(amax_bits, E4M3_MAX_BITS), 1))
    # the reference says why the mean is none or a multiple of two units; adding 1.5 · 2^23 rounds it to one
    step, inverse = power_of_two(code + 1), power_of_two(253 - code)
    mean = tl.where(tl.abs(mean) < amax * 0.03125, 0.0, ((mean * inverse + 12582912.0) - 12582912.0) * step)
    tl.store(v_units + head * (2 * D) + columns, power_of_two(code))
    tl.store(v_units + head * (2 * D) + D + columns, mean)


@triton.jit
def _in_runs(x, RUNS: tl.constexpr):
    """[tokens, D] as [RUNS, tokens / RUNS, D]: a thread has elements of the same place in every run."""
    return tl.reshape(x, (RUNS, x.shape[0] // RUNS, x.shape[1]))


@triton.jit
def _seen(key_mask, tokens, inside, batch, stride_b, stride_s):
    """Leaves of `inside` those places whose keys the mask shows."""
    if key_mask is not None:
        place = batch.to(tl.int64) * stride_b + tokens.to(tl.int64) * stride_s
        inside &= tl.load(key_mask + place, mask=inside, other=0) != 0
    return inside


@triton.jit
def _sums(
    x, partials, cos, sin, weight, first_weight, eps, first_tokens, ROUNDS_TWICE: tl.constexpr, key_mask,
    batch, head_in_batch, head, heads, chunk, length, step,
    stride_b, stride_h, stride_s, mask_stride_b, mask_stride_s,
    ROTATED: tl.constexpr, CHUNKS: tl.constexpr, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums and counts of finite numbers of x where keys are seen, among every `step`-th token of one chunk."""
    samples = tl.cdiv(length, step)
    share = tl.cdiv(samples, CHUNKS)
    last = tl.minimum((chunk + 1) * share, samples)
    RUN: tl.constexpr = _RUN_ELEMENTS // D
    even_sums, odd_sums = tl.zeros((RUN, D // 2), tl.float64), tl.zeros((RUN, D // 2), tl.float64)
    even_counts, odd_counts = tl.zeros((RUN, D // 2), tl.int32), tl.zeros((RUN, D // 2), tl.int32)
    for first in range(chunk * share, last, _KEY_RUNS * RUN):
        sample = (first + tl.arange(0, _KEY_RUNS * RUN))[:, None]
        tokens = tl.where(sample < last, sample * step, length)
        inside = _seen(key_mask, tokens, tokens < length, batch, mask_stride_b, mask_stride_s)
        even, odd = load_changed_pairs(
            x, cos, sin, weight, first_weight, eps, first_tokens, ROUNDS_TWICE, batch, head_in_batch, tokens, length,
            stride_b, stride_h, stride_s, PAIRED, HEAD_DIM, D,
        )  # fmt: skip
        if ROTATED > 1:
            even, odd = with_rotated_channels(even, odd, ROTATED, D)
        even_sums, even_counts = _added(even_sums, even_counts, even, inside)
        odd_sums, odd_counts = _added(odd_sums, odd_counts, odd, inside)
    place = partials + (head * CHUNKS + chunk) * D + 2 * tl.arange(0, D // 2)
    _store_sums(place, even_sums, even_counts, heads * CHUNKS * D)
    _store_sums(place + 1, odd_sums, odd_counts, heads * CHUNKS * D)


@triton.jit
def _added(sums, counts, x, inside):
    """Sums and counts with the finite numbers of some runs of tokens that are `inside`."""
    counts_too = inside & (magnitude_bits(x) < NOT_FINITE)
    sums += tl.sum(_in_runs(tl.where(counts_too, x, 0.0), _KEY_RUNS).to(tl.float64), axis=0)
    return sums, counts + tl.sum(_in_runs(counts_too.to(tl.int32), _KEY_RUNS), axis=0)


@triton.jit
def _store_sums(place, sums, counts, plane):
    """Store the sums and the counts of a chunk.

    In float64, kept as two float32 numbers, a sum hardly depends on its order, which the reference does not share.
    """
    total = tl.sum(sums, axis=0)
    leading = total.to(tl.float32)
    tl.store(place, leading)
    tl.store(place + plane, (total - leading.to(tl.float64)).to(tl.float32))
    tl.store(place + 2 * plane, tl.sum(counts, axis=0).to(tl.float32))


@triton.jit
def _value_range(
    v, partials, key_mask, batch, head_in_batch, head, heads, chunk, length,
    stride_b, stride_h, stride_s, mask_stride_b, mask_stride_s,
    ROTATED: tl.constexpr, CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of each channel in one chunk, of keys that are seen."""
    share = tl.cdiv(length, CHUNKS)
    last = tl.minimum((chunk + 1) * share, length)
    columns = tl.arange(0, D)
    RUN: tl.constexpr = _RUN_ELEMENTS // D
    RUNS: tl.constexpr = _VALUE_RUNS if ROTATED == 1 else _ROTATED_RUNS
    largest = tl.zeros((RUN, D), tl.int32)
    for first in range(chunk * share, last, RUNS * RUN):
        tokens = (first + tl.arange(0, RUNS * RUN))[:, None]
        inside = (tokens < last) & (columns < HEAD_DIM)[None, :]
        inside = _seen(key_mask, tokens, inside, batch, mask_stride_b, mask_stride_s)
        x = load_tile(v, batch, head_in_batch, tokens, columns, inside, stride_b, stride_h, stride_s)
        if ROTATED > 1:
            x = rotated_rows(x, ROTATED)
        bits = magnitude_bits(x)
        largest = tl.maximum(largest, tl.max(_in_runs(tl.where(bits < NOT_FINITE, bits, 0), RUNS), axis=0))
    place = partials + (head * CHUNKS + chunk) * D + columns
    tl.store(place, tl.max(largest, axis=0).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["first_tokens", "length", "step", "mask_stride_b", "mask_stride_s"])
def statistics(
    k, v, partials, finished, mean, v_units, cos, sin, weight, first_weight, eps, first_tokens,
    ROUNDS_TWICE: tl.constexpr, key_mask, heads, heads_in_batch, length, step,
    k_stride_b, k_stride_h, k_stride_s, v_stride_b, v_stride_h, v_stride_s,
    mask_stride_b, mask_stride_s,
    SMOOTHS_V: tl.constexpr, ROTATED_VALUES: tl.constexpr, CHUNKS: tl.constexpr, PAIRED: tl.constexpr,
    HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One chunk of one head of K ([B, H, length, HEAD_DIM], any strides, behind its norm and its RoPE), or of V.

    mean: float32 [B·H, D], K's over every `step`-th token, of finite numbers. v_units: float32 [B·H, 2, D], the powers
    of two that bring V's finite numbers within e4m3 when they have lost their mean, and that mean, zeros unless
    SMOOTHS_V, of V whose channels are rotated in blocks of ROTATED_VALUES. K or V may be None. key_mask: uint8 [B,
    length], any strides, 0 for keys that count for nothing, or None.
    `heads` is B·H. finished: int32 [2, B·H], zeros.
    partials: float32 [7, B·H, CHUNKS, D]: of K the sum as two numbers to be added and the count; of V its range, and
    the same as of K.
    """
    program, of_keys = tl.program_id(0), 0
    if k is not None:
        of_keys = heads * CHUNKS
        if program < of_keys:
            head = program // CHUNKS
            _sums(
                k, partials, cos, sin, weight, first_weight, eps, first_tokens, ROUNDS_TWICE, key_mask,
                head // heads_in_batch, head % heads_in_batch, head, heads, program % CHUNKS, length, step,
                k_stride_b, k_stride_h, k_stride_s, mask_stride_b, mask_stride_s,
                1, CHUNKS, PAIRED, HEAD_DIM, D,
            )  # fmt: skip
            if is_last(finished + head, CHUNKS):
                of_head = _whole_mean(partials, head, heads, CHUNKS, D)
                tl.store(mean + head * D + tl.arange(0, D), of_head)
    if v is not None:
        program -= of_keys
        if program >= 0:
            head = program // CHUNKS
            partials += 3 * heads * CHUNKS * D
            _value_range(
                v, partials, key_mask, head // heads_in_batch, head % heads_in_batch, head, heads, program % CHUNKS,
                length, v_stride_b, v_stride_h, v_stride_s, mask_stride_b, mask_stride_s,
                ROTATED_VALUES, CHUNKS, HEAD_DIM, D,
            )  # fmt: skip
            if SMOOTHS_V:
                _sums(
                    v, partials + heads * CHUNKS * D, None, None, None, None, None, 0, False, key_mask,
                    head // heads_in_batch, head % heads_in_batch, head, heads, program % CHUNKS, length, step,
                    v_stride_b, v_stride_h, v_stride_s, mask_stride_b, mask_stride_s,
                    ROTATED_VALUES, CHUNKS, PAIRED, HEAD_DIM, D,
                )  # fmt: skip
            if is_last(finished + heads + head, CHUNKS):
                _store_units(partials, v_units, head, heads, SMOOTHS_V, CHUNKS, D)
