"""Sum a quality table up: means over prompts with 95 % intervals, as data and as Markdown."""

import math
from typing import Any

from dma_diffusers.eval.intervals import bootstrap

_COLUMNS = {
    "psnr_db": ("PSNR, dB", 2),
    "ssim": ("SSIM", 4),
    "latents_relative_l2": ("Latents, relative L2", 4),
    "psnr_gain_db": ("PSNR gain over all MXFP4, dB", 2),
    "share_of_gap": ("Share of the gap to all MXFP8 closed", 2),
}
_LOW, _HIGH = "all MXFP4", "all MXFP8"


def summarise(configurations: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[float | None]]]:
    """Per configuration, the columns' means as [estimate, low, high]; None where infinite.

    A column that comes out undefined (∞ - ∞) is left out.

    DMA's rows also have the PSNR gain over all MXFP4, and its share of all MXFP8's gain: both are paired by
    prompt, and there once those two configurations are.
    """
    psnr = {
        name: [math.inf if value is None else value for value in result["prompts"]["psnr_db"]]
        for name, result in configurations.items()
    }
    summary = {}
    for name, result in configurations.items():
        columns = result["prompts"] | {"psnr_db": psnr[name]}
        row = {column: bootstrap([values]) for column, values in columns.items()}
        if name.startswith("DMA") and _LOW in psnr and _HIGH in psnr:
            row["psnr_gain_db"] = bootstrap([psnr[name], psnr[_LOW]], lambda dma, low: dma - low)
            row["share_of_gap"] = bootstrap(
                [psnr[name], psnr[_LOW], psnr[_HIGH]], lambda dma, low, high: (dma - low) / (high - low)
            )
        summary[name] = {
            column: [bound if math.isfinite(bound) else None for bound in interval]
            for column, interval in row.items()
            if not any(map(math.isnan, interval))
        }
    return summary


def markdown(summary: dict[str, dict[str, list[float | None]]]) -> str:
    """The table of a summary, `estimate [low, high]` in each cell."""
    header = ["Attention", *(title for title, _ in _COLUMNS.values())]
    rows = [header, ["---"] * len(header)]
    for name, row in summary.items():
        rows.append([name, *(_cell(row.get(column), digits) for column, (_, digits) in _COLUMNS.items())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(interval: list[float | None] | None, digits: int) -> str:
    if interval is None:
        return "–"
    estimate, low, high = ("∞" if bound is None else f"{bound:.{digits}f}" for bound in interval)
    return estimate if low == high else f"{estimate} [{low}, {high}]"
