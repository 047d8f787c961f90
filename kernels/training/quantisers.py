"""The quantisers in torch: they define what is correct.

Each rounds a matrix along its rows, in float32. Blocks are of 32 numbers, of 16 in NVFP4; they fill the rows.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dma_diffusers.kernels.formats import E2M1, E4M3, FloatElement, ScaleRounding, pack, unpack
from dma_diffusers.kernels.formats.scale import FOUR_OVER_SIX_MAX, encode_e8m0
from dma_diffusers.kernels.training.recipe import Quantiser

ROTATED = 32
"""The numbers that a rotation mixes, the numbers of an MX block, and those that share MS-EDEN's correction."""
QUEST_SCALE = 2.92247856 / 6
"""The scale of a normal block of standard deviation 1 with which e2m1 errs least (arXiv 2505.14669, section 4)."""
EDEN_TOP = 6 / (0.93 * 17 / 16)
"""The number to which MS-EDEN's scales bring a block's amax, where e2m1 ends at 6: least error (arXiv 2601.22813)."""
ROOT_TWO_BITS = 0x3FB504F3
"""The bits of the largest float32 below √2."""
_E8M0_BIAS = 127


class Quantised(NamedTuple):
    """The result of a quantiser.

    numbers: those that are multiplied, in the matrix's dtype. outside: the factor that they still need, `[rows, 1]` or
    a number. mask: bool, False where a number was clipped and gets no gradient; None where nothing can be.
    """

    numbers: Tensor
    outside: Tensor | float = 1.0
    mask: Tensor | None = None

    @property
    def value(self) -> Tensor:
        """The numbers with their factor."""
        return self.numbers * self.outside


def quantise(
    x: Tensor, quantiser: Quantiser, uniforms: Tensor | None = None, amax: Tensor | None = None
) -> Quantised:
    """x `[rows, columns]` rounded by one of the quantisers.

    uniforms: float32 from 0 to 1, where it is random: `[rows, columns]`, for MS-EDEN `[rows, columns / 16]`.
    amax: of NVFP4, float32 `[rows, 1]` or `[1, 1]`: at least the largest magnitude of each row, or of x; None measures
        it, for each row, and of all of x for MS-EDEN.
    """
    match quantiser:
        case Quantiser.NONE:
            return Quantised(x)
        case Quantiser.QUEST:
            return quest(x)
        case Quantiser.NEAREST | Quantiser.STOCHASTIC:
            return three_quarters(x, uniforms)
        case Quantiser.MXINT8:
            codes = pack(x, "mxint8", ScaleRounding.CEIL)
            return Quantised(unpack(codes, x.dtype))
        case Quantiser.FOUR_OVER_SIX:
            amax = x.float().abs().amax(1, keepdim=True) if amax is None else amax
            codes = pack(x, "nvfp4", tensor_amax=amax, four_over_six=True)
            assert codes.tensor_scale is not None
            return Quantised(unpack(replace(codes, tensor_scale=None), x.dtype), codes.tensor_scale)
        case _:
            return ms_eden(x, uniforms, amax)


def quest(x: Tensor, exponents: str = "nearest") -> Quantised:
    """MXFP4 under the power of two that is nearest to 2.92247856/6 of a block's standard deviation σ, on a log scale.

    A block that is nearly constant has at least half of its root mean square for σ, or it would be lost.
    exponents: "nearest", or "floor" for the power of two below, as the released emulator has it.
    """
    blocks = x.float().unflatten(1, (-1, ROTATED))
    mean = blocks.mean(-1)
    deviation = (blocks - mean[..., None]).square().mean(-1).sqrt()
    square = blocks.square().mean(-1).sqrt()
    wanted = (torch.maximum(deviation, square * 0.5) * QUEST_SCALE).view(torch.int32)
    largest_with_scale_one = ROOT_TWO_BITS if exponents == "nearest" else 0x3FFFFFFF
    exponent = (wanted - largest_with_scale_one + 0x7FFFFF >> 23).clamp_min(-_E8M0_BIAS).float()
    scale = torch.exp2(exponent).masked_fill(wanted >= 0x7F800000, torch.nan)[..., None]
    scaled = blocks / scale
    numbers = (E2M1.round(scaled) * scale).flatten(1)
    return Quantised(numbers.to(x.dtype), 1.0, (scaled.abs() <= E2M1.max).flatten(1))


def three_quarters(x: Tensor, uniforms: Tensor | None) -> Quantised:
    """MXFP4 of ¾·x, whose amax comes to lie between 3 and 6: to nearest even, or by chance where there are uniforms."""
    blocks = x.float().unflatten(1, (-1, ROTATED))
    code = encode_e8m0(blocks.abs().amax(-1), E2M1, ScaleRounding.FLOOR)
    scale = code.view(torch.float8_e8m0fnu).float()[..., None]
    scaled = blocks * 0.75 / scale
    rounded = E2M1.round(scaled) if uniforms is None else stochastic(scaled, uniforms.view_as(scaled), E2M1)
    return Quantised((rounded * scale).flatten(1).to(x.dtype), Quantiser.NEAREST.outside)


def ms_eden(x: Tensor, uniforms: Tensor | None, amax: Tensor | None = None) -> Quantised:
    """NVFP4 to nearest even, whose E4M3 scales are then multiplied by |x|²/⟨x, rounded⟩ of 32 numbers.

    The corrected scale is rounded by chance, so that the projection on x is x in the mean. If x is rotated by a random
    matrix first, the rest of the error has no direction, and the whole is right in the mean (arXiv 2601.22813,
    section 3).
    """
    assert uniforms is not None
    largest = x.float().abs().amax().view(1, 1) if amax is None else amax
    outside = eden_outside(largest)
    blocks = (x.float() / outside).unflatten(1, (-1, 16))
    scale = E4M3.round(blocks.abs().amax(-1) * (1 / EDEN_TOP))
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    rounded = E2M1.round(blocks * inverse[..., None])
    exact, found = (
        of_block.unflatten(1, (-1, 2)).sum(-1)
        for of_block in (blocks.square().sum(-1), (blocks * rounded).sum(-1) * scale)
    )
    correction = torch.where(found == 0, 1.0, exact / found).repeat_interleave(2, 1)
    scale = stochastic(scale * correction, uniforms, E4M3)[..., None]
    return Quantised((rounded * scale).flatten(1).to(x.dtype), outside)


def eden_outside(amax: Tensor) -> Tensor:
    """MS-EDEN's factor outside, a power of two, under which the scale of numbers up to `amax` is at most 256."""
    exponent = torch.log2(amax.float().clamp_min(2.0**-100) / (EDEN_TOP * FOUR_OVER_SIX_MAX)).ceil()
    return torch.exp2(exponent)


def stochastic(x: Tensor, uniforms: Tensor, element: FloatElement) -> Tensor:
    """x rounded to one of the element's two numbers beside it, and saturated.

    It is the larger one where the uniform is below x's distance from the smaller one, in steps. So the mean over
    uniforms from 0 to 1 is x, where x lies within ±max.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32).clamp_min(2.0**element.emin)
    step = power * 2.0**-element.mantissa_bits
    steps = x.abs() / step
    below = steps.floor()
    return ((below + (uniforms < steps - below)) * step).clamp_max(element.max).copysign(x)
