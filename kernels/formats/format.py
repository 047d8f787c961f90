"""The list of formats: each an element × a scale × the block of elements that shares one scale."""

from dataclasses import dataclass

from .element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT6, INT8, Element
from .scale import Scale


@dataclass(frozen=True)
class Format:
    """How the numbers of a tensor are stored, along its last dimension."""

    name: str
    element: Element | None = None
    """None: numbers are kept as they are."""
    scale: Scale | None = None
    block: int | None = None
    """Elements of the last dimension that share a scale; None: all of them."""
    block_rows: int = 1
    """Neighbouring rows (second last dimension) that share a scale."""

    @property
    def bits(self) -> int:
        """Bits of one element."""
        return 16 if self.element is None else self.element.bits

    @property
    def average_bits(self) -> float:
        """Bits of one element and its share of the block's scale; row, tile and tensor scales don't count."""
        if self.block is None or self.scale is None:
            return self.bits
        return self.bits + self.scale.bits / self.block

    @property
    def has_tensor_scale(self) -> bool:
        """Whether an FP32 scale of the whole tensor lies on top of the block scales."""
        return self.scale is Scale.E4M3


FORMATS = {
    format.name: format
    for format in (
        Format("bf16"),
        Format("fp8", E4M3, Scale.FP32),
        Format("int8", INT8, Scale.FP32),
        Format("int8_tile", INT8, Scale.FP32, block_rows=128),
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
