"""Test the frames, sizes and rates that video pipelines take."""

import inspect
import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dma_diffusers.pipelines.load import outline
from dma_diffusers.pipelines.video import clip_call, read_image
from tests.pipelines.saved_video import STEPS, save_video
from tests.tiny_pipelines import CALLS, cogvideox


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    return save_video("wan", tmp_path_factory.mktemp("wan"))


@pytest.fixture
def of_true_size(tmp_path):
    """Return a function that writes a pipeline's folder without weights, in its models' default configurations."""

    def write(name: str, transformer: str, vae: str):
        kind = getattr(diffusers, name)
        needed = [argument for argument in inspect.signature(kind.__init__).parameters if argument != "self"]
        index = {argument: ["transformers", "NotLoaded"] for argument in needed} | {"_class_name": name}
        for part, model in (("transformer", transformer), ("vae", vae)):
            index[part] = ["diffusers", model]
            (tmp_path / part).mkdir()
            with torch.device("meta"):
                config = getattr(diffusers, model)().to_json_string()
            (tmp_path / part / "config.json").write_text(config)
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        return tmp_path

    return write


FAMILIES = {
    "HunyuanVideoPipeline": (
        "HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo", "57 or 61", "192x96", (1280, 720), 24,
    ),
    "LTXImageToVideoPipeline": (
        "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo", "57 or 65", "192x96", (704, 512), 25,
    ),
    "CogVideoXPipeline": (
        "CogVideoXTransformer3DModel", "AutoencoderKLCogVideoX", "57 or 65", "192x96", (720, 480), 8,
    ),
    "MochiPipeline": ("MochiTransformer3DModel", "AutoencoderKLMochi", "55 or 61", "192x96", (848, 480), 30),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families(of_true_size, name):
    transformer, vae, frames, sides, size, rate = FAMILIES[name]
    folder = of_true_size(name, transformer, vae)
    call = clip_call(folder)
    assert (call.size, call.fps) == (size, rate)
    with pytest.raises(ValueError, match=f"not 60: take {frames}$"):
        clip_call(folder, frames=60)
    with pytest.raises(ValueError, match=f"not 200x100: take {sides}$"):
        clip_call(folder, size=(200, 100))


def test_an_outline_has_no_weights(wan_folder):
    pipe = outline(wan_folder)
    assert pipe.text_encoder is None
    assert {tensor.device.type for tensor in pipe.transformer.parameters()} == {"meta"}
    assert pipe.vae_scale_factor_temporal == 4


@pytest.mark.parametrize(("frames", "drawn"), [(9, 9), (13, 16)])
def test_cogvideox_draws_another_number_of_frames_than_it_is_asked_for(frames, drawn):
    """This is why `clip_call` uses a stride of 8 for CogVideoX, though its VAE has 4."""
    call = CALLS[diffusers.CogVideoXPipeline] | {"num_frames": frames, "num_inference_steps": 1}
    assert cogvideox()("a cat", output_type="np", **call).frames.shape[1] == drawn


def test_what_is_given_wins_over_the_folder(wan_folder):
    recommended = CALLS[diffusers.WanPipeline] | {"num_inference_steps": STEPS}
    call = clip_call(wan_folder)
    assert call.arguments == recommended
    assert (call.size, call.fps) == ((176, 144), 16)
    call = clip_call(wan_folder, steps=7, frames=13, size=(96, 64), fps=12.5)
    changed = {"num_inference_steps": 7, "num_frames": 13, "width": 96, "height": 64}
    assert call.arguments == recommended | changed
    assert (call.size, call.fps) == ((96, 64), 12.5)


def test_a_rate_that_the_model_takes_is_passed_on(of_true_size):
    folder = of_true_size("LTXPipeline", "LTXVideoTransformer3DModel", "AutoencoderKLLTXVideo")
    assert clip_call(folder, fps=12).arguments["frame_rate"] == 12
    assert "frame_rate" not in clip_call(folder).arguments


def test_an_image_is_cropped_to_the_clips_shape(tmp_path):
    folder = save_video("wan from image", tmp_path)
    stripes = np.zeros((50, 300, 3), np.uint8)
    stripes[:, 100:200] = 255  # this is a white band in the middle
    call = clip_call(folder, size=(96, 96), image=Image.fromarray(stripes))
    picture = call.arguments["image"]
    assert picture.size == (96, 96)
    assert np.asarray(picture)[:, 8:-8].min() > 200


def test_a_size_that_the_image_decides(of_true_size):
    folder = of_true_size(
        "HunyuanVideo15ImageToVideoPipeline",
        "HunyuanVideo15Transformer3DModel",
        "AutoencoderKLHunyuanVideo15",
    )
    image = Image.new("RGB", (40, 30))
    call = clip_call(folder, image=image)
    assert call.size is None
    assert call.arguments["image"] is image
    with pytest.raises(ValueError, match="takes no height and width"):
        clip_call(folder, size=(96, 64), image=image)


def test_images_are_read_upright(tmp_path):
    path = tmp_path / "turned.jpg"
    picture = Image.new("L", (40, 30))
    exif = picture.getexif()
    exif[0x0112] = 6  # this orientation means a turn by 90°
    picture.save(path, exif=exif)
    assert read_image(path).size == (30, 40)
    assert read_image(path).mode == "RGB"


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_images_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "first.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OSError, match=r"^cannot read \S+first\.png: [^\n]+$"):
        read_image(path)
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    path.write_bytes(whole.read_bytes()[:900])
    with pytest.raises(OSError, match=r"^cannot read \S+first\.png: [^\n]+$"):
        read_image(path)
