"""`dma-diffusers eval` on a tiny pipeline: what it finds, that it ends, and that it resumes."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dma_diffusers.cli import main
from dma_diffusers.eval.metrics.inception import inception_features
from dma_diffusers.eval.quality.configurations import AGAIN, ANOTHER_KERNEL
from tests.command_line import ROOT, run, start
from tests.pipelines.saved_flux import save_flux

PROMPTS = ["a red apple", "two cats", "a dog on a hill"]
NEAR, FAR = "preset=b200", "low=mxfp4,window=0,sink=0,protect_text=false"
OPTIONS = ("--seeds", "2", "--batch", "2", "--config", NEAR, "--config", FAR)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text, "category": text[0]}) for text in PROMPTS))
    return path


@pytest.fixture(scope="module")
def asked(model, prompts):
    return ("eval", "--model", str(model), "--prompts", str(prompts), *OPTIONS)


@pytest.fixture(scope="module", autouse=True)
def features_are_computed_once():
    """Inception, most of an evaluation's time, looks at each batch of pictures once in all these tests."""
    known = {}

    def features(batch: torch.Tensor) -> torch.Tensor:
        key = (batch.shape, batch.numpy().tobytes())
        if key not in known:
            known[key] = inception_features(batch)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dma_diffusers.eval.quality.scoring.inception_features", features)
        yield


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    """The folder of an evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["dma-diffusers", *asked, "-o", str(folder)])
        main()
    assert not ended.value.code
    return folder


def evaluation(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


def numbers(folder: Path) -> dict:
    """The findings of an evaluation, without what changes from run to run."""
    rows = evaluation(folder)["rows"]
    return {
        name: {key: row[key] for key in ("summary", "pictures", "steps", "config")}
        for name, row in rows.items()
    }


def pictures(folder: Path) -> dict[str, int]:
    """Every picture, and when it was written."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("pictures/*/*.png")
    }


def test_the_baseline_against_itself_is_zero(finished):
    summary = evaluation(finished)["rows"][AGAIN.name]["summary"]
    assert {name: column["estimate"] for name, column in summary.items()} == {
        "psnr_db": None, "ssim": 1.0, "lpips": 0.0, "latents_relative_l2": 0.0, "fid": 0.0, "kid": 0.0,
    }  # fmt: skip
    assert {column["n"] for column in summary.values()} == {6}
    assert set(evaluation(finished)["rows"][AGAIN.name]["steps"]) == {0.0}


def test_another_exact_kernel_is_nearer_than_low_precision(finished):
    rows = evaluation(finished)["rows"]
    assert list(rows) == [AGAIN.name, ANOTHER_KERNEL.name, NEAR, FAR]
    error = {name: row["summary"]["latents_relative_l2"]["estimate"] for name, row in rows.items()}
    assert 0 < error[ANOTHER_KERNEL.name] < 1e-5 < error[NEAR] < error[FAR]
    for name in (ANOTHER_KERNEL.name, NEAR, FAR):
        assert all(step > 0 for step in rows[name]["steps"])
    assert rows[NEAR]["receipt"]["modules"] and rows[ANOTHER_KERNEL.name]["receipt"] is None


def test_summaries_follow_from_the_scores(finished):
    found = evaluation(finished)
    assert [prompt["text"] for prompt in found["prompts"]] == PROMPTS
    scores = np.array(found["rows"][FAR]["pictures"]["latents_relative_l2"])
    summary = found["rows"][FAR]["summary"]["latents_relative_l2"]
    means = scores.reshape(3, 2).mean(axis=1)
    assert summary["estimate"] == pytest.approx(scores.mean(), rel=1e-5)
    assert summary["low"] == pytest.approx(means.min(), rel=1e-5)  # of three prompts, one may be drawn thrice
    assert summary["high"] == pytest.approx(means.max(), rel=1e-5)


def test_the_worst_are_shown_first(finished):
    found = evaluation(finished)
    for name in (NEAR, FAR):
        lpips = np.array(found["rows"][name]["pictures"]["lpips"]).reshape(3, 2)
        assert [worst["value"] for worst in found["worst"] if worst["row"] == name] == pytest.approx(
            sorted(lpips.max(axis=1))[::-1], rel=1e-4
        )
    for worst in found["worst"]:
        assert {Image.open(finished / path).size for path in worst["pictures"].values()} == {(40, 48)}


def test_errors_by_layer_leave_nothing_in_the_way_of_recordings(
    monkeypatch, capsys, asked, finished, tmp_path
):
    layers = evaluation(finished)["layers"]
    assert layers["steps"] == [0, 1] and set(layers["relative_l2"]) == {NEAR, FAR}
    folder = shutil.copytree(finished, tmp_path / "run")
    code, output, error = run(monkeypatch, capsys, *asked, "--attention", "-o", str(folder))
    assert code == 0, error
    assert "attention.json" in output


def test_a_few_pictures_are_said_to_be_few(finished):
    few, singular = evaluation(finished)["notes"]
    assert "FID over 6 pictures" in few and "singular" in singular


def test_what_is_there_is_not_drawn_again(monkeypatch, capsys, asked, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = pictures(folder)
    assert len(before) == 5 * 6
    code, _, error = run(monkeypatch, capsys, *asked, "--config", "low=nvfp4", "-o", str(folder))
    assert code == 0, error
    after = pictures(folder)
    assert {name: after[name] for name in before} == before
    assert len(after) == 6 * 6
    found = numbers(folder)
    assert found.pop("low=nvfp4") and found == numbers(finished)


def test_a_row_of_which_nothing_ran_says_so(monkeypatch, capsys, asked, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    code, output, error = run(monkeypatch, capsys, *asked, "--config", "auto", "-o", str(folder))
    assert code == 0, error
    found = evaluation(folder)
    row = found["rows"]["auto"]
    assert (row["ran"], row["predicted_cost"], row["summary"]["psnr_db"]["identical"]) == (0, 1, 6)
    assert found["notes"][0].startswith(
        "auto: no attention calls ran at low precision (nothing is faster than stock"
    )
    assert "| auto (no call ran at low precision) |" in output
    assert found["rows"][NEAR]["ran"] == 1 and found["rows"][AGAIN.name]["ran"] is None


def test_a_dry_run_says_what_a_run_would_do(monkeypatch, capsys, asked, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = sorted(folder.rglob("*"))
    code, output, error = run(
        monkeypatch, capsys, *asked, "--config", "low=nvfp4", "--dry-run", "-o", str(folder)
    )
    assert (code, output) == (0, ""), error
    plan, *rows, compared, time_of_all = error.splitlines()
    assert plan == "6 rows × 3 prompts × 2 seeds = 36 pictures, 30 of them there already"
    assert rows == [
        *(f"  {name}: 0 to draw" for name in ("full precision, first drawing", AGAIN.name, ANOTHER_KERNEL.name)),
        *(f"  {name}: 0 to draw" for name in (NEAR, FAR)), "  low=nvfp4: 6 to draw",
    ]  # fmt: skip
    assert compared.startswith("compared by PSNR, dB, SSIM, LPIPS") and "FID to full precision" in compared
    assert re.fullmatch(
        r"about \d+ s: pictures \d+ s, errors of steps \d+ s, errors of layers \d+ s", time_of_all
    )
    assert sorted(folder.rglob("*")) == before


def test_a_scorer_and_samples_for_a_benchmark(monkeypatch, capsys, asked, finished, tmp_path):
    (tmp_path / "own_brightness.py").write_text(
        "def score(frames, prompt):\n    assert prompt != 'two cats'\n    return frames.double().mean().item()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = shutil.copytree(finished, tmp_path / "run")
    options = ("--scorer", "own_brightness:score", "--samples-for", "t2i-compbench")
    code, output, error = run(monkeypatch, capsys, *asked, *options, "-o", str(folder))
    assert code == 0, error
    assert "own\\_brightness:score ↑" in output
    found = evaluation(folder)
    scores, summary = found["rows"][FAR]["pictures"], found["rows"][FAR]["summary"]["own_brightness:score"]
    assert scores["own_brightness:score"][2:4] == [None, None] and summary["n"] == 4
    assert any(
        note.startswith(
            f"own_brightness:score could not score 2 of 6 of {FAR}, the first: 'two cats', seed 0 (Ass"
        )
        for note in found["notes"]
    )
    (samples,) = folder.glob("samples/low-mxfp4-*/samples")
    expected = [f"{prompt}_{number:06}.png" for number, prompt in enumerate(np.repeat(PROMPTS, 2))]
    assert sorted(path.name for path in samples.iterdir()) == sorted(expected)
    shown = [np.asarray(Image.open(samples / name)).astype(float).mean() for name in expected]
    kept = [mean for place, mean in enumerate(shown) if place not in (2, 3)]
    stored = scores["own_brightness:score"]
    assert [*stored[:2], *stored[4:]] == pytest.approx(kept, rel=1e-5)
    assert len([*folder.glob("samples/*/samples")]) == 5


def test_other_steps_are_other_pictures(monkeypatch, capsys, asked, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    before = pictures(folder)
    code, _, error = run(monkeypatch, capsys, *asked, "--steps", "3", "-o", str(folder))
    assert code == 0, error
    assert len(pictures(folder)) == 2 * len(before)
    assert numbers(folder)[FAR]["pictures"] != numbers(finished)[FAR]["pictures"]
    assert len(numbers(folder)[FAR]["steps"]) == 3
    assert evaluation(folder)["layers"]["steps"] == [0, 1, 2]


def test_other_weights_behind_a_link_are_other_pictures(
    monkeypatch, capsys, asked, model, finished, tmp_path
):
    """Another path to the same files finds their pictures; other files behind the same path do not."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(finished, tmp_path / "run")
    before, of_vae = pictures(folder), tmp_path / "vae"
    copy = shutil.copytree(model, tmp_path / "model")
    shutil.move(copy / "vae", of_vae)
    (copy / "vae").symlink_to(of_vae)
    code, _, error = run(monkeypatch, capsys, *asked, "--model", str(copy), "-o", str(folder))
    assert code == 0, error
    assert pictures(folder) == before and numbers(folder) == numbers(finished)

    (weights,) = of_vae.glob("*.safetensors")
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights)
    code, _, error = run(monkeypatch, capsys, *asked, "--model", str(copy), "-o", str(folder))
    assert code == 0, error
    assert len(pictures(folder)) == 2 * len(before)
    assert numbers(folder)[FAR]["summary"] != numbers(finished)[FAR]["summary"]


def test_corrupt_and_missing_files_are_drawn_again_and_named(monkeypatch, capsys, asked, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    corrupt, missing, *_ = sorted(folder.glob("pictures/preset-b200-*/*.png"))
    corrupt.write_bytes(corrupt.read_bytes()[:50])
    missing.unlink()
    code, _, error = run(monkeypatch, capsys, *asked, "-o", str(folder))
    assert code == 0, error
    assert f"{corrupt.relative_to(folder)} was corrupt and was drawn anew" in evaluation(folder)["notes"]
    assert numbers(folder) == numbers(finished)


def test_a_killed_run_resumes_to_the_same_numbers(monkeypatch, capsys, asked, finished, tmp_path):
    folder = tmp_path / "run"
    process = start(*asked, "-o", str(folder), OMP_NUM_THREADS="1")
    while len(pictures(folder)) < 9:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    before = pictures(folder)
    assert len(before) < 30 and not (folder / "evaluation.json").exists()
    code, _, error = run(monkeypatch, capsys, *asked, "-o", str(folder))
    assert code == 0, error
    assert numbers(folder) == numbers(finished)
    after = pictures(folder)
    assert {name: after[name] for name in before} == before


def test_processes_share_the_prompts(asked, finished, tmp_path):
    """Launched as `accelerate launch` does for several GPUs; without one it starts a single process."""
    folder = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "dma_diffusers", *asked, "-o", str(folder)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The report is") == done.stdout.count(str(folder / "report.html")) == 1
    assert numbers(folder) == numbers(finished)


def test_a_full_disk_is_one_line(asked, tmp_path):
    def little_space():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    folder = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "dma_diffusers", *asked, "-o", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, preexec_fn=little_space,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "too large" in done.stderr.splitlines()[-1]
    assert not pictures(folder) and not list(folder.rglob("*.tmp"))


def test_attention_of_chosen_modules_and_steps(monkeypatch, capsys, asked, finished, tmp_path):
    """In the folder of an evaluation, too, which has recordings of its own."""
    shutil.copytree(finished, tmp_path / "run")
    options = ("--attention", "--modules", "-1", "--modules", "transformer_blocks.0.attn", "--recorded", "1")
    code, output, error = run(monkeypatch, capsys, *asked, *options, "-o", str(tmp_path / "run"))
    assert code == 0, error
    found = json.loads((tmp_path / "run" / "attention.json").read_text())
    assert found["modules"] == ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    assert found["steps"] == [0] and list(found["summary"]) == [NEAR, FAR] and NEAR in output
    assert np.shape(found["configurations"][NEAR]["recall"])[:3] == (len(PROMPTS), 2, 1)


def test_what_draws_nan_is_named(monkeypatch, capsys, asked, model, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(model, tmp_path / "model")
    (weights,) = (copy / "vae").glob("*.safetensors")  # latents stay finite: only the picture is not
    save_file({name: tensor * torch.nan for name, tensor in load_file(weights).items()}, weights)
    code, _, error = run(monkeypatch, capsys, *asked, "--model", str(copy), "-o", str(tmp_path / "run"))
    assert code == 1
    assert (
        error.splitlines()[-1]
        == "error: full precision, first drawing: the pipeline drew NaN or infinity instead of a picture"
    )


def test_a_missing_package_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dma_diffusers.eval.metrics.alignment.find_spec", lambda name: None)
    code, _, error = run(monkeypatch, capsys, "eval", "-o", str(tmp_path / "run"))
    assert code == 1
    assert error.startswith("error: the alignment score needs the package") and error.count("\n") == 1


BAD = {
    "no prompts": (("--prompts", "/no/such/file.txt"), "/no/such/file.txt"),
    "both ways": (("--configs", "c.yaml"), "by --config or by --configs, not by both"),
    "a file": (("-o", str(ROOT / "README.md")), "README.md"),
    "no folder": (("-o", "/no/such/folder/run"), "/no/such/folder"),
    "another model": (
        ("--config", "model=WanTransformer3DModel"),
        "is for WanTransformer3DModel, not for Flux",
    ),
    "without --attention": (("--recorded", "1"), "are for --attention: give that too"),
    "no such module": (("--attention", "--modules", "7"), "there is no module 7: give 0 to 2"),
    "no room": (("--attention", "--limit", "0.001", "--size", "256"), "more than the limit of 1 MB"),
    "no such layer": (
        ("--config", "dense_layers=[9]", "--attention"),
        "FluxTransformer2DModel has 3 modules",
    ),
    "no policy": (
        ("--config", "policy=/no/such/policy.json"),
        "there is no policy file /no/such/policy.json",
    ),
    "frames of a picture": (("--frames", "5"), "--frames is for clips: FluxPipeline draws pictures"),
    "no size": (("--size", "9x9x9"), "give width and height, as in 832x480"),
    "no seed": (("--seed", str(2**64)), "2 seeds from there must be from 0 to"),
    "no model": (("--model", str(ROOT / "tests")), "no Diffusers pipeline"),
    "a hub id": (("--model", "owner/name"), "hf download owner/name --local-dir FOLDER"),
    "no such dense layer": (("--config", "dense_layers=[99]"), "dense_layers=[99]: dense_layers (99,)"),
    "no scorer": (("--scorer", "no_such_module:score"), "no_such_module cannot be imported"),
    "a scorer twice": (("--scorer", "math:hypot", "--scorer", "math:hypot"), "math:hypot is given twice"),
    "I3D of pictures": (("--i3d", "/no/such/file.safetensors"), "/no/such/file.safetensors"),
    "no benchmark": (("--samples-for", "imagenet"), "there are vbench, t2i-compbench"),
    "a benchmark of clips": (
        ("--samples-for", "vbench"),
        "vbench reads clips, and this model draws pictures",
    ),
    "a dry run of calls": (("--dry-run", "--attention"), "--dry-run is for pictures"),
    "no clip": (("--clip", "owner/clip"), "hf download owner/clip --local-dir FOLDER"),
    "no reference": (("--reference", "/no/such/folder"), "/no/such/folder"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(monkeypatch, capsys, asked, tmp_path, arguments, words):
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # read from the environment at import
    code, output, error = run(monkeypatch, capsys, *asked, "-o", str(tmp_path / "run"), *arguments)
    assert code == 1 and not output
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not pictures(tmp_path / "run")


def test_a_model_that_draws_nothing_leaves_no_folder(monkeypatch, capsys, asked, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXImageToVideoPipeline"}')
    code, _, error = run(monkeypatch, capsys, *asked, "--model", str(tmp_path), "-o", str(tmp_path / "run"))
    assert code == 1 and "starts from an image" in error
    assert not (tmp_path / "run").exists()
