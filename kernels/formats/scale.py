"""Scales: the largest magnitude of a block (amax) becomes the number that multiplies its elements.

`q_max` is the largest number of the element. Sources: OCP Microscaling Formats (MX) v1.0, sections 5.4.1 (E8M0) and
6.3 (conversion); arXiv 2510.25602 for rounding up and for E4M3 scales under an FP32 tensor scale.
"""

import math
import struct
from enum import StrEnum

import torch
from torch import Tensor

from .element import E4M3, Element

FOUR_OVER_SIX_MAX = 256.0
"""The largest E4M3 scale where a block may take one that is half as large again: both are E4M3 numbers then."""


class Scale(StrEnum):
    """The number that is stored as the scale of a block."""

    E8M0 = "e8m0"
    """A power of two, stored as one byte: its exponent + 127; 255 is NaN."""
    E4M3 = "e4m3"
    """An 8-bit float, under one FP32 scale for the whole tensor."""
    FP32 = "fp32"
    """amax / q_max in float32, not rounded further."""

    @property
    def bits(self) -> int:
        """The number of bits of one scale."""
        return 32 if self is Scale.FP32 else 8


class ScaleRounding(StrEnum):
    """The rule by which an E8M0 scale is rounded to a power of two."""

    CEIL = "ceil"
    """2^ceil(log2(amax / q_max)); it never clips."""
    FLOOR = "floor"
    """2^(floor(log2 amax) - emax), the rule of OCP MX v1.0, section 6.3; it clips what lies above q_max."""
    NEAREST = "nearest"
    """2^round(log2(amax / q_max)); it clips by a factor of √2 at most."""

    @classmethod
    def _missing_(cls, value):
        raise ValueError(f"unknown scale rounding {value!r}: choose from {', '.join(cls)}")


def encode_e8m0(amax: Tensor, element: Element, rounding: ScaleRounding) -> Tensor:
    """The E8M0 codes (uint8) for blocks of the given `amax` (float32); 255 where amax is not finite.

    The codes are exact, because float32 bits read as integers order numbers by exponent, then mantissa: the scale's
    exponent is the distance to the largest amax whose scale is one, in steps of 2^23, rounded up.
    """
    distance = amax.view(torch.int32) - _bits_of_largest_with_scale_one(element, rounding)
    exponent = (distance + 0x7FFFFF) >> 23
    return (exponent + 127).clamp_min(0).masked_fill(~amax.isfinite(), 255).to(torch.uint8)


def _bits_of_largest_with_scale_one(element: Element, rounding: ScaleRounding) -> int:
    match rounding:
        case ScaleRounding.CEIL:
            return _float32_bits(element.max)
        case ScaleRounding.FLOOR:
            return _float32_bits(2.0 ** (element.emax + 1)) - 1
        case ScaleRounding.NEAREST:
            limit = element.max * math.sqrt(2)  # is irrational, so the last float32 below it is the largest
            bits = _float32_bits(limit)
            return bits if _float32(bits) < limit else bits - 1


def _float32_bits(value: float) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0]


def _float32(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def encode_e4m3(amax: Tensor, element: Element, tensor_scale: Tensor) -> Tensor:
    """The E4M3 codes (uint8) of amax / q_max / tensor_scale, saturated; 0x7F (NaN) where amax is not finite."""
    return E4M3.encode(_divided(amax, element.max) / tensor_scale).masked_fill(~amax.isfinite(), 0x7F)


def fp32_scale(amax: Tensor, element: Element) -> Tensor:
    """The scale amax / q_max (float32); NaN where amax is not finite."""
    return _divided(amax, element.max).masked_fill(~amax.isfinite(), math.nan)


def fp32_tensor_scale(amax: Tensor, element: Element, largest: float = E4M3.max) -> Tensor:
    """The scale amax / (largest · q_max) (float32), which makes the largest block scale `largest`; it is never zero."""
    return _divided(amax, largest * element.max).clamp_min(torch.finfo(torch.float32).smallest_normal)


def _divided(x: Tensor, divisor: float) -> Tensor:
    """The correctly rounded x / divisor; by a Python number, torch on a GPU would multiply by its inverse."""
    return x / torch.full_like(x, divisor)


def decode_scales(scales: Tensor, scale: Scale | None) -> Tensor:
    """The numbers of stored scales as float32, exact; the tensor scale is not applied."""
    match scale:
        case Scale.E8M0:
            return scales.view(torch.float8_e8m0fnu).to(torch.float32)
        case Scale.E4M3:
            return E4M3.decode(scales)
        case _:
            return scales
