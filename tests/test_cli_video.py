"""`dma-diffusers generate-video`, as a user meets it."""

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from tests.command_line import ROOT, run
from tests.pipelines.saved_flux import save_flux
from tests.pipelines.saved_video import save_video

WIDTH, HEIGHT, FRAMES = 176, 144, 9  # of the tiny Wan's generation.json
COARSE = ("--low", "mxfp4", "--window", "0", "--sink", "0")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models by name; saved when first asked for."""
    saved = {}

    def folder(name: str) -> str:
        if name not in saved:
            save = save_flux if name == "flux" else lambda path: save_video(name, path)
            saved[name] = str(save(tmp_path_factory.mktemp(name.replace(" ", "_"))))
        return saved[name]

    return folder


@pytest.fixture
def model(folders):
    return folders("wan")


@pytest.fixture
def ftfy(monkeypatch):
    """Wan's image-to-video pipeline cleans prompts with it, whether it is there or not."""
    monkeypatch.setattr("dma_diffusers.pipelines.load.is_ftfy_available", lambda: True)
    stand_in = SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_i2v.ftfy", stand_in, raising=False)


def clip(path: Path) -> np.ndarray:
    """The frames of a .mp4, `[F, H, W, 3]`."""
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]).astype(int)


def test_a_clip_with_frames_size_and_rate_that_were_asked_for(monkeypatch, capsys, model, tmp_path):
    target = tmp_path / "out.mp4"
    arguments = ("--frames", "5", "--fps", "12.5", "--size", "208x176", "--steps", "1", "-o", str(target))
    code, output, error = run(monkeypatch, capsys, "generate-video", "a cat", "--model", model, *arguments)
    assert code == 0, error
    assert clip(target).shape == (5, 176, 208, 3)
    with av.open(str(target)) as file:
        assert file.streams.video[0].average_rate == 12.5
    drawn, placed, *receipt = output.splitlines()
    assert re.fullmatch(r"WanPipeline, .* of weights in .*", placed)
    words = rf"{target}: 5 frames of 208x176, 12\.5 a second; DMA mxfp8/mxfp4, window 128, sink 128, [\d.]+ s"
    assert re.fullmatch(words, drawn)
    assert "  4 calls intercepted" in receipt  # one guided step: two of each of two modules
    assert list(tmp_path.iterdir()) == [target]


def test_compare_shows_and_measures(monkeypatch, capsys, model, tmp_path):
    exact, drawn, sheet = (tmp_path / f"{name}.mp4" for name in ("exact", "drawn", "sheet"))
    common = ("generate-video", "a cat", "--model", model, "--seed", "7", "--json")
    run(monkeypatch, capsys, *common, "--preset", "exact", "-o", str(exact))
    run(monkeypatch, capsys, *common, *COARSE, "-o", str(drawn))
    code, output, error = run(monkeypatch, capsys, *common, *COARSE, "--compare", "-o", str(sheet))
    assert code == 0, error
    result = json.loads(output)
    shown = clip(sheet)
    assert shown.shape[0] == FRAMES
    assert shown.shape[2] == 3 * WIDTH + 2 * 8
    assert shown.shape[1] > HEIGHT + 48
    for left, alone in ((0, exact), (WIDTH + 8, drawn)):
        assert np.abs(shown[:, :HEIGHT, left : left + WIDTH] - clip(alone)).mean() < 3
    assert result | {"frames": FRAMES, "fps": 16, "width": WIDTH, "height": HEIGHT} == result
    assert len(result["frames_psnr_db"]) == FRAMES
    assert min(result["frames_psnr_db"]) == result["frames_psnr_db"][result["worst_frame"] - 1]
    squares = [10 ** (-value / 10) for value in result["frames_psnr_db"]]
    assert result["psnr_db"] == pytest.approx(-10 * np.log10(np.mean(squares)))
    assert 0.5 < result["ssim"] < 1
    assert result["flicker"] > 0
    assert result["receipt"]


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_other_formats_and_another_family(monkeypatch, capsys, folders, tmp_path, kind):
    target = tmp_path / f"out.{kind}"
    arguments = ("generate-video", "a cat", "--model", folders("cogvideox"), "--json", "-o", str(target))
    code, output, error = run(monkeypatch, capsys, *arguments)
    assert code == 0, error
    assert json.loads(output) | {"frames": 9, "fps": 8, "width": 96, "height": 64} == json.loads(output)
    with Image.open(target) as picture:
        assert picture.size == (96, 64)
        assert picture.n_frames == 9


def test_from_an_image_through_two_transformers(monkeypatch, capsys, folders, ftfy, tmp_path):
    first, target = tmp_path / "first.png", tmp_path / "out.webp"
    results = []
    for colour in ("red", "blue"):
        Image.new("RGB", (50, 40), colour).save(first)
        arguments = ("--model", folders("wan from image"), "--image", str(first), "--json", "-o", str(target))
        code, output, error = run(monkeypatch, capsys, "generate-video", "a cat", *arguments)
        assert code == 0, error
        results.append(target.read_bytes())
    names = [module["module"] for module in json.loads(output)["receipt"]["modules"]]
    assert {name.split(".")[0] for name in names} == {"transformer", "transformer_2"}
    assert results[0] != results[1]


def test_quality_first_and_the_guard_reach_the_configuration(monkeypatch, capsys, model, tmp_path):
    asked = []

    def preset(name, **changes):
        asked.append(changes)
        raise ValueError("seen")

    monkeypatch.setattr("dma_diffusers.config.DMAConfig.preset", preset)
    for command in (("generate",), ("generate-video", "--model", model)):
        for flags in ((), ("--quality-first",), ("--guard", "0.2")):
            run(monkeypatch, capsys, *command, *flags, "a cat", "-o", str(tmp_path / "out.webp"))
    assert asked == [{}, {"quality_first": True}, {"guard": 0.2}] * 2


def test_a_schedule_reaches_both_experts(monkeypatch, capsys, folders, tmp_path):
    arguments = ("--model", folders("wan"), "--json", "-o", str(tmp_path / "out.webp"), "--steps", "4")
    words = "sigma>0.9: dense(everywhere=high); dense(everywhere=low)"
    code, output, error = run(monkeypatch, capsys, "generate-video", "a cat", *arguments, "--schedule", words)
    assert code == 0, error
    found = [module["by_entry"] for module in json.loads(output)["receipt"]["modules"] if module["policy"]]
    assert found and all("; ".join(by_entry) == words and min(by_entry.values()) > 0 for by_entry in found)


BAD_INPUT = {
    "frames": ("wan", ("--frames", "8"), r"WanPipeline draws 4·k \+ 1 frames, not 8: take 5 or 9$"),
    "frames of CogVideoX": ("cogvideox", ("--frames", "13"), r"8·k \+ 1 frames, not 13: take 9 or 17$"),
    "sides": ("wan", ("--size", "170x140"), "multiples of 16, not 170x140: take 176x144$"),
    "size of three sides": ("wan", ("--size", "9x170x140"), "give width and height"),
    "size of no sides": ("wan", ("--size", "big"), "give one number for each dimension"),
    "no encoder": ("wan", ("-o", "out.avi"), r"\.avi is no clip format; there are \.mp4, \.webp, \.gif$"),
    "no frames per second": ("wan", ("--fps", "0"), "a clip needs 0.1 to 1000 frames per second, got 0$"),
    "endless frames per second": ("wan", ("--fps", "inf"), "a clip needs .*, got inf$"),
    "too fast for a gif": ("wan", ("--fps", "60", "-o", "out.gif"), "at most 50 frames per second, got 60"),
    "no folder": ("wan", ("-o", "/no/such/folder/out.mp4"), "no folder"),
    "place that takes no files": ("wan", ("-o", "/proc/out.mp4"), "cannot write"),
    "image for text to video": ("wan", ("--image", __file__), "takes no image to start from"),
    "no image": ("wan from image", (), "starts from an image: .*--image"),
    "missing image": ("wan from image", ("--image", "none.png"), r"cannot read none\.png: No such file"),
    "unreadable image": ("wan from image", ("--image", __file__), "cannot read .*holds no picture"),
    "text to image": ("flux", (), "draws pictures: dma-diffusers generate is"),
    "policy and window": ("wan", ("--policy", "dense()", "--window", "384"), "leave them out"),
    "policy file of another model": (
        "wan",
        ("--policy", str(ROOT / "eval/results/h200_policy.json")),
        "is for FluxTransformer2DModel, not for Wan",
    ),
    "quality without a file": ("wan", ("--quality", "0.5"), "give --policy too"),
    "schedule with a gap": ("wan", ("--schedule", "sigma>0.5: dense()"), "from sigma 0.5 down to 0"),
    "schedule that overlaps": (
        "wan",
        ("--schedule", "dense(); sigma>0.5: dense()"),
        "0.5 stands after sigma>0.0",
    ),
}


@pytest.mark.parametrize(("name", "arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_before_weights_are_loaded(
    monkeypatch, capsys, folders, ftfy, tmp_path, name, arguments, words
):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    common = ("generate-video", "a cat", "--model", folders(name), "-o", str(tmp_path / "out.mp4"))
    capsys.readouterr()  # saving a model shows a bar
    code, output, error = run(monkeypatch, capsys, *common, *arguments)
    assert code == 1
    assert not output
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(words, error.strip())
    assert not list(tmp_path.iterdir())


def test_a_video_model_in_generate(monkeypatch, capsys, model, tmp_path):
    arguments = ("generate", "a cat", "--model", model, "-o", str(tmp_path / "out.png"))
    code, _, error = run(monkeypatch, capsys, *arguments)
    assert code == 1
    assert "which draws clips: dma-diffusers generate-video is for those" in error


def test_a_disk_that_gets_full(monkeypatch, capsys, model, tmp_path):
    write = Path.write_bytes

    def full(self, data):
        write(self, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    target = tmp_path / "out.webp"
    arguments = ("generate-video", "a cat", "--model", model, "--steps", "1", "-o", str(target))
    code, output, error = run(monkeypatch, capsys, *arguments)
    assert (code, output) == (1, "")
    assert error == f"error: cannot write {target}: No space left on device\n"
    assert not list(tmp_path.iterdir())
