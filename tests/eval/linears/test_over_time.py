"""Bits over time: shares and their stability against hand counts, and what the plot shows, read back from the SVG."""

import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from dma_diffusers.eval.linears import over_time
from dma_diffusers.linears.allocation import FACTORS
from dma_diffusers.linears.calibration import Calibration, InputStatistics


def statistics(shares: dict[float, tuple[float, float]]) -> InputStatistics:
    """One call at each noise level, with these shares under T(4) and T(6) at every factor."""
    under = {
        level: (1, torch.tensor(each, dtype=torch.float64)[:, None].expand(2, len(FACTORS)))
        for level, each in shares.items()
    }
    return InputStatistics(torch.ones(4, dtype=torch.float64), len(shares), 1.0, under)


def calibration() -> Calibration:
    """Two blocks with q and k on one input, and a layer that ran at one noise level alone."""
    steady, moving = {1.0: (0.5, 0.75), 0.5: (0.5, 0.75)}, {1.0: (0.5, 1.0), 0.5: (0.0, 0.5)}
    inputs = {
        "blocks.0.attn.to_q": statistics(steady), "blocks.1.attn.to_q": statistics(moving),
        "blocks.0.ff.net.2": statistics({0.5: (1.0, 1.0)}),
    }  # fmt: skip
    readers = {
        f"blocks.{number}.attn.{name}": {f"blocks.{number}.attn.to_q"}
        for number in (0, 1)
        for name in ("to_q", "to_k")
    }
    return Calibration(inputs, readers | {"blocks.0.ff.net.2": {"blocks.0.ff.net.2"}})


@pytest.fixture
def found():
    return over_time.bits_over_time({"transformer.": calibration()})


def test_shares_of_each_input(found):
    assert found["levels"] == [1.0, 0.5]
    assert found["inputs"]["transformer.blocks.1.attn.to_q"] == {
        "layers": ["transformer.blocks.1.attn.to_q", "transformer.blocks.1.attn.to_k"],
        "shares": [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]], "kind": "blocks: attn.to_q, to_k",
    }  # fmt: skip
    assert found["inputs"]["transformer.blocks.0.ff.net.2"]["shares"] == [None, [1.0, 0.0, 0.0]]


def test_stability_is_what_a_hand_counts(found):
    of_kind = found["stability"]["blocks: attn.to_q, to_k"]
    # Half of the channels go from 4 to 6 bits, half from 6 to 8. On average a quarter has 4 bits, half 6 and a
    # quarter 8, so a quarter is in another group at either level.
    assert of_kind["change"] == {"mean": 1.0, "worst": 2.0, "of": "transformer.blocks.1.attn.to_q"}
    assert of_kind["moved"] == {"mean": 0.125, "worst": 0.25}
    assert of_kind["bits"] == pytest.approx([0.5 * 4.25 + 0.25 * 6.25 + 0.25 * 8.25, 6.25])
    assert found["stability"]["all"]["inputs"] == 3
    assert found["stability"]["all"]["change"]["mean"] == pytest.approx(2 / 3)


def test_two_transformers_keep_their_prefixes():
    found = over_time.bits_over_time({"transformer.": calibration(), "transformer_2.": calibration()})
    kinds = {entry["kind"] for entry in found["inputs"].values()}
    assert "transformer_2.blocks: ff.net.2" in kinds and len(kinds) == 4


def test_the_plot_has_a_panel_for_each_kind(found, tmp_path):
    over_time.save(found, tmp_path / "bits.svg")
    root = ElementTree.fromstring((tmp_path / "bits.svg").read_text())
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for text in ("attn.to_q, to_k", "ff.net.2", "4 bits", "6 bits", "8 bits", "noise level"):
        assert texts.count(text) == 1
    stored = json.loads((tmp_path / "bits.json").read_text())
    assert stored["inputs"]["transformer.blocks.1.attn.to_q"]["shares"] == [[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
