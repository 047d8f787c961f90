"""The report of a run stands beside its evaluation.json."""

from pathlib import Path

from dma_diffusers.eval.report.evaluation import read
from dma_diffusers.eval.report.markdown import table, table_by_cost
from dma_diffusers.eval.report.page import html
from dma_diffusers.eval.report.pareto import pareto
from dma_diffusers.eval.report.svg import standalone
from dma_diffusers.pipelines.files import write_atomically


def write_report(folder: Path) -> tuple[Path, Path]:
    """Write report.html and report.md from the evaluation.json of a run's folder; return their paths.

    Where it has predicted costs, report.md has a second table, by cost, and predicted_cost.svg has PSNR over cost.

    Raises ValueError where that is no evaluation or a picture is broken, FileNotFoundError where a file is missing;
    nothing is written then.
    """
    evaluation = read(folder / "evaluation.json")
    page, markdown = folder / "report.html", folder / "report.md"
    written = {page: html(evaluation, folder), markdown: table(evaluation) + "\n"}
    if plot := pareto(
        evaluation, "psnr_db" if "psnr_db" in evaluation["metrics"] else None, "predicted_cost"
    ):
        written[folder / "predicted_cost.svg"] = standalone(plot)
        written[markdown] += f"\n{table_by_cost(evaluation)}\n"
    for path, text in written.items():
        write_atomically(path, text.encode())
    return page, markdown
