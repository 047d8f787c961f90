"""The formats and rotations that a study compares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dma_diffusers.kernels.formats import FORMATS, ROTATIONS, Format, IntElement, block_of, get_format
from dma_diffusers.kernels.formats.scale import Scale


class UnsignedElement(IntElement):
    """An integer from 0 to 2^bits - 1, for numbers that are never negative."""

    @property
    def max(self) -> float:
        """The largest number, 2^bits - 1."""
        return 2.0**self.bits - 1


UNSIGNED = {
    "int8": Format("uint8", UnsignedElement("uint8", 8), Scale.FP32),
    "int4": Format("uint4", UnsignedElement("uint4", 4), Scale.FP32),
    "mxint8": Format("mxuint8", UnsignedElement("uint8", 8), Scale.E8M0, 32),
    "mxint4": Format("mxuint4", UnsignedElement("uint4", 4), Scale.E8M0, 32),
    "nvint4": Format("nvuint4", UnsignedElement("uint4", 4), Scale.E4M3, 16),
}
"""For each signed integer, this is the unsigned one that probabilities can have in its place."""
_PAIRED = ("fp8", "int8", "mxfp8", "mxint8", "mxfp4", "nvfp4")
"""The formats of P·V that pairs are measured with, next to bf16."""


class Variant(NamedTuple):
    """A way to round one part of a call.

    part: q, k, v, p, both q and k (`qk`), a linear layer's input and weight (`linear`), or all of attention (`pair`),
    where `format` has the formats of Q·K and of P·V. smooth: says if the mean over tokens is subtracted before.
    """

    part: str
    format: str
    rotation: str = "none"
    smooth: bool = False


@dataclass(frozen=True)
class Options:
    """A study's formats and rotations by name; no rotations are all that a head dimension allows.

    Raises ValueError, in one line, for unknown ones, and for bf16, which the others are compared with.
    """

    formats: Sequence[str] = tuple(name for name, format in FORMATS.items() if format.element)
    rotations: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in self.formats:
            if get_format(name).element is None:
                raise ValueError(f"a study compares other formats with {name}: leave it out")
        for rotation in self.rotations:
            if rotation not in ROTATIONS:
                raise ValueError(f"unknown rotation {rotation!r}: choose from {', '.join(ROTATIONS)}")

    @property
    def unsigned(self) -> list[Format]:
        """The unsigned integers that go with the formats."""
        return [UNSIGNED[name] for name in self.formats if name in UNSIGNED]

    @property
    def paired(self) -> list[str]:
        """The formats of P·V that pairs are measured with, next to bf16."""
        return [name for name in _PAIRED if name in self.formats]

    def of_head_dim(self, head_dim: int) -> list[str]:
        """The rotations for heads of this many channels; raises ValueError for one that was asked for and can't be."""
        if self.rotations:
            for rotation in self.rotations:
                block_of(rotation, head_dim)
            return list(self.rotations)
        return [rotation for rotation in ROTATIONS if _fits(rotation, head_dim)]


def _fits(rotation: str, head_dim: int) -> bool:
    try:
        return block_of(rotation, head_dim) > 0
    except ValueError:
        return False
