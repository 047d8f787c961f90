"""Whole stock pipelines: exact is stock, and DMA is the reference put in stock's place."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dma_diffusers import DMAAttnProcessor, DMAConfig, apply, report, restore
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal
from dma_diffusers.kernels.tiling.precision_map import build_map
from tests import tiny_pipelines
from tests.kernels.calls import by_reference

# Calls of two steps by their number of tokens: how many are DMA's, and where their text is.
EXPECTED = {
    "flux": {480 + 19: (6, (0, 19))},
    "sd3": {380 + 77 + 23: (4, (380, 480)), 380: (2, (0, 0))},
    "wan": {297: (8, (0, 0))},  # two calls a step: with the prompt and without
    "hunyuan": {420 + 27: (4, (420, 447))},
}


@pytest.fixture(params=EXPECTED)
def name(request) -> str:
    return request.param


@pytest.fixture
def pipe(name):
    return getattr(tiny_pipelines, name)()


class Reference(TorchFunctionMode):
    """The torch reference in the place of the attention calls that are expected to be intercepted."""

    def __init__(self, expected, policy):
        super().__init__()
        self.expected = expected
        self.policy = policy
        self.calls = dict.fromkeys(expected, 0)
        self.masked_keys = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask")
            call = dict(zip(names, args, strict=False)) | (kwargs or {})
            query, key, value, mask = (call.get(name) for name in names)
            if query.shape[2] == key.shape[2] in self.expected:
                return self.attention(query, key, value, mask)
        return func(*args, **(kwargs or {}))

    def attention(self, query, key, value, mask):
        tokens = key.shape[2]
        self.calls[tokens] += 1
        layout = Layout(tokens, tokens, self.expected[tokens][1])
        key_mask = None if mask is None else mask[:, 0, 0]
        if mask is not None:
            self.masked_keys += int((~mask).sum())
        mapping = build_map(self.policy.classes(layout), layout)
        return by_reference(query, key, value, mapping, "mxfp8", "mxfp4", key_mask=key_mask)[0]


def draw_with_reference(pipe, name, policy) -> tuple[torch.Tensor, Reference]:
    mode = Reference(EXPECTED[name], policy)
    forward = pipe.transformer.forward

    def referenced(*args, **kwargs):
        with mode:
            return forward(*args, **kwargs)

    pipe.transformer.forward = referenced
    try:
        return tiny_pipelines.draw(pipe), mode
    finally:
        del pipe.transformer.forward


def relative_l2(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_exact_is_stock_bit_for_bit(pipe):
    stock = tiny_pipelines.draw(pipe, output_type="pt")
    pipe.transformer.set_attn_processor(DMAAttnProcessor(DMAConfig.preset("exact")))
    assert torch.equal(tiny_pipelines.draw(pipe, output_type="pt"), stock)
    assert {module.lowering for module in report(pipe).modules} == {"stock"}


def test_calls_below_the_length_are_stock_bit_for_bit(pipe):
    stock = tiny_pipelines.draw(pipe)
    apply(pipe, min_length=2000)
    assert torch.equal(tiny_pipelines.draw(pipe), stock)


def test_dma_is_the_reference_in_the_right_calls(pipe, name):
    stock = tiny_pipelines.draw(pipe)
    expected, mode = draw_with_reference(pipe, name, Diagonal(128, 128))
    assert mode.calls == {tokens: calls for tokens, (calls, _) in EXPECTED[name].items()}

    pipe.transformer.set_attn_processor(DMAAttnProcessor(DMAConfig()))
    drawn = tiny_pipelines.draw(pipe)
    assert torch.equal(drawn, expected)
    assert 1e-6 < relative_l2(drawn, stock) < 0.01
    assert sum(module.intercepted for module in report(pipe).modules) == sum(mode.calls.values())


@pytest.mark.parametrize("head_dim", [40, 64])
def test_other_head_dims(name, head_dim):
    pipe = getattr(tiny_pipelines, name)(head_dim)
    expected, _ = draw_with_reference(pipe, name, Diagonal(384, 0))
    apply(pipe, window=384, sink=0)
    assert torch.equal(tiny_pipelines.draw(pipe), expected)


def test_dense_layers_and_dense_steps_are_high_everywhere(pipe, name):
    expected, _ = draw_with_reference(pipe, name, Dense())
    apply(pipe)
    intercepted = sum(1 for module in report(pipe).modules if module.policy)
    apply(pipe, dense_layers=(*range(intercepted - 1), -1))
    assert torch.equal(tiny_pipelines.draw(pipe), expected)
    apply(pipe, dense_above_sigma=0.0)
    assert torch.equal(tiny_pipelines.draw(pipe), expected)
    apply(pipe, dense_above_sigma=1.0)
    assert not torch.equal(tiny_pipelines.draw(pipe), expected)


def test_the_noise_level_is_the_schedulers(pipe, monkeypatch):
    tiny_pipelines.draw(pipe)
    first, second = pipe.scheduler.sigmas[:2].tolist()
    gates = []
    genuine = operator.attention

    def spy(*args, policy, **kwargs):
        gates.append(policy != operator.DENSE)
        return genuine(*args, policy=policy, **kwargs)

    monkeypatch.setattr(operator, "attention", spy)
    apply(pipe, dense_above_sigma=(first + second) / 2)
    tiny_pipelines.draw(pipe)
    half = len(gates) // 2
    assert gates == [False] * half + [True] * half != []


def test_the_padding_of_hunyuan_video_is_not_attended():
    pipe = tiny_pipelines.hunyuan()
    _, mode = draw_with_reference(pipe, "hunyuan", Diagonal())
    assert mode.masked_keys > 0

    # Padding reaches the model only as values, so the video may not follow it beyond K's and V's statistics.
    call = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: call.update(kwargs), with_kwargs=True
    )
    tiny_pipelines.draw(pipe)
    hook.remove()
    apply(pipe)
    mask = call["encoder_attention_mask"].bool()
    call["return_dict"] = False
    with torch.no_grad():
        before = pipe.transformer(**call)[0]
        moved = call["encoder_hidden_states"].clone()
        moved[~mask] += 1
        after = pipe.transformer(**call | {"encoder_hidden_states": moved})[0]
        moved[mask] += 1
        other = pipe.transformer(**call | {"encoder_hidden_states": moved})[0]
    assert relative_l2(after, before) < relative_l2(other, before) / 10


def test_restore_puts_the_same_processors_back(pipe):
    stock = tiny_pipelines.draw(pipe)
    processors = dict(pipe.transformer.attn_processors)
    apply(pipe)
    apply(pipe, low="nvfp4")
    assert not torch.equal(tiny_pipelines.draw(pipe), stock)
    restore(pipe)
    assert torch.equal(tiny_pipelines.draw(pipe), stock)
    assert all(pipe.transformer.attn_processors[key] is value for key, value in processors.items())
    assert not pipe.transformer._forward_pre_hooks
    assert report(pipe).modules == ()


def test_same_seed_same_bits_and_applying_twice_is_applying_once(pipe):
    apply(pipe)
    once = tiny_pipelines.draw(pipe)
    assert torch.equal(tiny_pipelines.draw(pipe), once)
    apply(pipe)
    assert torch.equal(tiny_pipelines.draw(pipe), once)
    assert len(pipe.transformer._forward_pre_hooks) == 1


def test_nothing_else_changes(pipe, name):
    other = getattr(tiny_pipelines, name)()
    stock = tiny_pipelines.draw(other, output_type="pt")
    backend = _AttentionBackendRegistry._active_backend
    sdpa = F.scaled_dot_product_attention
    processors = other_processors(pipe)

    apply(pipe)
    with Calls() as mode:
        picture = tiny_pipelines.draw(pipe, output_type="pt")

    assert not torch.equal(picture, stock)
    assert mode.operator == sum(module.intercepted for module in report(pipe).modules) > 0
    assert other_processors(pipe) == processors
    assert _AttentionBackendRegistry._active_backend is backend
    assert F.scaled_dot_product_attention is sdpa
    assert torch.equal(tiny_pipelines.draw(other, output_type="pt"), stock)


class Calls(TorchDispatchMode):
    """Counts the operator's calls, wherever they come from."""

    operator = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operator += "dma_diffusers" in str(func)
        return func(*args, **(kwargs or {}))


def other_processors(pipe) -> list[int]:
    """Identities of all attention processors outside the transformer."""
    parts = [pipe.components[key] for key in sorted(pipe.components) if key != "transformer"]
    modules = [module for part in parts if isinstance(part, torch.nn.Module) for module in part.modules()]
    return [id(module.processor) for module in modules if hasattr(module, "processor")]
