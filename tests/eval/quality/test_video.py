"""An evaluation of a tiny video pipeline: every frame is scored, nothing twice, and the report moves."""

import base64
import io
import json
import re
import sys

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from dma_diffusers.cli import main
from dma_diffusers.eval.metrics.paired import psnr_db
from dma_diffusers.eval.metrics.video import each_frame, pooled_psnr_db
from dma_diffusers.eval.quality import scoring
from dma_diffusers.eval.quality.configurations import AGAIN
from tests.command_line import run
from tests.tiny_pipelines import wan

CALL = {"height": 64, "width": 80, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 21}
LOW = "low=mxfp4,min_length=0,window=0,sink=0"
PROMPTS = ["a cat runs", "a dog sleeps", "a car turns"]


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    wan().save_pretrained(folder / "model")
    (folder / "model" / "generation.json").write_text(json.dumps(CALL))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    options = ("--seeds", "1", "--batch", "2", "--config", LOW, "--samples-for", "vbench")
    return ("eval", "--model", str(folder / "model"), "--prompts", str(folder / "prompts.txt"), *options)


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["dma-diffusers", *asked, "-o", str(folder)])
        main()
    assert not ended.value.code
    return folder


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def clips(folder, row):
    """uint8 `[clips, F, 3, H, W]` in no order that matters."""
    strips = [np.array(Image.open(path)) for path in sorted(folder.glob(f"pictures/{row}-*/*.png"))]
    return torch.from_numpy(np.stack(strips)).unflatten(1, (5, -1)).permute(0, 1, 4, 2, 3)


def test_every_frame_is_scored(finished):
    found = evaluation(finished)
    assert found["settings"]["frames"] == 5
    exact, coarse = (found["rows"][name] for name in (AGAIN.name, LOW))
    assert exact["frames"] == {
        "psnr_db": [None] * 5, "ssim": [1.0] * 5, "lpips": [0.0] * 5, "flicker": [None, *[0.0] * 4],
    }  # fmt: skip
    assert coarse["frames"]["flicker"][0] is None
    assert np.mean(coarse["frames"]["flicker"][1:]) == pytest.approx(
        coarse["summary"]["flicker"]["estimate"], rel=1e-4
    )
    psnr = each_frame(psnr_db, clips(finished, "low"), clips(finished, "full-precision-first-drawing"))
    assert coarse["frames"]["psnr_db"] == pytest.approx(pooled_psnr_db(psnr, 0).tolist(), rel=1e-5)
    assert sorted(coarse["pictures"]["psnr_db"]) == pytest.approx(
        sorted(pooled_psnr_db(psnr, 1).tolist()), rel=1e-5
    )
    assert np.mean(coarse["frames"]["lpips"]) == pytest.approx(
        coarse["summary"]["lpips"]["estimate"], rel=1e-4
    )


def test_clips_have_flicker_and_no_fid(finished):
    found = evaluation(finished)
    exact, coarse = (found["rows"][name]["summary"] for name in (AGAIN.name, LOW))
    assert exact["flicker"]["estimate"] == exact["lpips"]["estimate"] == 0
    assert coarse["flicker"]["estimate"] > 0 and "fid" not in coarse and "kid" not in coarse
    assert any("no FID and no KID" in note for note in found["notes"])
    assert any("no FVD: it needs clips of at least 9 frames" in note for note in found["notes"])


def test_samples_have_vbenchs_names(finished):
    (samples,) = finished.glob("samples/low-*")
    assert sorted(path.name for path in samples.iterdir()) == sorted(f"{prompt}-0.mp4" for prompt in PROMPTS)
    with av.open(str(samples / "a cat runs-0.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    drawn = clips(finished, "low").permute(0, 1, 3, 4, 2).numpy().astype(int)
    off = min(np.abs(np.stack(frames) - clip).mean() for clip in drawn)
    assert np.shape(frames) == (5, 64, 80, 3) and off < 4  # H.264 is lossy


def test_the_report_moves(finished):
    page = (finished / "report.html").read_text()
    assert "Error of each frame" in page and "Seconds per clip" in page and "The worst clips" in page
    first = evaluation(finished)["worst"][0]["pictures"][AGAIN.name]
    exact = [
        np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(Image.open(finished / first))
    ]
    drawn = clips(finished, "full-precision-first-drawing").permute(0, 1, 3, 4, 2).numpy()
    assert any(np.array_equal(exact, clip) for clip in drawn)
    uris = re.findall(r'class="clip" src="data:image/webp;base64,([^"]+)"', page)
    assert len(uris) == len(PROMPTS)
    shown = Image.open(io.BytesIO(base64.b64decode(uris[0])))
    assert shown.n_frames == 5 and shown.size == (3 * 80 + 2 * 8, 64)
    shown.seek(3)
    assert np.abs(np.asarray(shown.convert("RGB"))[:, :80].astype(int) - exact[3]).mean() < 8


def test_what_is_scored_is_not_scored_again(monkeypatch, capsys, asked, finished):
    before = evaluation(finished)["rows"]
    measured = []
    monkeypatch.setattr(scoring, "_paired", lambda chunk: measured.append(chunk))
    code, _, error = run(monkeypatch, capsys, *asked, "-o", str(finished))
    assert code == 0, error
    after = evaluation(finished)["rows"]
    assert not measured
    assert all(after[name][key] == before[name][key] for name in before for key in ("summary", "frames"))


def test_a_reference_folder_is_for_pictures(monkeypatch, capsys, asked, tmp_path):
    for i in range(2):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / f"{i}.png")
    code, _, error = run(
        monkeypatch, capsys, *asked, "--reference", str(tmp_path), "-o", str(tmp_path / "run")
    )
    assert code == 1 and "reference folder is for FID and KID of pictures" in error and error.count("\n") == 1
    assert not list((tmp_path / "run").glob("pictures/*"))
