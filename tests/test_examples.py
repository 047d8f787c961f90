"""Each example runs as its user would run it, on an embedded model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dma_diffusers.pipelines.load import DEMO_MODEL, VIDEO_DEMO_MODEL

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = {"flux": 256, "qwen_image": 256, "cache": 256, "compiled": 256, "finetune": 64}  # their sides
FURTHER = {"finetune": ("--train_steps", "1")}
CLIPS = ("wan", "hunyuan_video")
SCRIPTS = {
    "batch": ("--steps", "1"),
    "evaluate": ("--steps", "1", "--batch", "3", "--size", "64"),
    "calibrate": (
        *("--steps", "1", "--recorded", "1", "--count", "2", "--size", "64", "--target", "sm_100"),
        *("--formats", "mxfp8|mxfp4"),
    ),
}


def run(*command: str | Path) -> str:
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [*command], capture_output=True, text=True, env=os.environ | {"PATH": commands}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_example_is_run():
    written = {path.stem for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert written - {"arguments"} == {*PICTURES, *CLIPS, *SCRIPTS}
    page = (EXAMPLES / "README.md").read_text()
    assert all(
        f"({path.name})" in page for path in EXAMPLES.iterdir() if path.stem in written - {"arguments"}
    )


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name, tmp_path):
    output = tmp_path / "picture.png"
    side = str(PICTURES[name])
    options = ("--num_inference_steps", "1", "--width", side, "--height", side, "--output", output)
    receipt = run(
        sys.executable, EXAMPLES / f"{name}.py", "--model", DEMO_MODEL, *options, *FURTHER.get(name, ())
    )
    assert "transformer" in receipt
    assert Image.open(output).size == (PICTURES[name], PICTURES[name])


@pytest.mark.parametrize("name", CLIPS)
def test_clips(name, tmp_path):
    output = tmp_path / "clip.gif"
    options = ("--num_inference_steps", "1", "--width", "192", "--height", "128", "--num_frames", "9")
    asked = ("--model", VIDEO_DEMO_MODEL, "--output", output)
    receipt = run(sys.executable, EXAMPLES / f"{name}.py", *asked, *options)
    assert "transformer" in receipt
    with Image.open(output) as clip:
        assert (clip.size, clip.n_frames) == ((192, 128), 9)


@pytest.mark.parametrize("name, written", [
    ("batch", {"apple.png", "apple_exact.png", "penguin.png"}),
    ("evaluate", {"report.html", "evaluation.json"}),
    ("calibrate", {"policy.json", "apple.png"}),
])  # fmt: skip
def test_commands(name, written, tmp_path):
    run("bash", EXAMPLES / f"{name}.sh", "demo", tmp_path, *SCRIPTS[name])
    assert written <= {path.name for path in tmp_path.iterdir()}
