"""The units in which values in FP8 and fp16 are summed: V less its mean, over a power of two for each channel.

The probabilities of such values, which are a part of l, have left V's mean out of their sums. kernel.py counts them,
and adds their share of the mean at its end; hopper.py adds it as it leaves the units.
"""

import triton
import triton.language as tl


@triton.jit
def _inverse(power):
    """The inverse of normal powers of two, exactly."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def in_units(accumulator, v_units):
    """The accumulator in units of its channels' powers of two."""
    # volatile, here and below: read anew, not kept in registers throughout the loops
    return accumulator * _inverse(tl.load(v_units, volatile=True))[None, :]


@triton.jit
def out_of_units(accumulator, v_units):
    """The accumulator of which `in_units` made this one."""
    return accumulator * tl.load(v_units, volatile=True)[None, :]


@triton.jit
def log_of_sum(l, m):
    """The logarithm, in base 2, of probabilities that add up to l under m; −inf for none. It is one number for two."""
    return m + tl.log2(l)


@triton.jit
def counted(log_own, l, m, log_before):
    """`log_of_sum` of the probabilities in log_own, and of those that l has got since it was log_before."""
    own = tl.exp2(log_own - m) + (l - tl.exp2(log_before - m))
    return log_of_sum(tl.maximum(own, 0.0), m)
