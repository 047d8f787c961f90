"""This module compares timed entries with each other and with the bound: as data, as a table, as Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from dma_diffusers.eval.bench.entries import FULL, LOW_BIT
from dma_diffusers.eval.bench.shapes import Shape

WRONG = 0.2  # a result of a larger relative L2 counts as wrong
WAYS = ("eager", "graph")  # a program calls attention one call after another, or as a CUDA graph
HEADER = (
    "Attention",
    "ms",
    "TFLOP/s",
    "× best full precision",
    "× best low bit",
    "% of bound",
    "relative L2",
    "peak MiB",
    "host µs",
    "eager TFLOP/s",
    "graph TFLOP/s",
)
_TITLES = {"kernel": "– without quantisation", "quantise": "– its quantiser's kernels"}
_DIFFERENCE = "– whole less kernel (a difference)"


def compared(shape: Shape, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to the entries what their times mean.

    Adds `wrong` (relative L2 over .2, or None, which is NaN) and `less_kernel_ms` (whole less kernel), and to `whole`
    and `kernel` each `tflops`, `share_of_bound` (None without a bound), `over_full` and `over_low`: speed in units of
    the best peer's of that kind, with the peer's own quantisation (None without one). A wrong entry is no best.
    `eager_tflops` and `graph_tflops` follow from the times in `WAYS`, where there are any.
    """
    timed = [
        entry | {"wrong": _is_wrong(entry["relative_l2"])} if "whole" in entry else entry for entry in entries
    ]
    best = {
        kind: min((e["whole"]["ms"] for e in timed if e["kind"] == kind and not e.get("wrong", True)), default=None)
        for kind in (FULL, LOW_BIT)
    }  # fmt: skip
    for entry in timed:
        for part in ("whole", "kernel"):
            if part in entry:
                ms = entry[part]["ms"]
                tflops, bound = shape.flop / ms / 1e9, entry["bound_tflops"]
                entry[part] = (
                    entry[part]
                    | {
                        "tflops": tflops,
                        "share_of_bound": bound and tflops / bound,
                        "over_full": best[FULL] and best[FULL] / ms,
                        "over_low": best[LOW_BIT] and best[LOW_BIT] / ms,
                    }
                    | _tflops_as_called(shape, entry[part])
                )
        if "kernel" in entry:
            entry["less_kernel_ms"] = entry["whole"]["ms"] - entry["kernel"]["ms"]
    return timed


def cells(entries: list[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`: one for each entry, and for ours one for each part."""
    lines = []
    for entry in entries:
        if "whole" not in entry:
            lines.append([f"{entry['name']}: {entry['absent']}", *[""] * (len(HEADER) - 1)])
            continue
        title = entry["name"] + " (WRONG)" * entry["wrong"]
        error = "NaN" if entry["relative_l2"] is None else f"{entry['relative_l2']:.4f}"
        memory = f"{entry['peak_bytes'] / 2**20:,.0f}"
        as_called = [_rounded(entry["whole"].get(f"{way}_tflops")) for way in WAYS]
        host = f"{entry['whole']['host_us']:.0f}"
        lines.append([title, *_speeds(entry["whole"]), error, memory, host, *as_called])
        for part, title in _TITLES.items():
            if part in entry:
                lines.append([title, *_speeds(entry[part]), "", "", f"{entry[part]['host_us']:.0f}", "", ""])
        if "kernel" in entry:
            lines.append([_DIFFERENCE, f"{entry['less_kernel_ms']:.3f}", *[""] * (len(HEADER) - 2)])
    return lines


def markdown(
    shapes: dict[str, dict[str, Any]],
    header: Sequence[str] = HEADER,
    cells: Callable[[list[dict[str, Any]]], list[list[str]]] = cells,
) -> str:
    """Return the tables of a result's `shapes`, each under its name.

    header, cells: another benchmark gives its own.
    """
    return "\n\n".join(
        "\n".join(
            [f"**{label}**\n", _line(header), _line(["---", *["---:"] * (len(header) - 1)])]
            + [_line(line) for line in cells(measured["entries"])]
        )
        for label, measured in shapes.items()
    )


def _is_wrong(relative_l2: float | None) -> bool:
    return relative_l2 is None or relative_l2 > WRONG


def _tflops_as_called(shape: Shape, part: dict[str, Any]) -> dict[str, float]:
    """Return the TFLOP/s of a part in each of `WAYS` that it was measured in."""
    ms = {way: part.get(f"{way}_ms") for way in WAYS}
    return {f"{way}_tflops": shape.flop / taken / 1e9 for way, taken in ms.items() if taken}


def _rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _speeds(part: dict[str, Any]) -> list[str]:
    share = part.get("share_of_bound")
    ratios = [part.get("over_full"), part.get("over_low")]
    return [
        f"{part['ms']:.3f}",
        f"{part['tflops']:.0f}" if "tflops" in part else "",
        *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        "" if share is None else f"{100 * share:.0f}",
    ]


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(text.replace('|', chr(92) + '|') for text in texts)} |"
