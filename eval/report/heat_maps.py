"""This module draws the attention error of each module and step: a map for each configuration, one colour scale."""

import math
from typing import TYPE_CHECKING, Any

from dma_diffusers.eval.report.svg import FAINT, label_decades, svg

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

_LABELS = 40  # at most so many module names are written, or else every second, third, ... one
_LETTER, _WIDTH = 0.068, 12  # they are the widths of a letter, and of names and panels, in inches


def layer_errors(layers: dict[str, Any] | None) -> str | None:
    """Return the maps as an <svg> element; None where nothing was recorded."""
    if not layers or not layers["modules"] or not layers["steps"] or not layers["relative_l2"]:
        return None
    maps, modules = layers["relative_l2"], layers["modules"]
    names = max(map(len, modules)) * _LETTER
    panel = max(0.3 * len(layers["steps"]), *(len(name) * _LETTER for name in maps), 1.2)
    rows = math.ceil(len(maps) / max((_WIDTH - names) // panel, 1))
    columns = math.ceil(len(maps) / rows)
    width = names + columns * panel + 0.9
    height = min(max(0.165 * len(modules), 1.2), 6.5) + 0.4
    return svg("layers", width, rows * height, lambda figure: _draw(figure, layers, rows, columns))


def _draw(figure: "Figure", layers: dict[str, Any], rows: int, columns: int) -> None:
    import matplotlib
    from matplotlib.colors import LogNorm

    modules, steps, maps = layers["modules"], layers["steps"], layers["relative_l2"]
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    norm = _scale([error for errors in maps.values() for row in errors for error in row])
    colours = matplotlib.colormaps["viridis"].with_extremes(bad="#9993")
    for axes, (name, errors) in zip(panels, maps.items(), strict=False):
        values = [[math.nan if error is None else error for error in row] for row in errors]
        image = axes.imshow(values, cmap=colours, norm=norm, aspect="auto", interpolation="none")
        axes.set_title(name, loc="left")
    for index, axes in enumerate(panels):
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8, labelbottom=index + columns >= len(maps))
        axes.set_visible(index < len(maps))
    every = -(-len(modules) // _LABELS)
    panels[0].set_yticks(range(0, len(modules), every), modules[::every])
    every = -(-len(steps) // 8)
    panels[0].set_xticks(range(0, len(steps), every), steps[::every])
    bar = figure.colorbar(
        image,
        ax=panels,
        label="relative L2",
        pad=0.02,
        aspect=20,
        shrink=min(1, 3 / figure.get_figheight()),
        anchor=(0, 1),
    )
    bar.outline.set_edgecolor(FAINT)
    if isinstance(norm, LogNorm):
        label_decades(bar.ax.yaxis)


def _scale(errors: list[float | None]) -> "Normalize":
    """Return the colour scale: logarithmic where errors spread over more than one power of ten."""
    from matplotlib.colors import LogNorm, Normalize

    positive = [error for error in errors if error]
    low, high = min(positive, default=0), max(positive, default=1)
    return LogNorm(low, high) if low and high > 10 * low else Normalize(0, high)
