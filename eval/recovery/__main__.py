"""The recovery study, from a checkout: what fine-tuning gains back on the demo models.

`python -m dma_diffusers.eval.recovery prepare FOLDER` draws with full precision, once for all rows; `… row FOLDER NAME`
makes one row, and skips one that is there; `… table FOLDER` sums up the rows that are finished.
"""

import json
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from dma_diffusers.cli.console import hide_loading_bars, quiet
from dma_diffusers.eval.recovery.rows import ROWS
from dma_diffusers.eval.recovery.run import drawings_path, result_paths, run
from dma_diffusers.eval.recovery.scores import scores
from dma_diffusers.eval.recovery.study import Plan, Study
from dma_diffusers.eval.recovery.summary import gap_lines, summarise, table
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.progress import progress

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Argument(help="Folder of the study.")]


@app.command()
def prepare(
    folder: Folder,
    model: Annotated[str, typer.Option(help="demo or demo-video.")] = Plan.model,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts to learn from.")] = Plan.prompts,
    early: Annotated[
        int, typer.Option(min=0, help="Further ones, of which the first steps alone are drawn.")
    ] = Plan.early,
    early_steps: Annotated[int, typer.Option(min=1, help="The number of these steps.")] = Plan.early_steps,
    held_out: Annotated[int, typer.Option(min=1, help="Prompts to draw and compare.")] = Plan.held_out,
    budget: Annotated[list[int] | None, typer.Option(help="Steps after which to measure; repeat it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = Plan.batch,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = Plan.learning_rate,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; the model's own if left out.")] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Train with compiled blocks.")] = Plan.compiled,
) -> None:
    """Draw with full precision: calls to learn from, held-out calls, and held-out pictures or clips."""
    budgets = tuple(sorted(budget)) if budget else Plan.budgets
    judged = min(Plan.judged, held_out)
    plan = Plan(
        model, prompts, held_out, judged, budgets, batch, lr,
        steps=steps, early=early, early_steps=early_steps, compiled=compiled,
    )  # fmt: skip
    with quiet(), progress() as on_step:
        hide_loading_bars()
        Study.of(folder, plan).prepare(on_step)
    print(f"{folder}: rows of {model} are {'; '.join(ROWS[model])}")


@app.command()
def row(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Name of the row, as `prepare` lists them.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the training's order.")] = 0,
    seconds: Annotated[
        float,
        typer.Option(min=0, help="Of a last training after those of the budgets, which draws; 0 for none."),
    ] = 0,
) -> None:
    """Train for one precision, and compare what it draws with full precision; what was stopped goes on."""
    with quiet(), progress() as on_step:
        hide_loading_bars()
        path = run(Study(folder), name, seed, seconds, on_step)
    print(path)


@app.command()
def rescore(folder: Folder) -> None:
    """Score the drawings of all finished rows again, as with metrics that were not at hand before."""
    with quiet():
        study = Study(folder)
        for path in chain(*(result_paths(study, name) for name in ROWS[study.plan.model])):
            found = scores(study.drawings(drawings_path(path)), study.exact, study.held_out)
            result = json.loads(path.read_bytes()) | {"scores": found}
            write_atomically(path, json.dumps(result, indent=1).encode())


@app.command("table")
def print_table(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON file to write as well.")] = None,
) -> None:
    """Print the rows that are finished, the gap that training closes, and the order of the losses."""
    summary = summarise(Study(folder))
    if output:
        write_atomically(output, json.dumps(summary, indent=1).encode())
    print(table(summary))
    for line in (*gap_lines(summary), f"order: {json.dumps(summary['order'])}"):
        print(line)


if __name__ == "__main__":
    app()
