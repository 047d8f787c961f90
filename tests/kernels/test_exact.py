"""Exact attention of a few rows is float64 attention over everything, whatever a call has."""

import math

import pytest
import torch

from dma_diffusers.kernels.attention import exact
from dma_diffusers.kernels.attention.exact import exact_rows
from dma_diffusers.kernels.call import Call, Norms
from tests.kernels.oracle import normalised, rotated

ROUNDING = 1e-5
"""What float32 may add: scores come to 16, and how products are summed depends on the processor."""


def make(**fields) -> Call:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 173, 32), torch.randn(2, 3, 173, 32), torch.randn(2, 3, 173, 32)
    return Call(q, k, v, **fields)


def angles() -> tuple[torch.Tensor, torch.Tensor]:
    turned = torch.rand(173, 16) * 6
    return turned.cos(), turned.sin()


def norms(rounds_twice: bool) -> Norms:
    return Norms(*(torch.rand(2, 32) + 0.5), 1e-6, 20, *(torch.rand(2, 32) + 0.5), rounds_twice)


def mask() -> torch.Tensor:
    seen = torch.rand(2, 173) > 0.4
    seen[1] = False  # no query of this entry sees a key
    return seen


FIELDS = {
    "plain": dict,
    "scale": lambda: {"scale": 0.5},
    "mask": lambda: {"key_mask": mask()},
    "causal": lambda: {"is_causal": True},
    "angles": lambda: {"q_rope": angles(), "k_rope": angles()},
    "norms": lambda: {"norms": norms(False), "q_rope": angles()},
    "norms that round twice, mask": lambda: {"norms": norms(True), "key_mask": mask(), "is_causal": True},
}


def expected(call: Call) -> torch.Tensor:
    """Attention of all rows in float64, step by step."""
    q, k, v = call.q, call.k, call.v
    if call.norms is not None:
        q = normalised(q, call.norms.q, call.norms.q_first, call.norms)
        k = normalised(k, call.norms.k, call.norms.k_first, call.norms)
    q, k = rotated(q, call.q_rope).double(), rotated(k, call.k_rope).double()
    k, v = (x.repeat_interleave(2, 1).double() for x in (k, v))
    hidden = torch.zeros(2, 1, 173, 173, dtype=torch.bool)
    if call.key_mask is not None:
        hidden |= ~call.key_mask[:, None, None]
    if call.is_causal:
        hidden |= torch.ones(173, 173, dtype=torch.bool).triu(1)
    p = (q @ k.mT * call.scale).masked_fill(hidden, -math.inf).softmax(-1)
    return p.masked_fill(hidden.all(-1, keepdim=True), 0) @ v


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("at_once", [1, 2**24])
@pytest.mark.parametrize("rows", [range(0, 173), range(5, 173, 21), range(172, 173)], ids=len)
def test_rows_are_those_of_everything(name, at_once, rows, monkeypatch):
    monkeypatch.setattr(exact, "MOST_KEYS", at_once)  # each head alone, or all at once
    call = make(**FIELDS[name]())
    torch.testing.assert_close(
        exact_rows(call, rows).double(), expected(call)[:, :, rows], rtol=0, atol=ROUNDING
    )


def test_what_is_hidden_may_be_anything():
    seen = mask()
    call = make(key_mask=seen)
    clean = exact_rows(call, range(0, 173, 9))
    hidden = ~seen[:, None].expand(2, 3, 173)
    call.k[hidden], call.v[hidden] = math.nan, math.inf
    assert torch.equal(exact_rows(call, range(0, 173, 9)), clean)


def test_bad_numbers_stay_bad():
    call = make()
    call.k[0, 0, 3] = math.nan
    found = exact_rows(call, range(4)).isnan()
    assert found[0, :2].all() and not found[0, 2:].any() and not found[1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_in_float32_for_narrow_inputs_also_under_autocast(dtype):
    call = make()
    call = Call(*(x.to(dtype) for x in (call.q, call.k, call.v)))
    with torch.autocast("cpu", torch.bfloat16):
        found = exact_rows(call, range(0, 173, 30))
    torch.testing.assert_close(found.double(), expected(call)[:, :, 0:173:30], rtol=0, atol=ROUNDING)
