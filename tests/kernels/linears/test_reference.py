"""The reference of linear layers against float64 and independent codecs."""

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.linears.reference import linear, quantised_input
from dma_diffusers.kernels.linears.weight import quantise
from tests.kernels.linears.cases import (
    BLOCK_GROUPS,
    GROUPS,
    permutation_of,
    relative_l2,
    rows_of,
    weight_of,
)

ELEMENTS = {
    "mxfp4": (ml_dtypes.float4_e2m1fn, 6.0), "mxfp6_e2m3": (ml_dtypes.float6_e2m3fn, 7.5),
    "mxfp6_e3m2": (ml_dtypes.float6_e3m2fn, 28.0), "mxfp8": (ml_dtypes.float8_e4m3fn, 448.0),
}  # fmt: skip


def mx(x: np.ndarray, format: str) -> np.ndarray:
    """x `[rows, K]` in an MX format by ml_dtypes, in float64."""
    dtype, largest = ELEMENTS[format]
    blocks = x.astype(np.float64).reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    scale = 2.0 ** np.ceil(np.log2(np.where(amax == 0, 1, amax) / largest))
    return ((blocks / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale).reshape(x.shape)


def test_permuted_but_unquantised_it_is_the_layer_itself():
    groups = GROUPS["bf16"]
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 160, dtype=torch.float64, generator=generator) for n in (33, 48))
    bias = torch.randn(48, dtype=torch.float64, generator=generator)
    stored = quantise(weight, groups, permutation_of(groups))
    assert (linear(x, stored, bias) - F.linear(x, weight, bias)).abs().max() < 1e-12
    assert (
        linear(x.unflatten(0, (3, 11)), stored, bias).flatten(0, 1) - F.linear(x, weight, bias)
    ).abs().max() < 1e-12


@pytest.mark.parametrize("name", [name for name in BLOCK_GROUPS if name != "nvfp4"])
def test_groups_are_those_of_independent_codecs(name):
    groups = BLOCK_GROUPS[name]
    x, weight, permutation = rows_of(groups, 37), weight_of(groups, 40), permutation_of(groups)
    bias = torch.randn(40)

    def rounded(t):
        parts = np.split(t[:, permutation.long()].numpy(), np.cumsum(groups.widths)[:-1], axis=1)
        return np.concatenate([mx(p, f) for p, f in zip(parts, groups.formats, strict=True)], axis=1)

    expected = rounded(x) @ rounded(weight).T + bias.double().numpy()
    found = linear(x, quantise(weight, groups, permutation), bias)
    assert relative_l2(found, torch.from_numpy(expected)) < 1e-6


def test_fp8_is_that_of_independent_codecs():
    x, weight = rows_of(GROUPS["fp8"], 37), weight_of(GROUPS["fp8"], 48)

    def rounded(t, scale):
        return (
            torch.from_numpy((t / scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64)) * scale
        )

    def row_scale(t):
        return torch.where(t.abs().amax(1, keepdim=True) == 0, 1, t.abs().amax(1, keepdim=True) / 448)

    expected = rounded(x, row_scale(x)) @ rounded(weight, row_scale(weight)).T
    assert relative_l2(linear(x, quantise(weight, GROUPS["fp8"])), expected) < 1e-6
    scale = x.abs().amax() * 2 / 448
    expected = rounded(x, scale) @ rounded(weight, weight.abs().amax() / 448).T
    found = linear(x, quantise(weight, GROUPS["fp8"], one_scale=True), input_scale=scale)
    assert relative_l2(found, expected) < 1e-6


def test_beyond_the_input_scale_it_saturates():
    x = torch.tensor([[1e6, -torch.inf, 3.0, torch.nan] + [0.0] * 156])
    found = quantised_input(x, GROUPS["fp8"], None, torch.tensor(0.01))
    assert found[0, :3].tolist() == pytest.approx([4.48, -4.48, 3.0], rel=0.05)
    assert found[0, 3].isnan() and (found[0, 4:] == 0).all()


@pytest.mark.parametrize("name", GROUPS)
def test_a_bad_row_spoils_no_other(name):
    groups = GROUPS[name]
    x, weight = rows_of(groups, 9), quantise(weight_of(groups, 48), groups)
    clean = linear(x, weight)
    x[3, 70], x[5, 2] = torch.nan, torch.inf
    found = linear(x, weight)
    others = [n for n in range(9) if n not in (3, 5)]
    assert torch.equal(found[others], clean[others])
    assert found[3].isnan().all() and not found[5].isfinite().any()


def test_the_prologue_is_that_of_diffusers_layers():
    groups = GROUPS["bf16"]
    x = torch.randn(2, 7, 160, dtype=torch.float64)
    scale, shift = torch.randn(2, 160, dtype=torch.float64), torch.randn(2, 160, dtype=torch.float64)
    weight = torch.randn(48, 160, dtype=torch.float64)
    stored = quantise(weight, groups, permutation_of(groups))
    normalised = F.layer_norm(x, (160,), eps=1e-6)
    for prologue, expected in (
        (Prologue(1e-6), normalised),
        (Prologue(1e-6, scale, shift), normalised * (1 + scale[:, None]) + shift[:, None]),
        (Prologue(None, scale, shift), x * (1 + scale[:, None]) + shift[:, None]),
        (Prologue(gelu=True), F.gelu(x, approximate="tanh")),
    ):
        found = linear(x, stored, prologue=prologue)
        assert (found - F.linear(expected, weight)).abs().max() < 1e-12


def test_fewer_bits_lose_more():
    errors = []
    for formats, widths in ((("mxfp4",), (512,)), (("mxfp4", "mxfp8"), (384, 128)), (("mxfp8",), (512,))):
        groups = Groups(formats, widths)
        x, weight = torch.randn(64, 512), weight_of(groups, 64)
        x[:, 384:] *= 30
        errors.append(relative_l2(linear(x, quantise(weight, groups)), F.linear(x, weight)))
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2]
