"""The probabilities of LOW's tiles on sm_90, in Gluon: powers of two in e4m3, some of them without an exponential.

The special-function unit gives 16 exponentials a clock and SM: those of a tile would take as long as its products.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dma_diffusers.kernels.attention import reference
from dma_diffusers.kernels.tiling import layout, precision_map

TILE = gl.constexpr(layout.TILE)
ROWS = gl.constexpr(precision_map.SHARED_ROWS)
GROUPS = gl.constexpr(reference.INTERPOLATED_GROUPS)
OFFSET = gl.constexpr(reference.INTERPOLATION_OFFSET)
# `interpolated_power` of reference.py, of two numbers at once: 0x5800 is 128, which 32·x − 0xB0000 takes from the bits;
# half a binade is 0x200, and 0x3985 the weight.
_INTERPOLATE = gl.constexpr("""{
    .reg .b32 low, high, half_low, half_high, anchor, weight;
    .reg .b16 first, second;
    mov.b32 anchor, 0x58005800;
    mov.b32 weight, 0x39853985;
    cvt.rn.relu.f16x2.f32 low, $2, $1;
    cvt.rn.relu.f16x2.f32 high, $4, $3;
    add.rn.f16x2 low, low, anchor;
    add.rn.f16x2 high, high, anchor;
    mad.lo.u32 half_low, low, 32, 0x01F50200;
    mad.lo.u32 half_high, high, 32, 0x01F50200;
    mad.lo.u32 low, low, 32, 0xFFF50000;
    mad.lo.u32 high, high, 32, 0xFFF50000;
    fma.rn.f16x2 low, half_low, weight, low;
    fma.rn.f16x2 high, half_high, weight, high;
    cvt.rn.satfinite.e4m3x2.f16x2 first, low;
    cvt.rn.satfinite.e4m3x2.f16x2 second, high;
    mov.b32 $0, {first, second};
}""")


@gluon.jit
def as_operand(x, sums: gl.constexpr):
    """Returns float32 x [64, 128] as the registers of an 8-bit operand of the products `sums` hold it."""
    x = gl.reshape(x, (ROWS, TILE // 16, 2, 4, 2))
    x = gl.reshape(gl.permute(x, (0, 1, 3, 2, 4)), (ROWS, TILE))
    return gl.convert_layout(x, gl.DotOperandLayout(0, sums, 4), assert_trivial=True)


@gluon.jit
def _is_interpolated(x):
    """Says which columns of x are. It depends on bits that are a register's own, and so is known when compiled."""
    columns = gl.arange(0, TILE, layout=gl.SliceLayout(0, x.type.layout))
    return (columns // 16 * GROUPS % 8 < GROUPS)[None, :]


@gluon.jit
def powers(s, factor, m, sums: gl.constexpr):
    """Returns 2^(s·factor − m) of products s [64, 128] in e4m3, as an operand of the products `sums`."""
    is_interpolated = _is_interpolated(s)
    slope = gl.where(is_interpolated, (4.0 * factor)[:, None], factor[:, None])
    x = s.to(gl.float32) * slope + gl.where(is_interpolated, (OFFSET - 4.0 * m)[:, None], -m[:, None])
    x = as_operand(x, sums)
    interpolated = gl.inline_asm_elementwise(_INTERPOLATE, "=r,r,r,r,r", [x], gl.int8, is_pure=True, pack=4)
    interpolated = interpolated.to(gl.float8e4nv, bitcast=True)
    return gl.where(_is_interpolated(x), interpolated, gl.exp2(x).to(gl.float8e4nv))
