"""Receipts of linear layers: which formats each one has, how it runs, and why."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class LinearReceipt:
    """The receipt of one linear layer.

    formats, widths: of its groups of input channels; empty for a layer that is left alone.
    bits: the average bits of a weight, scales of blocks included. lowering: as `kernels.linears.lowering` names it,
        "stock" for a layer that is left alone, "none" if the one that was asked for can't run. reason: why.
    kept: the source for which it has eight bits where the method would give fewer; empty if it need not.
    bytes_before, bytes_after: of its weight.
    """

    module: str
    formats: tuple[str, ...]
    widths: tuple[int, ...]
    bits: float
    lowering: str
    reason: str
    architecture: str
    kept: str = ""
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        if not self.formats:
            return f"left alone: {self.reason}"
        kept = f"; kept at eight bits: {self.kept}" if self.kept else ""
        return f"{' | '.join(self.formats)}, lowering {self.lowering} on {self.architecture}: {self.reason}{kept}"


def lines(receipts: Iterable[LinearReceipt]) -> list[str]:
    """A line for each choice, and one for the memory that weights take."""
    receipts = list(receipts)
    found = []
    for choice, group in groupby(sorted(receipts, key=_order), key=str):
        members = list(group)
        named = f"{len(members)} linear layers ({members[0].module}, …)" if members[1:] else members[0].module
        found.append(f"{named}: {choice}")
        if members[0].formats:
            found.append(f"  {_average_bits(members):.2f} bits a weight on average")
    quantised = [each for each in receipts if each.formats and each.bytes_after != each.bytes_before]
    if quantised:
        before, after = (
            sum(getattr(receipt, name) for receipt in quantised) for name in ("bytes_before", "bytes_after")
        )
        found.append(
            f"quantised weights take {after / 1e6:.4g} MB in the place of {before / 1e6:.4g} MB "
            f"({after / before:.0%}), and {_average_bits(quantised):.2f} bits a weight"
        )
    return found


def _order(receipt: LinearReceipt) -> tuple[bool, str]:
    return not receipt.formats, str(receipt)


def _average_bits(receipts: list[LinearReceipt]) -> float:
    weights = sum(receipt.bytes_before for receipt in receipts)
    return sum(receipt.bits * receipt.bytes_before for receipt in receipts) / weights
