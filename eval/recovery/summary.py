"""The summary of a study's finished rows: scores with intervals, the gap that training closes, the losses' order."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dma_diffusers.eval.intervals import bootstrap
from dma_diffusers.eval.quality.columns import COLUMNS
from dma_diffusers.eval.quality.summary import as_json
from dma_diffusers.eval.recovery.rows import GAPS, ORDER, ROWS
from dma_diffusers.eval.recovery.run import result_paths
from dma_diffusers.eval.recovery.study import Study
from dma_diffusers.eval.recovery.training import END

Results = Mapping[str, dict[str, Any]]


def summarise(study: Study) -> dict[str, Any]:
    """Sum up the rows that are finished; intervals are 95 %, over prompts, of the mean over seeds."""
    of_seeds = {
        name: [json.loads(path.read_bytes()) for path in paths]
        for name in ROWS[study.plan.model]
        if (paths := result_paths(study, name))
    }
    results = {name: mean_of(found) for name, found in of_seeds.items()}
    return {
        "plan": asdict(study.plan),
        "rows": {name: result | _of_row(name, results, study.plan.model) for name, result in results.items()},
        "gaps": [
            {
                "row": row,
                "from": free,
                "to": better,
                "closed_percent": gap_closed(results, row, free, better),
                "of_seeds": [
                    gap_closed(results | {row: one}, row, free, better)["estimate"] for one in of_seeds[row]
                ],
            }
            for row, free, better in GAPS[study.plan.model]
            if {row, free, better} <= results.keys()
        ],
        "order": order(results),
    }


def mean_of(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the first of a row's results, with the losses and scores that are the means over all of them."""
    first, *_ = results
    losses = set.intersection(*(set(result["loss"]) for result in results))
    return first | {
        "seeds": [result["seed"] for result in results],
        "loss": {
            name: float(np.mean([result["loss"][name] for result in results]))
            for name in first["loss"]
            if name in losses
        },
        "scores": {
            metric: np.mean([result["scores"][metric] for result in results], 0).tolist()
            for metric in first["scores"]
        },
    }


def _of_row(name: str, results: Results, model: str) -> dict[str, Any]:
    """Return the means of a row's scores, and of what they gained over the same precision without training."""
    scores, free = results[name]["scores"], ROWS[model][name].free
    found = {"means": {metric: _interval([values]) for metric, values in scores.items()}}
    if free in results:
        before = results[free]["scores"]
        found["gained"] = {
            metric: _interval([values, before[metric]], lambda after, before: after - before)
            for metric, values in scores.items()
            if metric in before
        }
    return found


def gap_closed(results: Results, row: str, free: str, better: str) -> dict[str, Any]:
    """Return how much of the PSNR between `free` and `better` the row regains, in percent."""
    columns = [results[name]["scores"]["psnr_db"] for name in (row, free, better)]
    return _interval(columns, lambda after, before, aim: 100 * (after - before) / (aim - before))


def order(results: Results) -> dict[str, Any] | None:
    """Return the held-out losses of `ORDER` at the largest budget that all trained ones reached, and whether they rise.

    None where a row is missing.
    """
    if not set(ORDER) <= results.keys():
        return None
    trained = [results[name]["loss"] for name in ORDER if results[name]["trains"]]
    budget = max(map(int, set.intersection(*(set(loss) - {END} for loss in trained))))
    losses = {name: results[name]["loss"][str(budget if results[name]["trains"] else 0)] for name in ORDER}
    return {"budget": budget, "losses": losses, "rises": bool(np.all(np.diff(list(losses.values())) >= 0))}


def table(summary: Mapping[str, Any]) -> str:
    """Return a summary as Markdown."""
    rows = summary["rows"]
    metrics = list(next(iter(rows.values()))["means"]) if rows else []
    budgets = [0, *summary["plan"]["budgets"], END]
    header = [
        "Row",
        *(f"loss, {budget} steps" for budget in budgets[:-1]),
        "loss at the end",
        *(COLUMNS[name]["title"] for name in metrics),
    ]
    lines = [f"| {' | '.join(header)} |", "| --- |" + " ---: |" * (len(header) - 1)]
    for name, row in rows.items():
        losses = [row["loss"].get(str(budget)) for budget in budgets]
        cells = [name, *("–" if loss is None else f"{loss:.3g}" for loss in losses)]
        cells += [_words(row["means"].get(metric), COLUMNS[metric]["digits"]) for metric in metrics]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gap_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each gap of a summary."""
    return [
        f"{gap['row']}: {_words(gap['closed_percent'], 0)} % of the gap from {gap['from']} to {gap['to']}"
        for gap in summary["gaps"]
    ]


def _words(interval: Mapping[str, Any] | None, digits: int) -> str:
    if interval is None:
        return "–"
    estimate, low, high = (f"{interval[name]:.{digits}f}" for name in ("estimate", "low", "high"))
    return f"{estimate} [{low}, {high}]"


def _interval(columns: list, statistic=lambda mean: mean) -> dict[str, Any]:
    return as_json(bootstrap(columns, statistic), len(columns[0]))
