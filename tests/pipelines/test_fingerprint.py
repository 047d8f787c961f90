"""Test that models and files are told apart by what they hold, not by where they lie."""

import json
import os
import shutil

import pytest

from dma_diffusers.config import DMAConfig
from dma_diffusers.pipelines.fingerprint import config_identity, model_fingerprint


@pytest.fixture
def model(tmp_path):
    """A folder like a pipeline's: an index, and two components of small files."""
    folder = tmp_path / "model"
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "T"],
        "tokenizer": ["transformers", "C"],
    }
    for name, content in {
        "model_index.json": json.dumps(index),
        "transformer/config.json": "{}",
        "transformer/weights.safetensors": "weights",
        "tokenizer/spiece.model": "pieces",
        "tokenizer/deep/vocab.json": "{}",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def linked(model, name):
    """A copy of the model, one component of which is a symbolic link."""
    copy = shutil.copytree(model, model.with_name("linked"))
    shutil.move(copy / name, model.with_name("elsewhere"))
    (copy / name).symlink_to(model.with_name("elsewhere"))
    return copy


def test_every_path_to_the_same_files_is_the_same_model(monkeypatch, model):
    found = {
        model_fingerprint(model),
        model_fingerprint(str(model)),
        model_fingerprint(linked(model, "transformer")),
    }
    model.with_name("link").symlink_to(model)
    monkeypatch.chdir(model.parent)
    assert found == {model_fingerprint("link"), model_fingerprint("./model/")} and len(found) == 1


@pytest.mark.parametrize("name", ["transformer", "tokenizer", "tokenizer/deep"])
def test_files_behind_a_link_count(model, name):
    copy = linked(model, name)
    before = model_fingerprint(copy)
    next((copy / name).rglob("*.*s*")).write_text("other")
    assert model_fingerprint(copy) != before


@pytest.mark.parametrize(
    "name", ["transformer/weights.safetensors", "tokenizer/spiece.model", "transformer/config.json"]
)
def test_each_file_of_a_component_counts(model, name):
    before = model_fingerprint(model)
    (model / name).write_text("other")
    changed = model_fingerprint(model)
    (model / name).rename((model / name).with_name("renamed.json"))
    assert len({before, changed, model_fingerprint(model)}) == 3


def test_what_is_not_loaded_does_not_count(model):
    before = model_fingerprint(model)
    for name in (
        "README.md",
        "samples.json",
        "transformer/weights.bin",
        "transformer/.lock",
        "old/model.safetensors",
    ):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("other")
    assert model_fingerprint(model) == before


def test_links_in_a_circle_end(model):
    before = model_fingerprint(model)
    (model / "transformer" / "self").symlink_to(model / "transformer")
    assert model_fingerprint(model) == before


def test_a_hubs_model_is_its_id_and_commit(monkeypatch, tmp_path):
    assert model_fingerprint("owner/name") == "owner/name"
    index = str(tmp_path / "snapshots" / "c0ffee" / "model_index.json")
    monkeypatch.setattr("dma_diffusers.pipelines.fingerprint.try_to_load_from_cache", lambda *_: index)
    assert model_fingerprint("owner/name") == "owner/name@c0ffee"


def test_a_file_of_linears_counts_by_its_content(tmp_path):
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        file.write_bytes(b"linears")
    first, second = (config_identity(DMAConfig(linears=os.fspath(file))) for file in files)
    assert first == second
    files[1].write_bytes(b"others")
    assert config_identity(DMAConfig(linears=os.fspath(files[1]))) != first
    assert config_identity(DMAConfig(linears="fp8"))["linears"] == "fp8"
