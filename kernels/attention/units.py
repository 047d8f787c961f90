"""The units in which 8-bit values are summed: V less its mean, over a power of two for each channel.

Probabilities that add up to l have summed l times V's mean too little, whatever they are.
"""

import triton
import triton.language as tl


@triton.jit
def _inverse(power):
    """The inverse of normal powers of two, exactly."""
    return ((254 << 23) - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def in_units(accumulator, l, v_units, D: tl.constexpr):
    """The accumulator of values that have lost V's mean, in units of their channels' powers of two."""
    # volatile, here and below: read anew, not kept in registers throughout the loops
    rest = accumulator - l[:, None] * tl.load(v_units + D, volatile=True)[None, :]
    return rest * _inverse(tl.load(v_units, volatile=True))[None, :]


@triton.jit
def out_of_units(accumulator, l, v_units, D: tl.constexpr):
    """The accumulator of which `in_units` made this one."""
    rest = accumulator * tl.load(v_units, volatile=True)[None, :]
    return rest + l[:, None] * tl.load(v_units + D, volatile=True)[None, :]
