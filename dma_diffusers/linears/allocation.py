"""The threshold rule: how many of a layer's input channels get 4, 6 and 8 bits.

Source: MicroMix, arXiv 2508.02343, section 3. An element x of an input X belongs to n bits if |x| ≤ T(n), at which
the rounding error of n bits stays under that of INT8: T(n) = 2^b · (2^(n-1) / q_max) · max|X| / 254, with the exponent
bias b of the format. The share of elements under T(n), averaged over calibration, is the share of channels.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from dma_diffusers.kernels.formats import FloatElement, get_format
from dma_diffusers.kernels.linears.groups import Groups

FORMATS = ("mxfp4", "mxfp6_e2m3", "mxfp8")
"""The formats of the groups, in the order of the sorted channels: outliers are last, and have eight bits."""
ALIGNMENT = 128
"""The groups of 6 and 8 bits are rounded up to so many channels."""
_OCTAVES = 7
_PER_OCTAVE = 4
FACTORS = tuple(2.0 ** (i / _PER_OCTAVE) for i in range(-_OCTAVES * _PER_OCTAVE, _OCTAVES * _PER_OCTAVE + 1))
"""Factors of the thresholds, at which calibration counts elements; 1 is among them."""


@dataclass(frozen=True)
class Shares:
    """The shares of a layer's elements that 4 bits, and 4 or 6 bits, are enough for, at each of `FACTORS`.

    under_4, under_6: float64 `[len(FACTORS)]`, from 0 to 1, rising.
    """

    under_4: torch.Tensor
    under_6: torch.Tensor

    def at(self, factor: float) -> tuple[float, float, float]:
        """The shares of 4, 6 and 8 bits where the thresholds are multiplied by `factor`."""
        place = min(max((math.log2(factor) + _OCTAVES) * _PER_OCTAVE, 0), len(FACTORS) - 1)
        low = min(int(place), len(FACTORS) - 2)

        def between(values: torch.Tensor) -> float:
            return float(values[low] + (place - low) * (values[low + 1] - values[low]))

        four = between(self.under_4)
        six = max(between(self.under_6), four)
        return four, six - four, 1 - six


def threshold(format: str) -> float:
    """T(n) / max|X| of one of `FORMATS`: .0105 for E2M1, .0336 for E2M3, .0360 for E3M2."""
    element = get_format(format).element
    assert isinstance(element, FloatElement)
    bias = 2 ** (element.exponent_bits - 1) - 1
    return 2.0**bias * (2.0 ** (element.bits - 1) / element.max) / 254


def groups_of(in_features: int, shares: tuple[float, float, float]) -> Groups:
    """The groups for these shares of 4, 6 and 8 bits; those of 6 and 8 are rounded up to multiples of `ALIGNMENT`."""
    eight = min(_rounded_up(shares[2] * in_features), in_features)
    six = min(_rounded_up(shares[1] * in_features), in_features - eight)
    widths = (in_features - six - eight, six, eight)
    filled = [(format, width) for format, width in zip(FORMATS, widths, strict=True) if width]
    return Groups(tuple(format for format, _ in filled), tuple(width for _, width in filled))


def permutation_of(mean_abs: torch.Tensor) -> torch.Tensor:
    """The order of channels by their mean |x|, outliers last: int32 `[K]`, from float `[K]`."""
    return mean_abs.argsort(stable=True).int()


def factor_for(bits: float, weights: Mapping[str, int], groups_at: Callable[[str, float], Groups]) -> float:
    """The factor of the thresholds for which layers take `bits` on average, or just less, scales of blocks included.

    weights: the number of weights of each layer. groups_at: the groups of a layer for a factor.
    Raises ValueError for an average that can't be had.
    """

    def average(factor: float) -> float:
        taken = sum(groups_at(name, factor).average_bits * count for name, count in weights.items())
        return taken / sum(weights.values())

    least, most = average(FACTORS[-1]), average(FACTORS[0])
    if not least <= bits <= get_format("mxfp8").average_bits:
        raise ValueError(
            f"bits={bits:g} can't be had: these layers take {least:.2f} to {most:.2f} bits, scales of blocks included"
        )
    low, high = math.log2(FACTORS[0]), math.log2(FACTORS[-1])
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if average(2.0**middle) <= bits else (middle, high)
    return 2.0**high


def _rounded_up(channels: float) -> int:
    # A share that is a whole number but for float64's rounding is not rounded up.
    return math.ceil(round(channels, 6) / ALIGNMENT) * ALIGNMENT
