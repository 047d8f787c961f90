"""Test the embedded demo video model: its files, its prompts, and that it draws what a prompt says."""

import json

import numpy as np
import pytest
from diffusers import WanPipeline

from dma_diffusers.attach import apply, report, restore
from dma_diffusers.pipelines.demo_video_training.prompts import held_out_clips, is_held_out, prompt
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.load import DEMO_MODEL, recommended_call

DEMO = DEMO_MODEL.parents[1] / "demo_video"
PROMPTS = [json.loads(line)["prompt"] for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
CALL = recommended_call(DEMO / "wan")


@pytest.fixture(scope="module")
def pipe():
    pipe = WanPipeline.from_pretrained(DEMO / "wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def exact(pipe):
    return draw(pipe, ["a rocket moving left on a green background"], [0], CALL | {"num_inference_steps": 6})


def test_files_are_small():
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 16e6


def test_prompts_are_held_out_pairs():
    clips = held_out_clips()
    assert [prompt(*clip) for clip in clips] == PROMPTS
    assert len(set(PROMPTS)) == 40
    assert all(is_held_out(concept, motion) for concept, motion, _ in clips)


def test_a_clip_has_three_thousand_tokens(pipe):
    frames = (CALL["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    side = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
    assert frames * (CALL["height"] // side) * (CALL["width"] // side) == 3456


def test_a_rocket_moves_left_on_green(exact):
    (clip,) = exact.frames.astype(np.float32)
    assert clip.shape == (33, 128, 192, 3)
    red, green, blue = clip[:, :8, :8].mean((0, 1, 2))
    assert green > max(red, blue) + 40
    differs = np.abs(clip - clip[:, :8, :8].mean((1, 2), keepdims=True)).sum(3) > 60
    columns = np.array([np.nonzero(frame)[1].mean() for frame in differs])
    assert columns[0] - columns[-1] > 60
    assert (np.diff(columns[::4]) < 2).all()


def test_low_precision_stays_near_and_is_restored(pipe):
    call = CALL | {"num_inference_steps": 1, "num_frames": 9}
    stock = draw(pipe, PROMPTS[:1], [0], call)
    apply(pipe)
    coarse = draw(pipe, PROMPTS[:1], [0], call)
    intercepted = [module.module for module in report(pipe).modules if module.intercepted]
    restore(pipe)
    assert intercepted == [f"transformer.blocks.{i}.attn1" for i in range(4)]
    error = (coarse.latents - stock.latents).norm() / stock.latents.norm()
    assert 1e-3 < error < 0.2
    assert (draw(pipe, PROMPTS[:1], [0], call).frames == stock.frames).all()
