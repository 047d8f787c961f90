"""The quantiser's common steps: finding tokens, loading those of one head, norm and RoPE, finding powers of two."""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import INTERPRETED, halves, rounded_pairs, within
from dma_diffusers.kernels.quantiser import reference

E4M3_MAX_BITS = tl.constexpr(0x43E00000)  # 448
NOT_FINITE = tl.constexpr(0x7F800000)  # and above: magnitudes, as bits
ROTATED_MAX = tl.constexpr(reference.ROTATED_MAX)


@triton.jit
def magnitude_bits(x):
    """|x| as int32 bits: ordered like the magnitudes, with infinities and NaN above every finite number."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def token_at(token_order, place, length, tokens):
    """Finds the token at each of `length` slots, `length` where none stands; without a token order the slot itself.

    tokens: how many there are, None for one at each slot.
    """
    if token_order is not None:
        token = tl.load(token_order + place, mask=place < length, other=-1)
        place = tl.where((token >= 0) & (token < (length if tokens is None else tokens)), token, length)
    return place


@triton.jit
def load_tile(x, batch, head, tokens, columns, inside, stride_b, stride_h, stride_s):
    """float32 [tokens, columns] of one head, zeros outside."""
    place = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tokens.to(tl.int64) * stride_s
    return tl.load(x + place + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_pairs(x, offset, inside, PAIRED: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr):
    """float32 [rows, D/2] twice, the even columns of rows and the odd ones, zeros outside.

    The rows begin at x + offset, each [rows, 1] or a number. Of those that are `inside`, COLUMNS elements are read. If
    PAIRED, two neighbouring elements are read as one aligned word, so that no element moves between threads.
    """
    pairs = tl.arange(0, D // 2)[None, :]
    if PAIRED:
        WORD: tl.constexpr = tl.int64 if x.dtype.element_ty == tl.float32 else tl.int32
        words = x.to(tl.pointer_type(WORD), bitcast=True) + (offset >> 1) + pairs
        words = tl.load(words, mask=inside & (pairs < COLUMNS // 2), other=0)
        even, odd = halves(words, x.dtype.element_ty)
    else:
        x += offset + 2 * pairs
        even = tl.load(x, mask=inside & (pairs < (COLUMNS + 1) // 2), other=0.0).to(tl.float32)
        odd = tl.load(x + 1, mask=inside & (pairs < COLUMNS // 2), other=0.0).to(tl.float32)
    return even, odd


@triton.jit
def load_changed_pairs(
    x, cos, sin, weight, first_weight, eps, first, ROUNDS_TWICE: tl.constexpr, batch, head, tokens, length,
    stride_b, stride_h, stride_s, PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pairs behind RMSNorm, if there is a `weight`, and RoPE, if there is a `cos`."""
    place = batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + tokens.to(tl.int64) * stride_s
    even, odd = load_pairs(x, place, tokens < length, PAIRED, HEAD_DIM, D)
    if weight is not None:
        even, odd = normalised(
            even, odd, weight, first_weight, eps, first, tokens, ROUNDS_TWICE, x.dtype.element_ty, PAIRED, HEAD_DIM, D
        )  # fmt: skip
    if cos is not None:
        even, odd = rotated(even, odd, cos, sin, tokens, length, HEAD_DIM, D)
    return even, odd


@triton.jit
def joined(even, odd):
    """[rows, D] of its even and its odd columns."""
    return tl.reshape(tl.join(even, odd), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def normalised(
    even, odd, weight, first_weight, eps, first, tokens, ROUNDS_TWICE: tl.constexpr, DTYPE: tl.constexpr,
    PAIRED: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pairs [tokens, D/2] behind RMSNorm, rounded to DTYPE; if ROUNDS_TWICE, before the multiplication by weights too.

    The `first` tokens have the `first_weight`, if there is one.
    """
    total = tl.sum(tl.fma(even, even, odd * odd), axis=1)
    if HEAD_DIM & (HEAD_DIM - 1) == 0:
        mean = total * (1.0 / HEAD_DIM)  # exactly
    else:
        mean = tl.div_rn(total, tl.full(total.shape, HEAD_DIM, tl.float32))
    inverse = tl.rsqrt(mean + eps)[:, None]
    # Each token's weights are read from the L1 cache: two rows of weights would fill the registers.
    if first_weight is not None:
        weight = tl.where(tokens < first, first_weight, weight)
        if PAIRED:  # which the compiler has forgotten from Triton 3.7 on
            weight = tl.multiple_of(weight, [16, 16])
    even_weight, odd_weight = load_pairs(weight, 0, tokens >= 0, PAIRED, HEAD_DIM, D)
    even, odd = even * inverse, odd * inverse
    if ROUNDS_TWICE:
        even, odd = rounded_pairs(even, odd, DTYPE)
    return rounded_pairs(even * even_weight, odd * odd_weight, DTYPE)


@triton.jit
def rotated(even, odd, cos, sin, tokens, length, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """Pairs [tokens, D/2], channels 2i and 2i+1, turned by the angle i of their token."""
    pairs = tl.arange(0, D // 2)[None, :]
    inside = (tokens < length) & (pairs < HEAD_DIM // 2)
    place = tokens * (HEAD_DIM // 2) + pairs
    c = tl.load(cos + place, mask=inside, other=0.0)
    s = tl.load(sin + place, mask=inside, other=0.0)
    return even * c - odd * s, even * s + odd * c


@triton.jit
def with_signs(x, channels):
    """x [rows, channels], some of which change their sign, as rotation.py's `sign_is_changed` says."""
    mixed = (channels.to(tl.uint32) + 1) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA77
    changed = (x.to(tl.uint32, bitcast=True) ^ (mixed & 0x80000000)[None, :]).to(tl.float32, bitcast=True)
    return changed


@triton.jit
def butterfly(x, DISTANCE: tl.constexpr):
    """Sums and differences of columns that lie so far apart, in the places of the first and of the second."""
    pairs = tl.reshape(x, (x.shape[0], x.shape[1] // (2 * DISTANCE), 2, DISTANCE))
    if INTERPRETED:  # it takes its time for every xor
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
    else:
        # The xor of a pair's numbers and a thread's own is the number of the other thread: this takes one exchange, and
        # no shared memory.
        bits = pairs.to(tl.int32, bitcast=True)
        other = (tl.xor_sum(bits, axis=2, keep_dims=True) ^ bits).to(tl.float32, bitcast=True)
        is_first = (tl.arange(0, 2) == 0)[None, None, :, None]
        pairs = tl.where(is_first, pairs + other, other - pairs)
    return tl.reshape(pairs, x.shape)


@triton.jit
def butterflies_in_thread(x, COUNT: tl.constexpr):
    """The first butterflies, between columns that lie 1 to COUNT/2 apart: a thread holds as many neighbours."""
    ROWS: tl.constexpr = x.shape[0]
    COLUMNS: tl.constexpr = x.shape[1]
    for step in tl.static_range(3):
        if 2**step < COUNT:  # the lowest bit of a column's number becomes the highest of its COUNT's
            first, second = tl.split(tl.reshape(x, (ROWS, COLUMNS // COUNT, COUNT // 2, 2)))
            both = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
            x = tl.reshape(both, (ROWS, COLUMNS))
    return x


@triton.jit
def with_rotated_channels(even, odd, BLOCK: tl.constexpr, D: tl.constexpr):
    """Pairs [rows, D/2] whose channels are rotated in blocks, as formats/rotation.py defines it."""
    pairs = tl.arange(0, D // 2)
    return _with_mixed_channels(with_signs(even, 2 * pairs), with_signs(odd, 2 * pairs + 1), BLOCK)


@triton.jit
def rotated_rows(x, BLOCK: tl.constexpr):
    """The same of whole rows [rows, D]; what is finite stays so, as with the reference's `rotate_values`."""
    D: tl.constexpr = x.shape[1]
    x = within(x, ROTATED_MAX)
    even, odd = tl.split(tl.reshape(x, (x.shape[0], D // 2, 2)))
    return joined(*with_rotated_channels(even, odd, BLOCK, D))


@triton.jit
def rows_rotated_back(x, BLOCK: tl.constexpr):
    """The rows of which `rotated_rows` made x [rows, D], up to float32's rounding."""
    D: tl.constexpr = x.shape[1]
    even, odd = tl.split(tl.reshape(x, (x.shape[0], D // 2, 2)))
    return with_signs(joined(*_with_mixed_channels(even, odd, BLOCK)), tl.arange(0, D))


@triton.jit
def _with_mixed_channels(even, odd, BLOCK: tl.constexpr):
    """Pairs [rows, D/2], each BLOCK of channels by the Hadamard matrix over √BLOCK."""
    IN_THREAD: tl.constexpr = 8 if BLOCK >= 16 else BLOCK // 2
    even, odd = even + odd, even - odd
    even, odd = butterflies_in_thread(even, IN_THREAD), butterflies_in_thread(odd, IN_THREAD)
    for step in tl.static_range(3, 7):
        if 2**step < BLOCK // 2:
            even, odd = butterfly(even, 2**step), butterfly(odd, 2**step)
    factor: tl.constexpr = BLOCK**-0.5
    return even * factor, odd * factor


@triton.jit
def e8m0_ceil(amax_bits, q_max_bits):
    """The E8M0 code of 2^ceil(log2(amax / q_max)), which never clips; 255 (NaN) where amax is not finite."""
    # float32 bits count exponents in steps of 2^23; the distance to q_max, rounded up, is the exponent
    code = tl.maximum(((amax_bits - q_max_bits + 0x7FFFFF) >> 23) + 127, 0)
    return tl.where(amax_bits >= 0x7F800000, 255, code)


@triton.jit
def inverse_of(code):
    """The factor that divides by the number of an E8M0 code; 0 for NaN, of which anything makes NaN or 0."""
    return ((254 - tl.minimum(code, 254)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_two(code):
    """The number of an E8M0 code."""
    bits = tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def is_last(finished, programs):
    """Tells whether this program is the last of so many to come here; it then sees what the others stored.

    `finished` is zero before the first comes and after the last: a launch may be repeated with its arguments.
    """
    tl.debug_barrier()  # the whole program has stored
    last = tl.atomic_add(finished, 1, sem="acq_rel") == programs - 1
    if last:
        tl.store(finished, 0)
    return last
