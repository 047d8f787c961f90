"""Linear layers on the command line: `calibrate --linears`, and evaluations that know a file by its content."""

import json

import pytest

from dma_diffusers import DMAConfig, apply, report
from dma_diffusers.eval.quality.configurations import Row
from dma_diffusers.eval.quality.evaluate import identity_of_row
from dma_diffusers.pipelines.load import load_pipeline
from tests.command_line import run
from tests.pipelines.saved_flux import save_flux


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def arguments(model, tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a cat\ntwo dogs\na house\n")
    return ["calibrate", str(model), "--prompts", str(prompts), "--count", "1", "--recorded", "1",
            "--target", "sm_100", "--formats", "mxfp8|mxfp4"]  # fmt: skip


def test_calibrate_chooses_linears_too(model, arguments, tmp_path, monkeypatch, capsys):
    policy, plot = tmp_path / "policy.json", tmp_path / "bits.svg"
    options = ["-o", str(policy), "--quality", "0", "--linears", "--bits-plot", str(plot)]
    code, output, error = run(monkeypatch, capsys, *arguments, *options)
    assert code == 0, error
    assert "linears' bits" in output
    document = json.loads(policy.read_text())
    ends = document["choices"][0], document["choices"][-1]
    assert ends[0]["config"]["linears"] == "policy-0.safetensors" and "linears" not in ends[1]["config"]
    assert ends[0]["evidence"]["bits_of_linears"] < ends[1]["evidence"]["bits_of_linears"] == 16
    chosen = {name: groups for name, groups in ends[0]["evidence"]["linears"].items() if groups}
    assert json.loads(plot.with_suffix(".json").read_text())["stability"]["all"]["inputs"] > 0

    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("policy.json", "policy-0.safetensors"):
        (tmp_path / name).rename(moved / name)
    pipe = load_pipeline(model)
    apply(pipe, DMAConfig.from_file(moved / "policy.json"))
    receipts = {receipt.module: receipt for receipt in report(pipe).linears if receipt.formats}
    assert {name: dict(zip(r.formats, r.widths, strict=True)) for name, r in receipts.items()} == chosen


@pytest.mark.parametrize(("options", "words"), [
    (["--bits-plot", "bits.svg"], "give --linears too"),
    (["--bits-plot", "bits.png", "--linears"], "name a file that ends in .svg"),
])  # fmt: skip
def test_what_calibrate_refuses(arguments, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    code, _, error = run(monkeypatch, capsys, *arguments, "-o", "policy.json", *options)
    assert code == 1 and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_pictures_follow_the_content_of_a_file_of_linears(tmp_path):
    file = tmp_path / "linears.safetensors"
    row = Row("it", config=DMAConfig.preset("exact", linears=str(file)))
    found = []
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        found.append(identity_of_row(row))
    assert found[0] == found[2] != found[1]
    assert identity_of_row(Row("it", config=DMAConfig.preset("exact", linears="fp8"))) != found[0]
