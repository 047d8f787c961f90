"""Matplotlib's plots become SVG inside a page: the page's font and colours, the same bytes each time."""

import io
import re
from collections.abc import Callable
from itertools import cycle
from typing import TYPE_CHECKING, Any

from dma_diffusers.eval.report.evaluation import BASELINE, NOISE_FLOOR

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# These stand in: matplotlib must have colours, and only the reader's browser knows the page's.
INK, FAINT, RULE = "#010101", "#020202", "#030303"
_PAGE = {INK: "var(--ink)", FAINT: "var(--faint)", RULE: "var(--rule)"}

_FONT = "system-ui, sans-serif"
# Paul Tol chose these so that colour-blind readers too can tell them apart, on white and on black.
_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#aa3377", "#66ccee", "#ee7733", "#009988")

_STYLE = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 9,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "text.parse_math": False,
}


def row_colours(rows: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the colour of each row in every plot of a page."""
    colours = cycle(_COLOURS)
    fixed = {BASELINE: INK, NOISE_FLOOR: FAINT}
    return {name: fixed.get(row["role"]) or next(colours) for name, row in rows.items()}


def css_colour(colour: str) -> str:
    """Return a plot's colour as the page's style sheet has it."""
    return _PAGE.get(colour, colour)


def svg(name: str, width: float, height: float, draw: Callable[["Figure"], None]) -> str:
    """Return an <svg> element of `width` × `height` inches, drawn by `draw` on a figure.

    name: another for each plot of a page, so that their ids differ.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Figure((width, height), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=nothing)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)  # these ids name parts, and repeat from plot to plot
    drawn = re.sub(r"font-family: [^;\"]*; ", "", drawn)  # matplotlib names its own font at every word
    for colour, variable in _PAGE.items():
        drawn = drawn.replace(colour, variable)
    return drawn


def standalone(element: str) -> str:
    """Return a plot's <svg> element as a file of its own, on white, without line breaks and third decimals."""
    element = re.sub(r"\s*\n\s*", " ", element)
    # A number is rounded inside a tag, where coordinates are, and not in a label between tags.
    element = re.sub(r"\d+\.\d{3,}(?=[^<>]*>)", lambda number: f"{float(number[0]):.2f}", element)
    colours = f"--ink: #1d1d1b; --faint: #6b6b66; --rule: #dfdfd8; background: #fff; font-family: {_FONT}"
    return element.replace(">", f"><style>svg {{ {colours} }}</style>", 1)


def label_decades(axis: "Axis") -> None:
    """Write 1, 2 and 5 of each power of ten along a logarithmic axis, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
