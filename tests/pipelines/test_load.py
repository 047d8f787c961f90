"""Test what pipelines can draw, and where their weights are placed."""

import json
import os

import diffusers
import pytest
import torch

from dma_diffusers.pipelines.load import (
    DEMO_MODEL,
    VIDEO_DEMO_MODEL,
    Ability,
    ability,
    check_model,
    load_pipeline,
    named_model,
    recommended_call,
)
from dma_diffusers.pipelines.placement import Placement, Size, choose, place
from tests.tiny_pipelines import wan

PICTURE = Ability(video=False, from_text=True, from_image=False)
TEXT_TO_VIDEO = Ability(video=True, from_text=True, from_image=False)
IMAGE_TO_VIDEO = Ability(video=True, from_text=False, from_image=True)
EITHER_TO_VIDEO = Ability(video=True, from_text=True, from_image=True)
ABILITIES = {
    PICTURE: (
        "FluxPipeline", "Flux2Pipeline", "Flux2KleinPipeline", "StableDiffusion3Pipeline", "QwenImagePipeline",
        "ChromaPipeline", "ZImagePipeline",
    ),
    TEXT_TO_VIDEO: (
        "WanPipeline", "HunyuanVideoPipeline", "HunyuanVideo15Pipeline", "LTXPipeline", "CogVideoXPipeline",
        "CosmosTextToWorldPipeline", "MochiPipeline", "SkyReelsV2Pipeline",
    ),
    IMAGE_TO_VIDEO: (
        "WanImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanVideo15ImageToVideoPipeline",
        "LTXImageToVideoPipeline", "CogVideoXImageToVideoPipeline", "Cosmos2VideoToWorldPipeline",
    ),
    EITHER_TO_VIDEO: ("Cosmos2_5_PredictBasePipeline",),
}  # fmt: skip
NEITHER = (
    "FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxFillPipeline", "FluxControlPipeline",
    "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline", "QwenImageImg2ImgPipeline",
    "WanVideoToVideoPipeline", "WanAnimatePipeline", "StableVideoDiffusionPipeline",
)  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "name"), [(can, name) for can, names in ABILITIES.items() for name in names]
)
def test_what_pipelines_draw_from_what(expected, name):
    assert ability(getattr(diffusers, name)) == expected


@pytest.mark.parametrize("name", NEITHER)
def test_pipelines_that_need_more_than_text_and_a_first_frame(name):
    can = ability(getattr(diffusers, name))
    assert not can.from_text
    assert not can.from_image


def _folder(path, name):
    (path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    return path


@pytest.mark.parametrize(
    ("name", "video", "image", "words"),
    [
        ("FluxPipeline", True, False, "draws pictures: dma-diffusers generate is"),
        ("WanPipeline", False, False, "draws clips: dma-diffusers generate-video is"),
        ("WanPipeline", True, True, "takes no image"),
        ("LTXImageToVideoPipeline", True, False, "starts from an image: .* --image FILE"),
        ("LTXImageToVideoPipeline", None, False, "starts from an image"),
        ("FluxImg2ImgPipeline", None, False, "does not turn text alone into an image"),
    ],
)
def test_a_model_for_something_else_is_refused(tmp_path, name, video, image, words):
    with pytest.raises(ValueError, match=rf"is a {name}, which {words}[^\n]*$"):
        check_model(_folder(tmp_path, name), video, image)


@pytest.mark.parametrize(
    ("index", "words"),
    [('{"_class_name": "WanPipeline"', "model_index.json is not JSON"), ("[]", "is a None pipeline")],
)
def test_a_folder_that_is_damaged_is_named(tmp_path, index, words):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=words):
        check_model(tmp_path)


def test_a_folder_of_a_finetune_says_what_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"no model_index\.json$"):
        check_model(tmp_path)
    (tmp_path / "loss.jsonl").touch()
    with pytest.raises(ValueError, match=r"`finetune` wrote it: load its transformer/ or lora/"):
        check_model(tmp_path)


@pytest.mark.parametrize("frames", ['"9"', "-3", "true", "0"])
def test_recommended_counts_are_whole_numbers(tmp_path, frames):
    (_folder(tmp_path, "WanPipeline") / "generation.json").write_text(f'{{"num_frames": {frames}}}')
    with pytest.raises(ValueError, match=r"generation\.json: num_frames must be a whole number from 1, got"):
        recommended_call(tmp_path)


def test_what_ftfy_is_needed_for(tmp_path, monkeypatch):
    monkeypatch.setattr("dma_diffusers.pipelines.load.is_ftfy_available", lambda: False)
    folder = _folder(tmp_path, "WanImageToVideoPipeline")
    with pytest.raises(ValueError, match="needs ftfy: pip install"):
        check_model(folder, True, image=True)
    check_model(_folder(tmp_path, "WanPipeline"), True)  # this pipeline checks for ftfy itself


def test_embedded_models_have_names():
    assert named_model(None) == named_model("demo") == DEMO_MODEL
    assert named_model("demo-video").parts[-3:] == ("pipelines", "demo_video", "wan")
    assert named_model("owner/name") == "owner/name"
    assert named_model(os.path.relpath(DEMO_MODEL)) == named_model(f"{DEMO_MODEL}/../flux") == DEMO_MODEL


GB = 10**9
WAN_14B = {"transformer": 28 * GB, "text_encoder": 11 * GB, "vae": GB // 2}
FLUX = {"transformer": 24 * GB, "text_encoder": GB // 4, "text_encoder_2": 9 * GB, "vae": GB // 6}
A_PICTURE, A_CLIP, A_SHORT_CLIP = Size(1024**2, 1), Size(720 * 1280, 81), Size(720 * 1280, 17)
A_LONG_CLIP = Size(480 * 832, 161)


@pytest.mark.parametrize(
    ("weights", "memory", "size", "expected"),
    [
        (WAN_14B, 141, A_CLIP, Placement("none", tiling=False)),
        (WAN_14B, 80, A_CLIP, Placement("none", tiling=True)),
        (WAN_14B, 48, A_CLIP, Placement("model", tiling=True)),
        (WAN_14B, 24, A_CLIP, Placement("group", tiling=True)),
        (WAN_14B, 100, A_CLIP, Placement("none", tiling=False)),  # the VAE needs no more for 81 frames
        (WAN_14B, 90, A_SHORT_CLIP, Placement("none", tiling=True)),
        (FLUX, 80, A_PICTURE, Placement("none", tiling=False)),
        (FLUX, 32, A_PICTURE, Placement("model", tiling=False)),
        (FLUX, 16, A_PICTURE, Placement("group", tiling=False)),
        (FLUX, 2, A_PICTURE, Placement("group", tiling=True)),
    ],
)
def test_placement_by_memory(weights, memory, size, expected):
    assert choose(weights, memory * GB, [size]) == expected


def test_placement_has_room_for_every_call():
    """The longest clip needs most memory in the transformer, the widest one in the VAE."""
    sizes = [A_LONG_CLIP, Size(720 * 1280, 49)]
    assert not choose(WAN_14B, 80 * GB, sizes[:1]).tiling
    assert choose(WAN_14B, 80 * GB, sizes) == Placement("none", tiling=True)


@pytest.mark.parametrize(
    ("name", "call", "expected"),
    [
        ("WanPipeline", {"height": 64, "width": 48, "num_frames": 5}, Size(64 * 48, 5)),
        ("WanPipeline", {"height": 64, "width": 48, "num_frames": 1}, Size(64 * 48, 3)),
        ("FluxPipeline", {"width": 512}, Size(512 * 1024, 1)),
    ],
)
def test_what_calls_draw_is_what_has_to_fit(monkeypatch, name, call, expected):
    """`load_pipeline` must place a pipeline by the sizes of all its calls."""
    seen = []

    def placed(pipe, sizes):
        seen.extend(sizes)
        return ""

    monkeypatch.setattr("dma_diffusers.pipelines.load.place", placed)
    model = DEMO_MODEL if name == "FluxPipeline" else VIDEO_DEMO_MODEL
    load_pipeline(model, calls=[call, call | {"height": 128}])
    assert seen == [expected, Size(128 * call["width"], expected.frames)]


def test_less_memory_never_asks_for_more():
    order = [Placement(offload, tiling) for offload in ("none", "model", "group") for tiling in (False, True)]
    ranks = [order.index(choose(WAN_14B, memory * GB, [A_CLIP])) for memory in range(160, 0, -1)]
    assert ranks == sorted(ranks)
    assert ranks[-1] == len(order) - 1


def test_loads_a_video_pipeline_and_says_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    wan().save_pretrained(tmp_path)
    said = []
    pipe = load_pipeline(tmp_path, video=True, say=said.append)
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float32
    assert said == ["WanPipeline, 0.3 MB of weights in float32, on the CPU"]


class _Recorder:
    """Records what `place` does to a pipeline, and pretends that there is a GPU."""

    def __init__(self, monkeypatch, pipe, memory: int):
        self.pipe, self.done = pipe, []
        cuda = {
            "is_available": lambda: True, "current_device": lambda: 0,
            "mem_get_info": lambda device: (memory, memory), "get_device_name": lambda device: "a GPU",
        }  # fmt: skip
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name in ("to", "enable_model_cpu_offload", "enable_group_offload"):
            monkeypatch.setattr(pipe, name, lambda *_, name=name, **__: self.done.append(name))
        monkeypatch.setattr(pipe.vae, "to", lambda *_: self.done.append("vae.to"))


@pytest.mark.parametrize(
    ("memory", "done", "words", "tiled"),
    [
        (10**12, ["to"], "all on a GPU", False),
        (2**30 + 2 * 10**5, ["enable_model_cpu_offload"], "one component at a time on a GPU", False),
        (10**4, ["enable_group_offload", "vae.to"], "one layer at a time on a GPU, VAE in tiles", True),
    ],
)
def test_pipelines_are_placed_as_chosen(monkeypatch, memory, done, words, tiled):
    pipe = wan()
    recorder = _Recorder(monkeypatch, pipe, memory)
    pipe.transformer.to(torch.bfloat16)
    said = place(pipe, [Size(64 * 64, 1)])
    assert recorder.done == done
    assert said == f"WanPipeline, 0.2 MB of weights in float32 (transformer in bfloat16), {words}"
    assert pipe.vae.use_tiling == tiled


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("WanPipeline", {"default": torch.bfloat16, "vae": torch.float32, "image_encoder": torch.float32}),
        ("MochiPipeline", {"default": torch.bfloat16}),
    ],
)
def test_dtypes_on_a_gpu(tmp_path, monkeypatch, name, expected):
    class Loaded(Exception):
        pass

    def load(model, torch_dtype, **_):
        raise Loaded(torch_dtype)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", load)
    with pytest.raises(Loaded) as found:
        load_pipeline(_folder(tmp_path, name))
    assert found.value.args == (expected,)
