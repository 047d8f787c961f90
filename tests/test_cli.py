"""The command line as a user meets it."""

import json
import re
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dma_diffusers.config import CHOICES
from dma_diffusers.kernels.lowerings import LOWERINGS
from tests.command_line import run, start
from tests.pipelines.saved_flux import CALL, save_flux
from tests.tiny_pipelines import flux

ROOT = Path(__file__).parents[1]
WIDTH, HEIGHT = CALL["width"], CALL["height"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_flux(tmp_path_factory.mktemp("flux")))


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_generate_writes_a_picture(monkeypatch, capsys, model, tmp_path):
    target = tmp_path / "out.png"
    code, output, _ = run(monkeypatch, capsys, "generate", "a cat", "--model", model, "-o", str(target))
    assert code == 0
    assert picture(target).shape == (HEIGHT, WIDTH, 3)
    assert str(target) in output
    assert "DMA mxfp8/mxfp4, window 128, sink 128" in output
    assert list(tmp_path.iterdir()) == [target]


def test_a_policy_file_chooses(monkeypatch, capsys, tmp_path):
    target, policy = tmp_path / "out.png", ROOT / "eval" / "results" / "h200_policy.json"
    arguments = ("generate", "a red cat", "--steps", "1", "--size", "64", "--json", "-o", str(target))
    arguments += ("--policy", str(policy))
    windows = {}
    for quality in ("0", "1"):
        code, output, error = run(monkeypatch, capsys, *arguments, "--quality", quality)
        assert code == 0, error
        windows[quality] = [module["policy"] for module in json.loads(output)["receipt"]["modules"]]
    assert windows["0"] != windows["1"]
    for refused, words in (
        (("--window", "128"), "--policy chooses window itself"),
        (("--quality", "1.5"), "quality must be a number from 0"),
    ):
        assert words in run(monkeypatch, capsys, *arguments, *refused)[2]
    assert "give --policy too" in run(monkeypatch, capsys, *arguments[:-2], "--quality", "0.5")[2]


def test_a_schedule_in_words(monkeypatch, capsys, model, tmp_path):
    target, words = (
        tmp_path / "out.png",
        "sigma>0.9: dense(everywhere=high); importance(budget=0.1) high=bf16",
    )
    arguments = ("generate", "a cat", "--model", model, "-o", str(target), "--steps", "4", "--schedule")
    code, output, error = run(monkeypatch, capsys, *arguments, words)
    assert code == 0, error
    assert f"DMA mxfp8/mxfp4, {words}" in output
    assert re.search(
        r"12 calls intercepted: \d of sigma>0\.9: dense\(everywhere=high\); \d+ of importance", output
    )
    target.unlink()
    policy = str(ROOT / "eval" / "results" / "h200_policy.json")
    for bad, refusal in (
        (("sigma>0.5: dense(); sigma>0.9: dense(); dense()",), "sigma>0.9 stands after sigma>0.5"),
        (("sigma>0.5: dense()",), "nothing holds from sigma 0.5 down to 0"),
        (
            (words, "--policy", "dense()"),
            "every entry of the schedule has a policy: leave them out, or dense",
        ),
        ((words, "--policy", policy), "--policy chooses schedule itself: give one or the other"),
        ((words, "--preset", "exact"), "it takes no schedule"),
    ):
        code, output, error = run(monkeypatch, capsys, *arguments, *bad)
        assert (code, output, error.count("\n")) == (1, "", 1) and refusal in error
    assert not target.exists()


def test_a_policy_in_words(monkeypatch, capsys, model, tmp_path):
    target = tmp_path / "out.png"
    arguments = ("generate", "a cat", "--model", model, "-o", str(target), "--low", "nvfp4", "--policy")
    code, output, error = run(monkeypatch, capsys, *arguments, "neighborhood(window=5x99, high=3x3)")
    assert code == 0, error
    assert "DMA mxfp8/nvfp4, neighborhood(window=5x99, high=3x3)" in output
    assert "note: window 99 in dimension 2 was clamped to the grid's" in output
    for words, refusal in (
        (("dense()", "--window", "384"), "leave them out, or dense"),
        (("dense()", "--quality", "0.5"), "give --policy too"),
        (("neighborhood(window=5x5x5)",), "window 5×5×5 is 3-D, but grid"),
    ):
        assert refusal in run(monkeypatch, capsys, *arguments, *words)[2]


def test_precisions_on_the_command_line_are_in_the_receipt(monkeypatch, capsys, model, tmp_path):
    arguments = ("generate", "a cat", "--model", model, "--json", "-o", str(tmp_path / "out.png"))
    code, output, error = run(monkeypatch, capsys, *arguments, "--high", "mxfp8/bf16", "--low", "nvfp4/fp8")
    assert code == 0, error
    modules = json.loads(output)["receipt"]["modules"]
    assert {(module["high"], module["low"]) for module in modules} == {("mxfp8", "nvfp4")}


def test_flags_win_over_the_model_folder(monkeypatch, capsys, model, tmp_path):
    target = tmp_path / "out.png"
    arguments = ("generate", "a cat", "--model", model, "--size", "64", "--json", "-o", str(target))
    code, output, _ = run(
        monkeypatch, capsys, *arguments, "--steps", "3", "--low", "nvfp4", "--window", "384"
    )
    assert code == 0
    assert picture(target).shape == (64, 64, 3)
    for module in json.loads(output)["receipt"]["modules"]:
        assert (module["high"], module["low"]) == ("mxfp8", "nvfp4")
        assert "window=384" in module["policy"]
        assert module["intercepted"] == 3


def test_compare_shows_both_pictures_and_measures_them(monkeypatch, capsys, model, tmp_path):
    arguments = ("generate", "a cat", "--model", model, "--json", "--seed", "7", "--low", "mxfp4")
    exact, drawn, sheet = (tmp_path / f"{name}.png" for name in ("exact", "drawn", "sheet"))
    run(
        monkeypatch,
        capsys,
        "generate",
        "a cat",
        "--model",
        model,
        "--seed",
        "7",
        "--preset",
        "exact",
        "-o",
        str(exact),
    )
    run(monkeypatch, capsys, *arguments, "-o", str(drawn))
    code, output, _ = run(monkeypatch, capsys, *arguments, "--compare", "-o", str(sheet))
    result = json.loads(output)

    assert code == 0
    assert set(result) == {"output", "seconds", "psnr_db", "ssim", "latents_relative_l2", "receipt"}
    panels = picture(sheet)
    assert panels.shape[0] > HEIGHT
    assert panels.shape[1] == 3 * WIDTH + 2 * 8
    first, second, third = (panels[:HEIGHT, left : left + WIDTH] for left in (0, WIDTH + 8, 2 * (WIDTH + 8)))
    assert np.array_equal(first, picture(exact))
    assert np.array_equal(second, picture(drawn))
    assert not np.array_equal(first, second)
    assert np.array_equal(third, np.minimum(abs(first - second) * 64, 255))
    mean_square = np.mean((first - second) ** 2.0)
    assert result["psnr_db"] == pytest.approx(10 * np.log10(255**2 / mean_square), rel=1e-4)
    assert 0 < result["latents_relative_l2"] < 0.2
    assert 0.5 < result["ssim"] < 1


def test_compare_of_exact_with_itself(monkeypatch, capsys, model, tmp_path):
    target = str(tmp_path / "out.png")
    arguments = (
        "generate",
        "a cat",
        "--model",
        model,
        "--preset",
        "exact",
        "--compare",
        "--json",
        "-o",
        target,
    )
    _, output, _ = run(monkeypatch, capsys, *arguments)
    result = json.loads(output)
    assert (result["psnr_db"], result["ssim"], result["latents_relative_l2"]) == (None, 1.0, 0.0)


def test_a_picture_that_dma_left_to_stock_is_not_called_dma(monkeypatch, capsys, model, tmp_path):
    arguments = ("generate", "a cat", "--model", model, "--size", "16", "-o", str(tmp_path / "out.png"))
    _, output, _ = run(monkeypatch, capsys, *arguments)
    assert "stock attention" in output.splitlines()[0]
    assert "fewer than" in output


def test_json_is_all_of_standard_output(model, tmp_path):
    process = start("generate", "a cat", "--model", model, "--json", "-o", str(tmp_path / "out.png"))
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert set(json.loads(output)) == {"output", "seconds", "receipt"}
    assert not error


BAD_INPUT = {
    "unknown high format": (("--high", "fp3"), "mxfp8"),
    "unknown low format": (("--low", "fp3"), "nvfp4"),
    "unknown preset": (("--preset", "fastest"), "auto, b200, hopper, exact"),
    "negative window": (("--window", "-1"), "window"),
    "negative sink": (("--sink", "-1"), "sink"),
    "unknown lowering": (("--lowering", "no-such-lowering"), "unknown lowering 'no-such-lowering'"),
    "formats that the lowering does not run": (
        ("--lowering", "native", "--low", "mxint4"),
        r"lowering native can't run mxfp8 \| mxint4 on \w+: the kernel multiplies .*, not mxint4",
    ),
    "exact with formats": (("--preset", "exact", "--low", "mxfp4"), "exact"),
    "model folder that is no pipeline": (("--model", str(ROOT / "tests")), "model_index.json"),
    "model that does not exist": (("--model", "/no/such/model"), "neither a folder nor a hub id"),
    "output folder that does not exist": (("-o", "/no/such/folder/out.png"), "no folder"),
    "output folder that takes no files": (("-o", "/proc/out.png"), "cannot write"),
    "output of no picture format": (("-o", "out.txt"), "picture format"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_no_picture(monkeypatch, capsys, model, tmp_path, arguments, words):
    target = tmp_path / "out.png"
    common = ("generate", "a cat", "--model", model, "-o", str(target))
    code, output, error = run(monkeypatch, capsys, *common, *arguments)
    assert code != 0
    assert not output
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may run it")
@pytest.mark.parametrize("command", ["generate", "generate-video", "batch"])
def test_a_lowering_that_does_not_run_here_is_refused_before_weights_are_loaded(
    monkeypatch, capsys, tmp_path, command
):
    def load(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    (tmp_path / "jobs.jsonl").write_text('{"prompt": "a cat"}')
    what, output = {
        "generate": ("a cat", "out.png"), "generate-video": ("a cat", "out.gif"),
        "batch": (str(tmp_path / "jobs.jsonl"), "out"),
    }[command]  # fmt: skip
    common = (command, what, "-o", str(tmp_path / output))
    code, _, error = run(monkeypatch, capsys, *common, "--lowering", "native")
    assert code == 1
    assert "lowering native can't run mxfp8 | mxfp4 on cpu" in error


def _nan(folder: Path) -> None:
    (weights,) = (folder / "transformer").glob("*.safetensors")
    nan = {name: torch.full_like(value, torch.nan) for name, value in load_file(weights).items()}
    save_file(nan, weights, {"format": "pt"})


def _wide_heads(folder: Path) -> None:
    flux(head_dim=264).transformer.save_pretrained(folder / "transformer")


def _truncated(component: str, folder: Path) -> None:
    (weights,) = (folder / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])


def _generation(content: str, folder: Path) -> None:
    (folder / "generation.json").write_text(content)


BAD_MODELS = {
    "weights that are NaN": (_nan, "NaN"),
    "wide heads": (_wide_heads, "head_dim 264 is more than 256"),
    "corrupt weights": (partial(_truncated, "transformer"), "transformer"),
    "corrupt text encoder": (partial(_truncated, "text_encoder_2"), "holds corrupt weights"),
    "generation.json that is a list": (partial(_generation, "[1]"), "generation.json holds no JSON object"),
    "generation.json that is text": (partial(_generation, "24 steps"), "generation.json is not JSON"),
    "generation.json with an unknown key": (partial(_generation, '{"stepps": 3}'), "takes no stepps"),
    "generation.json with a wrong type": (
        partial(_generation, '{"num_inference_steps": "3"}'),
        "num_inference_steps must be a whole number from 1, got '3'",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_model_is_one_line_and_no_picture(monkeypatch, capsys, model, tmp_path, spoil, words):
    copy, target = shutil.copytree(model, tmp_path / "model"), tmp_path / "out.png"
    spoil(copy)
    code, output, error = run(
        monkeypatch, capsys, "generate", "a cat", "--model", str(copy), "-o", str(target)
    )
    assert code == 1
    assert not output
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(words, error)
    assert list(tmp_path.iterdir()) == [copy]


def test_output_is_checked_before_the_model_is_loaded(monkeypatch, capsys):
    arguments = ("generate", "a cat", "--model", "/no/such/model", "-o", "/no/such/folder/out.png")
    _, _, error = run(monkeypatch, capsys, *arguments)
    assert "/no/such/folder" in error


def test_interrupted_run_leaves_nothing(model, tmp_path):
    target = tmp_path / "out.png"
    arguments = ("generate", "a cat", "--model", model, "--steps", "100000", "-o", str(target))
    process = start(*arguments, FORCE_COLOR="1")  # so that the progress bar is shown, and says when it draws
    shown = ""
    while "DMA" not in shown:
        character = process.stderr.read(1)
        assert character, shown
        shown += character
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not output
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", [["generate", "a cat"], ["eval"]])
def test_without_the_extra_its_name_is_told(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, error = run(monkeypatch, capsys, *command, "-o", str(tmp_path / "out.png"))
    assert code == 1
    assert re.match(
        r"error: this command needs transformers: pip install 'dma-diffusers\[(demo|eval)]'\n", error
    )


def test_doctor_says_why(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "doctor", "--json")
    findings = json.loads(output)
    assert code == 0
    assert set(findings) == {"torch", "triton", "gpu", "lowerings"}
    found = {(row.pop("formats"), row.pop("name")): row for row in findings["lowerings"]}
    pairs, names = ("mxfp8|mxfp4", "bf16|int8", "bf16|int8/bf16"), ("native", "faithful", "reference")
    assert list(found) == [(pair, name) for pair in pairs for name in names]
    assert all(set(row) == {"runs", "reason"} and row["reason"] for row in found.values())
    assert all(found[pair, "reference"]["runs"] for pair in pairs)
    if findings["gpu"] is None:
        assert not any(found[pair, name]["runs"] for pair in pairs for name in names[:2])
        assert "sm_100" in found["mxfp8|mxfp4", "native"]["reason"]


def test_doctor_on_hopper(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr("dma_diffusers.doctor.architecture", lambda device: "sm_90")
    _, output, _ = run(monkeypatch, capsys, "doctor", "--json")
    runs = {(row["formats"], row["name"]): row["runs"] for row in json.loads(output)["lowerings"]}
    assert [row for row, can in runs.items() if not can] == [("mxfp8|mxfp4", "native")]


def test_help_names_every_lowering(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "generate", "--help")
    assert code == 0
    assert all(re.search(rf"\b{name}\b", output) for name in (*CHOICES, *(way.name for way in LOWERINGS)))


def test_doctor_in_words(monkeypatch, capsys):
    code, output, _ = run(monkeypatch, capsys, "doctor")
    assert code == 0
    assert "reference" in output


def test_compile_lists_every_variant(monkeypatch, capsys):
    pytest.importorskip("triton")
    arguments = ("compile", "--target", "sm_100", "--high", "mxfp8", "--low", "mxfp4", "--json")
    code, output, _ = run(monkeypatch, capsys, *arguments)
    variants = json.loads(output)
    keys = {"kernel", "formats", "head_dim", "mma_kinds", "registers", "spills", "shared_bytes"}
    assert code == 0
    assert {variant["head_dim"] for variant in variants} == {64, 128}
    assert all(keys <= set(variant) for variant in variants)


def test_compile_in_words(monkeypatch, capsys):
    compiler = pytest.importorskip("dma_diffusers.kernels.ahead_of_time.compile")
    variant = {"kernel": "attend", "formats": ["bf16", "int8"], "spills": 0, "loops": [{"matrix": []}]}
    monkeypatch.setattr(compiler, "compile_all", lambda *_, **__: [variant])
    code, output, _ = run(monkeypatch, capsys, "compile", "--target", "sm_90")
    assert code == 0
    assert "bf16, int8" in output and "matrix" not in output


def test_compile_lists_the_kernels_of_linear_layers(monkeypatch, capsys):
    pytest.importorskip("triton")
    code, output, _ = run(monkeypatch, capsys, "compile", "--target", "sm_90", "--linears", "--json")
    variants = json.loads(output)
    assert code == 0
    assert {variant["kernel"] for variant in variants} == {"quantise_rows", "reencode_rows"}
    assert {variant["size"] for variant in variants} == {"3072×9216", "12288×3072"}


@pytest.mark.parametrize("flags", [
    ("--target", "sm_1"), ("--target", "sm_100", "--high", "fp3"), ("--target", "sm_1", "--linears"),
    ("--target", "sm_100", "--linears", "--high", "mxfp8"),
])  # fmt: skip
def test_compile_refuses_in_one_line(monkeypatch, capsys, flags):
    pytest.importorskip("triton")
    code, output, error = run(monkeypatch, capsys, "compile", *flags)
    assert code == 1
    assert not output
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_running_out_of_memory_is_one_line(monkeypatch, capsys, model, tmp_path):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB.")

    monkeypatch.setattr("dma_diffusers.pipelines.load.load_pipeline", fail)
    arguments = ("generate", "a cat", "--model", model, "-o", str(tmp_path / "out.png"))
    assert run(monkeypatch, capsys, *arguments) == (1, "", "error: CUDA out of memory.\n")
    assert not list(tmp_path.iterdir())
