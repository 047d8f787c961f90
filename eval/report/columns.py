"""This module makes the columns of a report's table, and its cells as text."""

import math
from collections import Counter
from typing import Any, NamedTuple

from dma_diffusers.eval.report.evaluation import CONFIGURATION, number

MISSING = "–"
_LEADING = ("lpips", "psnr_db", "ssim", "latents_relative_l2")


class Column(NamedTuple):
    """A column is a metric that at least one row has.

    arrow: towards the better side. n: pictures behind each of its figures, None where they differ.
    """

    metric: str
    title: str
    arrow: str
    digits: int
    n: int | None


class Cell(NamedTuple):
    """A cell is a figure as text. interval: "[low, high]", empty where it has none. n: pictures behind it.

    identical: so many pictures are identical to the baseline's and left out of a mean that would be infinite.
    """

    estimate: str
    interval: str = ""
    n: int | None = None
    identical: int = 0


def columns(evaluation: dict[str, Any]) -> list[Column]:
    """Return the table's columns, in the evaluation's order."""
    found = []
    for metric, about in evaluation["metrics"].items():
        figures = [row["summary"][metric] for row in evaluation["rows"].values() if metric in row["summary"]]
        if figures:
            counts = {figure.get("n") for figure in figures}
            arrow = "↑" if about["better"] == "higher" else "↓"
            n = counts.pop() if len(counts) == 1 else None
            found.append(Column(metric, about["title"], arrow, about["digits"], n))
    return found


def cell(row: dict[str, Any], column: Column) -> Cell:
    """Return a row's figure in a column."""
    figure = row["summary"].get(column.metric)
    if figure is None:
        return Cell(MISSING)
    estimate, low, high = (number(figure.get(key)) for key in ("estimate", "low", "high"))
    identical = figure.get("identical", 0) if math.isfinite(estimate) else 0
    return interval_cell(estimate, low, high, column.digits)._replace(n=figure.get("n"), identical=identical)


def interval_cell(estimate: float, low: float, high: float, digits: int) -> Cell:
    """Write a figure with its interval, where that is more than a point."""
    interval = f"[{_text(low, digits)}, {_text(high, digits)}]" if low != high else ""
    return Cell(_text(estimate, digits), interval)


def leading_metric(evaluation: dict[str, Any]) -> str | None:
    """Return the metric that plots show: LPIPS, or the next paired one of which a configuration has a finite figure."""
    rows = [row for row in evaluation["rows"].values() if row["role"] == CONFIGURATION]
    finite = {
        metric for row in rows for metric, figure in row["summary"].items() if figure["estimate"] is not None
    }
    return next((metric for metric in _LEADING if metric in finite), None)


def value_text(value: float | None, digits: int) -> str:
    """Write a stored value with so many digits after the point."""
    return _text(number(value), digits)


def seconds_text(row: dict[str, Any]) -> str:
    """Write a row's measured seconds per picture, with at least three significant digits."""
    seconds = row.get("seconds_per_picture")
    if seconds is None:
        return MISSING
    return f"{seconds:#.3g}".rstrip(".") if seconds < 999.5 else f"{seconds:.0f}"


def share_text(row: dict[str, Any]) -> str:
    """Write which share of a row's attention calls ran at low precision; empty where all did, or nothing is known."""
    share = row.get("ran")
    if share is None or share == 1:
        return ""
    return "no call ran at low precision" if not share else f"{share:.0%} of the calls ran at low precision"


def ran_by_reference(row: dict[str, Any]) -> bool:
    """Say if calls of a row ran by the reference in torch, whose seconds say nothing of a kernel's."""
    modules = (row.get("receipt") or {}).get("modules", ())
    return any(module["lowering"] == "reference" for module in modules)


def gist(row: dict[str, Any]) -> list[str]:
    """Say in a line each what most of a row's modules ran; nothing without a receipt."""
    ran = Counter(
        "stock attention"
        if module["lowering"] == "stock"
        else f"{module.get('high')}|{module.get('low')} {module.get('policy')}, {module['lowering'] or 'not known'}"
        for module in (row.get("receipt") or {}).get("modules", ())
    )
    return [f"{count} modules: {what}" for what, count in ran.most_common(2)]


def cost_text(row: dict[str, Any]) -> str:
    """Write a row's predicted cost of attention, in units of bf16's."""
    cost = row.get("predicted_cost")
    return MISSING if cost is None else f"{cost:.3f}"


def has_costs(evaluation: dict[str, Any]) -> bool:
    """Say if any row has a predicted cost."""
    return any(row.get("predicted_cost") is not None for row in evaluation["rows"].values())


def _text(value: float, digits: int) -> str:
    return "∞" if math.isinf(value) else f"{value:.{digits}f}".replace("-", "−")
