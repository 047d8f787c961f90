"""Elements: the narrow numbers that share a scale. Every element rounds to nearest even and saturates.

Sources: OCP Microscaling Formats (MX) v1.0, section 5.3 (E5M2, E4M3, E3M2, E2M3, E2M1, INT8);
arXiv 2510.25602 (INT6, INT4).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatElement:
    """A float with a sign bit and subnormals; `max` is its largest finite number."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    max: float

    @property
    def bits(self) -> int:
        """The number of bits of one code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def emax(self) -> int:
        """The exponent of the largest number, floor(log2 max)."""
        return math.frexp(self.max)[1] - 1

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent_bits - 1)

    def round(self, x: Tensor) -> Tensor:
        """The nearest numbers, with ties to even, saturated to ±max; NaN stays NaN, and zero keeps its sign.

        x: float32 of any shape; the result has the same shape and dtype.
        """
        x = x.clamp(-self.max, self.max)
        power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^floor(log2 |x|)
        # A number added to 1.5·2^23 steps loses everything below one step, so float32 does the rounding.
        anchor = power.clamp_min(2.0**self.emin) * (1.5 * 2.0 ** (23 - self.mantissa_bits))
        return ((x + anchor) - anchor).copysign(x)

    def encode(self, x: Tensor) -> Tensor:
        """The codes (uint8, right-aligned) of `round(x)`; NaN becomes zero in elements without NaN (6 and 4 bits).

        x: float32 of any shape; the result has the same shape.
        """
        rounded = self.round(x) if self.bits == 8 else self.round(x).nan_to_num(0.0)
        carried = (rounded * self._carrier_factor).to(self._carrier).view(torch.uint8)
        sign, magnitude = carried & 0x80, carried & 0x7F
        return sign >> (8 - self.bits) | magnitude >> self._carrier_shift

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32, exact) of `codes` (uint8, right-aligned)."""
        sign, magnitude = codes & self._sign_bit, codes & (self._sign_bit - 1)
        carried = sign << (8 - self.bits) | magnitude << self._carrier_shift
        return carried.view(self._carrier).to(torch.float32) / self._carrier_factor

    @property
    def _sign_bit(self) -> int:
        return 1 << (self.bits - 1)

    # Torch has 8-bit floats only. A narrower float is carried by E4M3, whose spare exponent and mantissa bits are zero.
    @property
    def _carrier(self) -> torch.dtype:
        return torch.float8_e5m2 if self.exponent_bits == 5 else torch.float8_e4m3fn

    @property
    def _carrier_factor(self) -> float:
        return torch.finfo(self._carrier).smallest_normal / 2.0**self.emin

    @property
    def _carrier_shift(self) -> int:
        return (2 if self._carrier == torch.float8_e5m2 else 3) - self.mantissa_bits


@dataclass(frozen=True)
class IntElement:
    """A two's complement integer of `bits` bits in units of one, clipped symmetrically.

    The lowest code, -2^(bits-1), stands for no number: it stores NaN. OCP's INT8 counts in units of 2^-6, so the same
    numbers have E8M0 scales 2^6 times as large there.
    """

    name: str
    bits: int

    @property
    def max(self) -> float:
        """The largest number, 2^(bits-1) - 1."""
        return 2.0 ** (self.bits - 1) - 1

    @property
    def emax(self) -> int:
        """The exponent of the largest number, floor(log2 max)."""
        return self.bits - 2

    def round(self, x: Tensor) -> Tensor:
        """The nearest integers, with ties to even, clipped to ±max; NaN stays NaN, and zeros lose their sign.

        x: float32 of any shape; the result has the same shape and dtype.
        """
        return x.clamp(-self.max, self.max).round() + 0.0

    def encode(self, x: Tensor) -> Tensor:
        """The codes (uint8, right-aligned) of `round(x)`; NaN becomes the lowest code.

        x: float32 of any shape; the result has the same shape.
        """
        integers = self.round(x).nan_to_num(-self.max - 1).to(torch.int8)
        return integers.view(torch.uint8) & (2**self.bits - 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The numbers (float32) of `codes` (uint8, right-aligned); the lowest code gives NaN."""
        spare = 8 - self.bits
        integers = ((codes << spare).view(torch.int8) >> spare).to(torch.float32)  # >> extends the sign
        return integers.masked_fill(integers < -self.max, math.nan)


Element = FloatElement | IntElement

E5M2 = FloatElement("e5m2", 5, 2, 57344.0)
E4M3 = FloatElement("e4m3", 4, 3, 448.0)
E3M2 = FloatElement("e3m2", 3, 2, 28.0)
E2M3 = FloatElement("e2m3", 2, 3, 7.5)
E2M1 = FloatElement("e2m1", 2, 1, 6.0)
INT8 = IntElement("int8", 8)
INT6 = IntElement("int6", 6)
INT4 = IntElement("int4", 4)
