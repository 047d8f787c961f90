"""Policy files and modules with fields of their own are read, refused where they are wrong, and given to models."""

import json
from dataclasses import asdict

import pytest
import torch

from dma_diffusers import DMAAttnProcessor, DMAConfig, apply, report, restore
from tests import tiny_pipelines
from tests.tiny_pipelines import draw

FLUX = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn", "single_transformer_blocks.1.attn"]
CHANGES = {FLUX[0]: {"window": [0, 384], "sink": 0}, FLUX[1]: {"dense": True}}


def document(**changes) -> dict:
    def choice(quality: float, window: int) -> dict:
        config = {"high": "mxfp8", "low": "nvfp4", "window": window, "sink": 128, "dense_above_sigma": None}
        return {"quality": quality, "config": config, "modules": CHANGES, "evidence": {}}

    return {
        "format": "dma-diffusers policy", "version": 1, "quality": 0.5,
        "model": {"class": "FluxTransformer2DModel", "modules": FLUX, "fingerprint": ""},
        "choices": [choice(0.5, 128), choice(0, 0), choice(0.8, 384)],
    } | changes  # fmt: skip


def written(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def policy(tmp_path):
    return written(tmp_path / "policy.json", document())


@pytest.mark.parametrize(
    ("quality", "window"), [(None, 128), (0, 0), (0.2, 128), (0.5, 128), (0.51, 384), (0.8, 384)]
)
def test_the_choice_at_or_above_a_quality(policy, quality, window):
    config = DMAConfig.from_file(policy, quality)
    assert (config.window, config.low, config.model) == (window, "nvfp4", "FluxTransformer2DModel")
    assert config.of_module(FLUX[0]) == DMAConfig(low="nvfp4", window=(0, 384), sink=0)
    assert config.of_module(FLUX[2]) == DMAConfig(low="nvfp4", window=window)
    assert [config.is_dense(name) for name in FLUX] == [False, True, False]
    assert DMAConfig.from_file(policy, quality, window=640).window == 640


def test_precisions_of_a_file_are_kept_as_the_shortest_words(tmp_path):
    choice = document()["choices"][0]
    choice["config"] |= {"high": "mxfp8/bf16", "low": "nvfp4/bf16"}
    choice["modules"] = {FLUX[1]: {"low": "nvfp4/fp8"}}
    config = DMAConfig.from_file(written(tmp_path / "policy.json", document(choices=[choice])), 0.5)
    assert (config.high, config.low) == ("mxfp8", "nvfp4/bf16")
    assert config.of_module(FLUX[1]) == DMAConfig(low="nvfp4")


def test_a_file_may_say_how_channels_are_rotated(tmp_path):
    choice = document()["choices"][0]
    choice["config"] |= {"rotation": "hadamard32"}
    choice["modules"] = {FLUX[1]: {"rotation": "head_dim"}}
    config = DMAConfig.from_file(written(tmp_path / "policy.json", document(choices=[choice])), 0.5)
    found = [config.of_module(name).arguments((0, 0))["rotation"] for name in FLUX]
    assert found == ["hadamard32", "head_dim", "hadamard32"]


@pytest.mark.parametrize(("content", "options", "words"), [
    (None, {}, "there is no policy file"),
    ("{", {}, "is not JSON"),
    (b"\xff\xfe\x00", {}, "is not JSON"),
    ("[1]", {}, "is no policy file: `dma-diffusers calibrate` writes them"),
    ({"format": "other"}, {}, "is no policy file"),
    (document(version=2), {}, "has version 2, and only 1 can be read"),
    (document(choices=[]), {}, "is damaged"),
    (document(choices=[{"quality": 1}]), {}, "is damaged: KeyError"),
    (document(choices=[{"quality": "1"}]), {}, "is damaged"),
    (document(model=None), {}, "is damaged"),
    (document(choices=[document()["choices"][0] | {"config": {"bits": 4}}]), {}, "unknown option bits"),
    (document(choices=[document()["choices"][0] | {"modules": {FLUX[0]: {"bits": 4}}}]), {}, "has no bits; there are"),
    (document(choices=[document()["choices"][0] | {"config": {"high": {}}}]), {}, "policy.json: "),
    (document(), {"quality": 0.9}, "no choice of quality 0.9 or more, its best is 0.8"),
    (document(), {"quality": 1.5}, r"quality must be a number from 0 \(cheapest\) to 1 \(most precise\), got 1.5"),
    (document(), {"quality": -0.1}, "quality must be a number from 0"),
    (document(), {"quality": float("nan")}, "quality must be a number from 0"),
    (document(), {"quality": "high"}, "quality must be a number from 0"),
    (document(), {"quality": True}, "quality must be a number from 0"),
    (document(), {"bits": 4}, "unknown option bits"),
])  # fmt: skip
def test_what_is_refused_in_one_line(tmp_path, content, options, words):
    path = tmp_path / "policy.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        written(path, content)
    with pytest.raises((ValueError, OSError), match=words) as error:
        DMAConfig.from_file(path, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("modules", "words"), [
    (3, "modules must map names"),
    ({"attn": 3}, "modules must map names"),
    ({"attn": {"text": "first"}}, "attn has no text; there are high, low, window, sink, policy, dense"),
    ({"attn": {"window": -1}}, "attn: window must be a whole number of tokens"),
    ({"attn": {"window": [128, 1.5]}}, "attn: window must be a whole number of tokens, 0 or more, got 1.5"),
    ({"attn": {"window": []}}, "attn: window must be a whole number"),
    ({"attn": {"high": "fp3"}}, "attn: unknown format 'fp3'"),
    ({"attn": {"dense": 1}}, "attn: dense must be true or false, got 1"),
])  # fmt: skip
def test_fields_that_modules_cannot_have(modules, words):
    with pytest.raises(ValueError, match=words) as error:
        DMAConfig(modules=modules)
    assert "\n" not in str(error.value)


def test_configurations_with_modules_are_values():
    config = DMAConfig(modules=CHANGES)
    assert config == DMAConfig(modules=dict(reversed(CHANGES.items()))) and hash(config) == hash(
        DMAConfig.of(config)
    )
    assert DMAConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_each_module_runs_its_own_and_receipts_say_so(policy):
    pipe = tiny_pipelines.flux()
    config = DMAConfig.from_file(policy)
    apply(pipe, config)
    mixed = draw(pipe)
    receipts = {receipt.module: receipt for receipt in report(pipe.transformer).modules}
    assert [receipts[name].policy for name in FLUX] == [
        "diagonal(window=0/384, sink=0)", "dense(everywhere=high)", "diagonal(window=128, sink=128)"
    ]  # fmt: skip
    assert {receipt.intercepted for receipt in receipts.values()} == {2}
    restore(pipe)
    pipe.transformer.set_attn_processor(DMAAttnProcessor(config))
    assert torch.equal(draw(pipe), mixed)
    apply(pipe, low="nvfp4")
    assert not torch.equal(draw(pipe), mixed)


def test_the_windows_of_a_policy_file_reach_the_heads(policy):
    """Windows of the first module alone change the picture: with all windows alike it is another."""
    pipe = tiny_pipelines.flux()
    apply(pipe, DMAConfig.from_file(policy))
    mixed = draw(pipe)
    for window in (0, 384):
        apply(pipe, low="nvfp4", modules=CHANGES | {FLUX[0]: {"window": window, "sink": 0}})
        assert not torch.equal(draw(pipe), mixed)
    apply(pipe, low="nvfp4", modules=CHANGES)
    assert torch.equal(draw(pipe), mixed)


@pytest.mark.parametrize(("make", "words"), [
    (tiny_pipelines.wan, "this configuration is for FluxTransformer2DModel, not for WanTransformer3DModel"),
    (lambda: tiny_pipelines.flux(num_single_layers=3), "only one of them has single_transformer_blocks.2.attn"),
    (lambda: tiny_pipelines.flux(num_single_layers=1), "only one of them has single_transformer_blocks.1.attn"),
    (lambda: tiny_pipelines.flux(num_attention_heads=4), "has 4 heads, and this configuration windows for 2"),
])  # fmt: skip
def test_a_policy_for_another_model_changes_nothing(policy, make, words):
    pipe = make()
    with pytest.raises(ValueError, match=words) as error:
        apply(pipe, DMAConfig.from_file(policy))
    assert "\n" not in str(error.value) and not report(pipe).modules


def test_modules_that_a_model_does_not_intercept():
    for name in ("blocks.7.attn1", "blocks.0.attn2"):  # absent, and cross-attention
        with pytest.raises(ValueError, match=f"modules: WanTransformer3DModel has no {name} to intercept"):
            apply(tiny_pipelines.wan(), modules={name: {"window": 384}})
