"""`--linears` on the command line."""

import json

import pytest

from dma_diffusers import quantize_linears, save_linears
from dma_diffusers.eval.quality.configurations import named, with_linears
from dma_diffusers.pipelines.linears import PROMPTS
from tests import tiny_pipelines
from tests.command_line import run
from tests.pipelines.saved_flux import CALL, save_flux


@pytest.fixture
def folder(tmp_path):
    return str(save_flux(tmp_path / "flux"))


def generated(monkeypatch, capsys, tmp_path, folder, *options: str) -> tuple[dict, bytes]:
    output = tmp_path / "out.png"
    code, printed, error = run(
        monkeypatch, capsys, "generate", "a cat", "-o", str(output), "--model", folder, "--json", *options
    )
    assert code == 0, error
    return json.loads(printed), output.read_bytes()


def formats_of(result: dict) -> set[tuple[str, ...]]:
    return {tuple(layer["formats"]) for layer in result["receipt"]["linears"] if layer["formats"]}


def test_generate_quantises_linears(monkeypatch, capsys, tmp_path, folder):
    stock, drawn = generated(monkeypatch, capsys, tmp_path, folder, "--preset", "exact")
    assert not stock["receipt"]["linears"]
    low, other = generated(monkeypatch, capsys, tmp_path, folder, "--preset", "exact", "--linears", "mxfp4")
    assert formats_of(low) == {("mxfp4",)}
    assert other != drawn
    compared, _ = generated(monkeypatch, capsys, tmp_path, folder, "--linears", "mxfp4", "--compare")
    assert compared["psnr_db"] < 60


def test_micromix_is_calibrated_on_built_in_prompts(monkeypatch, capsys, tmp_path, folder):
    from dma_diffusers.linears import quantise

    seen, real = [], quantise.run_prompts
    monkeypatch.setattr(
        quantise,
        "run_prompts",
        lambda pipe, prompts, *rest: seen.append(prompts) or real(pipe, prompts, *rest),
    )
    result, _ = generated(monkeypatch, capsys, tmp_path, folder, "--linears", "micromix")
    assert seen == [PROMPTS]
    assert formats_of(result)


def test_generate_loads_a_file(monkeypatch, capsys, tmp_path, folder):
    pipe = tiny_pipelines.flux()
    call = {name: value for name, value in CALL.items() if name != "guidance_scale"}
    quantize_linears(pipe, "micromix", calibration=["a cat"], call=call)
    save_linears(pipe, tmp_path / "mixed.safetensors")
    wanted = {
        tuple(m.groups.formats)
        for m in pipe.transformer.modules()
        if hasattr(m, "groups") and hasattr(m, "keeps")
    }
    path = str(tmp_path / "mixed.safetensors")
    result, drawn = generated(monkeypatch, capsys, tmp_path, folder, "--linears", path)
    assert formats_of(result) == wanted
    assert generated(monkeypatch, capsys, tmp_path, folder, "--linears", path)[1] == drawn


@pytest.mark.parametrize(
    ("linears", "message"),
    [("int4", "unknown linears 'int4'"), ("gone.safetensors", "there is no file gone.safetensors")],
)
def test_linears_that_do_not_exist_are_refused_in_one_line(
    monkeypatch, capsys, tmp_path, folder, linears, message
):
    monkeypatch.chdir(tmp_path)
    code, output, error = run(
        monkeypatch, capsys, "generate", "a cat", "-o", "out.png", "--model", folder, "--linears", linears
    )
    assert (code, output) == (1, "")
    assert error.splitlines()[-1].count(message) == 1
    assert not (tmp_path / "out.png").exists()


def test_a_file_that_is_none_is_refused_before_the_model_is_loaded(monkeypatch, capsys, tmp_path):
    (tmp_path / "text.safetensors").write_text("text")
    monkeypatch.chdir(tmp_path)
    for command in ("generate", "generate-video"):
        code, _, error = run(
            monkeypatch, capsys, command, "a cat", "-o", "out.png" if command == "generate" else "out.mp4",
            "--model", str(tmp_path / "no_model"), "--linears", "text.safetensors",
        )  # fmt: skip
        assert code == 1
        assert "text.safetensors is no safetensors file" in error.splitlines()[-1]


def test_jobs_of_a_batch_have_linears_of_their_own(monkeypatch, capsys, tmp_path, folder):
    jobs = tmp_path / "jobs.jsonl"
    entries = [{"linears": "mxfp4"}, {}, {"linears": "micromix"}, {"linears": "int4"}]
    lines = [
        {"prompt": "a cat", "preset": "exact", "model": folder, "output": f"{i}.png"} | e
        for i, e in enumerate(entries)
    ]
    jobs.write_text("\n".join(map(json.dumps, lines)))
    code, _, error = run(monkeypatch, capsys, "batch", str(jobs), "-o", str(tmp_path / "out"))
    assert code == 1 and "unknown linears 'int4'" in error
    pictures = [(tmp_path / "out" / f"{i}.png").read_bytes() for i in range(3)]
    assert len(set(pictures)) == 3
    # The second job draws with the stock layers, though the first one's were quantised.
    assert pictures[1] == generated(monkeypatch, capsys, tmp_path, folder, "--preset", "exact")[1]
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert "stock attention, linears mxfp4" in {result.get("config") for result in results}


def test_eval_gives_linears_to_configurations_that_do_not_say():
    configurations = with_linears(named(["exact", "low=nvfp4", "linears=int8,window=384"]), "mxfp4")
    assert [config.linears for config in configurations.values()] == ["mxfp4", "mxfp4", "int8"]


def test_eval_of_attention_takes_no_linears(monkeypatch, capsys, tmp_path, folder):
    code, _, error = run(
        monkeypatch,
        capsys,
        "eval",
        "-o",
        str(tmp_path / "e"),
        "--attention",
        "--linears",
        "fp8",
        "--model",
        folder,
    )
    assert code == 1 and "--attention measures attention alone" in error
