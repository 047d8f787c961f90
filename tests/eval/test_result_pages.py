"""The tables of quality say what the committed evaluations hold, README's small ones what those say."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.cost import pairs, tile_clocks
from dma_diffusers.eval.quality import configurations
from dma_diffusers.eval.quality.configurations import AGAIN, ANOTHER_KERNEL, DEFAULT
from dma_diffusers.eval.quality.prompts import BUILT_IN, read_prompts
from dma_diffusers.eval.quality.summary import summarise
from dma_diffusers.eval.report.evaluation import read
from dma_diffusers.eval.report.markdown import table, table_by_cost
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Diagonal
from dma_diffusers.kernels.tiling.precision_map import Class

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results"
QUALITY = (RESULTS / "quality.md").read_text()
SPEED = (RESULTS / "speed.md").read_text()
README = (ROOT / "README.md").read_text()
FILES = ("h200_quality.json.gz", "h200_quality_of_policy.json.gz")
_CONFIGURATIONS = {
    "h200_where.json.gz": RESULTS / "h200_where.yaml",
    "h200_video_where.json.gz": RESULTS / "h200_video_where.yaml",
    "h200_means.json.gz": RESULTS / "h200_means.yaml",
    "h200_video_means.json.gz": RESULTS / "h200_video_means.yaml",
}


@pytest.fixture(scope="module")
def evaluation():
    return read(RESULTS / FILES[0])


def test_the_page_has_the_table(evaluation):
    assert table(evaluation) in QUALITY
    assert list(evaluation["rows"]) == [AGAIN.name, ANOTHER_KERNEL.name, *DEFAULT]


@pytest.mark.parametrize("page, corner, size", [(QUALITY, "Attention", (5, 3)), (SPEED, "Shape", (4, 5))])
def test_readme_has_part_of_the_table(page, corner, size):
    part, whole = cells(README, corner), cells(page, corner)
    assert len(part) == size[0] * size[1]
    assert part.items() <= whole.items()


def test_the_table_of_an_h100():
    table, shapes = (
        cells(SPEED, "Shape on an H100"),
        json.loads(gzip.decompress((RESULTS / "h100_bench.json.gz").read_bytes()))["shapes"],
    )
    assert len(table) == 3 * len(shapes)
    found = iter(table.values())
    for shape in shapes.values():
        batch, heads, tokens, head_dim = shape["size"]
        ms = {entry["name"]: entry["whole"]["ms"] for entry in shape["entries"] if "whole" in entry}
        stock, low, mixed = (
            ms[name] for name in ("cuDNN SDPA bf16", "LOW int8", "bf16|int8, window 128, sink 128")
        )
        for of in (stock, low, mixed):
            speed = f"{4 * batch * heads * tokens**2 * head_dim / of / 1e9:.0f}"
            assert next(found) == (speed if of == stock else f"{speed} ({stock / of:.2f} ×)")


@pytest.mark.parametrize("file", FILES)
def test_summaries_follow_from_the_scores(file):
    evaluation = read(RESULTS / file)
    assert [prompt["text"] for prompt in evaluation["prompts"]] == [p.text for p in read_prompts(BUILT_IN)[0]]
    for row in evaluation["rows"].values():
        for metric, scores in row["pictures"].items():
            if None in scores:
                assert row["role"] == "baseline"
                continue
            assert len(scores) == 800
            expected = summarise(scores, evaluation["settings"]["seeds"])
            stored = row["summary"][metric]
            assert np.allclose(
                [stored[key] for key in expected], list(expected.values()), rtol=1e-4, atol=1e-6
            )


def test_the_table_of_policies(evaluation):
    policies = read(RESULTS / FILES[1])["rows"]
    chosen = json.loads((RESULTS / "h200_policy.json").read_text())["choices"]
    costs = {choice["quality"]: choice["evidence"]["cost"] for choice in chosen}
    for quality in (0.25, 0.5, 0.75):
        summary = policies[f"policy=policy.json,quality={quality}"]["summary"]
        psnr, lpips = summary["psnr_db"], summary["lpips"]["estimate"]
        numbers = f"{costs[quality]:.3f} | {psnr['estimate']:.2f} [{psnr['low']:.2f}, {psnr['high']:.2f}] | {lpips:.4f}"
        line = f"| quality {quality} | {numbers} |".replace(" 0.", " .")
        assert line in QUALITY
    for window in (128, 384):
        psnr = evaluation["rows"][f"DMA, window {window}"]["summary"]["psnr_db"]
        line = f"| DMA, window {window} | {_predicted_cost(window):.3f} | {psnr['estimate']:.2f} "
        assert line.replace(" 0.", " .") in QUALITY


@pytest.mark.parametrize("file", _CONFIGURATIONS)
def test_the_tables_of_where_attention_matters(file):
    evaluation = read(RESULTS / file)
    assert table_by_cost(evaluation) in QUALITY
    assert list(evaluation["rows"])[2:] == list(configurations.read(_CONFIGURATIONS[file]))


def test_rows_of_the_demo_clips_come_at_three_costs():
    grid, tokens = (9, 16, 24), 9 * 16 * 24
    per_high, per_low = tile_clocks("sm_100", 64, "mxfp8", "mxfp4")
    costs = {}
    for name, config in configurations.read(_CONFIGURATIONS["h200_video_where.json.gz"]).items():
        assert (config.dense_above_sigma, config.dense_layers) == (1, ())
        visited = pairs(config.asked, Layout(tokens, tokens, (0, 0), config.grid or grid))
        clocks = visited.high.mean() * per_high + visited.low.mean() * per_low
        costs[name] = clocks.item() / (tokens / 128) ** 2 / tile_clocks("sm_100", 64, "bf16", "bf16")[0]
    names = list(costs)
    for level, rows in ((0.823, names[4:9]), (0.616, names[9:13]), (0.446, names[13:])):
        of_level = [costs[name] for name in rows]
        assert max(of_level) / min(of_level) < 1.03
        assert np.mean(of_level) == pytest.approx(level, abs=0.005)


def test_the_committed_policy_can_be_read():
    config = DMAConfig.from_file(RESULTS / "h200_policy.json", quality=0.6)
    assert config.low == "nvfp4" and len(config.modules) == 6


def cells(text: str, corner: str) -> dict[tuple[str, str], str]:
    """The cells, by row and column, of the table whose first column is called `corner`."""
    lines = text[text.index(f"| {corner} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = (
        [cell.strip() for cell in line.replace(r"\|", "/").split("|")[1:-1]] for line in lines
    )
    return {(name, column): cell for name, *row in rows for column, cell in zip(header[1:], row, strict=True)}


def _predicted_cost(window: int) -> float:
    """The demo's attention on a B200 as a share of bf16's: 128 tokens of text before 1,024 of picture."""
    classes = Diagonal(window, 128).classes(Layout(1152, 1152, (0, 128)))
    share = (classes == Class.HIGH).float().mean().item()
    high, low = tile_clocks("sm_100", 64, "mxfp8", "mxfp4")
    return (share * high + (1 - share) * low) / tile_clocks("sm_100", 64, "bf16", "bf16")[0]
