"""The table of an evaluation as Markdown."""

import re
from typing import Any

from dma_diffusers.eval.report.columns import Cell, cell, columns, seconds_text
from dma_diffusers.eval.report.evaluation import CONFIGURATION, check


def table(evaluation: dict[str, Any]) -> str:
    """One line per row of the evaluation, `estimate [low, high]` in each cell; no newline at the end.

    The line "n" has the pictures behind each figure of a column; where they differ they are in the cells.
    Raises ValueError where `evaluation` is none.
    """
    check(evaluation)
    shown = columns(evaluation)
    lines = [
        [
            "Attention",
            *(f"{escaped(column.title)} {column.arrow}" for column in shown),
            "Seconds per picture",
        ],
        ["---", *["---:"] * (len(shown) + 1)],
    ]
    for name, row in evaluation["rows"].items():
        role = "" if row["role"] in (CONFIGURATION, name) else f" ({row['role']})"
        label = escaped(name) + role
        figures = [_figure(cell(row, column), column.n is None) for column in shown]
        lines.append([label if row["role"] == CONFIGURATION else f"**{label}**", *figures, seconds_text(row)])
    lines.append(["n", *(str(column.n or "") for column in shown), ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def escaped(text: str) -> str:
    """`text` in one line, with Markdown's and HTML's special characters as themselves."""
    return re.sub(r"([\\`*_|<>\[\]&])", r"\\\1", " ".join(text.split()))


def _figure(figure: Cell, with_n: bool) -> str:
    n = f"(n = {figure.n})" if with_n and figure.n else ""
    return " ".join(filter(None, (figure.estimate, figure.interval, n)))
