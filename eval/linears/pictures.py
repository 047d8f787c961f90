"""Pictures of the ways to choose the bits of linear layers, beside MicroMix's: `dma-diffusers eval` on variants' rows.

`python -m dma_diffusers.eval.linears.pictures RUN/evaluation.json …` prints a table for each run.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dma_diffusers.eval.intervals import Interval, bootstrap
from dma_diffusers.eval.linears.variants import OURS
from dma_diffusers.eval.report.evaluation import BASELINE, read

METRICS = {"psnr_db": "PSNR, dB ↑", "lpips": "LPIPS ↓"}
_DECIMALS = {"psnr_db": 2, "lpips": 4}


def table(evaluation: dict[str, Any]) -> str:
    """Return, as Markdown, each row's PSNR and LPIPS to full precision, and what they are less MicroMix's.

    Differences are of the same prompts and seeds; intervals are 95 %, over prompts. MicroMix is better where its PSNR
    is higher (the difference is below 0) and its LPIPS lower (above 0).
    """
    names = [f"{words} | less MicroMix's" for words in METRICS.values()]
    lines = [f"| Linear layers | {' | '.join(names)} |", "| --- |" + " ---: |" * 2 * len(METRICS)]
    for name, row in evaluation["rows"].items():
        if row["role"] == BASELINE:
            continue
        cells = [name]
        for metric, decimals in _DECIMALS.items():
            cells.append(
                _words(
                    Interval(*(_finite_or_not(row["summary"][metric].get(k)) for k in Interval._fields)),
                    decimals,
                )
            )
            cells.append("–" if name == OURS else _words(difference(evaluation, metric, name), decimals))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(evaluation: dict[str, Any], metric: str, name: str) -> Interval:
    """Return the mean of a row's metric less MicroMix's, with its interval over prompts."""
    columns = [_of_prompts(evaluation, metric, row) for row in (name, OURS)]
    return bootstrap(columns, lambda other, our: other - our)


def _of_prompts(evaluation: dict[str, Any], metric: str, name: str) -> Sequence[float]:
    """A row's metric of each prompt, a mean over its seeds."""
    values = [_finite_or_not(value) for value in evaluation["rows"][name]["pictures"][metric]]
    return np.reshape(values, (-1, evaluation["settings"]["seeds"])).mean(1)


def _finite_or_not(value: float | None) -> float:
    """A stored number; None is infinite, the PSNR of identical pictures."""
    return math.inf if value is None else value


def _words(interval: Interval, decimals: int) -> str:
    estimate, low, high = (
        "∞" if value == math.inf else f"{value:.{decimals}f}".replace("-", "−") for value in interval
    )
    return estimate if low == high == estimate == "∞" else f"{estimate} [{low}, {high}]"


def main(files: Annotated[list[Path], typer.Argument(help="evaluation.json of each run.")]) -> None:
    """Print the table of each run, under its batch."""
    for file in files:
        evaluation = read(file)
        settings = evaluation["settings"]
        print(f"Batch {settings['batch']}, {settings['prompts']} prompts\n\n{table(evaluation)}\n")


if __name__ == "__main__":
    typer.run(main)
