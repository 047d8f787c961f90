"""`dma-diffusers simulate` as a user meets it."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from dma_diffusers.eval.simulator.count import Count
from dma_diffusers.eval.simulator.plot import classes, classes_of
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.neighborhood import neighborhood
from dma_diffusers.kernels.tiling.policies import parse
from dma_diffusers.kernels.tiling.precision_map import Class
from tests.command_line import ROOT, run

FLUX = (
    "--grid",
    "256x256",
    "--window",
    "80x80",
    "--stride",
    "16x16",
    "--q-tile",
    "16x16",
    "--kv-tile",
    "16x8",
)


def test_json_is_all_of_standard_output(monkeypatch, capsys):
    code, output, error = run(monkeypatch, capsys, "simulate", *FLUX, "--attention-share", ".518", "--json")
    assert (code, error) == (0, "")
    found = json.loads(output)
    assert (found["tiles_all"], found["tiles_worst"], found["tiles_mean"]) == (512, 50, 50)
    assert found["speedup_worst"] == found["speedup_mean"] == 10.24
    assert found["end_to_end"] == pytest.approx(1.88, abs=0.02)
    assert "not of seconds" in found["counts"] and found["notes"] == []


def test_the_table(monkeypatch, capsys):
    arguments = ("--attention-share", "0.518", "--dense-steps", "9/28", "--text", "512", "--causal", "0x1")
    code, output, _ = run(monkeypatch, capsys, "simulate", *FLUX, *arguments)
    assert code == 0
    assert re.search(r"KV tiles in all +516", output) and re.search(r"end to end .* 1\.\d\d\b", output)
    assert "Speed-ups are of tiles counted, not of seconds." in output


def test_without_an_attention_share_there_is_no_end_to_end(monkeypatch, capsys):
    _, output, _ = run(monkeypatch, capsys, "simulate", *FLUX, "--json")
    assert json.loads(output)["end_to_end"] is None
    _, output, _ = run(monkeypatch, capsys, "simulate", *FLUX)
    assert "end to end" not in output


KERNEL_TILES = FLUX[:6]


def test_predicted_times(monkeypatch, capsys):
    arguments = ("simulate", *KERNEL_TILES, "--gpu", "h200", "--attention-share", ".518")
    code, table, _ = run(monkeypatch, capsys, *arguments)
    assert code == 0
    assert "H200, 24 heads × 128, quantisation included" in table
    assert "Times are predicted by a model that is within 15% of all times measured on an H200." in table
    _, output, _ = run(monkeypatch, capsys, *arguments, "--json")
    found = json.loads(output)["prediction"]
    assert found["speedup"] == pytest.approx(found["full_precision_ms"] / found["ms"])
    assert found["end_to_end"] == pytest.approx(1 / (1 - 0.518 * (1 - 1 / found["speedup"])))
    assert re.search(
        rf"this, bf16\|int8 +{found['ms']:.3f} ",
        run(monkeypatch, capsys, *arguments)[1],
    )


def test_times_of_another_gpu_are_called_what_they_are(monkeypatch, capsys):
    arguments = (
        "simulate",
        *KERNEL_TILES,
        "--gpu",
        "b200",
        "--low",
        "nvfp4",
        "--heads",
        "48",
        "--head-dim",
        "64",
    )
    _, output, _ = run(monkeypatch, capsys, *arguments)
    assert "B200, 48 heads × 64" in output and "mxfp8|nvfp4" in output
    assert "Times are predicted, not measured on any B200." in output


def test_proposals_have_times(monkeypatch, capsys):
    arguments = ("simulate", "--grid", "256x256", "--search", "--gpu", "h200")
    _, output, _ = run(monkeypatch, capsys, *arguments)
    assert "ms on H200" in output and "Times are predicted" in output


def test_the_cost_of_a_policy(monkeypatch, capsys):
    words = "neighborhood(window=80x80, stride=16x16)"
    arguments = ("simulate", "--grid", "256x256", "--gpu", "h200", "--attention-share", ".518")
    _, output, _ = run(monkeypatch, capsys, *arguments, "--policy", words, "--json")
    _, of_windows, _ = run(monkeypatch, capsys, *arguments, *KERNEL_TILES[2:], "--json")
    found = json.loads(output)
    assert found["prediction"] == json.loads(of_windows)["prediction"]
    assert (found["policy"], found["high"], found["low"]) == (words, 0, pytest.approx(50 / 512))
    assert found["cost"] == pytest.approx(50 / 512 * 2048 / 3072)
    _, output, _ = run(monkeypatch, capsys, *arguments, "--policy", words)
    assert re.search(r"pairs of tiles SKIP +90\.2%", output) and "Times are predicted" in output


def test_pairs_that_the_softmax_leaves_out(monkeypatch, capsys):
    arguments = (
        "simulate",
        "--grid",
        "64x64",
        "--gpu",
        "h200",
        "--policy",
        "skip_softmax(threshold=0.001)",
        "--json",
    )
    _, none, _ = run(monkeypatch, capsys, *arguments)
    _, half, _ = run(monkeypatch, capsys, *arguments, "--left-out", ".5")
    none, half = json.loads(none), json.loads(half)
    assert half["cost"] == pytest.approx(none["cost"] * (1 + 512 / 2048) / 2)
    assert half["prediction"]["ms"] < none["prediction"]["ms"]


def test_the_cost_of_means(monkeypatch, capsys):
    """FLUX's 512 tiles at 4096²: 50 are visited, and 16 tiles of means are walked for the others."""
    words = "neighborhood(window=80x80, stride=16x16, beyond=mean)"
    arguments = ("simulate", "--grid", "256x256", "--gpu", "h200", "--policy", words)
    found = json.loads(run(monkeypatch, capsys, *arguments, "--json")[1])
    shares = found["high"], found["low"], found["mean"], found["skip"]
    assert shares == pytest.approx((0, 50 / 512, 462 / 512, 0))
    assert found["cost"] == pytest.approx((50 * 2048 + 16 * 2048) / 512 / 3072)
    _, table, _ = run(monkeypatch, capsys, *arguments)
    assert re.search(r"pairs of tiles MEAN +90\.2%", table)
    assert (
        "Times are predicted by a model that is within 4 % of the kernel with MEAN tiles on an H200." in table
    )
    _, skipped, _ = run(monkeypatch, capsys, *arguments[:-1], words.replace(", beyond=mean", ""), "--json")
    assert 1 < found["prediction"]["ms"] / json.loads(skipped)["prediction"]["ms"] < 1.3


def test_the_cost_of_a_schedule_is_its_mean_over_the_steps(monkeypatch, capsys):
    """HunyuanVideo's schedule, of which 15 of 50 steps lie above .945."""
    grid, near = ("--grid", "30x48x80", "--gpu", "b200"), "neighborhood(window=18x24x24, stride=16x8x8)"
    schedule = f"sigma>0.945: dense(); sigma>0.5: {near} low=nvfp4; {near}"
    arguments = (
        "simulate", *grid, "--schedule", schedule, "--steps", "50", "--shift", "7", "--attention-share", ".5"
    )  # fmt: skip
    code, output, error = run(monkeypatch, capsys, *arguments, "--json")
    assert (code, error) == (0, "")
    found = json.loads(output)
    levels = [7 * t / (1 + 6 * t) for t in (1 - step / 50 for step in range(50))]
    assert found["levels"] == pytest.approx(levels) and levels[14] > 0.945 > levels[15]
    of_entries = [sum(a < level <= b for level in levels) for a, b in ((0.945, 1), (0.5, 0.945), (-1, 0.5))]
    assert [entry["steps"] for entry in found["entries"]] == of_entries and of_entries[0] == 15
    alone = [
        json.loads(run(monkeypatch, capsys, "simulate", *grid, "--policy", policy, *low, "--json")[1])
        for policy, low in (("dense()", ()), (near, ("--low", "nvfp4")), (near, ()))
    ]
    for of in (lambda one: one["cost"], lambda one: one["high"], lambda one: one["prediction"]["ms"]):
        mean = sum(steps * of(one) for steps, one in zip(of_entries, alone, strict=True)) / 50
        assert of(found) == pytest.approx(mean)
    prediction = found["prediction"]
    assert prediction["speedup"] == pytest.approx(prediction["full_precision_ms"] / prediction["ms"])
    assert prediction["end_to_end"] == pytest.approx(1 / (0.5 + 0.5 / prediction["speedup"]))
    _, table, _ = run(monkeypatch, capsys, *arguments)
    assert re.search(r"dense\(everywhere=high\), 15 of 50 steps: cost +0\.875", table)
    assert re.search(rf"cost, dense bf16 in our kernel being 1 +{found['cost']:.3f}", table)


def test_a_schedule_with_means_says_what_was_measured(monkeypatch, capsys):
    schedule = "sigma>0.5: dense(); importance(budget=0.05, low=0.1, beyond=mean, by=pools)"
    arguments = ("simulate", "--grid", "64x64", "--gpu", "h200", "--schedule", schedule, "--steps", "8")
    _, table, _ = run(monkeypatch, capsys, *arguments)
    assert (
        "Times are predicted by a model that is within 4 % of the kernel with MEAN tiles on an H200." in table
    )


def test_the_picture_of_a_policy_shows_its_classes(monkeypatch, capsys, tmp_path):
    layout = Layout(40 * 128, 40 * 128, (0, 128), (39, 8, 16))
    near = parse("neighborhood(window=9x8x16, stride=1x8x16, high=3x8x16, beyond=mean)")
    drawn = classes_of(near, layout)
    inner, row = drawn[1:, 1:], drawn[20, 1:]
    assert (drawn[0] == Class.HIGH).all() and (drawn[:, 0] == Class.HIGH).all()
    assert [(row == one).sum() for one in Class] == [3, 6, 30, 0] and (inner != Class.SKIP).all()
    by_content = classes_of(parse("importance(budget=0.1, low=0.1, beyond=mean)"), layout)
    assert (by_content[1:, 1:] == len(Class)).all() and (by_content[0] == Class.HIGH).all()
    arguments = ("simulate", "--grid", "39x8x16", "--text", "128", "--gpu", "h200", "--policy", str(near))
    code, _, error = run(monkeypatch, capsys, *arguments, "--plot", str(tmp_path / "map.svg"))
    assert code == 0, error
    legend = "".join(ElementTree.parse(tmp_path / "map.svg").getroot().itertext())
    assert all(word in legend for word in ("HIGH", "LOW", "MEAN", "beyond=mean")) and "SKIP" not in legend


def test_without_a_gpu_there_are_no_times(monkeypatch, capsys):
    _, output, _ = run(monkeypatch, capsys, "simulate", *FLUX, "--json")
    assert json.loads(output)["prediction"] is None


def test_notes_on_windows_and_boxes(monkeypatch, capsys):
    arguments = ("--grid", "21x45x80", "--window", "30x24x24", "--q-tile", "1x8x16", "--kv-tile", "2x8x8")
    _, output, _ = run(monkeypatch, capsys, "simulate", *arguments)
    assert "note: window 30 in dimension 1 was clamped to the grid's 21\n" in output
    assert "note: KV tiles of 2×8×8 pad the grid by 12%, 1×8×16 by 7%\n" in output


def test_search(monkeypatch, capsys):
    arguments = ("simulate", "--grid", "256x256", "--search", "--cost", "0.05")
    _, output, _ = run(monkeypatch, capsys, *arguments, "--json")
    candidates = json.loads(output)["candidates"]
    assert candidates and all(found["cost"] <= 0.05 for found in candidates)
    _, output, _ = run(monkeypatch, capsys, *arguments, "--attention-share", ".5")
    first = candidates[0]
    assert (
        f"{first['window'][0]}×{first['window'][1]}" in output and f"{first['speedup_worst']:.2f}" in output
    )


def test_the_picture(monkeypatch, capsys, tmp_path):
    for name in ("map.svg", "again.svg", "map.png"):
        code, _, error = run(
            monkeypatch, capsys, "simulate", *FLUX, "--text", "64", "--plot", str(tmp_path / name)
        )
        assert code == 0, error
    assert (tmp_path / "map.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    assert ElementTree.parse(tmp_path / "map.svg").getroot().tag.endswith("svg")
    assert np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).std() > 10


def test_the_picture_shows_what_was_counted():
    count = Count(neighborhood((20, 30), (9, 12), (2, 4))[0], (4, 8), (4, 8), text=40)
    drawn = classes(count)
    assert drawn.shape == (20 + 2, count.all)
    skipped, cut, filled, text = (drawn == number for number in range(4))
    assert (~skipped).sum(-1).double().mean().item() == pytest.approx(count.mean)
    assert (~skipped[:20]).sum(-1).max() == count.worst
    assert (cut.sum() / (cut | filled).sum()).item() == pytest.approx(count.cut)
    assert text[20:].all() and text[:, 20:].all() and not text[:20, :20].any()


@pytest.mark.parametrize(("arguments", "words"), [
    (("--grid", "256x256"), "give --window, such as 80x80, or --search"),
    (("--grid", "256x", "--search"), "--grid '256x': give one number for each dimension"),
    (("--grid", "0x8", "--search"), "0 is not in 1 … 1048576"),
    (("--grid", "99999999999", "--search"), "99999999999 is not in"),
    (("--grid", "8x8x8x8", "--search"), "1 to 3 dimensions, got 4"),
    (("--grid", "64x64", "--window", "9"), "window 9 is 1-D, but grid 64×64 is 2-D"),
    (("--grid", "64x64", "--window", "9x9", "--stride", "9x10"), "stride 10 exceeds window 9"),
    (("--grid", "64x64", "--window", "9x9", "--dilation", "8x1"), "dilation 8 × window 9 = 72 exceeds length 64"),
    (("--grid", "64x64", "--dilation", "80x1", "--search"), "dilation 80 × window 1 = 80 exceeds length 64"),
    (("--grid", "64x64", "--dilation", "2", "--search"), "dilation 2 is 1-D"),
    (("--grid", "64x64", "--window", "9x9", "--q-tile", "8"), "Q tile 8 is 1-D"),
    (("--grid", "64x64", "--kv-tile", "8", "--search"), "Q tile 8 is 1-D"),
    (("--grid", "64x64", "--window", "9x9", "--causal", "2x0"), "--causal 2x0: 2 is not in 0 … 1"),
    (("--grid", "64x64", "--window", "9x9", "--text", "-1"), "text must be 0 tokens or more, got -1"),
    (("--grid", "64x64", "--window", "9x9", "--attention-share", "2"), "attention share must lie between 0 and 1"),
    (("--grid", "64x64", "--window", "9x9", "--dense-steps", "9/28"), "--dense-steps needs --attention-share"),
    (("--grid", "64x64", "--window", "9x9", "--attention-share", ".5", "--dense-steps", "9"), "give K/N"),
    (("--grid", "64x64", "--window", "9x9", "--attention-share", ".5", "--dense-steps", "9/8"), "0 ≤ K ≤ N"),
    (("--grid", "64x64", "--window", "9x9", "--cost", ".5"), "--cost is for --search"),
    ((*FLUX, "--gpu", "b100"), "unknown GPU 'b100': choose from h100, h200, b200, b300"),
    ((*FLUX, "--gpu", "h200"), "times are predicted for the kernel's tiles, of 128 tokens, got 16×16"),
    ((*FLUX[:6], "--gpu", "h200", "--low", "fp3"), "fp3"),
    (("--grid", "8x8", "--policy", "dense()"), "--policy says all of the map: give it --grid, --text and --gpu"),
    ((*FLUX, "--gpu", "h200", "--policy", "dense()"), "--policy says all of the map"),
    (("--grid", "8x8", "--gpu", "h200", "--policy", "sparse()"), "'sparse()' is no policy"),
    ((*FLUX, "--left-out", ".5"), "--left-out is for --policy"),
    (("--grid", "8x8", "--gpu", "h200", "--policy", "dense()", "--left-out", ".5"), "leaves out no pairs"),
    ((*FLUX, "--steps", "9"), "--steps and --shift are for --schedule"),
    (("--grid", "8x8", "--schedule", "dense()"), "--schedule says all of the map: give it --grid, --text and --gpu"),
    (("--grid", "8x8", "--gpu", "h200", "--schedule", "dense()"), "--schedule needs --steps"),
    (("--grid", "8x8", "--gpu", "h200", "--schedule", "dense()", "--steps", "4", "--shift", "0"), "a shift over 0"),
    (("--grid", "8x8", "--gpu", "h200", "--schedule", "dense()", "--policy", "dense()"), "give one of them"),
    (("--grid", "8x8", "--gpu", "h200", "--schedule", "sigma>0.9: dense()", "--steps", "4"), "nothing holds from"),
    (("--grid", "8x8", "--gpu", "h200", "--schedule", "dense()", "--steps", "4", "--plot", "map.svg"), "draws one map"),
    (("--grid", "8x8", "--gpu", "h200", "--schedule", "dense()", "--steps", "4", "--attention-share", ".5",
      "--dense-steps", "1/4"), "make them an entry of that"),
    ((*FLUX, "--low", "int8"), "--high and --low are for predicted times: add --gpu"),
    (("--grid", "64x64", "--search", "--cost", "0"), "cost must be over 0"),
    (("--grid", "64x64", "--search", "--cost", ".00001"), "the cheapest one found costs"),
    (("--grid", "64x64", "--window", "9x9", "--plot", "map.pdf"), "ends in .svg or .png"),
    (("--grid", "64x64", "--window", "9x9", "--plot", "/no/such/folder/map.svg"), "there is no folder"),
    (("--grid", "1024x1024", "--window", "9x9", "--plot", "map.svg"), "too large to draw"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, words):
    code, output, error = run(monkeypatch, capsys, "simulate", *arguments)
    assert (code, output, error.count("\n")) == (1, "", 1)
    assert error.startswith("error: ") and words in error
    assert not list(ROOT.glob("map.*"))
