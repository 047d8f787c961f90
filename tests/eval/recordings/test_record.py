"""Recordings: the very tensors of a stock run, in bounded space, resumed, and refused in one line."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from peft import LoraConfig
from safetensors import safe_open
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from dma_diffusers import DMAConfig, apply
from dma_diffusers.attach import report
from dma_diffusers.eval.recordings.record import _Recorder, record
from dma_diffusers.eval.recordings.store import INDEX, read_recordings
from tests import tiny_pipelines
from tests.tiny_pipelines import CALLS

PIPELINES = {
    "flux": tiny_pipelines.flux, "sd3": tiny_pipelines.sd3, "wan": tiny_pipelines.wan,
    "hunyuan": tiny_pipelines.hunyuan,
}  # fmt: skip
LONG = 200  # tokens: every text is shorter, every picture longer


class Seen(TorchFunctionMode):
    """Keeps what every long self-attention is given."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            self.keep(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def keep(self, query, key, value, attn_mask=None, **_):
        if query.shape[2] == key.shape[2] > LONG:
            self.calls.append(([x.clone() for x in (query, key, value)], attn_mask))


def call_of(pipe, **changes) -> dict:
    return {"num_inference_steps": 2} | CALLS[type(pipe)] | changes


@pytest.fixture(scope="module")
def flux():
    return tiny_pipelines.flux()


@pytest.mark.parametrize("name", PIPELINES)
def test_they_are_what_stock_attention_was_given(name, tmp_path):
    pipe = PIPELINES[name]()
    processors = {key: id(value) for key, value in pipe.transformer.attn_processors.items()}
    with Seen() as seen:
        tiny_pipelines.draw(pipe, "a cat", seed=5)
    recordings = record(pipe, ["a cat"], tmp_path, call_of(pipe), seeds=[5], steps=2)
    assert len(recordings) == len(seen.calls) > 2
    for recording, (expected, mask) in zip(recordings, seen.calls, strict=True):
        given, q = recordings.tensors(recording), expected[0]
        assert all(torch.equal(a, b) for a, b in zip(given[:3], expected, strict=True))
        assert given.q.dtype == q.dtype and recording.shape == q.shape
        assert (mask is None) == (given.key_mask is None)
        if mask is not None:
            assert torch.equal(mask.expand(len(q), 1, 1, -1)[:, 0, 0], given.key_mask)
    assert {key: id(value) for key, value in pipe.transformer.attn_processors.items()} == processors
    assert not report(pipe).modules and not pipe.transformer._forward_pre_hooks
    assert recordings.steps == [0, 1] and recordings.recordings[0].sigma == pytest.approx(1, abs=1e-3)
    grid = {"flux": (24, 20), "sd3": (20, 19), "wan": (3, 9, 11), "hunyuan": (3, 10, 14)}[name]
    assert {recording.layout.grid for recording in recordings} == {grid}
    texts = {recording.module: (recording.text, recording.shape[2]) for recording in recordings}
    if name == "flux":
        assert {text for text, _ in texts.values()} == {(0, 19)}
    if name == "sd3":
        assert texts["transformer_blocks.0.attn"] == ((380, 480), 480)
        assert texts["transformer_blocks.0.attn2"] == ((0, 0), 380)
    if name == "wan":
        assert {text for text, _ in texts.values()} == {(0, 0)}
    if name == "hunyuan":
        assert {stop - start for (start, stop), _ in texts.values()} == {27}
        assert all(stop == tokens for (_, stop), tokens in texts.values())


def test_calls_without_a_single_grid_are_recorded_without_it(flux, tmp_path):
    def two_images(_, args, kwargs):
        kwargs["img_ids"] = kwargs["img_ids"].clone()
        kwargs["img_ids"][100:, 0] = 1
        return args, kwargs

    hook = flux.transformer.register_forward_pre_hook(two_images, with_kwargs=True)
    recordings = record(flux, ["a cat"], tmp_path, call_of(flux), steps=1)
    hook.remove()
    assert {recording.grid for recording in recordings} == {()}


def test_an_index_without_grids_is_read(flux, tmp_path):
    record(flux, ["a cat"], tmp_path, call_of(flux), steps=1)
    document = json.loads((tmp_path / INDEX).read_text())
    assert [entry.pop("grid") for entry in document["recordings"]] == [[24, 20]] * 3
    (tmp_path / INDEX).write_text(json.dumps(document))
    assert {recording.layout.grid for recording in read_recordings(tmp_path)} == {()}


def test_the_noise_levels_of_all_steps_are_kept(flux, tmp_path):
    recordings = record(
        flux, ["a cat", "a dog"], tmp_path, call_of(flux, num_inference_steps=5), steps=[1, 3]
    )
    levels = flux.scheduler.sigmas[:5].tolist()
    assert recordings.sigmas == pytest.approx(levels) and recordings.steps == [1, 3]
    assert {(r.step, r.sigma) for r in recordings} == {(step, recordings.sigmas[step]) for step in (1, 3)}
    assert read_recordings(tmp_path).sigmas == recordings.sigmas
    document = json.loads((tmp_path / INDEX).read_text())
    del document["sigmas"]
    (tmp_path / INDEX).write_text(json.dumps(document))
    assert read_recordings(tmp_path).sigmas == []


def test_guidance_is_recorded_whole(flux, tmp_path):
    call = call_of(flux, true_cfg_scale=2.0, negative_prompt="grey")
    one_after_the_other = record(flux, ["a cat"], tmp_path / "flux", call, steps=1, modules=[0])
    first, second = (one_after_the_other.tensors(r).q for r in one_after_the_other)
    assert [r.call for r in one_after_the_other] == [0, 1] and not torch.equal(first, second)
    sd3 = tiny_pipelines.sd3()
    together = record(
        sd3, ["a cat"], tmp_path / "sd3", call_of(sd3, guidance_scale=4.0), steps=1, modules=[0]
    )
    assert [r.shape[0] for r in together] == [2]


def test_steps_and_modules_are_chosen(flux, tmp_path):
    call = call_of(flux, num_inference_steps=5)
    recordings = record(flux, ["a cat"], tmp_path / "a", call, modules=[-1, "transformer_blocks.0.attn"])
    assert recordings.steps == [0, 2, 4]
    assert recordings.modules == ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
    assert len(recordings) == 6
    assert record(flux, ["a cat"], tmp_path / "b", call, steps=[3, 1]).steps == [1, 3]
    with safe_open(tmp_path / "b" / recordings.recordings[0].file.replace("-0000-", "-0001-"), "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
    assert (metadata["step"], metadata["text"], metadata["is_causal"]) == (1, [0, 19], False)


@pytest.mark.parametrize(("options", "words"), [
    ({"modules": [7]}, "there is no module 7: give 0 to 2"),
    ({"modules": ["attn"]}, "there is no module 'attn'"),
    ({"steps": [2]}, r"steps must be among 0 to 1, got \[2\]"),
    ({"steps": 0}, "steps must be 1 or more, got 0"),
    ({"seeds": [1, 2]}, "give one seed a prompt, got 2 for 1"),
    ({"limit": 1000}, "one prompt takes .* MB .3 modules at 2 steps., more than the limit of 0.001 MB"),
])  # fmt: skip
def test_what_is_refused_leaves_nothing(flux, tmp_path, options, words):
    with pytest.raises(ValueError, match=words) as error:
        record(flux, ["a cat"], tmp_path / "folder", call_of(flux), **{"steps": 2} | options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "folder").exists() and not report(flux).modules


def test_no_prompts(flux, tmp_path):
    with pytest.raises(ValueError, match="no prompts"):
        record(flux, [], tmp_path, call_of(flux))


def test_transformers_of_different_kinds(flux, tmp_path):
    both = SimpleNamespace(
        components={"transformer": flux.transformer, "transformer_2": tiny_pipelines.wan().transformer}
    )
    with pytest.raises(ValueError, match="transformers of different kinds"):
        record(both, ["a cat"], tmp_path / "folder", {})
    assert not report(both).modules and not flux.transformer._forward_pre_hooks


def test_two_transformers_of_one_kind(tmp_path):
    """As in Wan 2.2: each runs at its own noise levels, under the same names."""
    one = tiny_pipelines.wan()
    second = copy.deepcopy(one.transformer)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.5)
    pipe = WanPipeline(**one.components | {"transformer_2": second}, boundary_ratio=0.9)
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 4} | CALLS[WanPipeline]
    with Seen() as seen:
        pipe("a cat", generator=torch.Generator().manual_seed(0), output_type="latent", **call)
    recordings = record(pipe, ["a cat"], tmp_path, call, steps=4)
    assert len(recordings) == len(seen.calls)
    for recording, (expected, _) in zip(recordings, seen.calls, strict=True):
        assert torch.equal(recordings.tensors(recording).q, expected[0])
    assert recordings.modules == ["blocks.0.attn1", "blocks.1.attn1"]
    apply(
        pipe,
        DMAConfig(
            model="WanTransformer3DModel",
            modules={"blocks.0.attn1": {"window": [0, 384]}, "blocks.1.attn1": {}},
        ),
    )
    pipe("a cat", output_type="latent", **call)
    policies = {receipt.module: (receipt.policy, receipt.intercepted > 0) for receipt in report(pipe).modules}
    for name in ("transformer", "transformer_2"):
        assert policies[f"{name}.blocks.0.attn1"] == ("diagonal(window=0/384, sink=128)", True)


def test_no_more_prompts_than_fit(flux, tmp_path):
    whole = record(flux, ["a", "b"], tmp_path / "whole", call_of(flux), steps=2)
    part = record(flux, ["a", "b"], tmp_path / "part", call_of(flux), steps=2, limit=whole.bytes * 3 // 4)
    assert part.prompts == [0] and part.notes == [
        f"1 of 2 prompts fit into {whole.bytes * 0.75 / 1e6:.3g} MB"
    ]
    assert part.bytes <= whole.bytes * 3 // 4
    on_disk = sum(path.stat().st_size for path in (tmp_path / "part").glob("*.safetensors"))
    assert on_disk == part.bytes
    resumed = record(flux, ["a", "b"], tmp_path / "part", call_of(flux), steps=2)
    assert resumed.prompts == [0, 1] and not resumed.notes and len(resumed) == len(whole)


def test_prompts_that_are_longer_than_the_first(flux, tmp_path, monkeypatch):
    """A prompt that fitted by its first step is left out once it does not fit, and leaves no files."""
    whole = record(flux, ["a", "b"], tmp_path / "whole", call_of(flux), steps=2)
    measured = _Recorder.measure
    monkeypatch.setattr(_Recorder, "measure", lambda *args: (measured(*args)[0] // 4, 2))
    limit = whole.bytes * 3 // 4
    part = record(flux, ["a", "b"], tmp_path / "part", call_of(flux), steps=2, limit=limit)
    assert part.prompts == [0] and part.notes == [f"1 of 2 prompts fit into {limit / 1e6:.3g} MB"]
    assert read_recordings(tmp_path / "part") == part
    on_disk = sum(path.stat().st_size for path in (tmp_path / "part").glob("*.safetensors"))
    assert on_disk == part.bytes <= limit
    with pytest.raises(ValueError, match="prompt 1 takes more than its first step foretold, and more than"):
        record(flux, ["a", "b"], tmp_path / "none", call_of(flux), steps=2, limit=limit // 2)
    assert not list((tmp_path / "none").iterdir()) and not report(flux).modules


def test_pipelines_that_cannot_be_interrupted(flux, tmp_path, monkeypatch):
    whole = record(flux, ["a"], tmp_path / "whole", call_of(flux), steps=2)
    monkeypatch.setattr(type(flux), "interrupt", property(lambda self: False))
    limit = whole.bytes * 3 // 2
    assert len(record(flux, ["a"], tmp_path / "again", call_of(flux), steps=2, limit=limit)) == len(whole)


def test_a_folder_is_resumed_and_mended(flux, tmp_path):
    drawn = []

    def recorded(**changes):
        drawn.clear()
        options = {"steps": 1, "on_step": lambda title, done, total: drawn.append(title)} | changes
        return record(flux, ["a", "b"], tmp_path, call_of(flux), **options)

    first = recorded()
    kept = {recording.file: first.tensors(recording) for recording in first}
    assert recorded().recordings == first.recordings and not drawn
    lost = next(r for r in first if r.prompt == 0)
    (tmp_path / lost.file).write_bytes(b"short")
    again = recorded()
    assert set(drawn) == {"recording 1 of 2"}
    assert again.recordings == first.recordings
    assert all(torch.equal(again.tensors(r).q, kept[r.file].q) for r in again)
    with pytest.raises(ValueError, match="recordings of different modules: choose another folder, or delete"):
        recorded(modules=[0])


def test_damage_is_named(flux, tmp_path):
    recordings = record(flux, ["a"], tmp_path, call_of(flux), steps=1, modules=[0])
    path = tmp_path / recordings.recordings[0].file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        recordings.tensors(recordings.recordings[0])
    (tmp_path / INDEX).write_text('{"format": "something else", "version": 1}')
    with pytest.raises(ValueError, match=f"{INDEX} is no index of recordings"):
        read_recordings(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no recordings in"):
        read_recordings(tmp_path / "absent")


def test_recordings_with_another_lora_are_not_completed(tmp_path):
    """Its factors count too, though the weights of the base are the same."""
    pipe = tiny_pipelines.flux()
    record(pipe, ["a cat"], tmp_path / "plain", call_of(pipe), steps=1)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    for folder, weight in (("plain", 1.0), ("style", 1.0), ("style", 0.5)):
        pipe.transformer.set_adapters("style", weight)
        if (folder, weight) == ("style", 1.0):
            record(pipe, ["a cat"], tmp_path / folder, call_of(pipe), steps=1)
            continue
        with pytest.raises(ValueError, match="recordings of different adapters: choose another folder"):
            record(pipe, ["a cat"], tmp_path / folder, call_of(pipe), steps=1)
