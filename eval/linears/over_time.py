"""Bits over time: the shares of 4, 6 and 8 bits that the threshold rule gives each input at each noise level."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dma_diffusers.eval.report.svg import standalone, svg
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.linears.allocation import FORMATS
from dma_diffusers.linears.calibration import Calibration
from dma_diffusers.pipelines.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#4477aa", "#ccbb44", "#ee6677")
_COLUMNS, _WIDTH, _HEIGHT, _LEGEND = 3, 2.8, 1.9, 0.5  # the sizes of panels and of the legend, in inches


def bits_over_time(calibrations: Mapping[str, Calibration], factor: float = 1.0) -> dict[str, Any]:
    """Return the shares of each input at each noise level, and how stable they are, as plain numbers for JSON.

    calibrations: by the prefix of module names, as `calibrate_linears` gives them. factor: of the thresholds.

    `inputs` has for each input, under the name of its first layer, all layers that read it, its `kind` (the same in all
    blocks), and a row `[4 bits, 6 bits, 8 bits]` for each of `levels`, None where it was not read. `stability` says how
    they change: see `stability`.
    """
    records = {prefix: seen.over_time(factor) for prefix, seen in calibrations.items()}
    tells_noise = all(record["tells_noise"] for record in records.values())
    levels = sorted({level for record in records.values() for level in record["levels"]}, reverse=tells_noise)
    inputs: dict[str, Any] = {}
    for prefix, seen in calibrations.items():
        record = records[prefix]
        for layer, shares in record["layers"].items():
            first = prefix + seen.shared(layer)
            of_level = dict(zip(record["levels"], shares, strict=True))
            entry = inputs.setdefault(
                first, {"layers": [], "shares": [of_level.get(level) for level in levels]}
            )
            entry["layers"].append(prefix + layer)
    for entry in inputs.values():
        entry["kind"] = _kind(entry["layers"], "" if len(calibrations) > 1 else next(iter(calibrations)))
    found = {"levels": levels, "tells_noise": tells_noise, "factor": factor, "inputs": inputs}
    return found | {"stability": stability(inputs)}


def stability(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return how far the bits of inputs change over noise levels, of each kind and in `all`.

    change: the largest average bits of an input at any level less the smallest, scales of blocks included, as a mean
    over inputs and of the `worst` of them. moved: the share of channels that are in another group at a level than by
    the shares of all levels together, at the worst level. bits: the smallest and the largest average over inputs.
    """
    kinds: dict[str, list[str]] = {"all": list(inputs)}
    for name, entry in inputs.items():
        kinds.setdefault(entry["kind"], []).append(name)
    figures = {name: _figures(entry["shares"]) for name, entry in inputs.items()}
    return {kind: _summary({name: figures[name] for name in names}) for kind, names in kinds.items()}


def save(found: Mapping[str, Any], path: Path) -> None:
    """Write the plot to `path`, which ends in .svg, and the numbers to the .json file beside it."""
    write_atomically(path, plot(found).encode())
    write_atomically(path.with_suffix(".json"), (json.dumps(_rounded(found), indent=1) + "\n").encode())


def plot(found: Mapping[str, Any]) -> str:
    """Draw a panel for each kind of input: the shares over noise levels, as SVG.

    A line is the mean over the inputs of a kind, its band reaches from the least to the largest of them.
    """
    kinds: dict[str, list[Any]] = {}
    for entry in found["inputs"].values():
        kinds.setdefault(entry["kind"], []).append(entry["shares"])
    rows = -(-len(kinds) // _COLUMNS)

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(rows, _COLUMNS, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(kinds) :]:
            axes.set_axis_off()
        for axes, (kind, shares) in zip(panels.flat, kinds.items(), strict=False):
            _panel(axes, found["levels"], shares)
            axes.set_title(kind.replace(": ", ":\n"), fontsize=7.5)
        if found["tells_noise"]:
            panels[0, 0].set_xlim(1, 0)
        panels[0, 0].set_ylim(0, 1)
        figure.supxlabel("noise level" if found["tells_noise"] else "call of the model", fontsize=9)
        figure.supylabel("share of channels", fontsize=9)
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(FORMATS), frameon=False)

    height = rows * _HEIGHT + _LEGEND
    return standalone(svg("bits-over-time", _COLUMNS * _WIDTH, height, draw))


def _panel(axes: "Axes", levels: list[float], shares: list[Any]) -> None:
    values = np.array([[row or [np.nan] * len(FORMATS) for row in of_input] for of_input in shares])
    there = ~np.isnan(values).all((0, 2))
    at, values = np.array(levels)[there], values[:, there]
    for number, (format, colour) in enumerate(zip(FORMATS, _COLOURS, strict=True)):
        of_format = values[..., number]
        axes.fill_between(at, np.nanmin(of_format, 0), np.nanmax(of_format, 0), color=colour, alpha=0.2, lw=0)
        label = f"{get_format(format).bits} bits"
        axes.plot(at, np.nanmean(of_format, 0), color=colour, marker="o", ms=2.5, lw=1.2, label=label)


def _kind(layers: list[str], prefix: str) -> str:
    """The names of the layers that read an input, as they are in every block: `blocks: attn.to_q, to_k, to_v`.

    prefix: of the names, to leave out.
    """
    words, before = [], ""
    for layer in layers:
        blocks, inside = _inside(layer.removeprefix(prefix))
        parent, _, own = inside.rpartition(".")
        words.append(own if words and parent == before else inside)
        before = parent
    return f"{blocks}: {', '.join(words)}"


def _inside(layer: str) -> tuple[str, str]:
    """The name of the list of blocks that a layer stands in, and its own inside of the block."""
    parts = layer.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[:number]), ".".join(parts[number + 1 :])


def _figures(shares: list[list[float] | None]) -> tuple[float, float, float]:
    """The change, the share moved, and the average bits of one input."""
    rows = np.array([row for row in shares if row])
    bits = rows @ [get_format(format).average_bits for format in FORMATS]
    moved = np.abs(rows - rows.mean(0)).sum(1) / 2
    return float(np.ptp(bits)), float(moved.max()), float(bits.mean())


def _summary(figures: dict[str, tuple[float, float, float]]) -> dict[str, Any]:
    change, moved, bits = np.array(list(figures.values())).T
    worst = list(figures)[int(change.argmax())]
    return {
        "inputs": len(figures), "change": {"mean": float(change.mean()), "worst": float(change.max()), "of": worst},
        "moved": {"mean": float(moved.mean()), "worst": float(moved.max())},
        "bits": [float(bits.min()), float(bits.max())],
    }  # fmt: skip


def _rounded(value: Any) -> Any:
    """The same with four decimals, which are more than the sample tells."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
