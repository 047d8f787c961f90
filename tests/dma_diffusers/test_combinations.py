"""DMA beside dtypes, memory formats, modes, attention backends, other pipelines and short schedules."""

import contextlib

import pytest
import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    attention_backend,
)

from dma_diffusers import DMAConfig, apply, report, restore
from tests import tiny_pipelines
from tests.dma_diffusers.combining import LOW, combine, counted_operator, nothing, of_model
from tests.tiny_pipelines import draw

CALLS = {"flux": 6, "sd3": 6, "wan": 8, "hunyuan": 4}  # of the operator, in a drawing of two steps


@pytest.mark.parametrize(("dtype", "applied_after"), [(torch.bfloat16, 0), (torch.float16, 1)])
@pytest.mark.parametrize("name", CALLS)
def test_half_precision(name, dtype, applied_after):
    steps = [(lambda pipe: pipe.to(dtype), CALLS[name]), (nothing, CALLS[name])]
    combine(getattr(tiny_pipelines, name), steps, applied_after=applied_after)


@pytest.mark.parametrize("name", CALLS)
def test_double_precision_is_left_to_stock_with_a_reason(name):
    pipe = getattr(tiny_pipelines, name)().to(torch.float64)
    stock = draw(pipe)
    apply(pipe, **LOW)
    with counted_operator(0):
        assert torch.equal(draw(pipe), stock)
    reasons = {reason for module in report(pipe).modules if module.policy for reason in module.fallbacks}
    assert reasons == {"q, k and v are not [batch, heads, tokens, head_dim] in bf16, fp16 or fp32"}


@pytest.mark.parametrize(
    ("name", "memory_format"), [("sd3", torch.channels_last), ("wan", torch.channels_last_3d)]
)
def test_channels_come_last(name, memory_format):
    def step(pipe) -> None:
        pipe.transformer.to(memory_format=memory_format)

    combine(getattr(tiny_pipelines, name), [(step, CALLS[name]), (nothing, CALLS[name])])


CONTEXTS = {
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize(("name", "calls"), {"flux": 3, "wan": 2, "sd3": 3, "qwen": 2}.items())
def test_contexts_of_torch(name, calls, context):
    build, run = of_model(name)

    def run_inside(model) -> torch.Tensor:
        with CONTEXTS[context]():
            return run(model)

    combine(build, [(nothing, calls), (nothing, calls)], run_inside)


def test_two_pipelines_know_nothing_of_each_other():
    first, second, stock = (tiny_pipelines.flux() for _ in range(3))
    expected = draw(stock)
    apply(first, low="nvfp4", min_length=0)
    alone = draw(first)
    apply(second, **LOW)
    other = draw(second)
    assert not torch.equal(alone, other)
    assert torch.equal(draw(first), alone) and torch.equal(draw(stock), expected)
    restore(second)
    assert torch.equal(draw(second), expected) and torch.equal(draw(first), alone)
    assert [module.intercepted for module in report(first).modules] == [6, 6, 6]
    assert not report(stock).modules


def test_two_pipelines_share_a_transformer():
    first, second = tiny_pipelines.flux(), tiny_pipelines.flux()
    second.transformer = first.transformer
    stock = draw(second)
    apply(first, **LOW)
    with counted_operator(6):
        assert not torch.equal(draw(second), stock)
    restore(second)
    assert torch.equal(draw(first), stock)


@pytest.mark.parametrize("taken", [("transformer",), ("transformer_2",), ("transformer", "transformer_2")])
def test_one_or_both_of_two_transformers(taken):
    pipe = tiny_pipelines.wan22()
    stock = draw(pipe)
    for name in taken:
        apply(getattr(pipe, name), **LOW)
    with counted_operator(4 * len(taken)):  # one step each, of two blocks, with the prompt and without
        assert not torch.equal(draw(pipe), stock)
    assert {module.module.partition(".")[0] for module in report(pipe).modules} == set(taken)
    restore(pipe)
    assert torch.equal(draw(pipe), stock)


def four_steps(pipe) -> torch.Tensor:
    """Draw as a distilled model does, which has its own noise levels and no guidance."""
    return draw(pipe, sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4, guidance_scale=0.0)


@pytest.mark.parametrize(("name", "calls"), [("flux", 12), ("sd3", 12), ("z_image", 12), ("hunyuan", 8)])
def test_distilled_schedules(name, calls):
    combine(getattr(tiny_pipelines, name), [(nothing, calls), (nothing, calls)], four_steps)


def test_dense_steps_are_those_of_a_distilled_schedule():
    pipe = tiny_pipelines.flux()
    apply(pipe, min_length=0, dense_above_sigma=0.6)
    four_steps(pipe)
    assert [(module.intercepted, *module.by_entry.values()) for module in report(pipe).modules] == [
        (4, 2, 2)
    ] * 3


@pytest.fixture
def of_process():
    """Keep the attention backend of the process, which a model's choice changes too."""
    active = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)


@pytest.mark.parametrize("order", ["before", "after", "around"])
@pytest.mark.parametrize(
    ("name", "backend"),  # flex does not ask for scaled_dot_product_attention
    [("flux", "flex"), ("wan", "flex"), ("hunyuan", "flex"), ("flux", "_native_math")],
)
def test_a_backend_is_for_what_falls_back(name, backend, order, of_process):
    pipe = getattr(tiny_pipelines, name)()
    native = draw(pipe)
    apply(pipe, **LOW)
    ours = draw(pipe)
    if order == "before":
        restore(pipe)
    around = contextlib.nullcontext()
    if order == "around":
        around = attention_backend(backend)
    else:
        pipe.transformer.set_attention_backend(backend)
    if order == "before":
        apply(pipe, **LOW)
    with around:
        with counted_operator(CALLS[name]):
            drawn = draw(pipe)
        assert (drawn - ours).norm() < 1e-5 * ours.norm()  # cross-attention has the backend
        assert (drawn - native).norm() > 1e-4 * native.norm()
        restore(pipe)
        stock = draw(pipe)
        assert not torch.equal(stock, native)
        apply(pipe, DMAConfig.preset("exact"))
        with counted_operator(0):
            assert torch.equal(draw(pipe), stock)


@pytest.mark.parametrize("name", ["flux", "wan", "hunyuan"])
def test_a_backend_is_reset_under_dma(name, of_process):
    pipe = getattr(tiny_pipelines, name)()
    native = draw(pipe)
    pipe.transformer.set_attention_backend("flex")
    apply(pipe, **LOW)
    pipe.transformer.reset_attention_backend()
    _AttentionBackendRegistry.set_active_backend(
        AttentionBackendName.NATIVE
    )  # Diffusers resets the model alone
    with counted_operator(CALLS[name]):
        assert not torch.equal(draw(pipe), native)
    restore(pipe)
    assert torch.equal(draw(pipe), native)
