"""Gradients through the registered operator."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dma_diffusers.kernels import operator
from dma_diffusers.kernels.call import Norms
from tests.kernels.calls import relative_l2

SHAPE = (2, 200, 2, 64)
QUANTISED = {"high": "bf16", "low": "int8", "policy": "diagonal(window=128, sink=0)", "lowering": "reference"}


@pytest.fixture
def qkv() -> list[torch.Tensor]:
    """q, k and v as models have them: tokens before heads, in bf16."""
    torch.manual_seed(0)
    return [torch.randn(SHAPE).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]


def out_of(*qkv: torch.Tensor, **given) -> torch.Tensor:
    return operator.attention(*qkv, **QUANTISED | given).out


def gradients(function, qkv: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The gradients of what the function makes of q, k and v, in their layout."""
    torch.manual_seed(1)
    for x in qkv:
        x.grad = None
    function(*qkv).backward(torch.randn(SHAPE).bfloat16().transpose(1, 2))
    return tuple(x.grad for x in qkv)


@pytest.mark.parametrize("backward", ["bf16", "int8"])
def test_gradients_are_those_of_attention_within_the_formats_error(qkv, backward):
    found = gradients(lambda *qkv: out_of(*qkv, backward=backward), qkv)
    expected = gradients(
        lambda *qkv: F.scaled_dot_product_attention(*(x.float() for x in qkv)).bfloat16(), qkv
    )
    for own, other, x in zip(found, expected, qkv, strict=True):
        assert own.dtype == x.dtype and own.stride() == x.stride()
        assert relative_l2(own, other) < 0.03


def test_int8_products_are_those_that_were_asked_for(qkv):
    in_int8 = gradients(lambda *qkv: out_of(*qkv, backward="int8"), qkv)
    assert all(
        0 < relative_l2(own, other) < 0.03 for own, other in zip(in_int8, gradients(out_of, qkv), strict=True)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_give_the_same_bits(qkv, reentrant):
    plain = gradients(out_of, qkv)
    again = gradients(lambda *qkv: checkpoint(out_of, *qkv, use_reentrant=reentrant), qkv)
    assert all(map(torch.equal, again, plain))


def test_a_training_step_is_one_graph(qkv):
    compiled = torch.compile(out_of, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, gradients(compiled, qkv), gradients(out_of, qkv)))


@pytest.mark.parametrize(
    "high, low, error",
    [("bf16", "bf16/bf16", 1e-2), ("bf16", "int8/bf16", 1e-2), ("int8", "int8/bf16", 2e-2)],
)
def test_gradients_flow_from_the_log_sum_exp_too(qkv, high, low, error):
    """Keys have a mean, which smoothing takes from scores and the log-sum-exp gets back."""
    weights = torch.randn(SHAPE[0], SHAPE[2], SHAPE[1])
    qkv[1] = (qkv[1].detach() + 2).requires_grad_()
    given = QUANTISED | {"high": high, "low": low, "return_lse": True}
    result = operator.attention(*qkv, **given)
    found = torch.autograd.grad((result.lse * weights).sum(), qkv[:2])
    scores = qkv[0].float() @ qkv[1].float().mT / 8
    expected = torch.autograd.grad((scores.logsumexp(-1) * weights).sum(), qkv[:2])
    assert all(relative_l2(own, other) < error for own, other in zip(found, expected, strict=True))


def test_the_log_sum_exp_is_returned_only_where_it_is_wanted(qkv):
    assert operator.attention(*qkv, **QUANTISED).lse.numel() == 0
    with torch.no_grad():
        without = out_of(*qkv)
    assert not without.requires_grad and torch.equal(without, out_of(*qkv))


NORMS = Norms(torch.ones(64), torch.ones(64), 1e-6)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"policy": "diagonal() | skip_softmax(threshold=0.01)"}, "threshold has no backward"),
        ({"norms": NORMS}, "norms have no backward"),
        ({"backward": "fp8"}, "backward must be one of bf16, int8, got 'fp8'"),
        ({"backward": "int8", "low": "mxfp4"}, "classes in int8, int8_tile, int4, got bf16 | mxfp4"),
        ({"backward": "int8", "rotation": "hadamard16"}, "turns no channels, got rotation=hadamard16"),
    ],
)
def test_what_has_no_backward_is_refused(qkv, given, message):
    with pytest.raises(ValueError, match=message):
        out_of(*qkv, **given)
    with torch.no_grad():
        out_of(*qkv, **given)


def test_an_observer_is_not_asked_where_gradients_are_wanted(qkv):
    class Observer:
        def attention(self, call, asked, attend):
            raise AssertionError

    observer = Observer()
    gradients(lambda *qkv: out_of(*qkv, observer=operator.handle_of(observer)), qkv)
