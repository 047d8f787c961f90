"""A study of the demo: its files, what they say, and what calibration makes of them."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import DDPMPipeline

from dma_diffusers import DMAConfig
from dma_diffusers.eval.recordings.record import record
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.eval.study import recommend, write
from dma_diffusers.eval.study.linears import Sample, measure, samples
from dma_diffusers.eval.study.options import Options, Variant
from dma_diffusers.eval.study.plots import medians
from dma_diffusers.eval.study.study import study
from dma_diffusers.pipelines.load import load_pipeline, recommended_call
from tests.command_line import run

FORMATS = ("int8", "mxfp8", "mxint8", "mxfp4", "nvint4", "fp8")
ROTATIONS = ("none", "hadamard32")
PROMPTS = ["a red apple left of a cat", "a blue car above a tree", "two dogs"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    pipe = load_pipeline()
    call = recommended_call() | {"num_inference_steps": 2, "height": 128, "width": 128}
    folder = tmp_path_factory.mktemp("recordings")
    recordings = record(pipe, PROMPTS, folder, call, steps=2, modules=[0, 2])
    taken = [s for s in samples(pipe, recordings, call) if ".0.ff.net" in s.layer]
    return pipe, recordings, taken


@pytest.fixture(scope="module")
def found(parts):
    _, recordings, taken = parts
    return study(recordings, Options(FORMATS, ROTATIONS), taken, device="cpu")


@pytest.fixture(scope="module")
def document(parts, found):
    return write.document(found, parts[1], Options(FORMATS, ROTATIONS), "dma-diffusers study")


def test_every_layer_step_and_variant_has_a_row(parts, document):
    _, recordings, taken = parts
    rows = document["rows"]
    layers = {*recordings.modules, *(sample.layer for sample in taken)}
    assert len(layers) == 4
    assert {row["layer"] for row in rows} == layers
    assert {(row["step"], row["sigma"]) for row in rows} == {(r.step, r.sigma) for r in recordings}
    # Six formats × two rotations × with and without the mean: k, qk and v; q; p with its unsigned ones; pairs.
    of_attention = [row for row in rows if row["layer"] == recordings.modules[0] and row["step"] == 0]
    assert len(of_attention) == 3 * 6 * 2 * 2 + 6 * 2 + (6 + 3) + 6 * (1 + 5)
    of_linear = [row for row in rows if row["layer"] == taken[0].layer and row["step"] == 0]
    assert len(of_linear) == 6 * 2
    keys = [tuple(row[name] for name in ("layer", "step", *Variant._fields)) for row in rows]
    assert len(set(keys)) == len(keys)


def test_theory_predicts_real_tensors(document):
    of_parts = medians(document["rows"])
    assert of_parts.keys() == {"q", "k", "v", "p", "linear", "all"}
    for part in ("q", "k", "v", "linear", "all"):
        assert of_parts[part] < 1


def test_intervals_are_over_prompts(found, document):
    variant = Variant("qk", "mxfp4", "hadamard32", True)
    row = next(r for r in document["summary"] if tuple(r[n] for n in Variant._fields) == variant)
    values = found.of_prompts(variant, "relative_l2")
    assert len(values) == 3 == len(set(values))
    estimate, low, high = row["relative_l2"]
    assert estimate == pytest.approx(np.mean(values)) and (low, high) == (min(values), max(values))
    rows = [r["relative_l2"] for r in document["rows"] if tuple(r[n] for n in Variant._fields) == variant]
    assert np.mean(rows) == pytest.approx(estimate)


def test_recommendations_are_the_least_errors(document):
    rows = document["rows"]
    for each in document["recommended"]:
        of_layer = {}
        for row in rows:
            if (row["layer"], row["part"]) == (each["layer"], each["part"]) and row[
                "relative_l2"
            ] is not None:
                bits = {"int8": 8, "mxfp8": 8, "mxint8": 8, "fp8": 8, "uint8": 8, "mxuint8": 8}.get(
                    row["format"], 4
                )
                if bits == each["bits"]:
                    key = row["format"], row["rotation"], row["smooth"]
                    of_layer.setdefault(key, []).append(row["relative_l2"])
        means = {key: np.mean(errors) for key, errors in of_layer.items()}
        assert each["relative_l2"] == pytest.approx(min(means.values()))
        usual = means[each["usual"], "none", each["part"] == "qk"]
        assert each["gain"] == pytest.approx(usual / min(means.values())) and each["gain"] >= 1
    assert {each["bits"] for each in document["recommended"]} == {4, 8}
    assert len(recommend.table(document)) == len(document["recommended"]) == 2 * (2 * 3 + 2)


def test_linear_layers_against_their_own_products(parts):
    sample = parts[2][0]
    one = Sample(0, 0, "layer", sample.rows, sample.weight)
    _, sums, _ = next(measure([one], Options(("int8",)), lambda *_: None))
    x, w = (tensor.double().numpy() for tensor in (sample.rows, sample.weight))
    rounded = [np.rint(a / (s := np.abs(a).max(1, keepdims=True) / 127)) * s for a in (x, w)]
    exact = x @ w.T
    expected = np.linalg.norm(rounded[0] @ rounded[1].T - exact) / np.linalg.norm(exact)
    assert sums[Variant("linear", "int8")].relative_l2 == pytest.approx(expected, rel=1e-2)


def test_files(document, tmp_path):
    write.save(document, tmp_path / "new")
    assert recommend.read(tmp_path / "new" / "study.json") == json.loads(json.dumps(document))
    table = list(csv.DictReader(io.StringIO((tmp_path / "new" / "study.csv").read_text())))
    assert len(table) == len(document["rows"])
    assert float(table[7]["relative_l2"] or 0) == (document["rows"][7]["relative_l2"] or 0)
    page = (tmp_path / "new" / "study.html").read_text()
    for title in ("Crossovers", "Crest factors", "Measured and predicted", "Q and K", "Layer by layer"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("<svg") == 10 and "http://" not in page.replace("http://www.w3.org", "")


def test_calibration_chooses_from_what_no_other_precision_beats(document):
    on_hopper = recommend.pairs(document, "sm_90")
    assert on_hopper == [("bf16/bf16", "int8/bf16"), ("bf16/bf16", "int8/fp8"), ("int8/bf16", "int8/fp8")]
    on_blackwell = recommend.pairs(document, "sm_100")
    assert ("bf16/bf16", "mxfp4/fp8") in on_blackwell
    assert recommend.rotation(document, on_blackwell) == "hadamard32"
    assert recommend.rotation(document, [("bf16/bf16", "nothing/fp8")]) == "none"
    assert all("nvint4" not in words for pair in on_blackwell for words in pair)  # no kernel multiplies it


def test_calibration_refuses_other_files_and_models(document, parts, tmp_path):
    (tmp_path / "other.json").write_text('{"format": "something"}')
    with pytest.raises(ValueError, match=r"other.json is not a file that `dma-diffusers study` wrote"):
        recommend.read(tmp_path / "other.json")
    recommend.check_model(document, parts[0])
    changed = document | {"settings": {"model": {"class": "WanTransformer3DModel"}}}
    with pytest.raises(
        ValueError, match="of a WanTransformer3DModel, the pipeline has a FluxTransformer2DModel"
    ):
        recommend.check_model(changed, parts[0])


def test_a_study_needs_recordings():
    with pytest.raises(ValueError, match="there are no recordings in nowhere"):
        study(Recordings(Path("nowhere"), {}), Options())


def test_the_commands(monkeypatch, capsys, tmp_path):
    """A study, and a calibration that takes it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    drawn = ["--prompts", str(prompts), "--count", "1", "--recorded", "1", "--steps", "1", "--size", "64"]
    formats = ["--format", "mxfp8", "--format", "mxfp4", "--rotation", "hadamard32", "--rotation", "none"]
    status, output, error = run(
        monkeypatch, capsys, "study", "demo", "-o", str(tmp_path / "out"), *drawn, *formats, "--no-linears"
    )
    assert (status, error) == (0, "") and "mxfp4" in output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(write.NAMES)
    status, output, error = run(
        monkeypatch, capsys, "calibrate", "demo", "-o", str(tmp_path / "policy.json"), *drawn,
        "--study", str(tmp_path / "out" / "study.json"), "--target", "sm_100", "--json",
    )  # fmt: skip
    assert (status, error) == (0, "")
    policy, studied = json.loads(output), recommend.read(tmp_path / "out" / "study.json")
    assert policy["evidence"]["formats"] == [list(pair) for pair in recommend.pairs(studied, "sm_100")]
    assert policy["evidence"]["rotation"] == "hadamard32"
    assert DMAConfig.from_file(tmp_path / "policy.json").rotation == "hadamard32"


@pytest.mark.parametrize(("arguments", "message"), [
    (("--format", "mxfp5"), "unknown format 'mxfp5': choose from"),
    (("--rotation", "hadamard8"), "unknown rotation 'hadamard8': choose from"),
])  # fmt: skip
def test_what_a_user_got_wrong_is_one_line(arguments, message, monkeypatch, capsys, tmp_path):
    status, output, error = run(monkeypatch, capsys, "study", "-o", str(tmp_path / "out"), *arguments)
    assert (status, output, error.count("\n")) == (1, "", 1) and message in error


def test_an_output_is_needed(monkeypatch, capsys):
    status, _, error = run(monkeypatch, capsys, "study")
    assert status == 1 and error.startswith("error: give --output, a folder")


def test_a_pipeline_without_a_transformer_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "dma_diffusers.pipelines.load.load_pipeline", lambda *_, **__: DDPMPipeline(None, None)
    )
    status, output, error = run(monkeypatch, capsys, "study", "-o", str(tmp_path / "out"), "--count", "1")
    assert (status, output, error) == (1, "", "error: DDPMPipeline has no transformer\n")
