"""An evaluation of a tiny video pipeline: frames are kept, and flicker is measured."""

import json

import pytest

from dma_diffusers.eval.quality.configurations import AGAIN
from tests.command_line import run
from tests.tiny_pipelines import wan

CALL = {"height": 64, "width": 80, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 21}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    wan().save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps(CALL))
    return folder


def test_videos_are_compared_frame_by_frame(monkeypatch, capsys, model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat runs\na dog sleeps\na car turns\n")
    arguments = ("--model", str(model), "--prompts", str(prompts), "--seeds", "1")
    low = "low=mxfp4,min_length=0,window=0,sink=0"
    folder = tmp_path / "run"
    code, _, error = run(monkeypatch, capsys, "eval", *arguments, "--config", low, "-o", str(folder))
    assert code == 0, error
    found = json.loads((folder / "evaluation.json").read_text())
    assert "flicker" in found["metrics"]
    exact, coarse = (found["rows"][name]["summary"] for name in (AGAIN.name, low))
    assert exact["flicker"]["estimate"] == exact["lpips"]["estimate"] == 0
    assert coarse["latents_relative_l2"]["estimate"] > 0
    assert coarse["flicker"]["estimate"] > 0
