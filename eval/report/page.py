"""The page of an evaluation is HTML that needs no other file."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from dma_diffusers.eval.report.categories import by_category
from dma_diffusers.eval.report.columns import (
    cell,
    columns,
    cost_text,
    gist,
    has_costs,
    leading_metric,
    ran_by_reference,
    seconds_text,
    share_text,
)
from dma_diffusers.eval.report.evaluation import NOISE_FLOOR, baseline, check, noun
from dma_diffusers.eval.report.frames import frame_plot, frame_scores
from dma_diffusers.eval.report.heat_maps import layer_errors
from dma_diffusers.eval.report.in_words import in_words
from dma_diffusers.eval.report.pareto import pareto
from dma_diffusers.eval.report.steps import step_errors, step_plot
from dma_diffusers.eval.report.svg import css_colour, row_colours
from dma_diffusers.eval.report.verdicts import LIMITS, SAME, SCENE, counted, of_row, verdicts, words
from dma_diffusers.eval.report.worst import worst
from dma_diffusers.receipt import Receipt

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def html(evaluation: dict[str, Any], folder: Path) -> str:
    """Return the page as text; the same evaluation gives the same page.

    folder: where the paths of the evaluation's worst pictures start. Raises ValueError where `evaluation` is none or a
    picture is broken, FileNotFoundError where one is missing, ModuleNotFoundError without jinja2 and matplotlib.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the report needs {error.name}: pip install 'dma-diffusers[eval]'", name=error.name
        ) from None
    check(evaluation)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = _text
    rows, metric = evaluation["rows"], leading_metric(evaluation)
    return environment.get_template(_TEMPLATE.name).render(
        worst=worst(evaluation, folder),  # this comes first, because it can fail
        in_words=in_words(evaluation),
        limits=(LIMITS[SAME], LIMITS[SCENE]),
        evaluation=evaluation,
        created=f"{datetime.fromisoformat(evaluation['created']):%Y-%m-%d %H:%M %Z}",
        baseline=baseline(evaluation),
        noise_floors=[name for name, row in rows.items() if row["role"] == NOISE_FLOOR],
        columns=columns(evaluation),
        has_costs=has_costs(evaluation),
        rows=_rows(evaluation),
        metric=evaluation["metrics"].get(metric),
        pareto=pareto(evaluation, metric),
        pareto_of_prediction=pareto(evaluation, metric, "predicted_cost"),
        steps=step_plot(evaluation),
        step_rows=step_errors(evaluation),
        frames=frame_plot(evaluation),
        frame_rows=frame_scores(evaluation, "lpips"),
        noun=noun(evaluation),
        layers=layer_errors(evaluation.get("layers")),
        categories=by_category(evaluation, metric) if metric else [],
        configurations=_configurations(rows),
        receipts={name: _receipt(row["receipt"]) for name, row in rows.items() if row.get("receipt")},
    )


def _rows(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the table and the legends show of each row."""
    rows, shown = evaluation["rows"], columns(evaluation)
    colours = row_colours(rows)
    found = {name: verdicts(evaluation, name) for name in rows}
    reference = rows[baseline(evaluation)].get("seconds_per_picture")
    return [
        {
            "name": name,
            "label": row.get("label") if row.get("label") != name else None,
            "role": row["role"],
            "colour": css_colour(colours[name]),
            "cells": [cell(row, column) for column in shown],
            "seconds": seconds_text(row),
            "cost": cost_text(row),
            "ran": share_text(row),
            "gist": gist(row),
            "verdict": words(verdict, evaluation) if (verdict := of_row(found[name])) else "",
            "verdict_class": (verdict or "").replace(" ", "-"),
            "counted": counted(found[name]),
            "by_reference": ran_by_reference(row),
            "times": row["seconds_per_picture"] / reference
            if reference and row.get("seconds_per_picture")
            else None,
        }
        for name, row in rows.items()
    ]


def _configurations(rows: dict[str, dict[str, Any]]) -> tuple[list[str], dict[str, list[Any]]]:
    """Return names of the fields that configurations have, and each one's values of those that it uses."""
    configurations = {name: _used(row["config"]) for name, row in rows.items() if row.get("config")}
    names = list(dict.fromkeys(field for config in configurations.values() for field in config))
    return names, {name: [config.get(field) for field in names] for name, config in configurations.items()}


def _used(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with None for formats that stock attention, and for widths that a policy does not use."""
    unused = ("window", "sink") if config.get("policy") else ()
    if config.get("lowering") == "stock":
        unused = ("high", "low", "window", "sink")
    return config | dict.fromkeys(unused)


def _receipt(stored: dict[str, Any]) -> str:
    """Return a stored receipt as `dma_diffusers.report` would print it."""
    return str(Receipt.from_dict(stored))


def _text(value: Any) -> str:
    """Return a setting as a reader would write it."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
