"""Dense steps and layers: where families have them by default, how many steps they are, and what the receipt says."""

import logging

import numpy as np
import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from dma_diffusers import DMAAttnProcessor, DMAConfig, apply, report
from dma_diffusers.dense import dense_parts
from dma_diffusers.families import FAMILIES, Family
from tests import tiny_pipelines
from tests.tiny_pipelines import draw

FLUX, HUNYUAN = "FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"
WAN, COGVIDEO = "WanTransformer3DModel", "CogVideoXTransformer3DModel"
NEAR = "neighborhood(window=9x8)"
DENSE = "dense(everywhere=high)"
MODULES = tuple(f"blocks.{number}.attn1" for number in range(8))


MU = calculate_shift(4096)  # FLUX.1-dev's at 1024×1024


def flux(steps: int, mu: float = MU):
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.timesteps / 1000


def hunyuan(steps: int, shift: float = 7.0):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    return scheduler.timesteps / 1000


def wan(steps: int, shift: float = 5.0):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler.timesteps / 1000


def cogvideo(steps: int):
    scheduler = CogVideoXDDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler.timesteps / 1000


def dense_steps(kind: str, levels: torch.Tensor) -> tuple[int, int]:
    """The numbers of steps that are dense by default, and with quality first."""
    family = FAMILIES[kind]
    return tuple(
        int((levels > found.above_sigma).sum()) for found in (family.dense_first, family.quality_first)
    )


# The schedules for which steps were published, and how many of them; the second are NVIDIA's by level for Wan, where
# its table has 14, and our judgement for FLUX and HunyuanVideo.
PUBLISHED = {
    FLUX: (flux(28), (9, 14)),
    HUNYUAN: (hunyuan(50), (15, 20)),
    WAN: (wan(40), (14, 18)),
    COGVIDEO: (cogvideo(50), (10, 13)),
}


def test_published_steps_are_dense_by_the_familys_schedule():
    for first in ("dense_first", "quality_first"):
        assert {kind for kind, family in FAMILIES.items() if getattr(family, first)} == set(PUBLISHED)
    for kind, (levels, steps) in PUBLISHED.items():
        assert dense_steps(kind, levels) == steps, kind
    assert dense_steps(WAN, wan(40, shift=3)) == (10, 14)  # Wan 2.2's own shift
    assert {kind for kind, family in FAMILIES.items() if family.published} == {FLUX, HUNYUAN}


def test_a_timestep_in_bf16_is_not_compared_in_bf16():
    for kind, scale in ((FLUX, 1), (HUNYUAN, 1000)):
        timestep = torch.tensor([0.904 * scale]).bfloat16()
        assert FAMILIES[kind].noise_level(timestep) > 0.901  # in bf16 both are .9023


def test_of_few_steps_those_at_high_noise_are_dense():
    """Distilled models: what counts is the level, so a schedule that stays at high noise is dense for longer."""
    assert dense_steps(FLUX, flux(4, mu=0)) == (1, 1)  # FLUX.1-schnell
    assert dense_steps(FLUX, flux(8)) == (3, 4)
    assert dense_steps(HUNYUAN, hunyuan(6, shift=17)) == (3, 4)
    assert dense_steps(HUNYUAN, hunyuan(8)) == (3, 4)
    found = {(steps, shift): dense_steps(WAN, wan(steps, shift)) for steps in (4, 8) for shift in (3, 5, 8)}
    assert found == {
        (4, 3): (1, 2), (4, 5): (2, 2), (4, 8): (2, 3),
        (8, 3): (2, 3), (8, 5): (3, 4), (8, 8): (4, 5),
    }  # fmt: skip


def parts(kind: str, available=MODULES, **fields):
    return dense_parts(DMAConfig(**fields), FAMILIES.get(kind, Family("none")), kind, available)


def names(*numbers: int) -> set[str]:
    return {MODULES[number] for number in numbers}


@pytest.mark.parametrize(("policy", "leaves_out"), [
    (NEAR, True), ("skip_softmax(threshold=0.01)", True),
    (f"{NEAR} | importance(budget=0.1)", True), ("importance(budget=0.1) | skip_softmax(threshold=0.01)", True),
    ("diagonal(near=grid) | skip_softmax(threshold=0.01)", True),
    ("importance(budget=0.1, beyond=skip)", True), ("importance(budget=0.1, beyond=mean)", True),
    (f"{NEAR} | diagonal(near=grid)", False), ("neighborhood(high=9x8)", False),
    ("diagonal(window=384)", False), ("importance(budget=0.1)", False), ("dense(everywhere=low)", False),
])  # fmt: skip
def test_defaults_are_for_policies_that_leave_pairs_out(policy, leaves_out):
    found = parts(WAN, policy=policy)
    assert (found.above_sigma, found.modules) == ((0.907, names(0)) if leaves_out else (None, set()))
    assert ("Sparse VideoGen" in found.note) == leaves_out


def test_what_is_said_replaces_the_familys():
    assert parts(WAN, policy=NEAR, dense_above_sigma=1, dense_layers=()) == (None, set(), "")
    found = parts(WAN, policy=NEAR, dense_layers=[2, -1])
    assert (found.above_sigma, found.modules) == (0.907, names(2, -1))
    assert found.note.startswith("dense steps by default: 14 of 40 steps")
    found = parts(WAN, policy=NEAR, dense_above_sigma=0.5)
    assert (found.above_sigma, found.modules) == (0.5, names(0))
    assert found.note.startswith("dense layers by default: ")
    assert parts(FLUX, policy=NEAR, dense_above_sigma=0.5) == (0.5, set(), "")  # it has no such layers
    assert parts(WAN, dense_above_sigma=0.5, dense_layers=[1]) == (0.5, names(1), "")


def test_quality_first_widens_them():
    found = parts(WAN, policy=NEAR, quality_first=True)
    assert (found.above_sigma, found.modules) == (0.86, names(0, 1, -2, -1))
    assert found.note.startswith("dense steps and layers for quality first: ")
    assert parts(WAN, quality_first=True) == (None, set(), "")
    for family in filter(lambda family: family.dense_first, FAMILIES.values()):
        assert family.quality_first.above_sigma < family.dense_first.above_sigma
        assert set(family.quality_first.layers) >= set(family.dense_first.layers)


def test_families_of_which_nothing_is_known():
    found = parts("SD3Transformer2DModel", policy=NEAR)
    assert found[:2] == (None, set())
    assert found.note == "no dense steps or layers by default: none are known for SD3Transformer2DModel"
    assert parts("SD3Transformer2DModel").note == ""
    with pytest.raises(
        ValueError, match="quality_first: no dense steps or layers are known for Unknown: give dense_above"
    ):
        parts("Unknown", policy=NEAR, quality_first=True)
    assert parts("Unknown", policy=NEAR, quality_first=True, dense_above_sigma=0.5, dense_layers=()) == (
        0.5, set(), "",
    )  # fmt: skip


def test_modules_that_leave_nothing_out_and_layers_that_a_model_has_not():
    own = {MODULES[0]: {"window": 384}, MODULES[3]: {"dense": True}}
    assert parts(WAN, policy=NEAR, modules=own).modules == names(3)
    assert parts(WAN, modules=own | {MODULES[1]: {"policy": NEAR}}).above_sigma == 0.907
    assert parts(WAN, MODULES[:1], policy=NEAR, quality_first=True).modules == names(0)


def test_the_receipt_says_how_much_was_dense_and_whose_choice_it_is(caplog):
    pipe = tiny_pipelines.wan()
    with caplog.at_level(logging.INFO, "dma_diffusers"):
        apply(pipe, policy="neighborhood(window=2x7x5)")
    draw(pipe, num_inference_steps=4)
    steps = int((pipe.scheduler.sigmas[:-1] > 0.907).sum())
    source = FAMILIES[WAN].dense_first.source
    assert f"WanTransformer3DModel: dense steps and layers by default: {source}" in caplog.text
    first, second = (module for module in report(pipe).modules if module.policy)
    assert (first.policy, first.by_entry) == (DENSE, {})
    above, rest = f"sigma>0.907: {DENSE}", "neighborhood(window=2x7x5)"
    assert second.policy == f"{above}; {rest}"
    assert 0 < steps < 4 and second.by_entry == {above: 2 * steps, rest: 8 - 2 * steps}  # two calls a step
    said = str(report(pipe))
    assert f"  note: dense steps and layers by default: {source}" in said
    assert f"  8 calls intercepted: {2 * steps} of {above}; {8 - 2 * steps} of {rest}" in said

    apply(pipe, policy="neighborhood(window=2x7x5)", dense_above_sigma=1, dense_layers=())
    draw(pipe)
    assert "sigma" not in str(report(pipe)) and "note" not in str(report(pipe))


def test_of_two_experts_the_one_for_high_noise_has_the_dense_steps():
    """As in Wan 2.2, at its own shift: steps at .999, .9, .75 and .5, two calls each."""
    pipe = tiny_pipelines.wan()
    pipe.transformer_2 = tiny_pipelines.wan().transformer
    pipe.register_to_config(boundary_ratio=0.875)
    pipe.scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    apply(pipe, policy="neighborhood(window=2x7x5)")
    draw(pipe, num_inference_steps=4)
    found = {module.module: module for module in report(pipe).modules}
    high, low = found["transformer.blocks.1.attn1"], found["transformer_2.blocks.1.attn1"]
    assert (high.intercepted, *high.by_entry.values()) == (4, 2, 2)
    assert (low.intercepted, *low.by_entry.values()) == (4, 0, 4)
    assert found["transformer_2.blocks.0.attn1"].policy == DENSE


def test_layers_are_those_of_the_model_whichever_modules_are_chosen():
    pipe = tiny_pipelines.wan()
    processors = pipe.transformer.attn_processors
    chosen = "blocks.1.attn1.processor"
    ours = DMAAttnProcessor(DMAConfig(policy="neighborhood(window=2x7x5)"))
    pipe.transformer.set_attn_processor(
        {name: ours if name == chosen else processor for name, processor in processors.items()}
    )
    (module,) = (module for module in report(pipe).modules if module.policy)
    assert (module.module, module.policy) == (
        "transformer.blocks.1.attn1",
        f"sigma>0.907: {DENSE}; neighborhood(window=2x7x5)",
    )
