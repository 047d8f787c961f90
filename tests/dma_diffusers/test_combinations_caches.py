"""DMA beside caches of Diffusers, which leave out blocks or attention in some steps."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
)

from dma_diffusers import apply
from tests import tiny_pipelines
from tests.dma_diffusers.combining import LOW, combine, nothing, of_model
from tests.tiny_pipelines import draw

STEPS = 6
CALLS = {"flux": 3, "wan": 4, "hunyuan": 2, "cogvideox": 2}  # of the operator, in a step without a cache


def run(pipe) -> torch.Tensor:
    return draw(pipe, num_inference_steps=STEPS)


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=10)  # blocks but the first run in the first step alone


def broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe.current_timestep
    )


def faster(pipe):
    has_both_prompts = "CogVideoX" in type(pipe).__name__  # in one batch
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901), attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW" if has_both_prompts else "BCFHW", is_guidance_distilled=not has_both_prompts,
        current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip


def taylor(pipe):
    return TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*blocks.*attn\d?"],
    )  # fmt: skip


def magnitude(pipe):
    return MagCacheConfig(mag_ratios=[1.0] * STEPS, num_inference_steps=STEPS)


def sea(pipe):
    return SeaCacheConfig(threshold=10)


# The operator's calls in a drawing with the cache.
CACHED = {
    (first_block, "flux"): 8, (first_block, "wan"): 14, (first_block, "hunyuan"): 7, (first_block, "cogvideox"): 7,
    (broadcast, "flux"): 12, (broadcast, "wan"): 22, (broadcast, "hunyuan"): 10, (broadcast, "cogvideox"): 8,
    (faster, "flux"): 9, (faster, "wan"): 18, (faster, "hunyuan"): 8, (faster, "cogvideox"): 10,
    (taylor, "flux"): 9, (taylor, "wan"): 12, (taylor, "hunyuan"): 6, (taylor, "cogvideox"): 6,
    (magnitude, "flux"): 6, (magnitude, "wan"): 8, (magnitude, "hunyuan"): 4, (magnitude, "cogvideox"): 4,
    (sea, "wan"): 12,
}  # fmt: skip


def enabled(cache):
    return lambda pipe: pipe.transformer.enable_cache(cache(pipe))


def disabled(pipe) -> None:
    pipe.transformer.disable_cache()


@pytest.mark.parametrize(("cache", "name"), CACHED)
def test_a_cache_is_enabled_and_disabled_under_dma(cache, name):
    steps = [(enabled(cache), CACHED[cache, name]), (disabled, CALLS[name] * STEPS)]
    combine(getattr(tiny_pipelines, name), steps, run)


@pytest.mark.parametrize("cache", [first_block, broadcast, faster, taylor, magnitude, sea])
def test_dma_is_applied_where_a_cache_is_enabled(cache):
    steps = [(enabled(cache), 0), (nothing, CACHED[cache, "wan"])]
    combine(tiny_pipelines.wan, steps, run, applied_after=1)


def test_keys_of_the_text_are_cached():
    build, run_once = of_model("nucleus")

    def run_twice(model) -> torch.Tensor:
        with model.cache_context("cond"):
            run_once(model)
            return run_once(model)

    def enable(model) -> None:
        model.enable_cache(TextKVCacheConfig())

    combine(build, [(nothing, 4), (enable, 4), (lambda model: model.disable_cache(), 4)], run_twice)
    model = build()
    enable(model)
    apply(model, **LOW)
    projected = []
    model.transformer_blocks[0].attn.add_k_proj.register_forward_hook(lambda *_: projected.append(True))
    run_twice(model)
    assert len(projected) == 1
