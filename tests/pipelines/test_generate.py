"""Test loading and drawing with a tiny pipeline that is saved like a user's model folder."""

import json
import shutil

import numpy as np
import pytest
import torch

from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import load_pipeline, recommended_call
from tests.pipelines.saved_flux import CALL, save_flux
from tests.tiny_pipelines import CALLS, hunyuan15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flux(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder)


def test_draws_what_the_stock_pipeline_draws(pipe):
    drawing = draw(pipe, ["a cat"], [3], CALL)
    stock = pipe("a cat", generator=torch.Generator().manual_seed(3), output_type="latent", **CALL).images
    assert drawing.pictures[0].size == (CALL["width"], CALL["height"])
    assert drawing.latents.dtype == torch.float32
    assert torch.equal(drawing.latents, stock.float().cpu())
    assert drawing.seconds > 0


def test_a_prompt_draws_the_same_alone_and_in_a_batch(pipe):
    call = CALL | {"true_cfg_scale": 2.0, "negative_prompt": "blurred"}
    together = draw(pipe, ["a cat", "two dogs"], [3, 4], call)
    alone = draw(pipe, ["two dogs"], [4], call)
    torch.testing.assert_close(together.latents[1:], alone.latents)
    assert not torch.allclose(together.latents[0], together.latents[1])


def test_steps_are_counted(pipe):
    seen = []
    draw(pipe, ["a cat"], [0], CALL | {"num_inference_steps": 3}, lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_pipeline_without_a_callback_is_watched_through_its_scheduler():
    pipe = hunyuan15()
    call = CALLS[type(pipe)] | {"num_inference_steps": 3}
    seed = torch.Generator().manual_seed(3)
    stock = pipe("a cat", generator=seed, output_type="latent", **call).frames
    seen = []
    drawing = draw(pipe, ["a cat"], [3], call, lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert torch.equal(drawing.latents, stock)
    assert drawing.frames.shape == (1, call["num_frames"], call["height"], call["width"], 3)
    halved = draw(pipe, ["a cat"], [3], call, replace_latents=lambda step, latents: latents / 2)
    assert not torch.allclose(halved.latents, stock)
    assert "step" not in vars(pipe.scheduler)


def test_a_picture_of_nan_is_refused(folder):
    broken = load_pipeline(folder)
    torch.nn.init.constant_(broken.transformer.proj_out.bias, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        draw(broken, ["a cat"], [0], CALL)


def test_same_seed_same_bits(pipe):
    first, second, other = (draw(pipe, ["a cat"], [seed], CALL) for seed in (5, 5, 6))
    assert torch.equal(first.latents, second.latents)
    assert np.array_equal(first.pictures[0], second.pictures[0])
    assert not torch.equal(first.latents, other.latents)


def test_the_folder_recommends_its_call(folder, tmp_path):
    assert recommended_call(folder) == CALL
    assert recommended_call(tmp_path) == {}


def _without_index(folder):
    (folder / "model_index.json").unlink()


def _foreign_class(folder):
    _reclass(folder, "NoSuchPipeline")


def _code_of_its_own(folder):
    _reclass(folder, ["pipeline", "MyPipeline"])
    (folder / "pipeline.py").write_text("raise SystemExit('code of the model was run')")


def _video(folder):
    _reclass(folder, "WanPipeline")


def _image_to_image(folder):
    _reclass(folder, "FluxImg2ImgPipeline")


def _pickled(folder):
    (weights,) = (folder / "transformer").glob("*.safetensors")
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()


def _reclass(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))


@pytest.mark.parametrize(
    "spoil", [_without_index, _foreign_class, _code_of_its_own, _video, _image_to_image, _pickled]
)
def test_folders_that_are_no_pipeline_are_refused(folder, tmp_path, spoil):
    copy = shutil.copytree(folder, tmp_path / "model")
    spoil(copy)
    with pytest.raises((ValueError, OSError), match="model"):
        load_pipeline(copy, video=False)


@pytest.mark.parametrize("name", ["no-such-folder", "./owner/name", "/no/such/folder", "a/b/c"])
def test_names_that_are_neither_folder_nor_hub_id_are_refused(name):
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        load_pipeline(name)
