"""The plots of a study, as SVG inside a page."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dma_diffusers.eval.report.svg import FAINT, INK, label_decades, svg
from dma_diffusers.eval.study.theory import CROSSOVERS, noise
from dma_diffusers.kernels.formats import get_format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Paul Tol chose these so that colour-blind readers too can tell them apart.
_PARTS = {"q": "#4477aa", "k": "#ee6677", "v": "#228833", "p": "#ccbb44", "linear": "#aa3377"}
_ROTATIONS = {"none": "#4477aa", "hadamard16": "#ccbb44", "hadamard32": "#ee6677", "head_dim": "#aa3377"}
_POINTS = 500  # of each part at most
_ON_MAP = "#1d1d1b"
_INTEGER, _FLOAT = "#ee6677", "#4477aa"
_NAMES = {
    "mx8": "MXINT8 / MXFP8",
    "mx6": "MXINT6 / MXFP6 E2M3",
    "mx4": "MXINT4 / MXFP4",
    "nv4": "NVINT4 / NVFP4",
}
Rows = Sequence[Mapping[str, Any]]


def crossover_map(document: Mapping[str, Any]) -> str | None:
    """Draw QSNR over crest factors for each integer and float of one size: theory's lines and layers' tensors."""
    shown = [name for name, both in CROSSOVERS.items() if set(both) <= set(document["formats"])]
    if not shown:
        return None
    crests = {
        _tensor(row, row["block"]): row["q50"] for row in document["crests"] if row["rotation"] == "none"
    }

    def draw(figure: "Figure") -> None:
        for axes, name in zip(figure.subplots(1, len(shown), squeeze=False).ravel(), shown, strict=True):
            for format, colour in zip(CROSSOVERS[name], (_INTEGER, _FLOAT), strict=True):
                block = get_format(format).block
                rows = [r for r in document["rows"] if r["format"] == format and r["qsnr"] is not None]
                points = [(crests[_tensor(r, block)], r["qsnr"]) for r in rows if _tensor(r, block) in crests]
                if points:
                    axes.plot(*zip(*points, strict=True), ".", color=colour, ms=5, alpha=0.5, mew=0)
                crest = torch.linspace(1.2, 0.95 * block**0.5, 60, dtype=torch.float64)
                qsnr = -10 * torch.log10(noise(get_format(format), crest, block))
                axes.plot(crest, qsnr, color=colour, lw=1.5, label=format)
            if document["crossovers"][name] < block**0.5:
                axes.axvline(document["crossovers"][name], color=FAINT, lw=0.8, ls=":")
            axes.set(xlabel="crest factor κ", title=_NAMES[name])
            axes.legend(frameon=False, fontsize=8)
        figure.axes[0].set_ylabel("QSNR (dB)")

    return svg("crossovers", 3 * len(shown), 3.2, draw)


def prediction(document: Mapping[str, Any]) -> str:
    """Draw measured over predicted QSNR, a point for each layer, step and variant, or for some of them."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for part, colour in _PARTS.items():
            points = [(r["predicted_qsnr"], r["qsnr"]) for r in document["rows"] if _is_measured(r, part)]
            points = points[:: -(-len(points) // _POINTS) or 1]
            if points:
                axes.plot(*zip(*points, strict=True), ".", color=colour, ms=3, alpha=0.5, mew=0, label=part)
        low, high = axes.get_xlim()
        axes.plot((low, high), (low, high), color=FAINT, lw=0.8, ls="--")
        axes.set(xlabel="predicted QSNR (dB)", ylabel="measured QSNR (dB)")
        axes.legend(frameon=False, markerscale=3)

    return svg("prediction", 5, 4, draw)


def crests(document: Mapping[str, Any]) -> str:
    """Draw the quantiles of κ in blocks of 32, means over layers and steps: 5 to 95 % thin, 25 to 75 % thick."""
    found: dict[tuple[str, bool, str], list[list[float]]] = {}
    for row in document["crests"]:
        if row["block"] == 32:
            quantiles = [row[name] for name in ("q05", "q25", "q50", "q75", "q95")]
            found.setdefault((row["part"], row["smooth"], row["rotation"]), []).append(quantiles)
    order = [key for part in _PARTS for key in sorted(found, key=lambda key: key[1]) if key[0] == part]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for place, key in enumerate(order):
            least, low, middle, high, most = np.mean(found[key], 0)
            colour = _ROTATIONS[key[2]]
            axes.plot((least, most), (place, place), color=colour, lw=1)
            axes.plot((low, high), (place, place), color=colour, lw=4, solid_capstyle="butt")
            axes.plot(middle, place, "|", color=INK, ms=7)
        labels = [f"{part}{' − mean' * smooth}, {rotation}" for part, smooth, rotation in order]
        axes.set_yticks(range(len(order)), labels)
        axes.invert_yaxis()
        axes.set(xlabel="crest factor κ of blocks of 32")

    return svg("crests", 6, 0.19 * len(order) + 0.7, draw)


def errors(document: Mapping[str, Any], part: str) -> str | None:
    """Draw the output's error by format and rotation; filled where the mean was subtracted."""
    rows = [row for row in document["summary"] if row["part"] == part and row["relative_l2"]]
    if not rows:
        return None
    formats = list(dict.fromkeys(row["format"] for row in rows))
    rotations = [rotation for rotation in _ROTATIONS if any(row["rotation"] == rotation for row in rows)]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for row in rows:
            estimate, *bounds = row["relative_l2"]
            aside = (rotations.index(row["rotation"]) - (len(rotations) - 1) / 2) * 0.17 + 0.06 * row[
                "smooth"
            ]
            x, colour = formats.index(row["format"]) + aside, _ROTATIONS[row["rotation"]]
            if bounds:
                axes.plot((x, x), bounds, color=colour, lw=1)
            axes.plot(x, estimate, "o", color=colour, mfc=colour if row["smooth"] else "none", ms=4)
        for rotation in rotations if len(rotations) > 1 else ():
            axes.plot([], [], "o", color=_ROTATIONS[rotation], ms=4, label=rotation)
        _named(axes, formats)
        axes.set_ylabel("relative L2 of the output")
        if len(rotations) > 1:
            axes.legend(frameon=False, ncols=len(rotations), loc="lower left", bbox_to_anchor=(0, 1))

    return svg(f"errors-{part}", 0.62 * len(formats) + 1.4, 3.6, draw)


def over_noise(document: Mapping[str, Any]) -> str | None:
    """Draw the error of q and k, smoothed and unrotated, over noise levels, a mean over layers; None for one level."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in document["rows"]:
        if (row["part"], row["rotation"], row["smooth"]) == ("qk", "none", True) and row["sigma"] is not None:
            found.setdefault(row["format"], {}).setdefault(row["sigma"], []).append(row["relative_l2"])
    if not found or len(next(iter(found.values()))) < 2:
        return None

    def draw(figure: "Figure") -> None:
        from matplotlib import colormaps

        axes = figure.subplots()
        for number, (format, of_levels) in enumerate(found.items()):
            levels = sorted(of_levels, reverse=True)
            colour = colormaps["turbo"]((number + 0.5) / len(found))
            axes.plot(
                levels,
                [np.mean(of_levels[s]) for s in levels],
                color=colour,
                marker="o",
                ms=3,
                lw=1.2,
                label=format,
            )
        axes.invert_xaxis()
        axes.set_yscale("log")
        label_decades(axes.yaxis)
        axes.set(xlabel="noise level σ, from noise to picture", ylabel="relative L2 of the output")
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg("noise", 5.6, 3.6, draw)


def layers(document: Mapping[str, Any]) -> str | None:
    """Draw the error of q and k, smoothed and unrotated, by layer and format, a mean over steps."""
    rows = [
        row
        for row in document["rows"]
        if (row["part"], row["rotation"], row["smooth"]) == ("qk", "none", True)
    ]
    return (
        _map("layers", rows, "layer", "format", lambda row: (row["layer"], row["format"])) if rows else None
    )


def pairs(document: Mapping[str, Any]) -> str | None:
    """Draw the error of attention by the formats of Q·K and of P·V, K smoothed, unrotated."""
    rows = [row for row in document["rows"] if row["part"] == "pair"]
    return _map("pairs", rows, "Q·K", "P·V", lambda row: tuple(row["format"].split("/"))) if rows else None


def _map(
    name: str, rows: Rows, down: str, across: str, place: Callable[[Mapping[str, Any]], tuple[str, ...]]
) -> str:
    """A map of mean errors, written into its cells."""
    found: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        found.setdefault(place(row), []).append(row["relative_l2"])
    lines, columns = (list(dict.fromkeys(key[axis] for key in found)) for axis in (0, 1))
    values = np.array([[np.mean(found.get((line, column), np.nan)) for column in columns] for line in lines])

    def draw(figure: "Figure") -> None:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        least, most = np.nanmin(values[values > 0]), np.nanmax(values)
        axes.imshow(values, cmap="YlOrRd", norm=LogNorm(least, most * 4), aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            if not np.isnan(value):
                axes.text(x, y, f"{value:.3f}".lstrip("0"), ha="center", va="center", size=8, color=_ON_MAP)
        axes.grid(False)
        axes.set_yticks(range(len(lines)), lines)
        axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
        axes.set(xlabel=across, ylabel=down)

    return svg(name, 0.62 * len(columns) + 0.075 * max(map(len, lines)) + 1.2, 0.24 * len(lines) + 1.2, draw)


def _named(axes: "Axes", formats: Sequence[str]) -> None:
    axes.set_xticks(range(len(formats)), formats, rotation=30, ha="right")
    axes.set_yscale("log")
    label_decades(axes.yaxis)


def _tensor(row: Mapping[str, Any], block: int | None) -> tuple[Any, ...]:
    return row["layer"], row["step"], row["part"], row["rotation"], row["smooth"], block


def _is_measured(row: Mapping[str, Any], part: str) -> bool:
    return row["part"] == part and row["qsnr"] is not None


def medians(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median distance in dB between measured and predicted QSNR, of each part and of all."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["qsnr"] is not None:
            for part in (row["part"], "all"):
                found.setdefault(part, []).append(abs(row["qsnr"] - row["predicted_qsnr"]))
    return {part: float(np.median(distances)) for part, distances in found.items()}
