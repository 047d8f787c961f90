"""DMA beside guidance: skipped layers and scores, smoothed energy, PAG, and prompts in one batch or one by one."""

import pytest
import torch
from diffusers import SmoothedEnergyGuidance, StableDiffusion3PAGPipeline, StableDiffusion3Pipeline
from diffusers.hooks import LayerSkipConfig, SmoothedEnergyGuidanceConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook

from dma_diffusers import apply, report, restore
from dma_diffusers.attach import UNSEEN
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.dma_diffusers.combining import LOW, combine, counted_operator, nothing, of_model
from tests.tiny_pipelines import draw


def skip_block(model) -> None:
    apply_layer_skip(model, LayerSkipConfig([1]))


def skip_attention(model) -> None:
    apply_layer_skip(model, LayerSkipConfig([1], skip_ff=False))


def skip_scores(model) -> None:
    apply_layer_skip(
        model, LayerSkipConfig([1], skip_attention=False, skip_ff=False, skip_attention_scores=True)
    )


def smooth(model) -> None:
    _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig([1]), blur_sigma=1.0)


HOOKED = {  # where Diffusers can do it, the operator's calls without the hook, and with it
    (skip_block, "wan"): (2, 1), (skip_block, "qwen"): (2, 1), (skip_block, "cogvideox"): (2, 1),
    (skip_block, "ltx"): (2, 1), (skip_block, "mochi"): (2, 1), (skip_attention, "z_image"): (2, 1),
    (skip_scores, "qwen"): (2, 1), (skip_scores, "z_image"): (2, 1),
    (smooth, "wan"): (2, 2), (smooth, "qwen"): (2, 2), (smooth, "cogvideox"): (2, 2), (smooth, "z_image"): (2, 2),
    (smooth, "sd3"): (3, 3), (smooth, "hunyuan15"): (2, 2),
}  # fmt: skip


@pytest.mark.parametrize("applied_after", [0, 2])
@pytest.mark.parametrize(("hook", "name"), HOOKED)
def test_layers_are_hooked(hook, name, applied_after):
    build, run = of_model(name)
    without, calls = HOOKED[hook, name]
    combine(build, [(nothing, without), (hook, calls), (nothing, calls)], run, applied_after)
    hooked = build()
    hook(hooked)
    assert not torch.equal(run(hooked), run(build()))


@pytest.mark.parametrize("name", ["qwen", "z_image"])
def test_scores_are_skipped_in_a_compiled_model(name):
    build, run = of_model(name)
    plain, model = run(build()), build()
    skip_scores(model)
    stock = run(model)
    apply(model, **LOW)
    ours = run(model)
    assert 1e-5 * stock.norm() < (ours - stock).norm() < (plain - stock).norm() / 5
    nodes = []

    def backend(graph, inputs):
        nodes.append(sum("dma_diffusers.attention" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    model.compile(backend=backend, fullgraph=True)
    assert torch.equal(run(model), ours)
    assert sum(nodes) == 1  # the other layer's scores are skipped
    restore(model)
    assert torch.equal(run(model), stock)


def hunyuan15_with_smoothed_energy():
    pipe = tiny_pipelines.hunyuan15()
    pipe.guider = SmoothedEnergyGuidance(
        seg_guidance_layers=[1], seg_guidance_start=0.0, seg_guidance_stop=1.0, seg_blur_sigma=1.0
    )
    return pipe


def test_a_guider_smooths_energy_in_a_pipeline():
    combine(hunyuan15_with_smoothed_energy, [(nothing, 10), (nothing, 10)])  # 4 calls without the guider's
    assert not torch.equal(draw(hunyuan15_with_smoothed_energy()), draw(tiny_pipelines.hunyuan15()))


def test_layers_are_skipped_in_a_pipeline():
    def run(pipe):
        return draw(pipe, skip_guidance_layers=[1], skip_layer_guidance_start=0, skip_layer_guidance_stop=1)

    combine(
        tiny_pipelines.sd3, [(nothing, 8), (nothing, 8)], run
    )  # 6 calls, and 2 of the block that is not skipped


def sd3_with_pag() -> StableDiffusion3PAGPipeline:
    parts = tiny_pipelines.sd3().components
    parts = {name: parts[name] for name in parts if name not in ("image_encoder", "feature_extractor")}
    pipe = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_pag_takes_its_layers_and_gives_them_back(monkeypatch):
    calls = tiny_pipelines.CALLS[StableDiffusion3Pipeline]
    monkeypatch.setitem(tiny_pipelines.CALLS, StableDiffusion3PAGPipeline, calls)
    combine(
        sd3_with_pag, [(nothing, 4), (nothing, 4)]
    )  # block 0 has two modules, block 1 has PAG's processor
    pipe = sd3_with_pag()
    plain = StableDiffusion3Pipeline(**pipe.components)
    assert not torch.equal(draw(pipe), draw(plain))
    apply(pipe, **LOW)
    draw(pipe)
    notes = {module.module.removeprefix("transformer."): module.notes for module in report(pipe).modules}
    assert notes == {
        "transformer_blocks.0.attn": (), "transformer_blocks.0.attn2": (), "transformer_blocks.1.attn": (UNSEEN,)
    }  # fmt: skip
    with counted_operator(6):
        draw(plain)


def of_batch(argument, entry: int):
    """Return one entry of an argument of a batch of two; others as they are."""
    is_batch = isinstance(argument, torch.Tensor | list) and len(argument) == 2
    return argument[entry : entry + 1] if is_batch else argument


@torch.no_grad()
@pytest.mark.parametrize("name", ["flux", "hunyuan", "qwen", "sd3", "wan"])
def test_prompts_in_one_batch_are_prompts_one_by_one(name):
    case = tiny_models.make(name)
    texts = torch.cat([text[:1] for text in case.texts(2)])
    latents = case.latents[:1].expand(2, *case.latents.shape[1:])
    for key, value in case.inputs.items():
        if isinstance(value, torch.Tensor | list) and len(value) == 1:
            case.inputs[key] = value * 2 if isinstance(value, list) else value.expand(2, *value.shape[1:])
    call = case.call(texts, latents)

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        batch = case.model(**call, return_dict=False)[0]
        alone = [{key: of_batch(value, entry) for key, value in call.items()} for entry in range(2)]
        return batch, torch.cat([case.model(**each, return_dict=False)[0] for each in alone])

    stock, _ = both()
    apply(case.model, **LOW)
    with counted_operator(3 * (case.joint_calls + case.image_calls)):
        batch, alone = both()
    error = (batch - stock).norm()
    assert error > 1e-5 * stock.norm()
    assert (batch - alone).norm() < error / 10
    restore(case.model)
    assert torch.equal(both()[0], stock)
