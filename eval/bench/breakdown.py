"""This module sorts the kernels of a step into parts, and computes from them what a step should take at least."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dma_diffusers.eval.bench.ways import PLAIN, Way

ATTENTION, ATTENTION_QUANTISER = "attention", "attention's quantiser"
LINEARS, QUANTISING = "linears", "quantising for linears"
POINTWISE, REST, HOST = "norms and pointwise", "rest", "host"
PARTS = (ATTENTION, ATTENTION_QUANTISER, LINEARS, QUANTISING, POINTWISE, REST)

# The first pattern that is found in a kernel's name decides. Inductor names its kernels after the operations in them,
# so its names are looked at before those of libraries: `triton_poi_fused__scaled_dot_product…` is pointwise.
_PATTERNS = (
    (LINEARS, r"^triton_tem_"),
    (QUANTISING, r"^triton_.*(scaled_mm|int_mm|_amax_|float8)"),
    (POINTWISE, r"^triton_"),
    (
        ATTENTION_QUANTISER,
        r"^(quantise|encode|statistics|means|pool|score|sample|score_rows|count|choose|write_block_lists|rotated)$",
    ),
    (ATTENTION, r"^attend|flash|fmha|sdpa|sage|qk_int_sv"),
    (QUANTISING, r"quanti[sz]e|float8_copy|reencode"),
    (LINEARS, r"nvjet|gemm|cutlass|cublas|xmma|splitK|multiply|linear|scaled_mm"),
    (POINTWISE, r"elementwise|layer_norm|rms_norm|reduce_kernel|CatArray|softmax|[Cc]opy"),
)


def part_of(kernel: str) -> str:
    """Return the one of `PARTS` that a kernel of this name belongs to."""
    return next((part for part, pattern in _PATTERNS if re.search(pattern, kernel)), REST)


def parts(kernels_ms: Mapping[str, float]) -> dict[str, float]:
    """Return the milliseconds of each of `PARTS`.

    kernels_ms: the milliseconds of a step's kernels, by name.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for kernel, ms in kernels_ms.items():
        found[part_of(kernel)] += ms
    return found


def compared(entries: Sequence[dict[str, Any]], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Return the entries with what their times mean beside each other's of the same mode.

    over_stock: the speed in units of stock's. host_ms: the time in which no kernel runs. quantising_share: the part of
    the linears' time, quantising included, that quantising takes: how much longer the kernels between the matrix
    products take than stock's, since most of them do norms and activations as well. amdahl_ms: what a step with both
    should take by the kernels of the two with one alone: stock's time less what attention saves and less what linears
    save, each with the norms and activations around it; of_amdahl: that over the time it takes. Each is None where what
    it needs was not measured.
    """
    found = {(entry["name"], entry["mode"]): entry for entry in entries if "absent" not in entry}
    named = {way.name: way for way in ways}
    return [
        entry if "absent" in entry else entry | _compared(entry, named[entry["name"]], found)
        for entry in entries
    ]


def best(entries: Sequence[dict[str, Any]], *kinds: str) -> dict[str, Any] | None:
    """Return the name, the mode and the `step_ms` of the fastest entry of these kinds; None where there is none."""
    timed = [entry for entry in entries if "absent" not in entry and entry["kind"] in kinds]
    fastest = min(timed, key=lambda entry: entry["step_ms"], default=None)
    return fastest and {name: fastest[name] for name in ("name", "mode", "step_ms")}


def _compared(
    entry: dict[str, Any], way: Way, found: Mapping[tuple[str, str], dict[str, Any]]
) -> dict[str, Any]:
    stock = found.get((PLAIN, entry["mode"]))
    alone = [found.get((part, entry["mode"])) for part in way.parts]
    amdahl = _amdahl_ms(stock, *alone) if alone else None
    return {
        "over_stock": stock and stock["step_ms"] / entry["step_ms"],
        "host_ms": entry["busy_ms"] and max(entry["step_ms"] - entry["busy_ms"], 0.0),
        "quantising_share": _quantising_share(entry, stock) if way.quantises else None,
        "amdahl_ms": amdahl,
        "of_amdahl": amdahl and amdahl / entry["step_ms"],
    }


def _quantising_share(entry: dict[str, Any], stock: dict[str, Any] | None) -> float | None:
    if stock is None or not (entry["busy_ms"] and stock["busy_ms"]):
        return None
    quantising = max(_sum(entry, QUANTISING, POINTWISE) - _sum(stock, QUANTISING, POINTWISE), 0.0)
    return quantising / (_sum(entry, LINEARS) + quantising)


def _amdahl_ms(
    stock: dict[str, Any] | None, attention: dict[str, Any] | None, linears: dict[str, Any] | None
) -> float | None:
    if not all(entry and entry["busy_ms"] for entry in (stock, attention, linears)):
        return None
    # Norms and activations may move into either's kernels.
    of_attention, of_linears = (ATTENTION, ATTENTION_QUANTISER, POINTWISE), (LINEARS, QUANTISING, POINTWISE)
    saved = _sum(stock, *of_attention) - _sum(attention, *of_attention)
    saved += _sum(stock, *of_linears) - _sum(linears, *of_linears)
    return stock["step_ms"] - saved


def _sum(entry: dict[str, Any], *names: str) -> float:
    return sum(entry["parts_ms"][name] for name in names)
