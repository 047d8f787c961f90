"""Test that LoRAs change what is drawn by their weights, count as settings, and are refused on other models."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict

from dma_diffusers.fingerprint import fingerprint
from dma_diffusers.pipelines.jobs import read_jobs
from dma_diffusers.pipelines.load import load_pipeline
from dma_diffusers.pipelines.loras import Lora, add, parse
from dma_diffusers.pipelines.tasks import tasks_of
from tests.command_line import run
from tests.pipelines.saved_flux import save_flux
from tests.tiny_pipelines import cogvideox, draw, flux, sd3, wan


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A LoRA for the tiny FLUX."""
    torch.manual_seed(1)
    return saved(flux(), tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


def saved(pipe, folder):
    targets = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.transformer.add_adapter(targets)
    FluxPipeline.save_lora_weights(
        folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer)
    )
    return folder / "pytorch_lora_weights.safetensors"


def latents(*loras: Lora) -> torch.Tensor:
    pipe = flux()
    add(pipe, loras)
    return draw(pipe)


def test_weights_scale_what_a_lora_changes(file):
    plain = latents()
    whole, half = latents(parse(str(file))), latents(parse(f"{file}:0.5"))
    assert not torch.allclose(whole, plain) and not torch.allclose(half, whole)
    assert torch.equal(latents(parse(f"{file}:0")), plain)
    torch.testing.assert_close(latents(Lora(file, 0.25), Lora(file, 0.25)), half)


def test_the_base_keeps_its_fingerprint(file):
    pipe = flux()
    add(pipe, [Lora(file)])
    assert fingerprint(pipe.transformer) == fingerprint(flux().transformer)


@pytest.mark.parametrize("make", [wan, sd3, cogvideox, lambda: flux(num_attention_heads=4)])
def test_a_lora_of_another_model_is_refused(file, make):
    pipe = make()
    with pytest.raises(ValueError, match=f"is no LoRA for this {type(pipe).__name__}: ") as error:
        add(pipe, [Lora(file)])
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_pipeline_that_takes_none(file):
    add(SimpleNamespace(), [])
    with pytest.raises(ValueError, match=f"SimpleNamespace takes no LoRA: leave {file} out"):
        add(SimpleNamespace(), [Lora(file)])


def test_without_peft(file, monkeypatch):
    monkeypatch.setattr("dma_diffusers.pipelines.loras.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="LoRA needs peft: pip install peft"):
        add(flux(), [Lora(file)])


def test_words(file, tmp_path):
    assert parse(str(file)) == Lora(file, 1.0) and parse(f"{file}:-0.8") == Lora(file, -0.8)
    assert parse(f"{file.name}:2", file.parent) == Lora(file, 2.0)
    with pytest.raises(
        FileNotFoundError, match=r"there is no LoRA file .*gone\.safetensors: give FILE or FILE:weight"
    ):
        parse("gone.safetensors:0.5", tmp_path)
    (tmp_path / "no.safetensors").write_bytes(b"no lora at all")
    with pytest.raises(ValueError, match=r"no\.safetensors is no safetensors file"):
        parse("no.safetensors", tmp_path)


def test_jobs_have_loras_of_their_own(file, model, tmp_path):
    (tmp_path / "near.safetensors").write_bytes(file.read_bytes())
    loras = [
        None,
        str(file),
        "near.safetensors",
        "near.safetensors:0.5",
        [str(file), "near.safetensors"],
        "gone",
    ]
    lines = [json.dumps({"prompt": "a cat", "model": str(model), "lora": lora}) for lora in loras]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    tasks, (failure,) = tasks_of(read_jobs(tmp_path / "jobs.jsonl", {})[0])
    assert failure.where == "line 6" and "there is no LoRA file" in failure.error
    plain, whole, near, half, both = (
        task.settings for task in sorted(tasks, key=lambda task: task.job.number)
    )
    assert whole == near and len({plain, whole, half, both}) == 4


def test_commands_take_them(monkeypatch, capsys, file, model, tmp_path):
    """One picture, and a batch, whose options are for jobs that have none of their own."""
    common = ("--model", str(model), "--preset", "exact")
    for name, options in {"plain": (), "half": ("--lora", f"{file}:0.5")}.items():
        output = tmp_path / f"{name}.png"
        code, _, error = run(monkeypatch, capsys, "generate", "a cat", *common, *options, "-o", str(output))
        assert code == 0, error
    entries = [{"output": "half.png"}, {"output": "none.png", "lora": f"{file}:0"}]
    (tmp_path / "jobs.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a cat"} | entry) for entry in entries)
    )
    jobs = ("batch", str(tmp_path / "jobs.jsonl"), "-o", str(tmp_path / "out"))
    code, _, error = run(monkeypatch, capsys, *jobs, *common, "--lora", f"{file}:0.5")
    assert code == 0, error
    drawn = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert drawn["half"] == (tmp_path / "half.png").read_bytes() != drawn["none"]
    assert drawn["none"] == (tmp_path / "plain.png").read_bytes()


def test_a_pipeline_is_loaded_with_them(file, model):
    pipe = load_pipeline(model, loras=[Lora(file, 0.5)])
    assert pipe.get_active_adapters() == ["lora_0"]
