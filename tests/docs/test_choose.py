"""The page that leads to a setting has the committed results' figures, and its lines can be applied."""

import gzip
import json
import math
import re

import pytest

from dma_diffusers.eval.simulator.policy import record
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Diagonal, parse
from tests.docs.blocks import names
from tests.docs.site import ROOT

PAGE = (ROOT / "docs" / "choose.md").read_text()
SOURCE = re.compile(r"\[(.+)\]\(\.\./(eval/results/\w+\.json(?:\.gz)?)\)")
CODE = re.compile(r"`((?:apply|quantize_linears|DMAConfig)\b[^`…]*)`")


def rows(header: str) -> list[list[str]]:
    """Return the cells of the table whose header begins so."""
    lines = PAGE[PAGE.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def source(cell: str) -> tuple[str, dict]:
    """Return the row that a source names, and the result that it links to."""
    found = SOURCE.fullmatch(cell)
    data = (ROOT / found[2]).read_bytes()
    return found[1], json.loads(gzip.decompress(data) if found[2].endswith(".gz") else data)


MEASURED = rows("| Model and size | The line |")
QUALITY = rows("| Setting | Pictures or clips |")
PREDICTED = rows("| Model and size | `simulate` |")


@pytest.mark.parametrize("row", MEASURED, ids=[row[0] for row in MEASURED])
def test_measured_steps(row):
    model, line, stock, ours, gain, cell = row
    (result,) = source(cell)[1]["shapes"].values()
    assert [stock, ours] == [f"{result[of]['step_ms']:,.0f}" for of in ("best_stock", "best_ours")]
    assert gain == f"{result['best_over_stock']:.2f} ×"
    assert result["size"] in model
    line = line if line != "the same" else MEASURED[MEASURED.index(row) - 1][1]
    name = result["best_ours"]["name"]
    assert ("published" in name, "calibrated" in name) == ("published" in line, "calibration" in line)
    assert result["stock"].split()[0] in PAGE


@pytest.mark.parametrize("row", QUALITY, ids=[row[-1].split("]")[0] + row[1] for row in QUALITY])
def test_quality_of_the_demos(row):
    _, drawn, psnr, lpips, cell = row
    name, result = source(cell)
    summary = result["rows"][name]["summary"]
    shown = (f"{summary['psnr_db']['estimate']:.1f}", f"{summary['lpips']['estimate']:.4f}".removeprefix("0"))
    assert (psnr, lpips) == shown
    assert (drawn == "clips") == ("flicker" in summary)


@pytest.mark.parametrize("row", PREDICTED, ids=[row[0] for row in PREDICTED])
def test_predicted_speeds(row):
    grid, text = re.fullmatch(r"`--grid ([\dx]+) --text (\d+)`", row[1]).groups()
    sides = tuple(map(int, grid.split("x")))
    tokens = int(text) + math.prod(sides)
    layout = Layout(tokens, tokens, (0, int(text)), sides)
    for policy, cell in zip(
        (Diagonal(128, 128), parse("importance(budget=0.1, beyond=skip)")), row[2:], strict=True
    ):
        predicted = record(policy, layout, "b200", 24, 128, "mxfp8", "mxfp4")["prediction"]
        assert cell == f"{predicted['speedup']:.2f} ×"


@pytest.mark.parametrize("code", sorted(set(CODE.findall(PAGE))))
def test_every_line_can_be_applied(code):
    eval(code, names(code))
