"""The list of formats: each is an element × a scale × the block of elements that shares one scale."""

from dataclasses import dataclass

from .element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT6, INT8, Element
from .scale import Scale


@dataclass(frozen=True)
class Format:
    """A way to store the numbers of a tensor, along its last dimension.

    element: the number that is stored; None keeps numbers as they are, and then there is no scale.
    scale: the kind of scale that multiplies elements.
    block: how many elements of the last dimension share a scale; None for all of them.
    block_rows: how many neighbouring rows (second last dimension) share a scale.
    """

    name: str
    element: Element | None = None
    scale: Scale | None = None
    block: int | None = None
    block_rows: int = 1

    @property
    def bits(self) -> int:
        """The number of bits of one element."""
        return 16 if self.element is None else self.element.bits

    @property
    def average_bits(self) -> float:
        """The bits of one element and of its share of the block's scale; scales of rows, tiles, tensors don't count."""
        if self.block is None or self.scale is None:
            return self.bits
        return self.bits + self.scale.bits / self.block

    @property
    def has_tensor_scale(self) -> bool:
        """True if one FP32 scale for the whole tensor multiplies the block scales."""
        return self.scale is Scale.E4M3


FORMATS = {
    format.name: format
    for format in (
        Format("bf16"),
        Format("fp8", E4M3, Scale.FP32),
        Format("int8", INT8, Scale.FP32),
        Format("int8_tile", INT8, Scale.FP32, block_rows=128),
        Format("int4", INT4, Scale.FP32),
        Format("mxfp8", E4M3, Scale.E8M0, 32),
        Format("mxfp8_e5m2", E5M2, Scale.E8M0, 32),
        Format("mxfp6_e2m3", E2M3, Scale.E8M0, 32),
        Format("mxfp6_e3m2", E3M2, Scale.E8M0, 32),
        Format("mxfp4", E2M1, Scale.E8M0, 32),
        Format("nvfp4", E2M1, Scale.E4M3, 16),
        Format("mxint8", INT8, Scale.E8M0, 32),
        Format("mxint6", INT6, Scale.E8M0, 32),
        Format("mxint4", INT4, Scale.E8M0, 32),
        Format("nvint4", INT4, Scale.E4M3, 16),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`; raises ValueError, listing all names, if there is none."""
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}: choose from {', '.join(FORMATS)}")
    return FORMATS[name]
