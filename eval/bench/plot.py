"""This module draws a result as a bar chart: TFLOP/s of each entry at each shape, and its bound as a thin line."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dma_diffusers.eval.bench.entries import FULL, LOW_BIT, OURS

_FILLS = {
    FULL: ("#b5b5b5", "#8a8a8a", "#d8d8d8"),
    LOW_BIT: ("#7fa7d1", "#4f7fb3", "#a9c4e0", "#2f5d8a"),
    OURS: ("#e4572e", "#f29e4c", "#b23a17", "#f6c28b", "#7d2a12", "#c98a5a"),
}
_BAR, _GAP, _LEFT, _TOP, _HEIGHT, _LABELS, _LEGEND_LINE = 18, 26, 46, 30, 260, 40, 18
_STEP = 200  # grid lines are so many TFLOP/s apart


def check_plot(path: Path) -> None:
    """Raise ValueError unless `path` ends in .svg."""
    if path.suffix != ".svg":
        raise ValueError(f"plots are SVG: name a file that ends in .svg, not {path.name}")


def plot(shapes: dict[str, dict[str, Any]]) -> bytes:
    """Draw the chart of a result's `shapes`, as SVG; entries that didn't run, or are wrong, have no bar."""
    drawn = {
        label: [e for e in measured["entries"] if "whole" in e and not e["wrong"]]
        for label, measured in shapes.items()
    }
    return _svg(drawn, _colours([e for entries in drawn.values() for e in entries])).encode()


def _colours(entries: list[dict[str, Any]]) -> dict[str, str]:
    """Choose a fill for each entry's name, among the shades of its kind's colour."""
    fills: dict[str, str] = {}
    for entry in entries:
        shades = _FILLS[entry["kind"]]
        used = sum(fill in shades for fill in fills.values())
        fills.setdefault(entry["name"], shades[used % len(shades)])
    return fills


def _svg(drawn: dict[str, list[dict[str, Any]]], fills: dict[str, str]) -> str:
    every = [entry for entries in drawn.values() for entry in entries]
    top = max((max(e["whole"]["tflops"], e["bound_tflops"] or 0) for e in every), default=_STEP)
    top = -(-top // _STEP) * _STEP
    widths = {label: max(_BAR * len(entries), 120) + _GAP for label, entries in drawn.items()}
    width = max(_LEFT + sum(widths.values()), 420)
    height = _TOP + _HEIGHT + _LABELS + _LEGEND_LINE * (len(fills) + 1)

    def y(tflops: float) -> float:
        return _TOP + _HEIGHT * (1 - tflops / top)

    parts = []
    for tflops in range(0, int(top) + 1, _STEP):
        parts.append(f'<path d="M{_LEFT} {y(tflops):.1f}H{width}" stroke="#e6e6e6"/>')
        parts.append(text(_LEFT - 6, y(tflops) + 4, str(tflops), "end"))
    parts.append(text(4, _TOP - 16, "TFLOP/s, quantisation included"))
    left = _LEFT + _GAP / 2
    for label, entries in drawn.items():
        for index, entry in enumerate(entries):
            x, tflops, bound = left + _BAR * index, entry["whole"]["tflops"], entry["bound_tflops"]
            parts.append(
                f'<rect x="{x:.1f}" y="{y(tflops):.1f}" width="{_BAR - 3}" height="{y(0) - y(tflops):.1f}" '
                f'fill="{fills[entry["name"]]}"><title>{escape(entry["name"])}: {tflops:.0f}</title></rect>'
            )
            if bound:
                parts.append(f'<path d="M{x:.1f} {y(bound):.1f}h{_BAR - 3}" stroke="#222" class="bound"/>')
        model, _, size = label.rpartition(" ")
        parts.append(text(left, _TOP + _HEIGHT + 16, model))
        parts.append(text(left, _TOP + _HEIGHT + 30, size))
        left += widths[label]
    parts += legend(fills | {"bound: matrix products or exponentials": ""}, _LEFT, _TOP + _HEIGHT + _LABELS)
    return document(width, height, parts)


def document(width: float, height: float, parts: Sequence[str]) -> str:
    """Return an SVG of this size with a white ground and these parts on it."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="11" fill="#333">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
        *parts,
        "</svg>\n",
    ])  # fmt: skip


def legend(fills: Mapping[str, str], left: float, top: float) -> list[str]:
    """Draw a line for each name with its fill; an empty one is drawn as a thin line."""
    parts = []
    for line, (name, fill) in enumerate(fills.items()):
        baseline = top + _LEGEND_LINE * (line + 0.7)
        parts.append(
            f'<rect x="{left}" y="{baseline - 9:.1f}" width="10" height="10" fill="{fill}"/>'
            if fill
            else f'<path d="M{left} {baseline - 4:.1f}h10" stroke="#222"/>'
        )
        parts.append(text(left + 16, baseline, name))
    return parts


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    """Draw words at a place, from there on or, with the anchor "end", up to there."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
