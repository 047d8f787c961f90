"""This module shows the error of each denoising step, restarted from the baseline's own latents."""

import math
from typing import TYPE_CHECKING, Any

from dma_diffusers.eval.report.axes import plot_lines
from dma_diffusers.eval.report.evaluation import NOISE_FLOOR
from dma_diffusers.eval.report.svg import label_decades, row_colours, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def step_errors(evaluation: dict[str, Any]) -> dict[str, list[float]]:
    """Return each row's error of every step, 0 as NaN; rows without any error above 0 are left out."""
    return {
        name: [error or math.nan for error in row["steps"]]
        for name, row in evaluation["rows"].items()
        if any(row.get("steps") or ())
    }


def step_plot(evaluation: dict[str, Any]) -> str | None:
    """Draw the line plot as an <svg> element; None where no row has an error."""
    rows, errors = evaluation["rows"], step_errors(evaluation)
    return svg("steps", 6.4, 4.2, lambda figure: _draw(figure, rows, errors)) if errors else None


def _draw(figure: "Figure", rows: dict[str, dict[str, Any]], errors: dict[str, list[float]]) -> None:
    axes, colours = figure.subplots(), row_colours(rows)
    lines = [(values, colours[name], rows[name]["role"] == NOISE_FLOOR) for name, values in errors.items()]
    plot_lines(axes, lines, logarithmic=True)
    label_decades(axes.yaxis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="denoising step", ylabel="relative error of the step")
