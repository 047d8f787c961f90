"""exp2 on two pipes at once, and its argument: most elements on the special-function unit, some as a polynomial.

The special-function unit gives 16 exponentials a clock and SM, an eighth of what the multiply-add units take:
FlashAttention-4's trick is to let those do a part. The polynomial is a minimax fit of 2^f over [-½, ½].
"""

import triton
import triton.language as tl

from dma_diffusers.kernels.device.rounding import INTERPRETED

# 1.5·2^23 + 127: added to x, it leaves round(x) + 127, the exponent field of 2^round(x), in the lowest bits.
_ANCHOR = tl.constexpr(12583039.0)
_FMA_OF_PAIRS = tl.constexpr("""{
    .reg .b64 a, b, c, d;
    mov.b64 a, {$2, $3};
    mov.b64 b, {$4, $5};
    mov.b64 c, {$6, $7};
    fma.rn.f32x2 d, a, b, c;
    mov.b64 {$0, $1}, d;
}""")


@triton.jit
def multiply_add(x, y, z, IN_PAIRS: tl.constexpr):
    """x·y + z in float32, y and z broadcast to x; IN_PAIRS: two to an instruction, from sm_100 on."""
    if IN_PAIRS and not INTERPRETED:
        operands = (x, tl.broadcast_to(y, x.shape), tl.broadcast_to(z, x.shape))
        return tl.inline_asm_elementwise(
            _FMA_OF_PAIRS, "=r,=r,r,r,r,r,r,r", operands, tl.float32, is_pure=True, pack=2
        )
    else:
        return x * y + z


@triton.jit
def polynomial_exp2(x):
    """2^x of float32 x ≤ 127, within 7.5e-5 of it (relative); 0 below −126.5 and of −inf, NaN of NaN."""
    x = tl.maximum(x, -127.0, propagate_nan=tl.PropagateNan.ALL)
    anchored = x + _ANCHOR
    f = x - (anchored - _ANCHOR)
    p = ((f * 0.0551716685295105 + 0.2426111251115799) * f + 0.6932609677314758) * f + 0.9999280571937561
    return p * (anchored.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shared_exp2(x, SHARE: tl.constexpr):
    """exp2 of [ROWS, COLUMNS]; SHARE of every 32 columns take the polynomial."""
    if SHARE == 0:
        y = tl.exp2(x)
    else:
        # A condition on the column alone costs nothing: which register holds which column is known.
        takes_polynomial = tl.arange(0, x.shape[1]) % 32 * SHARE % 32 < SHARE
        y = tl.where(takes_polynomial[None, :], polynomial_exp2(x), tl.exp2(x))
    return y
