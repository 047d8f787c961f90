"""This module writes the tables of an evaluation as Markdown: every figure, and each row's figures at its cost."""

import re
from typing import Any

from dma_diffusers.eval.report.columns import (
    Cell,
    cell,
    columns,
    cost_text,
    has_costs,
    ran_by_reference,
    seconds_text,
    share_text,
)
from dma_diffusers.eval.report.evaluation import BASELINE, CONFIGURATION, check, noun

_BY_COST = ("psnr_db", "lpips", "flicker")


def table(evaluation: dict[str, Any]) -> str:
    """Write one line per row of the evaluation, `estimate [low, high]` in each cell; no newline at the end.

    The line "n" has the pictures behind each figure of a column; where they differ they are in the cells. Raises
    ValueError where `evaluation` is none.
    """
    check(evaluation)
    shown = columns(evaluation)
    costs = ["Predicted cost of attention"] if has_costs(evaluation) else []
    titles = [f"{escaped(column.title)} {column.arrow}" for column in shown]
    header = ["Attention", *titles, f"Seconds per {noun(evaluation)}", *costs]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    for name, row in evaluation["rows"].items():
        remark = share_text(row) if row["role"] == CONFIGURATION or row["role"] == name else row["role"]
        label = escaped(name) + (f" ({remark})" if remark else "")
        figures = [_figure(cell(row, column), column.n is None) for column in shown]
        cost = [cost_text(row) for _ in costs]
        label = label if row["role"] == CONFIGURATION else f"**{label}**"
        seconds = seconds_text(row) + " (reference)" * ran_by_reference(row)
        lines.append([label, *figures, seconds, *cost])
    lines.append(["n", *(str(column.n or "") for column in shown), "", *("" for _ in costs)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_by_cost(evaluation: dict[str, Any]) -> str:
    """Write predicted cost, PSNR and LPIPS, of clips flicker too, cheapest first; the baseline is left out.

    Numbers below one have no zero before the point. There is no newline at the end. Raises ValueError where
    `evaluation` is none.
    """
    check(evaluation)
    shown = [column for column in columns(evaluation) if column.metric in _BY_COST]
    rows = {name: row for name, row in evaluation["rows"].items() if row["role"] != BASELINE}
    lines = [
        ["", "Predicted cost", *(column.title for column in shown)],
        ["---", *["---:"] * (len(shown) + 1)],
    ]
    for name, row in sorted(rows.items(), key=lambda named: named[1].get("predicted_cost") or 0):
        cost = "" if row.get("predicted_cost") is None else cost_text(row)
        lines.append([escaped(name), cost, *(_figure(cell(row, column), False) for column in shown)])
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return re.sub(r"(?<=[ \[−])0\.", ".", text)


def escaped(text: str) -> str:
    """Return `text` in one line, with Markdown's and HTML's special characters as themselves."""
    return re.sub(r"([\\`*_|<>\[\]&])", r"\\\1", " ".join(text.split()))


def _figure(figure: Cell, with_n: bool) -> str:
    n = f"(n = {figure.n})" if with_n and figure.n else ""
    identical = f"({figure.identical} identical)" if figure.identical else ""
    return " ".join(filter(None, (figure.estimate, figure.interval, n, identical)))
