"""Wrapped processors in eager mode: attention intercepted by name, and calls that are left alone as a whole."""

import threading

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.transformers import transformer_flux

from dma_diffusers import DMAConfig, apply
from dma_diffusers.decision import WANTS_GRADIENTS
from dma_diffusers.families import Family
from dma_diffusers.forward import ForwardContext
from dma_diffusers.interception import Interception
from dma_diffusers.kernels import operator
from dma_diffusers.mode import InterceptionMode
from dma_diffusers.rebind import Rebound, can_rebind
from dma_diffusers.stages import stages
from dma_diffusers.wrap import wrap
from tests.dma_diffusers import tiny_models

HEADS, DIM = 2, 16


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


class Model(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        return hidden_states


def flux_attention() -> torch.nn.Module:
    torch.manual_seed(0)
    return transformer_flux.FluxAttention(HEADS * DIM, HEADS, DIM, bias=False, pre_only=True)


def begin(forward: ForwardContext) -> None:
    """Begins a call of the model with five tokens of text."""
    forward.begin(Model().eval(), (torch.empty(0), torch.empty(1, 5, 0)), {})


def attach(module, processor=None, text="first", head_dim=DIM, **fields) -> Interception:
    config, family = DMAConfig.of(None, **{"min_length": 200} | fields), Family(text, single_stream=True)
    forward = ForwardContext(Model(), family, config)
    begin(forward)
    interception = Interception(
        stages(config, family, "Model", ("attn",)).modules["attn"], family, forward, head_dim
    )
    module.processor = wrap(processor or module.processor, interception)
    return interception


def hidden(tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, HEADS * DIM)


@pytest.fixture
def passes(monkeypatch):
    """Counts the calls that were looked at, operation by operation."""
    seen = []
    for cls in (Rebound, InterceptionMode):
        genuine = cls.__init__

        def init(self, *args, genuine=genuine):
            seen.append(type(self))
            genuine(self, *args)

        monkeypatch.setattr(cls, "__init__", init)
    return seen


def test_short_calls_are_looked_at_once_and_counted_each_time(passes):
    module, short, long = flux_attention(), hidden(199), hidden(200)
    stock = module(short)
    interception = attach(module)
    for _ in range(3):
        assert torch.equal(module(short), stock)
    assert len(passes) == 1
    assert interception.fallbacks == {"fewer than 200 keys": 3} and interception.intercepted == 0
    module(long), module(short), module(long)
    assert (interception.intercepted, interception.fallbacks) == (2, {"fewer than 200 keys": 4})
    assert passes == [Rebound] * 3


@pytest.mark.parametrize("dtype, taken", [(torch.bool, 1), (torch.float32, 0)])
def test_a_mask_that_is_refused_refuses_no_other(passes, dtype, taken):
    module, x = flux_attention(), hidden(200)
    interception = attach(module)
    for _ in range(2):
        module(x, attention_mask=torch.ones(1, 1, 200, 200, dtype=torch.bool))
    assert (
        interception.fallbacks == {"a mask that is not boolean over keys alone: each query has its own": 2}
        and len(passes) == 1
    )
    module(x, attention_mask=torch.ones(1, 1, 1, 200, dtype=dtype))
    module(x)
    assert interception.intercepted == 1 + taken


def test_training_is_left_alone_where_stock_is_faster_and_what_follows_is_not(passes, monkeypatch):
    monkeypatch.setattr("dma_diffusers.config.why_not_faster", lambda *_: "")
    module, x = flux_attention(), hidden(200)
    interception = attach(module, lowering="fastest")
    with torch.enable_grad():
        for _ in range(2):
            module(x.clone().requires_grad_()).sum().backward()
    assert interception.fallbacks == {WANTS_GRADIENTS: 2} and len(passes) == 1
    module(x.clone().requires_grad_())
    assert interception.intercepted == 1


def test_frozen_weights_under_gradients_are_looked_at_again(passes, monkeypatch):
    module, x = flux_attention(), hidden(200)
    interception = attach(module, lowering="fastest")
    monkeypatch.setattr("dma_diffusers.config.why_not_faster", lambda *_: "")
    with torch.enable_grad():
        module(x)
        module.requires_grad_(False)
        module(x)
    assert interception.intercepted == 1 and sum(interception.fallbacks.values()) == 1


def test_text_that_is_no_longer_told_is_another_reason():
    module, x = flux_attention(), hidden(100)
    interception = attach(module)
    module(x)
    interception.forward.begin(Model().eval(), (), {})
    module(x)
    assert interception.fallbacks == {
        "fewer than 200 keys": 1, "cross-attention, or a model's call that does not tell where text is": 1,
    }  # fmt: skip


@pytest.mark.parametrize("text, looks", [("none", 1), ("last", 3)])
def test_cross_attention_is_left_alone_where_the_family_has_no_joint_attention(passes, text, looks):
    module = Attention(HEADS * DIM, HEADS * DIM, HEADS, dim_head=DIM)
    interception = attach(module, AttnProcessor2_0(), text)
    for _ in range(3):
        module(hidden(300), encoder_hidden_states=hidden(250))
    assert interception.fallbacks == {"cross-attention: queries and keys are different tokens": 3}
    assert len(passes) == looks


class Helped(transformer_flux.FluxAttnProcessor):
    """A processor of somebody else's, whose helper asks for attention."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        return self.attend(hidden_states.unflatten(-1, (HEADS, DIM)).transpose(1, 2))

    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


def test_other_processors_are_watched_by_a_mode(passes):
    module = flux_attention()
    interception = attach(module, Helped())
    assert not can_rebind(Helped.__call__)
    module(hidden(300))
    assert interception.intercepted == 1 and passes == [InterceptionMode]


@pytest.mark.parametrize("name", tiny_models.CASES)
def test_every_family_is_intercepted_by_name(name, passes):
    case = tiny_models.make(name)
    apply(case.model, min_length=0)
    case.run(case.texts(1)[0])
    assert set(passes) == {InterceptionMode if name == "hunyuan15" else Rebound}


def test_masks_of_two_dimensions_go_through_diffusers_own_dispatch():
    module, x = flux_attention(), hidden(200)
    mask = torch.arange(200)[None] < 190
    stock = module(x, attention_mask=mask)
    interception = attach(module)
    interception.stand_in = lambda q, k, v, key_mask, scale, is_causal, **_: operator.Result(
        F.scaled_dot_product_attention(q, k, v, key_mask[:, None, None]), torch.empty(0), torch.empty(0).int()
    )
    assert torch.equal(module(x, attention_mask=mask), stock)
    assert interception.intercepted == 1


def test_what_others_change_in_a_module_of_diffusers_is_seen(monkeypatch):
    module, x = flux_attention(), hidden(200)
    attach(module)
    before, rope = module(x), (torch.rand(200, DIM), torch.rand(200, DIM))
    monkeypatch.setattr(transformer_flux, "apply_rotary_emb", lambda x, *_, **__: x)
    assert torch.equal(module(x, image_rotary_emb=rope), before)


def test_nothing_changes_in_the_modules_of_diffusers():
    before = dict(vars(transformer_flux)), dict(vars(attention_processor))
    module, x = flux_attention(), hidden(200)
    attach(module)
    module(x)
    other = Attention(HEADS * DIM, heads=HEADS, dim_head=DIM)
    interception = attach(other, AttnProcessor2_0(), "none")
    other(x)
    assert interception.intercepted == 1
    assert before == (vars(transformer_flux), vars(attention_processor))


def test_threads_in_one_module_do_not_meet():
    module = flux_attention()
    inputs = [hidden(tokens) for tokens in (199, 200, 201, 150)]
    attach(module)
    expected = [module(x) for x in inputs]
    interception = attach(module, module.processor.stock)
    failures, barrier = [], threading.Barrier(len(inputs))

    @torch.no_grad()
    def draw(x, out):
        begin(interception.forward)
        barrier.wait()
        for _ in range(20):
            if not torch.equal(module(x), out):
                failures.append(x.shape)

    threads = [threading.Thread(target=draw, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert interception.intercepted and set(interception.fallbacks) == {"fewer than 200 keys"}


def test_an_error_is_the_callers_and_teaches_nothing(monkeypatch):
    module, x = flux_attention(), hidden(100)
    interception = attach(module)

    def refuse(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        module(x)
    assert not interception._stock_kinds
