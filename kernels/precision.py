"""Precisions: the pair of formats in which a class of tiles is computed, and its words."""

from dataclasses import dataclass
from typing import NamedTuple

from dma_diffusers.kernels.formats import get_format

HIGH_PV, LOW_PV = "bf16", "fp8"


@dataclass(frozen=True)
class Precision:
    """The formats of one class of tiles: `qk` of the product Q·K, `pv` of the product P·V."""

    qk: str
    pv: str

    def __str__(self) -> str:
        return f"{self.qk}/{self.pv}"


class Precisions(NamedTuple):
    """The precisions of a call's HIGH and LOW tiles."""

    high: Precision
    low: Precision

    @classmethod
    def parse(cls, high: str, low: str) -> "Precisions":
        """The precisions that two words say: `"int8"`, or with the format of P·V `"int8/bf16"`.

        P·V is bf16 in HIGH and fp8 in LOW where the word leaves it out.
        Raises ValueError, in one line, for a word that says no precision.
        """
        return cls(_parse(high, HIGH_PV), _parse(low, LOW_PV))

    @property
    def words(self) -> tuple[str, str]:
        """The shortest words that say these precisions: they leave out a class's default P·V."""
        high, low = (
            precision.qk if precision.pv == default else str(precision)
            for precision, default in zip(self, (HIGH_PV, LOW_PV), strict=True)
        )
        return high, low


def _parse(word: str, default_pv: str) -> Precision:
    parts = word.split("/")
    if len(parts) > 2 or not all(parts):
        raise ValueError(
            f"{word!r} is no precision: give a format of Q·K such as 'int8', "
            "or the formats of Q·K and P·V such as 'int8/bf16'"
        )
    precision = Precision(parts[0], parts[1] if len(parts) == 2 else default_pv)
    get_format(precision.qk), get_format(precision.pv)
    return precision
