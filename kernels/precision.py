"""A precision: the format in which a class of tiles multiplies Q·K, and the format in which it multiplies P·V.

In words it is `int8/bf16`, or `int8` alone for the P·V that the class has by default.
"""

from dataclasses import dataclass
from typing import NamedTuple

from dma_diffusers.kernels.formats import FORMATS, get_format

HIGH_PV, LOW_PV = "bf16", "fp8"
"""The formats of P·V where the words leave them out, of HIGH and of LOW tiles."""
VALUES_ALONE = ("fp16",)
"""Formats of P·V in which nobody multiplies Q·K: float16 holds no score of large q and k, but every probability."""
MEANS_BITS = 8  # of Q·K, at least: the score of a mean stands for those of 32 keys


@dataclass(frozen=True)
class Precision:
    """The formats of one class of tiles, by name. qk: of Q·K. pv: of P·V."""

    qk: str
    pv: str

    def __str__(self) -> str:
        return f"{self.qk}/{self.pv}"


class Precisions(NamedTuple):
    """The precisions of HIGH and of LOW tiles."""

    high: Precision
    low: Precision

    @classmethod
    def parse(cls, high: str, low: str) -> "Precisions":
        """The precisions that these words say, such as "bf16" and "int8/fp8".

        Raises ValueError, in one line, for words of another form, or a format that does not exist. Whether a kernel
        multiplies a format as P·V is up to the lowering.
        """
        return cls(_parse(high, HIGH_PV), _parse(low, LOW_PV))

    def of_means(self, has_low: bool) -> Precision:
        """The precision of MEAN tiles: LOW's if the map has LOW tiles and Q·K has 8 bits or more there, else HIGH's."""
        return self.low if has_low and get_format(self.low.qk).bits >= MEANS_BITS else self.high

    @property
    def words(self) -> tuple[str, str]:
        """The shortest words for HIGH and for LOW, which leave out the default format of P·V."""
        defaults = zip(self, (HIGH_PV, LOW_PV), strict=True)
        high, low = (each.qk if each.pv == default else str(each) for each, default in defaults)
        return high, low


def _parse(words: str, default_pv: str) -> Precision:
    parts = words.split("/") if isinstance(words, str) else ()
    if not 1 <= len(parts) <= 2 or not all(parts):
        raise ValueError(
            f"precision {words!r} is neither a format of Q·K, as in int8, nor the formats of Q·K and P·V, as in "
            f"int8/bf16; the formats are {', '.join(FORMATS)}"
        )
    qk, pv = parts if len(parts) == 2 else (*parts, default_pv)
    if qk in VALUES_ALONE:
        raise ValueError(
            f"precision {words!r} has Q·K in {qk}, which is a format of P·V alone: write int8/{qk}"
        )
    return Precision(get_format(qk).name, pv if pv in VALUES_ALONE else get_format(pv).name)
