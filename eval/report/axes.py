"""Axes show what configurations differ in: a noise floor that is far from them all stands beside the axes, in words."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dma_diffusers.eval.report.svg import FAINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DECADES = 20  # values that spread more than so many times have a logarithmic axis


def is_logarithmic(values: Sequence[float]) -> bool:
    """Say if values spread so far that their axis is logarithmic."""
    return min(values) > 0 and max(values) > _DECADES * min(values)


def is_near(floor: float, values: Sequence[float]) -> bool:
    """Say if an axis that includes the floor leaves at least a third of itself to the values."""
    if is_logarithmic([*values, floor]):
        floor, values = math.log(floor), [math.log(value) for value in values]
    low, high = min(values), max(values)
    return max(low - floor, floor - high, 0) <= 2 * (high - low)


def say_beyond(axes: "Axes", words: str, above: bool) -> None:
    """Write at the upper or the lower edge what lies beyond it."""
    arrow, height = ("↑", 0.98) if above else ("↓", 0.02)
    axes.annotate(
        f"{words} {arrow}", (0.99, height), xycoords="axes fraction", ha="right",
        va="top" if above else "bottom", color=FAINT, fontsize=8,
    )  # fmt: skip


def plot_lines(axes: "Axes", lines: Sequence[tuple[Sequence[float], str, bool]], logarithmic: bool) -> None:
    """Draw a line for each row, and limit the axis to configurations' where noise floors lie far below or above.

    lines: the values, NaN where there is none, the colour, and if it is a noise floor.
    """
    for values, colour, is_floor in lines:
        axes.plot(values, "--" if is_floor else "-", color=colour, lw=1.4, marker="o", ms=2.5)
    seen = {
        floor: [
            value for values, _, is_floor in lines if is_floor == floor for value in values if value == value
        ]
        for floor in (True, False)
    }
    if logarithmic:
        axes.set_yscale("log")
    if not seen[True] or not seen[False]:
        return
    low, high = min(seen[False]), max(seen[False])
    floor = sorted(seen[True])[len(seen[True]) // 2]
    if is_near(floor, seen[False]):
        return
    margin = (high / low) ** 0.1 if logarithmic else (high - low) / 10
    axes.set_ylim(*((low / margin, high * margin) if logarithmic else (low - margin, high + margin)))
    say_beyond(axes, f"noise floor {floor:.2g}", floor > high)
