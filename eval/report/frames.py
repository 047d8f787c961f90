"""This module shows how far clips are from full precision's, frame by frame."""

import math
from typing import TYPE_CHECKING, Any

from dma_diffusers.eval.report.axes import plot_lines
from dma_diffusers.eval.report.evaluation import NOISE_FLOOR
from dma_diffusers.eval.report.svg import label_decades, row_colours, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_METRICS = ("psnr_db", "lpips", "flicker")


def frame_scores(evaluation: dict[str, Any], metric: str) -> dict[str, list[float]]:
    """Return each row's score of every frame; infinite ones, and those that have no logarithm, are NaN.

    Rows without any other are left out.
    """
    found = {}
    for name, row in evaluation["rows"].items():
        scores = [score or math.nan for score in row.get("frames", {}).get(metric, ())]
        if any(score == score for score in scores):
            found[name] = scores
    return found


def frame_plot(evaluation: dict[str, Any]) -> str | None:
    """Plot PSNR, LPIPS and flicker over frames as an <svg> element; None where no row has scores of frames."""
    rows = evaluation["rows"]
    scores = {metric: found for metric in _METRICS if (found := frame_scores(evaluation, metric))}
    if not scores:
        return None
    titles = {metric: evaluation["metrics"][metric]["title"] for metric in scores}
    return svg("frames", 6.4 * len(scores), 4.2, lambda figure: _draw(figure, rows, scores, titles))


def _draw(
    figure: "Figure",
    rows: dict[str, dict[str, Any]],
    scores: dict[str, dict[str, list[float]]],
    titles: dict[str, str],
) -> None:
    colours = row_colours(rows)
    panels = figure.subplots(1, len(scores), squeeze=False)[0]
    for axes, (metric, found) in zip(panels, scores.items(), strict=True):
        lines = [(values, colours[name], rows[name]["role"] == NOISE_FLOOR) for name, values in found.items()]
        plot_lines(axes, lines, logarithmic=metric != "psnr_db")
        if metric != "psnr_db":
            label_decades(axes.yaxis)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel="frame", ylabel=titles[metric])
