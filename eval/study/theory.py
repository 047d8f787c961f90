"""The theory of arXiv 2510.25602 predicts a format's error from the crest factor of its blocks alone.

A block's crest factor κ is its largest magnitude over its root mean square. QSNR is −10·log10 of the squared error over
the squared norm, in dB. Numbers in a block are taken as Gaussian, apart from the largest.
"""

import math

import torch
from torch import Tensor

from dma_diffusers.kernels.formats import Format, get_format
from dma_diffusers.kernels.formats.element import FloatElement, IntElement
from dma_diffusers.kernels.formats.scale import Scale

OVERHEAD = 1.5
"""ρ, by how much a power of two exceeds the smallest scale that doesn't clip: the paper's average of 1 to 2."""
CROSSOVERS = {
    "mx8": ("mxint8", "mxfp8"),
    "mx6": ("mxint6", "mxfp6_e2m3"),
    "mx4": ("mxint4", "mxfp4"),
    "nv4": ("nvint4", "nvfp4"),
}
"""The integer and the float that share bits and scales."""


def noise(format: Format, crest: Tensor, block: Tensor | int, overhead: Tensor | float = OVERHEAD) -> Tensor:
    """Predict the squared error of blocks over their squared norm, in the shape of `crest` (float64).

    crest: κ of each block. block: the elements of a block, which matter where the scale makes the largest one exact.
    overhead: ρ of each block's scale; scales other than E8M0 have 1. Raises ValueError for a format without elements.
    """
    if format.element is None:
        raise ValueError(f"{format.name} has no elements whose error could be predicted")
    is_exact = format.scale is not Scale.E8M0
    reach = crest * (
        1.0 if is_exact else overhead
    )  # the largest number of the format, in units of the block's rms
    if isinstance(format.element, IntElement):
        return (reach / format.element.max) ** 2 / 12 * (1 - is_exact / block)
    return _of_float(format.element, reach, crest**2 / block if is_exact else torch.zeros_like(crest))


def _of_float(element: FloatElement, reach: Tensor, largest_share: Tensor) -> Tensor:
    """Normal numbers err in proportion to themselves, subnormal ones by the same step all."""
    mantissa, smallest_normal = element.mantissa_bits, reach * (2.0**element.emin / element.max)
    below = torch.erf(smallest_normal / math.sqrt(2))
    density = torch.exp(-(smallest_normal**2) / 2) / math.sqrt(2 * math.pi)
    energy_above = 1 - below + 2 * smallest_normal * density
    step = 2.0 ** (element.emin - mantissa) / element.max
    of_normal = (energy_above - largest_share).clamp_min(0) / (24 * 4**mantissa)
    return of_normal + (step * reach) ** 2 / 12 * below


def crossovers() -> dict[str, float]:
    """Return for each of `CROSSOVERS` the crest factor below which the integer errs less than the float.

    They are published for integers that reach 2^(bits-1), not one less (at 4 bits 1.2 dB better than an integer is),
    and so they are here.
    """
    return {name: _crossover(*map(get_format, pair)) for name, pair in CROSSOVERS.items()}


def _crossover(integer: Format, float_format: Format) -> float:
    rounded_up = (1 - 2.0 ** (1 - integer.bits)) ** 2
    low, high = 1.0, 16.0
    for _ in range(60):
        crest = torch.tensor((low + high) / 2, dtype=torch.float64)
        block = integer.block or 1
        is_better = rounded_up * noise(integer, crest, block) < noise(float_format, crest, block)
        low, high = (float(crest), high) if is_better else (low, float(crest))
    return low
