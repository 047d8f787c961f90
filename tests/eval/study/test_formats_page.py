"""The page on formats says what the committed figures hold."""

import gzip
import json
from pathlib import Path

import pytest

from dma_diffusers.eval.study.tables import tables

RESULTS = Path(__file__).parents[3] / "eval" / "results"
PAGE = (RESULTS / "formats.md").read_text()
FIGURES = json.loads(gzip.decompress((RESULTS / "formats.json.gz").read_bytes()))


@pytest.mark.parametrize("about", tables(FIGURES))
def test_the_page_has_the_table(about):
    assert tables(FIGURES)[about] in PAGE


def test_theory_predicts_each_models_tensors():
    for of_model in FIGURES.values():
        distances = of_model["from_theory"]
        assert all(distances[part] < 1 for part in distances if part != "p")
