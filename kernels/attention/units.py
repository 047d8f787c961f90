"""The units in which 8-bit values are summed: V less its mean, over a power of two for each channel.

Their probabilities, which add up to a part of l, have summed V's mean too little, so many times.
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
def counted(own, own_m, l, m, l_before, m_before):
    """The probabilities `own` under their maximum own_m, with those that l has got since it was l_before; and m."""
    return own * tl.exp2(own_m - m) + (l - l_before * tl.exp2(m_before - m)), m
