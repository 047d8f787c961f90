"""A row's receipt tells how many of its attention calls ran at low precision, and which only seemed to."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dma_diffusers.fingerprint import OTHER_WEIGHTS

Receipt = dict[str, Any]
"""It is what `dma_diffusers.receipt.Receipt.to_dict` gives, as a row's folder keeps it."""


def shares_that_ran(receipt: Receipt | None) -> dict[str, float]:
    """Return the share of each attention module's calls that the operator ran, by the module's name in its transformer.

    Transformers of one pipeline count together. Modules that keep stock attention under every configuration, such as
    cross-attention, are left out, and so are those of which no call was counted.
    """
    calls, intercepted = _calls(receipt)
    return {name: intercepted[name] / number for name, number in calls.items() if number}


def share_that_ran(receipt: Receipt | None) -> float | None:
    """Return the share of all those modules' calls that the operator ran; None where no call was counted."""
    calls, intercepted = _calls(receipt)
    return intercepted.total() / calls.total() if calls.total() else None


def remarks_on(name: str, receipt: Receipt | None, linears: str | None) -> list[str]:
    """Say in one line each what a reader must know before reading a row's scores.

    linears: the row's low-bit linear layers, or None.
    """
    found = []
    share = share_that_ran(receipt)
    if share is not None and share < 1:
        number = "no" if not share else f"{share:.0%} of its"
        but = "its linear layers alone are low-bit" if linears else "the row shows full precision"
        found.append(
            f"{name}: {number} attention calls ran at low precision ({_reasons(receipt)})"
            + f": {but}" * (not share)
        )
    if any(OTHER_WEIGHTS in module.get("notes", ()) for module in _asked_for(receipt)):
        found.append(f"{name}: {OTHER_WEIGHTS}")
    return found


def _calls(receipt: Receipt | None) -> tuple[Counter[str], Counter[str]]:
    """Count calls, and those that the operator ran, by module."""
    calls: Counter[str] = Counter()
    intercepted: Counter[str] = Counter()
    for module in _asked_for(receipt):
        _, _, name = module["module"].partition(".")
        calls[name] += module["intercepted"] + sum(module["fallbacks"].values())
        intercepted[name] += module["intercepted"]
    return calls, intercepted


def _asked_for(receipt: Receipt | None) -> list[Mapping[str, Any]]:
    return [module for module in (receipt or {}).get("modules", ()) if module["policy"] is not None]


def _reasons(receipt: Receipt | None) -> str:
    """Return the commonest reasons for which calls were left to stock attention."""
    reasons: Counter[str] = Counter()
    for module in _asked_for(receipt):
        reasons.update(module["fallbacks"])
    return "; ".join(reason for reason, _ in reasons.most_common(2))
