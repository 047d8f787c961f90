"""This module shows a result of `bench pipeline` as a table and as a chart of stacked bars."""

from collections.abc import Sequence
from html import escape
from typing import Any

from dma_diffusers.eval.bench.breakdown import (
    ATTENTION,
    ATTENTION_QUANTISER,
    HOST,
    LINEARS,
    PARTS,
    POINTWISE,
    QUANTISING,
    REST,
)
from dma_diffusers.eval.bench.plot import document, legend, text

HEADER = (
    "Way",
    "mode",
    "ms a step",
    "× stock",
    "attention",
    "its quantiser",
    "linears",
    "quantising",
    "pointwise",
    "rest",
    "host",
    "quantising, %",
    "% of Amdahl",
    "weights GiB",
    "peak GiB",
    "relative L2",
)
_FILLS = {
    ATTENTION: "#e4572e", ATTENTION_QUANTISER: "#f6c28b", LINEARS: "#2f5d8a", QUANTISING: "#a9c4e0",
    POINTWISE: "#8fb996", REST: "#c9c9c9", HOST: "#f2f2f2",
}  # fmt: skip
_LEFT, _WIDTH, _TOP, _BAR, _LINE = 330, 560, 26, 14, 20


def cells(entries: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines, under `HEADER`."""
    lines = []
    for entry in entries:
        if "absent" in entry:
            lines.append([f"{entry['name']}: {entry['absent']}", entry["mode"], *[""] * (len(HEADER) - 2)])
            continue
        error = entry["relative_l2"]
        lines.append([
            entry["name"], entry["mode"], f"{entry['step_ms']:.1f}", _number(entry["over_stock"], 3),
            *(_number(entry["busy_ms"] and entry["parts_ms"][part], 1) for part in PARTS),
            _number(entry["host_ms"], 1), _percent(entry["quantising_share"]), _percent(entry["of_amdahl"]),
            f"{entry['weights_bytes'] / 2**30:.1f}", f"{entry['peak_bytes'] / 2**30:.1f}",
            "NaN" if error is None else f"{error:.4f}",
        ])  # fmt: skip
    return lines


def verdict(measured: dict[str, Any]) -> list[str]:
    """Return a sentence that says how the fastest of ours compares with the fastest of stock; none without either."""
    ratio = measured["best_over_stock"]
    if ratio is None:
        return []
    stock, ours = measured["best_stock"], measured["best_ours"]
    return [
        f"The fastest of stock is {stock['name']} ({stock['mode']}), {stock['step_ms']:.1f} ms; the fastest of ours is "
        f"{ours['name']} ({ours['mode']}), {ours['step_ms']:.1f} ms: {ratio:.3f} ×"
    ]


def plot(shapes: dict[str, dict[str, Any]]) -> bytes:
    """Draw a chart of a result's `shapes`, as SVG: a bar for each entry, stacked of what its step's time goes to."""
    drawn = {
        label: [entry for entry in measured["entries"] if "absent" not in entry]
        for label, measured in shapes.items()
    }
    body, y = [], _TOP
    for label, entries in drawn.items():
        body.append(text(8, y, f"{label}: ms a step"))
        y += _LINE / 2
        longest = max((entry["step_ms"] for entry in entries), default=1.0)
        for entry in entries:
            body += _bar(entry, y, _WIDTH / longest)
            y += _LINE
        y += _LINE * 1.5
    body += legend(_FILLS, _LEFT, y)
    return document(_LEFT + _WIDTH + 90, y + _LINE * (len(_FILLS) + 1), body).encode()


def _bar(entry: dict[str, Any], y: float, scale: float) -> list[str]:
    """Draw an entry's bar; if its kernels overlap, so that their sum is more than the step's time, they are scaled."""
    found = [text(_LEFT - 6, y + _BAR - 3, f"{entry['name']}, {entry['mode']}", "end")]
    times = entry["parts_ms"] | {HOST: entry["step_ms"] if entry["host_ms"] is None else entry["host_ms"]}
    x, per_ms = float(_LEFT), scale * entry["step_ms"] / sum(times.values())
    for part, ms in times.items():
        if ms:
            found.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{ms * per_ms:.1f}" height="{_BAR}" fill="{_FILLS[part]}" '
                f'class="part"><title>{escape(part)}: {ms:.1f} ms</title></rect>'
            )
        x += ms * per_ms
    return [*found, text(x + 5, y + _BAR - 3, f"{entry['step_ms']:.1f}")]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
