"""Test that a damaged file of a model is named, whatever the library that reads it would say."""

import shutil

import pytest

from dma_diffusers.pipelines.load import load_pipeline
from tests.pipelines.saved_flux import save_flux

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux") / "model")


@pytest.mark.parametrize(("name", "content", "words"), [
    ("tokenizer/tokenizer.json", POINTER, "is a pointer of Git LFS, not the file itself: run `git lfs pull` there"),
    ("tokenizer_2/tokenizer_config.json", POINTER, "is a pointer of Git LFS"),
    ("transformer/diffusion_pytorch_model.safetensors", POINTER, "is a pointer of Git LFS"),
    ("tokenizer/tokenizer.json", "", "is empty: fetch it again"),
    ("vae/diffusion_pytorch_model.safetensors", "", "is empty: fetch it again"),
    ("tokenizer/tokenizer.json", '{"version": "1.0", ' + " " * 1100, "is not JSON: "),
    ("scheduler/scheduler_config.json", "{", "is not JSON: "),
    ("text_encoder/config.json", "[1,", "is not JSON: "),
])  # fmt: skip
def test_a_damaged_file_is_named(saved, tmp_path, name, content, words):
    model = shutil.copytree(saved, tmp_path / "model")
    assert (model / name).is_file()
    (model / name).write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        load_pipeline(model)
    assert str(model / name) in str(error.value) and "\n" not in str(error.value)


def test_an_error_of_another_kind_stays_what_it_is(saved, tmp_path, monkeypatch):
    def fails(*given, **options):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", fails)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        load_pipeline(saved)
