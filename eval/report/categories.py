"""This module shows one metric by category of prompts."""

import math
from typing import Any, NamedTuple

import numpy as np

from dma_diffusers.eval.intervals import bootstrap, prompt_means
from dma_diffusers.eval.report.columns import Cell, interval_cell
from dma_diffusers.eval.report.evaluation import BASELINE, number


class Category(NamedTuple):
    """A category's prompts are a line of the table. cells: a figure and a shade, 0 (best) to 1, by row."""

    name: str
    prompts: int
    cells: dict[str, tuple[Cell, float]]


def by_category(evaluation: dict[str, Any], metric: str) -> list[Category]:
    """Return means of a metric over each category's pictures, with 95 % intervals over its prompts.

    Pictures that are identical to the baseline's have no finite PSNR, and are left out where others have one.

    The baseline's row is left out. The list is empty where all prompts share a category, or no row has the pictures'
    values.
    """
    names = [prompt.get("category") or "no category" for prompt in evaluation["prompts"]]
    scores = {  # `[prompts, seeds]` by row
        name: np.reshape([number(value) for value in row["pictures"][metric]], (len(names), -1))
        for name, row in evaluation["rows"].items()
        if row["role"] != BASELINE and metric in row.get("pictures", {})
    }
    found = list(dict.fromkeys(names))
    if len(found) < 2 or not scores:
        return []
    about = evaluation["metrics"][metric]
    members = {category: np.array([name == category for name in names]) for category in found}
    intervals = {
        (category, row): bootstrap([prompt_means(values[chosen].ravel(), values.shape[1])])
        for category, chosen in members.items()
        for row, values in scores.items()
    }
    shades = _shades({key: interval.estimate for key, interval in intervals.items()}, about["better"])
    return [
        Category(
            category,
            int(chosen.sum()),
            {
                row: (interval_cell(*intervals[category, row], about["digits"]), shades[category, row])
                for row in scores
            },
        )
        for category, chosen in members.items()
    ]


def _shades(values: dict[Any, float], better: str) -> dict[Any, float]:
    """Give the best value 0, the worst 1, those between linear shades; infinite ones are best."""
    finite = [value for value in values.values() if math.isfinite(value)]
    low, high = min(finite, default=0), max(finite, default=0)
    best, worst = (high, low) if better == "higher" else (low, high)
    spread = (worst - best) or 1
    return {key: (value - best) / spread if math.isfinite(value) else 0 for key, value in values.items()}
