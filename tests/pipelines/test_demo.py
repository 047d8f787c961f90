"""Test the embedded demo model: its files, its prompts, and that it draws what a prompt says."""

import json
import math
import re
from zlib import crc32

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open

from dma_diffusers.attach import apply, report, restore
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.compare import paired_metrics
from dma_diffusers.kernels import operator
from dma_diffusers.pipelines.demo_training.concepts import HELD_OUT, SEEN, plural
from dma_diffusers.pipelines.demo_training.export import save_pipeline
from dma_diffusers.pipelines.demo_training.prompts import held_out_scenes
from dma_diffusers.pipelines.demo_training.scenes import vocabulary
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import DEMO_MODEL, recommended_call

DEMO = DEMO_MODEL.parent
PROMPTS = [json.loads(line)["prompt"] for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
APPLE = "a red apple left of a cat on a yellow background"
CALL = recommended_call()
SHORT = CALL | {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe():
    pipe = FluxPipeline.from_pretrained(DEMO_MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exact(pipe):
    return draw(pipe, [APPLE], [0], SHORT)


def test_files_are_small():
    sizes = [path.stat().st_size for path in DEMO.rglob("*") if path.is_file()]
    assert max(sizes) < 15e6
    assert sum(sizes) <= 24e6


def test_weights_are_bf16_on_disk():
    shards = list(DEMO_MODEL.rglob("*.safetensors"))
    assert {path.parent.name for path in shards} == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    for path in shards:
        with safe_open(path, "pt") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118


def test_configurations_hold_no_paths(pipe, tmp_path):
    save_pipeline(pipe, tmp_path)
    for folder in (DEMO_MODEL, tmp_path):
        configurations = list(folder.glob("*/*config.json"))
        assert len(configurations) == 7
        for path in configurations:
            assert "_name_or_path" not in json.loads(path.read_text()), path


def test_transformer_is_of_the_size_it_should_be(pipe):
    assert 8e6 <= sum(parameter.numel() for parameter in pipe.transformer.parameters()) <= 10e6
    assert pipe.transformer.config.attention_head_dim == 64


def test_tokens_of_the_recommended_call(pipe):
    pixels = pipe.vae_scale_factor * 2  # one token covers two by two latents
    assert CALL["height"] // pixels * (CALL["width"] // pixels) + CALL["max_sequence_length"] == 1152


def test_prompts_are_held_out_combinations():
    scenes = held_out_scenes(200)
    assert [scene.prompt for scene in scenes] == PROMPTS
    assert len(set(PROMPTS)) == 200
    for scene in scenes:
        assert any(crc32(key.encode()) % 10 == 0 for key in scene.combinations()), scene.prompt


def test_held_out_concepts_are_kept_out(pipe):
    concepts = (DEMO / "held_out_concepts.txt").read_text().split()
    assert concepts == list(HELD_OUT)
    assert not HELD_OUT.keys() & SEEN.keys()
    words = set(concepts) | {plural(concept) for concept in concepts}
    assert not words & set(re.findall(r"\w+", " ".join(PROMPTS)))
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        known = set(tokenizer.get_vocab())
        assert known >= set(vocabulary())
        assert not words & known


def test_dma_intercepts_every_call_and_changes_little(pipe, exact):
    apply(pipe, DMAConfig.preset("b200"))
    drawing, receipt = draw(pipe, [APPLE], [0], SHORT), report(pipe)
    restore(pipe)
    calls = 2 * SHORT["num_inference_steps"]  # with and without the prompt
    assert {(module.intercepted, len(module.fallbacks)) for module in receipt.modules} == {(calls, 0)}
    assert len(receipt.modules) == len(pipe.transformer.attn_processors)
    (psnr,) = paired_metrics(drawing, exact)["psnr_db"]
    assert psnr is not None, "the same picture as without DMA"
    assert psnr > 15


def test_nothing_turns_on_the_demo(pipe):
    drawn = []
    for guard in (None, 0.2):
        apply(pipe, DMAConfig.preset("b200", guard=guard))
        drawn.append(draw(pipe, [APPLE], [0], SHORT).pictures[0])
    receipt = report(pipe)
    restore(pipe)
    assert np.array_equal(*drawn)
    assert all(0.01 < module.relative_error < 0.1 and not module.turned for module in receipt.modules)


def test_the_guard_keeps_the_demo_from_confetti(pipe, exact, monkeypatch):
    """Attention gives noise unless every tile is HIGH: the guard then draws what HIGH draws."""
    genuine, generator = operator._attention, torch.Generator().manual_seed(0)

    def attention(**asked):
        out, *others = genuine(**asked)
        if asked["policies"] != [operator.DENSE]:
            out.normal_(generator=generator)
        return out, *others

    monkeypatch.setattr(operator, "_attention", attention)
    drawn = []
    for fields in ({"policy": operator.DENSE}, {"guard": math.inf}, {"guard": 0.2}):
        apply(pipe, DMAConfig.preset("b200", **fields))
        drawn.append(draw(pipe, [APPLE], [0], SHORT))
    receipt = report(pipe)
    restore(pipe)
    assert all(len(module.turned) == 1 and module.policy == operator.DENSE for module in receipt.modules)
    errors = [paired_metrics(drawing, exact)["latents_relative_l2"][0] for drawing in drawn]
    assert errors[2] == errors[0] < 0.2 < 1 < errors[1]
    assert np.array_equal(drawn[2].pictures[0], drawn[0].pictures[0])


def test_the_prompt_matters(pipe, exact):
    other = draw(pipe, ["a blue whale right of a tree on a green background"], [0], SHORT)
    assert paired_metrics(other, exact)["latents_relative_l2"][0] > 0.5


def test_a_red_apple_is_drawn_left_of_a_cat_on_yellow(pipe):
    apply(pipe, DMAConfig.preset("b200"))
    picture = np.asarray(draw(pipe, [APPLE], [0], CALL).pictures[0]).astype(int)
    restore(pipe)
    red, green, blue = np.moveaxis(picture, -1, 0)
    yellow = (red > 200) & (green > 180) & (blue < 170)
    corners = [yellow[rows, columns] for rows in np.s_[:24, -24:] for columns in np.s_[:24, -24:]]
    assert all(corner.mean() > 0.95 for corner in corners)
    strongly_red = (red > 150) & (green < 90) & (blue < 90)
    left, right = strongly_red[:, :128].sum(), strongly_red[:, 128:].sum()
    assert left > 1000
    assert left > 5 * right
