"""Groups: a linear layer's input channels in contiguous groups, each in one format."""

from dataclasses import dataclass

from dma_diffusers.kernels.formats import Format, Scale, get_format

ALONE = ("bf16", "fp8", "int8", "nvfp4")
"""The formats that take all channels of a layer, or none."""
MIXABLE = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8")
"""The formats that share a layer, in this order: all have a power of two as the scale of 32 channels."""

STEP = 32
"""The width of a group in a block format is a multiple of it: 16 bytes of 4-bit numbers, which TMA wants of a row."""


@dataclass(frozen=True)
class Groups:
    """The formats of a layer's input channels, after its permutation if it has one.

    formats: of each group, by name: one of `ALONE`, or some of `MIXABLE` in ascending bits.
    widths: the channels of each group, in block formats multiples of 32.
    Raises ValueError, in one line, for anything else.
    """

    formats: tuple[str, ...]
    widths: tuple[int, ...]

    def __post_init__(self):
        words = " | ".join(self.formats)
        if not self.formats or len(self.formats) != len(self.widths):
            raise ValueError(f"each group has a format and a width: got {self.formats} and {self.widths}")
        if others := [name for name in self.formats if name not in ALONE + MIXABLE]:
            raise ValueError(
                f"no linear layer stores {others[0]!r}: choose from {', '.join(ALONE + MIXABLE)}"
            )
        if len(self.formats) > 1:
            if alone := [name for name in self.formats if name in ALONE]:
                raise ValueError(f"{alone[0]} shares no layer with other formats: got {words}")
            bits = [get_format(name).bits for name in self.formats]
            if bits != sorted(set(bits)):
                raise ValueError(f"groups go from few bits to many, each number of bits once: got {words}")
        for name, width in zip(self.formats, self.widths, strict=True):
            step = 1 if get_format(name).block is None else STEP
            if width < 1 or width % step:
                raise ValueError(f"the width of a group in {name} must be a multiple of {step}, got {width}")

    @classmethod
    def whole(cls, format: str, in_features: int) -> "Groups":
        """One group of all channels."""
        return cls((format,), (in_features,))

    @property
    def in_features(self) -> int:
        """The number of input channels."""
        return sum(self.widths)

    @property
    def average_bits(self) -> float:
        """The bits that an element takes on average, with its share of the block's scale."""
        bits = [get_format(name).average_bits for name in self.formats]
        return sum(b * width for b, width in zip(bits, self.widths, strict=True)) / self.in_features

    @property
    def narrow(self) -> int:
        """The number of channels that are stored two to a byte; they come first."""
        return sum(
            width for name, width in zip(self.formats, self.widths, strict=True) if get_format(name).bits == 4
        )

    @property
    def wide(self) -> int:
        """The number of channels that are stored one to a byte, or as they are."""
        return self.in_features - self.narrow

    @property
    def block(self) -> int | None:
        """The channels that share a scale; None if all of them do."""
        return get_format(self.formats[0]).block

    @property
    def has_row_scales(self) -> bool:
        """True if a float32 scale belongs to each row, or to the tensor."""
        return get_format(self.formats[0]).scale in (Scale.FP32, Scale.E4M3)

    @property
    def slices(self) -> list[tuple[Format, slice]]:
        """The format of each group, and its channels."""
        found, start = [], 0
        for name, width in zip(self.formats, self.widths, strict=True):
            found.append((get_format(name), slice(start, start + width)))
            start += width
        return found
