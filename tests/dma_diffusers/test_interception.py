"""One call: the operator is given it as it is, or it falls back to stock, for a reason in words."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dma_diffusers import DMAConfig
from dma_diffusers.decision import WANTS_GRADIENTS
from dma_diffusers.families import Family
from dma_diffusers.forward import ForwardContext
from dma_diffusers.interception import Interception
from dma_diffusers.kernels import operator
from dma_diffusers.mode import InterceptionMode
from dma_diffusers.stages import stages
from tests.kernels.calls import relative_l2

B, H, S, D = 2, 4, 137, 40
DENSE = "dense(everywhere=high)"


class Model(torch.nn.Module):
    def forward(self, hidden_states, encoder_hidden_states=None, timestep=None):
        return hidden_states


def interception(dense=False, **fields) -> Interception:
    config = DMAConfig.of(None, **{"min_length": 0} | fields)
    family = Family("none", timestep_scale=1000)
    found = stages(DMAConfig.of(config, modules={"attn": {"dense": dense}}), family, "Model", ("attn",))
    forward = ForwardContext(Model(), family, config, found)
    forward.begin(Model().eval(), (), {})
    return Interception(found.modules["attn"], family, forward, None)


def qkv(heads=H, kv_heads=H, keys=S, dtype=torch.bfloat16, head_dim=D):
    torch.manual_seed(0)
    q = torch.randn(B, S, heads, head_dim).to(dtype).transpose(1, 2)  # strided, as most models have it
    k, v = (torch.randn(B, kv_heads, keys, head_dim).to(dtype) for _ in range(2))
    return q, k, v


def run(taken: Interception, q, k, v, **kwargs) -> torch.Tensor:
    with InterceptionMode(taken, q.shape[2], 0):
        return F.scaled_dot_product_attention(q, k, v, **kwargs)


def padding() -> torch.Tensor:
    return torch.arange(S) < torch.tensor([[S], [S - 21]])


INTERCEPTED = {
    "plain": ({}, {}),
    "scale": ({"scale": 0.3}, {"scale": 0.3}),
    "causal": ({"is_causal": True}, {"is_causal": True}),
    "mask [B,1,1,S]": ({"attn_mask": padding()[:, None, None]}, {"key_mask": padding()}),
    "mask [1,1,1,S]": (
        {"attn_mask": padding()[1:, None, None]},
        {"key_mask": padding()[1:].expand(B, S)},
    ),
    "mask [1,S]": ({"attn_mask": padding()[1:]}, {"key_mask": padding()[1:].expand(B, S)}),
}


@pytest.mark.parametrize("name", INTERCEPTED)
def test_the_operator_gets_the_call_as_it_is(name):
    given, expected = INTERCEPTED[name]
    taken, (q, k, v) = interception(), qkv()
    out = run(taken, q, k, v, **given)
    assert (taken.intercepted, taken.fallbacks) == (1, {})
    assert torch.equal(out, operator.attention(q, k, v, **expected)[0])
    error = (out - F.scaled_dot_product_attention(q, k, v, **given)).norm() / out.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_grouped_queries(dtype):
    taken, (q, k, v) = interception(), qkv(kv_heads=2, dtype=dtype)
    out = run(taken, q, k, v, enable_gqa=True)
    assert taken.intercepted == 1
    assert out.dtype == dtype
    assert torch.equal(out, operator.attention(q, k, v)[0])


FALLBACKS = {
    "additive mask": ({"attn_mask": torch.zeros(B, 1, 1, S, dtype=torch.bfloat16)}, "mask"),
    "dense mask": ({"attn_mask": torch.ones(S, S, dtype=torch.bool).tril()}, "mask"),
    "mask of each query": ({"attn_mask": padding()[:, None, :, None] & padding()[:, None, None]}, "mask"),
    "mask of each head": ({"attn_mask": padding()[:, None, None].repeat(1, H, 1, 1)}, "mask"),
    "dropout": ({"dropout_p": 0.5}, "dropout"),
    "scale of zero": ({"scale": 0.0}, "a scale that is not a positive number"),
    "negative scale": ({"scale": -0.3}, "a scale that is not a positive number"),
    "scale that is no number": ({"scale": float("nan")}, "a scale that is not a positive number"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_falls_back_to_stock_is_stock(name):
    given, reason = FALLBACKS[name]
    taken, tensors = interception(), qkv()
    torch.manual_seed(1)
    out = run(taken, *tensors, **given)
    torch.manual_seed(1)
    torch.testing.assert_close(
        out, F.scaled_dot_product_attention(*tensors, **given), rtol=0, atol=0, equal_nan=True
    )
    assert taken.intercepted == 0
    assert [calls for key, calls in taken.fallbacks.items() if reason in key] == [1]


def expanded(which: int) -> tuple[torch.Tensor, ...]:
    """q, k and v, one of them a single head in the place of all."""
    return tuple(x[:, :1].expand(x.shape) if index == which else x for index, x in enumerate(qkv()))


@pytest.mark.parametrize(
    "tensors, fields, reason",
    [
        (expanded(0), {}, "share memory"),
        (expanded(1), {}, "share memory"),
        (expanded(2), {}, "share memory"),
        (tuple(x[:1].expand(x.shape) for x in qkv()), {}, "share memory"),
        ((*qkv()[:2], qkv()[2].as_strided((B, H, S, D), (H * S, S, 1, 1))), {}, "share memory"),
        ((qkv()[0], *(x[:1] for x in qkv()[1:])), {}, "different batches"),
        (tuple(x[:0] for x in qkv()), {}, "an empty call"),
        (qkv(keys=S + 1), {}, "cross-attention"),
        (qkv(), {"min_length": S + 1}, f"fewer than {S + 1} keys"),
        (qkv(head_dim=264), {"lowering": "fastest"}, "head_dim 264 is more than 256"),
        (qkv(dtype=torch.float64), {}, "bf16, fp16 or fp32"),
        (tuple(x[0] for x in qkv()), {}, "[batch, heads, tokens, head_dim]"),
        (qkv(), {"lowering": "stock"}, "exact"),
        (qkv(), {"lowering": "fastest"}, "nothing is faster than stock: native: cpu has no block-scaled MMA"),
    ],
)
def test_calls_that_dma_does_not_take(tensors, fields, reason):
    taken = interception(**fields)
    with InterceptionMode(taken, S, 0):
        out = F.scaled_dot_product_attention(*tensors)
    assert torch.equal(out, F.scaled_dot_product_attention(*tensors))
    assert taken.intercepted == 0
    assert [calls for key, calls in taken.fallbacks.items() if reason in key] == [1]


def test_one_expanded_head_is_no_shared_memory():
    taken, (q, k, v) = interception(), qkv(kv_heads=1)
    run(taken, q, k.expand(B, 1, S, D), v, enable_gqa=True)
    assert taken.intercepted == 1


def test_gradients_flow_through_the_operator():
    taken, tensors = interception(high="bf16", low="bf16/bf16"), [x.requires_grad_() for x in qkv()]
    gradient = torch.randn(B, H, S, D).bfloat16()
    expected = torch.autograd.grad(
        F.scaled_dot_product_attention(*(x.float() for x in tensors)), tensors, gradient.float()
    )
    found = torch.autograd.grad(run(taken, *tensors), tensors, gradient)
    assert taken.intercepted == 1 and not taken.fallbacks
    assert all(relative_l2(own, other) < 1e-2 for own, other in zip(found, expected, strict=True))


def test_a_policy_without_a_backward_raises_where_it_was_asked_for(monkeypatch):
    tensors = [x.requires_grad_() for x in qkv()]
    skips = "diagonal() | skip_softmax(threshold=0.01)"
    with pytest.raises(ValueError, match="gradients are wanted: a softmax threshold has no backward"):
        run(interception(policy=skips), *tensors)
    monkeypatch.setattr("dma_diffusers.config.why_not_faster", lambda *_: "")
    faster = interception(policy=skips, lowering="fastest")
    out = run(faster, *tensors)
    assert torch.equal(out, F.scaled_dot_product_attention(*tensors)) and faster.fallbacks == {
        WANTS_GRADIENTS: 1
    }


def test_calls_without_gradients_are_taken_even_if_weights_have_them():
    taken, tensors = interception(), [x.requires_grad_() for x in qkv()]
    with torch.no_grad():
        run(taken, *tensors)
    assert taken.intercepted == 1


def test_an_explicit_lowering_that_cannot_run_raises():
    with pytest.raises(ValueError, match="head_dim"):
        run(interception(lowering="reference"), *qkv(head_dim=264))
    with pytest.raises(ValueError, match="native can't run"):
        run(interception(lowering="native"), *qkv())


def test_a_guider_that_skips_attention_scores_still_does():
    taken, (q, k, v) = interception(), qkv()
    with AttentionScoreSkipFunctionMode():
        out = run(taken, q, k, v)
    assert torch.equal(out, v)
    assert list(taken.fallbacks) == ["a guider skips attention scores"]


@pytest.mark.parametrize("timestep, dense", [(951.0, True), (900.0, False), (1.0, False)])
def test_sigma_above_the_limit_makes_a_step_dense(timestep, dense):
    taken, (q, k, v) = interception(dense_above_sigma=0.9), qkv()
    taken.forward.begin_on_device(Model().eval(), (q,), {"timestep": torch.tensor([0.0, timestep])})
    assert taken.forward.call.stage == (0 if dense else 1)
    assert torch.equal(run(taken, q, k, v), operator.attention(q, k, v, mapped=not dense)[0])


def test_a_dense_layer_stays_dense_in_every_step():
    taken = interception(dense=True, dense_above_sigma=0.9)
    taken.forward.begin_on_device(Model().eval(), (), {"timestep": torch.tensor(1.0)})
    assert taken.own.words == (DENSE,) and taken.configs[taken.forward.call.stage].words == DENSE


def test_positional_arguments_of_the_model_are_understood():
    taken = interception(dense_above_sigma=0.5)
    taken.forward.begin_on_device(
        Model(), (torch.empty(1, 5, 2), torch.empty(1, 7, 2), torch.tensor(700)), {}
    )
    assert (taken.forward.text_length, taken.own.words[taken.forward.call.stage]) == (
        7,
        f"sigma>0.5: {DENSE}",
    )


@pytest.mark.parametrize("protected", [True, False])
def test_text_is_high_unless_that_is_switched_off(protected):
    config = DMAConfig(min_length=0, window=0, sink=0, protect_text=protected)
    family = Family("first")
    forward = ForwardContext(Model(), family, config)
    forward.begin(Model().eval(), (), {})
    taken = Interception(stages(config, family, "Model", ("attn",)).modules["attn"], family, forward, None)
    q, k, v = qkv(keys=384)
    q = k.clone()
    with InterceptionMode(taken, 300, 84):
        out = F.scaled_dot_product_attention(q, k, v)
    text_stop = 84 if protected else 0
    expected = operator.attention(q, k, v, policy="diagonal(window=0, sink=0)", text_stop=text_stop).out
    other = operator.attention(q, k, v, policy="diagonal(window=0, sink=0)", text_stop=84 - text_stop).out
    assert torch.equal(out, expected) and not torch.equal(out, other)
    assert ("without protected text" in taken.receipt("attn", q.device).policy) == (not protected)


def test_a_head_that_no_lowering_takes_raises_unless_the_choice_is_automatic():
    with pytest.raises(ValueError, match="head_dim 264 is more than 256"):
        run(interception(), *qkv(head_dim=264))


class NoWaiting(TorchDispatchMode):
    """Refuses to read a number off a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def inexact(monkeypatch):
    """Sets how many inexact rows each further call of the operator counts, as lowering `faithful` does."""
    genuine, counts = operator.attention, []

    def attention(*args, **kwargs):
        with (
            torch.utils._python_dispatch._disable_current_modes()
        ):  # what the operator reads is its own affair
            result = genuine(*args, **kwargs)
        return result._replace(inexact_rows=torch.tensor([counts.pop(0)], dtype=torch.int32))

    monkeypatch.setattr(operator, "attention", attention)
    return counts


def test_inexact_rows_are_summed_without_waiting_for_them(inexact):
    taken, other = interception(), interception()
    inexact += [3, 0, 2**31 - 1, 1]
    with NoWaiting():
        for _ in range(3):
            run(taken, *qkv())
        run(other, *qkv())
    with pytest.raises(AssertionError), NoWaiting():
        taken.receipt("attn", torch.device("cpu"))
    assert taken.receipt("attn", torch.device("cpu")).inexact_rows == 2**31 + 2
    assert other.receipt("attn", torch.device("cpu")).inexact_rows == 1


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_inexact_rows_are_summed_in_and_out_of_inference_mode(inexact, modes):
    taken = interception()
    inexact += [3, 4]
    for mode in modes:
        with torch.inference_mode(mode):
            run(taken, *qkv())
    assert taken.receipt("attn", torch.device("cpu")).inexact_rows == 7


def test_lowerings_that_store_every_row_exactly_count_none():
    taken = interception()
    run(taken, *qkv())
    assert (taken.intercepted, taken.inexact_rows) == (1, [])
    assert taken.receipt("attn", torch.device("cpu")).inexact_rows == 0
