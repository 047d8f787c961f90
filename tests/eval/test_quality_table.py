"""The quality table, on a tiny pipeline with random weights."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dma_diffusers.attach import apply, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval import quality_table as table_module
from dma_diffusers.eval.quality_summary import markdown, summarise
from dma_diffusers.eval.quality_table import CONFIGURATIONS, quality_table, read_prompts
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline
from tests.pipelines.saved_flux import CALL, save_flux

PROMPTS = ["a red apple", "two cats", "a dog on a hill"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The path of a finished table."""
    output = tmp_path_factory.mktemp("table") / "table.json"
    quality_table(PROMPTS, output, "the command", model, batch=2)
    return output


@pytest.fixture
def steps():
    """The configurations that were drawn with, one entry per denoising step."""
    return []


def test_the_table_holds_what_it_was_made_of(finished):
    table = json.loads(finished.read_text())
    assert set(table) == {"command", "settings", "configurations", "summary"}
    assert table["settings"]["prompts"] == PROMPTS
    assert list(table["configurations"]) == list(table["summary"]) == list(CONFIGURATIONS)
    for result in table["configurations"].values():
        assert {name: len(values) for name, values in result["prompts"].items()} == {
            "psnr_db": 3,
            "ssim": 3,
            "latents_relative_l2": 3,
        }
        assert result["receipt"]["modules"]


def test_exact_is_stock_and_precision_is_worth_something(finished):
    configurations = json.loads(finished.read_text())["configurations"]
    assert configurations["exact"]["prompts"]["psnr_db"] == [None] * 3
    assert configurations["exact"]["prompts"]["latents_relative_l2"] == [0.0] * 3
    error = {
        name: np.mean(result["prompts"]["latents_relative_l2"]) for name, result in configurations.items()
    }
    assert 0 < error["all MXFP8"] < error["DMA, window 128"] < error["all MXFP4"]
    assert error["all NVFP4"] != error["all MXFP4"]


def test_batches_and_seeds_are_those_of_single_prompts(finished, model):
    stored = json.loads(finished.read_text())["configurations"]["all MXFP4"]["prompts"]["latents_relative_l2"]
    pipe = load_pipeline(model)
    exact = draw(pipe, PROMPTS[2:], [2], CALL).latents
    apply(pipe, CONFIGURATIONS["all MXFP4"])
    low = draw(pipe, PROMPTS[2:], [2], CALL).latents
    assert stored[2] == pytest.approx(((low - exact).norm() / exact.norm()).item(), rel=1e-3)


def test_all_mxfp8_is_every_tile_high(model):
    pipe = load_pipeline(model)
    latents = []
    for config in (CONFIGURATIONS["all MXFP8"], DMAConfig.preset("b200", dense_layers=(0, 1, 2))):
        apply(pipe, config)
        latents.append(draw(pipe, PROMPTS[:1], [0], CALL).latents)
        restore(pipe)
    assert torch.equal(*latents)


def test_a_finished_table_is_not_measured_again(finished, model, steps):
    before = json.loads(finished.read_text())
    quality_table(PROMPTS, finished, "the command", model, batch=2, on_step=lambda *step: steps.append(step))
    assert not steps
    assert json.loads(finished.read_text()) == before


def test_an_interrupted_table_is_resumed(finished, model, tmp_path, steps):
    output = tmp_path / "table.json"

    def interrupt(name: str, done: int, total: int) -> None:
        if name == "DMA, window 384":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quality_table(PROMPTS, output, "the command", model, batch=2, on_step=interrupt)
    assert list(tmp_path.iterdir()) == [output]
    done = list(json.loads(output.read_text())["configurations"])
    assert done == ["exact", "all MXFP8", "DMA, window 640"]

    quality_table(PROMPTS, output, "the command", model, batch=2, on_step=lambda *step: steps.append(step))
    assert not {name for name, *_ in steps} & set(done)
    resumed, whole = (json.loads(path.read_text()) for path in (output, finished))
    assert resumed["summary"] == whole["summary"]
    assert steps[-1] == ("all NVFP4", 4, 4)  # two batches of two steps


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 3}, {"seed": 1, "batch": 3}])
def test_a_table_with_other_settings_is_not_overwritten(finished, model, steps, change):
    before = finished.read_bytes()
    arguments = {"batch": 2} | change
    with pytest.raises(ValueError, match=f"different {', '.join(change)}: choose another file, or delete it"):
        quality_table(
            PROMPTS, finished, "again", model, **arguments, on_step=lambda *step: steps.append(step)
        )
    assert not steps
    assert finished.read_bytes() == before


def test_a_changed_configuration_is_measured_again(finished, model, tmp_path, steps, monkeypatch):
    output = tmp_path / "table.json"
    output.write_text(finished.read_text())
    changed = CONFIGURATIONS | {"all NVFP4": CONFIGURATIONS["all MXFP4"]}
    monkeypatch.setattr(table_module, "CONFIGURATIONS", changed)
    arguments = {"batch": 2, "on_step": lambda name, *_: steps.append(name)}
    table = quality_table(PROMPTS, output, "again", model, **arguments)
    assert set(steps) == {"stock", "all NVFP4"}
    assert table["configurations"]["all NVFP4"]["config"] == asdict(changed["all NVFP4"])


def result(psnr_db):
    return {
        "prompts": {
            "psnr_db": psnr_db,
            "ssim": [0.9] * len(psnr_db),
            "latents_relative_l2": [0.1] * len(psnr_db),
        }
    }


def test_the_summary_is_paired():
    low = list(np.random.default_rng(0).normal(30, 5, 64))
    summary = summarise(
        {
            "exact": result([None] * 64),
            "all MXFP8": result([value + 8 for value in low]),
            "DMA, window 128": result([value + 2 for value in low]),
            "all MXFP4": result(low),
        }
    )
    assert summary["exact"]["psnr_db"] == [None] * 3
    assert summary["DMA, window 128"]["psnr_gain_db"] == pytest.approx([2, 2, 2])
    assert summary["DMA, window 128"]["share_of_gap"] == pytest.approx([0.25, 0.25, 0.25])
    estimate, lower, upper = summary["all MXFP4"]["psnr_db"]
    assert estimate == pytest.approx(np.mean(low))
    assert upper - lower == pytest.approx(2 * 1.96 * np.std(low) / math.sqrt(64), rel=0.1)
    assert "psnr_gain_db" not in summary["all MXFP4"]

    lines = markdown(summary).splitlines()
    assert len(lines) == 6
    assert lines[2].startswith("| exact | ∞ | 0.9000 | 0.1000 | – | – |")
    assert "| 2.00 | 0.25 |" in lines[4]


def test_undefined_is_not_infinite():
    identical, low = [None] * 3, [30.0, 31.0, 32.0]
    summary = summarise(
        {"all MXFP8": result(identical), "DMA, window 128": result(identical), "all MXFP4": result(low)}
    )
    assert summary["DMA, window 128"]["psnr_gain_db"] == [None] * 3
    assert markdown(summary).splitlines()[3].endswith("| ∞ | – |")


def test_prompts_are_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\n two \nthree\n")
    assert read_prompts(path, 2) == ["one", "two"]
    with pytest.raises(ValueError, match="holds no prompts"):
        read_prompts(path, 0)


@pytest.mark.parametrize("content", ["", "[]", "{}"])
def test_another_file_is_not_overwritten(model, tmp_path, content):
    output = tmp_path / "notes.json"
    output.write_text(content)
    with pytest.raises(ValueError, match="no quality table"):
        quality_table(PROMPTS, output, "the command", model)
    assert output.read_text() == content
