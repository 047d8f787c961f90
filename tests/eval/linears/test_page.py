"""The page on linear layers has the tables that the committed results give."""

import gzip
import json
from pathlib import Path

import pytest

from dma_diffusers.eval.linears import pictures
from dma_diffusers.eval.linears.over_time import stability
from dma_diffusers.eval.linears.variants import MUST_BEAT, table, table_of_wide
from dma_diffusers.eval.report.evaluation import read

RESULTS = Path(__file__).parents[3] / "eval" / "results"
PAGE = (RESULTS / "linears.md").read_text()


def result(name: str) -> dict:
    return json.loads(gzip.decompress((RESULTS / f"{name}.json.gz").read_bytes()))


@pytest.fixture(scope="module")
def errors():
    return result("linears_errors")


def test_tables_of_errors(errors):
    assert table(errors["summary"]) in PAGE
    assert table_of_wide(errors["synthetic"]) in PAGE


def test_micromix_errs_less_than_what_it_must_beat(errors):
    for rows in (errors["summary"], *errors["synthetic"].values()):
        for name in MUST_BEAT:
            assert rows[name]["over_micromix"]["low"] > 1
            assert name == "mxfp4" or rows[name]["bits"] == rows["micromix"]["bits"]


@pytest.mark.parametrize(
    "file", sorted(RESULTS.glob("h200_linears_batch*.json.gz")), ids=lambda file: file.stem
)
def test_tables_of_pictures(file):
    evaluation = read(file)
    assert pictures.table(evaluation) in PAGE
    for name in MUST_BEAT:
        assert pictures.difference(evaluation, "psnr_db", name).high < 0
        assert pictures.difference(evaluation, "lpips", name).low > 0


@pytest.mark.parametrize("model", ["demo", "demo_video"])
def test_stability_is_that_of_the_shares(model):
    found = result(f"linears_bits_{model}")
    again, stored = stability(found["inputs"])["all"], found["stability"]["all"]
    assert again["change"]["worst"] == pytest.approx(stored["change"]["worst"], abs=1e-3)
    for figure, decimals in (("mean", 2), ("worst", 2)):
        assert f"| {stored['change'][figure]:.{decimals}f}".replace(" 0.", " .") in PAGE
