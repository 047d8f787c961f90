"""The statistics of a whole head that encoding needs first: K's mean and V's scales.

Each program stores the partial results of a chunk of tokens, and the last one of a head reduces them, always in the
same token_order: the same inputs give the same bits.
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.quantiser.tile import (
    E4M3_MAX_BITS,
    NOT_FINITE,
    e8m0_ceil,
    is_last,
    load_changed,
    load_tile,
    magnitude_bits,
    power_of_two,
    publish,
)

# A run of tokens is what 8 warps load with one instruction, of 2 bytes an element. Several are loaded at once, so that
# enough bytes are on their way; fewer of K's, whose sums in float64 take registers. A chunk has whole runs.
_RUN_ELEMENTS = tl.constexpr(2048)
_KEY_RUNS = tl.constexpr(2)
_VALUE_RUNS = tl.constexpr(8)


@triton.jit
def _whole_mean(partials, mean, head, heads, CHUNKS: tl.constexpr, D: tl.constexpr):
    """K's mean in one head, of its partial results."""
    columns = tl.arange(0, D)
    place = partials + (head * CHUNKS + tl.arange(0, CHUNKS // 2))[:, None] * D + columns[None, :]
    plane = heads * CHUNKS * D
    leading = tl.load(place, cache_modifier=".cg").to(tl.float64)
    rest = tl.load(place + plane, cache_modifier=".cg").to(tl.float64)
    counts = tl.load(place + 2 * plane, cache_modifier=".cg")
    total = tl.sum(leading + rest, axis=0).to(tl.float32)
    tl.store(mean + head * D + columns, tl.div_rn(total, tl.maximum(tl.sum(counts, axis=0), 1.0)))


@triton.jit
def _whole_scale(partials, v_scale, head, heads, CHUNKS: tl.constexpr, D: tl.constexpr):
    """The normal power of two that brings each channel of V in one head within e4m3; 1 for zeros."""
    columns = tl.arange(0, D)
    place = (head * CHUNKS + tl.arange(0, CHUNKS))[:, None] * D + columns[None, :]
    ranges = tl.load(partials + 3 * heads * CHUNKS * D + place, cache_modifier=".cg")
    amax_bits = magnitude_bits(tl.max(ranges, axis=0))
    code = tl.where(amax_bits == 0, 127, tl.maximum(e8m0_ceil(amax_bits, E4M3_MAX_BITS), 1))
    tl.store(v_scale + head * D + columns, power_of_two(code))


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
def _key_sums(
    k, partials, cos, sin, weight, first_weight, eps, first_tokens, key_mask,
    batch, head_in_batch, head, heads, chunk, length, step,
    stride_b, stride_h, stride_s, rope_stride_s, rope_stride_d, mask_stride_b, mask_stride_s,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Sums and counts of the finite numbers of keys that are seen, among every `step`-th token of one chunk."""
    samples = tl.cdiv(length, step)
    columns = tl.arange(0, D)
    RUN: tl.constexpr = _RUN_ELEMENTS // D
    share = tl.cdiv(tl.cdiv(samples, CHUNKS // 2), _KEY_RUNS * RUN) * (_KEY_RUNS * RUN)
    last = tl.minimum((chunk + 1) * share, samples)
    sums, counts = tl.zeros((RUN, D), tl.float64), tl.zeros((RUN, D), tl.int32)
    for first in range(chunk * share, last, _KEY_RUNS * RUN):
        sample = (first + tl.arange(0, _KEY_RUNS * RUN))[:, None]
        inside = (sample < last) & (columns < HEAD_DIM)[None, :]
        inside = _seen(key_mask, sample * step, inside, batch, mask_stride_b, mask_stride_s)
        x = load_changed(
            k, cos, sin, weight, first_weight, eps, first_tokens, batch, head_in_batch, sample * step, columns, inside,
            length, stride_b, stride_h, stride_s, rope_stride_s, rope_stride_d, HEAD_DIM, D,
        )  # fmt: skip
        is_finite = magnitude_bits(x) < NOT_FINITE
        sums += tl.sum(_in_runs(tl.where(is_finite, x, 0.0), _KEY_RUNS).to(tl.float64), axis=0)
        counts += tl.sum(_in_runs((is_finite & inside).to(tl.int32), _KEY_RUNS), axis=0)
    # In float64, kept as two float32 numbers, a sum hardly depends on its order, which the reference does not share.
    total = tl.sum(sums, axis=0)
    leading = total.to(tl.float32)
    place = partials + (head * CHUNKS + chunk) * D + columns
    plane = heads * CHUNKS * D
    tl.store(place, leading)
    tl.store(place + plane, (total - leading.to(tl.float64)).to(tl.float32))
    tl.store(place + 2 * plane, tl.sum(counts, axis=0).to(tl.float32))


@triton.jit
def _value_range(
    v, partials, key_mask, batch, head_in_batch, head, heads, chunk, length,
    stride_b, stride_h, stride_s, mask_stride_b, mask_stride_s,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The largest finite magnitude of each channel in one chunk, of keys that are seen."""
    columns = tl.arange(0, D)
    RUN: tl.constexpr = _RUN_ELEMENTS // D
    share = tl.cdiv(tl.cdiv(length, CHUNKS), _VALUE_RUNS * RUN) * (_VALUE_RUNS * RUN)
    last = tl.minimum((chunk + 1) * share, length)
    largest = tl.zeros((RUN, D), tl.int32)
    for first in range(chunk * share, last, _VALUE_RUNS * RUN):
        tokens = (first + tl.arange(0, _VALUE_RUNS * RUN))[:, None]
        inside = (tokens < last) & (columns < HEAD_DIM)[None, :]
        inside = _seen(key_mask, tokens, inside, batch, mask_stride_b, mask_stride_s)
        x = load_tile(v, batch, head_in_batch, tokens, columns, inside, stride_b, stride_h, stride_s)
        bits = magnitude_bits(x)
        largest = tl.maximum(
            largest, tl.max(_in_runs(tl.where(bits < NOT_FINITE, bits, 0), _VALUE_RUNS), axis=0)
        )
    place = partials + 3 * heads * CHUNKS * D + (head * CHUNKS + chunk) * D + columns
    tl.store(place, tl.max(largest, axis=0).to(tl.float32, bitcast=True))


@triton.jit
def key_statistics(
    program, k, partials, counters, mean, cos, sin, weight, first_weight, eps, first_tokens, key_mask,
    heads, heads_in_batch, length, step, readers,
    stride_b, stride_h, stride_s, rope_stride_s, rope_stride_d, mask_stride_b, mask_stride_s,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One chunk of one head of K; the last of a head publishes the `mean` to its `readers`.

    Its arguments, and those of `value_statistics`, are as `quantise` has them.
    """
    head = program // (CHUNKS // 2)
    _key_sums(
        k, partials, cos, sin, weight, first_weight, eps, first_tokens, key_mask, head // heads_in_batch,
        head % heads_in_batch, head, heads, program % (CHUNKS // 2), length, step,
        stride_b, stride_h, stride_s, rope_stride_s, rope_stride_d, mask_stride_b, mask_stride_s,
        CHUNKS, HEAD_DIM, D,
    )  # fmt: skip
    if is_last(counters + head, CHUNKS // 2):
        _whole_mean(partials, mean, head, heads, CHUNKS, D)
        publish(counters + 2 * heads + head, readers)


@triton.jit
def value_statistics(
    program, v, partials, counters, v_scale, key_mask, heads, heads_in_batch, length, readers,
    stride_b, stride_h, stride_s, mask_stride_b, mask_stride_s,
    CHUNKS: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One chunk of one head of V; the last of a head publishes the `v_scale` to its `readers`."""
    head = program // CHUNKS
    _value_range(
        v, partials, key_mask, head // heads_in_batch, head % heads_in_batch, head, heads, program % CHUNKS,
        length, stride_b, stride_h, stride_s, mask_stride_b, mask_stride_s, CHUNKS, HEAD_DIM, D,
    )  # fmt: skip
    if is_last(counters + heads + head, CHUNKS):
        _whole_scale(partials, v_scale, head, heads, CHUNKS, D)
        publish(counters + 3 * heads + head, readers)
