"""A prepared call lists the tensors that it reads alike before and after it was recorded, whichever are the same."""

import pytest
import torch

pytest.importorskip("triton")

from dma_diffusers.kernels.attention.launch import Inputs, Variant, _own_tensors
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.plan import make
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Diagonal

PLAN = make(Diagonal(), Layout(300, 300))


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(300, 32), torch.randn(300, 32)


SHARED = tables()


@pytest.mark.parametrize("words", [("bf16", "int8"), ("mxfp8", "mxfp4"), ("bf16/fp8", "int8/bf16")])
@pytest.mark.parametrize("masks_keys", [False, True])
@pytest.mark.parametrize(
    "ropes", [(None, None), (tables(), tables()), (SHARED, SHARED)], ids=["none", "two", "one"]
)
@pytest.mark.parametrize("shares", [False, True])
def test_own_tensors_are_those_of_the_inputs(words, masks_keys, ropes, shares):
    q, k, v = torch.randn(3, 1, 2, 300, 64).bfloat16().unbind()
    mask = torch.rand(1, 300) > 0.3 if masks_keys else None
    call = Call(q, q if shares else k, v, mask, None, False, *ropes)
    variant = Variant.of(call, PLAN, Precisions.parse(*words), "faithful", "sm_90")
    inputs = Inputs.of(call, PLAN, variant)
    assert inputs.are_of(call)
    found, own = inputs.tensors, _own_tensors(call, PLAN)
    assert len(found) == len(own) == len({x.data_ptr() for x in own})
    for x, y in zip(found, own, strict=True):
        assert x is y or (
            x.dtype == torch.uint8 and torch.equal(x, y)
        )  # whole tiles of the mask are made anew


def test_copies_are_not_the_calls_own():
    q, k, v = torch.randn(3, 1, 2, 300, 64).unbind()
    call = Call(q, k, v)
    variant = Variant.of(call, PLAN, Precisions.parse("bf16", "int8"), "native", "sm_90")
    assert not Inputs.of(call, PLAN, variant).are_of(call)  # HIGH reads bf16 copies of float32
    odd = Call(*(x.bfloat16().transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)))
    assert not Inputs.of(odd, PLAN, variant).are_of(odd)
