"""`dma-diffusers finetune` on the command line."""

import importlib.util
import json

import pytest

from tests.command_line import run
from tests.pipelines.saved_flux import save_flux


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("finetune")
    save_flux(made / "flux")
    (made / "prompts.txt").write_text("a cat\na dog\n")
    return made


def test_a_run_is_said_in_a_line_and_resumed(monkeypatch, capsys, folder, tmp_path):
    asked = (
        "finetune",
        str(folder / "flux"),
        "-o",
        str(tmp_path / "out"),
        "--prompts",
        str(folder / "prompts.txt"),
    )
    options = (
        "--linears",
        "qat",
        "--attention",
        "low=mxfp4,window=0,sink=0",
        "--batch",
        "2",
        "--decay",
        "0.5",
    )
    code, printed, error = run(monkeypatch, capsys, *asked, *options, "--steps", "2", "--json")
    assert code == 0, error
    assert json.loads(printed)["steps"] == 2
    code, printed, error = run(monkeypatch, capsys, *asked, *options, "--steps", "3")
    assert code == 1 and "steps was 2, now 3" in error  # the learning rate falls towards the last step
    code, printed, error = run(monkeypatch, capsys, *asked, *options, "--steps", "2")
    assert code == 0 and "transformer: 2 steps, loss " in printed


@pytest.mark.parametrize(("options", "message"), [
    ((), "give --prompts, to distil from full precision, or --data"),
    (("--prompts", "{prompts}", "--data", "."), "give --prompts, to distil from full precision, or --data"),
    (("--data", "{empty}", "--linears", "qat"), "holds no pictures"),
    (("--prompts", "{prompts}", "--linears", "qat", "--tensorboard"), "this command needs tensorboard: pip install"),
    (("--prompts", "{prompts}", "--attention", "low=mxfp5"), "configuration 'low=mxfp5'"),
])  # fmt: skip
def test_bad_input_is_one_line(monkeypatch, capsys, folder, tmp_path, options, message):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else found(name)
    )
    given = [option.format(prompts=folder / "prompts.txt", empty=tmp_path) for option in options]
    code, _, error = run(
        monkeypatch, capsys, "finetune", str(folder / "flux"), "-o", str(tmp_path / "out"), *given
    )
    assert code == 1 and message in error and len(error.strip().splitlines()) == 1
