"""The table in the README: what the committed measurement says, and nothing else."""

import json
import math
from pathlib import Path

import pytest

from dma_diffusers.eval.quality_summary import markdown, summarise
from dma_diffusers.eval.quality_table import CONFIGURATIONS
from dma_diffusers.pipelines.load import DEMO_MODEL

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table():
    return json.loads((ROOT / "eval" / "results" / "quality_table.json").read_text())


def test_readme_shows_the_measurement(table):
    assert list(table["configurations"]) == list(CONFIGURATIONS)
    assert f"\n{markdown(table['summary'])}\n" in (ROOT / "README.md").read_text()


def test_summary_follows_from_the_values(table):
    summary = summarise(table["configurations"])
    assert summary.keys() == table["summary"].keys()
    for name, row in summary.items():
        assert row.keys() == table["summary"][name].keys()
        for column, interval in row.items():
            assert _numbers(table["summary"][name][column]) == pytest.approx(_numbers(interval), rel=1e-9)


def _numbers(interval):
    return [math.inf if bound is None else bound for bound in interval]


def test_prompts_are_the_held_out_ones(table):
    prompts = (DEMO_MODEL.parent / "prompts.txt").read_text().splitlines()
    assert table["settings"]["prompts"] == prompts
    assert len(prompts) == 64
    for result in table["configurations"].values():
        assert {len(values) for values in result["prompts"].values()} == {64}


@pytest.mark.parametrize("name", [name for name in CONFIGURATIONS if name.startswith("DMA")])
def test_dma_gains_over_all_mxfp4(table, name):
    estimate, low, _ = table["summary"][name]["psnr_gain_db"]
    assert estimate > low > 0
