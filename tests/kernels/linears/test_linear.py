"""The two steps of a linear layer in torch operations, eager and compiled, against the reference."""

import pytest
import torch

from dma_diffusers.kernels.linears import reference
from dma_diffusers.kernels.linears.linear import linear, multiply, quantise_input
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.linears.weight import quantise
from tests.kernels.linears.cases import GROUPS, permutation_of, relative_l2, rows_of, torch_device, weight_of

LOWERING = {"fp8": "scaled_mm", "int8": "int_mm"}
IN_BF16 = 4e-3  # torch._scaled_mm gives bf16


@pytest.fixture(autouse=True)
def device():
    """Tensors are made here, unless they come from a generator."""
    with torch_device() as device:
        yield device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 16, 63])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("name", LOWERING)
def test_products_of_rows_equal_the_reference(name, permuted, rows, dtype):
    groups = GROUPS[name]
    permutation = permutation_of(groups) if permuted else None
    x = torch.randn(rows, 160, dtype=torch.float32).to(dtype)
    weight, bias = quantise(weight_of(groups, 48), groups, permutation), torch.randn(48).to(dtype)
    found, expected = (f(x, weight, *rest) for f, rest in (
        (linear, (LOWERING[name], bias)), (reference.linear, (bias,))
    ))  # fmt: skip
    assert found.dtype == dtype and found.shape == (rows, 48)
    assert relative_l2(found, expected) < IN_BF16


@pytest.mark.parametrize("name", LOWERING)
def test_quantised_inputs_are_those_of_the_reference(name):
    groups = GROUPS[name]
    x = rows_of(groups, 63)
    codes, scale = quantise_input(x, permutation_of(groups), groups, LOWERING[name])
    assert scale.shape == (63, 1)
    expected = reference.quantised_input(x, groups, permutation_of(groups))
    assert torch.equal(codes.float() * scale, expected)


def test_one_scale_of_a_whole_input():
    groups = GROUPS["fp8"]
    x, bias = torch.randn(2, 9, 160), torch.randn(48)
    weight = quantise(weight_of(groups, 48), groups, one_scale=True)
    scale = x.abs().amax() / 448 * 4
    x[0, 0, :3] = torch.tensor([1e5, torch.inf, -torch.inf])
    found = linear(x, weight, "scaled_mm", bias, scale)
    assert found.shape == (2, 9, 48) and found.isfinite().all()
    assert relative_l2(found, reference.linear(x, weight, bias, scale)) < IN_BF16


@pytest.mark.parametrize("name", LOWERING)
def test_a_bad_row_spoils_no_other(name):
    groups = GROUPS[name]
    x, weight = torch.randn(33, 160), quantise(weight_of(groups, 48), groups)
    clean = linear(x, weight, LOWERING[name])
    x[3, 70], x[5, 2], x[7] = torch.nan, -torch.inf, 0
    found = linear(x, weight, LOWERING[name])
    others = [n for n in range(33) if n not in (3, 5, 7)]
    assert torch.equal(found[others], clean[others])
    assert not found[[3, 5]].isfinite().any() and (found[7] == 0).all()


@pytest.mark.parametrize("name", GROUPS)
def test_layers_can_share_a_quantised_input(name):
    groups, permutation = GROUPS[name], permutation_of(GROUPS[name])
    lowering = LOWERING.get(name, "reference")
    x = torch.randn(2, 9, 160 if name in LOWERING else groups.in_features)
    prologue = Prologue(1e-6, torch.randn(2, x.shape[-1]), torch.randn(2, x.shape[-1]))
    inputs = quantise_input(x, permutation, groups, lowering, prologue=prologue)
    for seed in range(2):
        weight = quantise(weight_of(groups, 48, seed), groups, permutation)
        alone = linear(x, weight, lowering, prologue=prologue)
        assert torch.equal(multiply(inputs, weight, lowering, None, x.dtype), alone.flatten(0, 1))


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize("name", LOWERING)
def test_it_compiles_whole_and_for_any_number_of_rows(name, one_scale):
    if name == "int8" and one_scale:
        pytest.skip("int8 has scales of rows alone")
    groups = GROUPS[name]
    weight = quantise(weight_of(groups, 48), groups, permutation_of(groups), one_scale=one_scale)
    scale = torch.tensor(0.02) if one_scale else None
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend, dynamic=True)
    def layer(x, bias):
        return linear(x, weight, LOWERING[name], bias, scale, Prologue(gelu=True))

    for rows in (40, 41, 77):
        x, bias = torch.randn(2, rows, 160), torch.randn(48)
        expected = linear(x, weight, LOWERING[name], bias, scale, Prologue(gelu=True))
        assert torch.equal(layer(x, bias), expected)
    assert len(graphs) == 1


@pytest.mark.parametrize(("shape", "prologue", "message"), [
    ((2, 9, 161), Prologue(), r"x must be \[..., 160\], as wide as its groups, got \[2, 9, 161\]"),
    ((160,), Prologue(), r"x must be \[..., 160\]"),
    ((2, 9, 160), Prologue(scale=torch.zeros(2, 160)), "both a scale and a shift, or neither"),
    ((2, 9, 160), Prologue(None, torch.zeros(3, 160), torch.zeros(3, 160)),
     r"scale and shift must be \[2 or 1, 160\] for x \[2, 9, 160\], got \[3, 160\]"),
])  # fmt: skip
@pytest.mark.parametrize("lowering", ["reference", "scaled_mm"])
def test_what_does_not_fit_is_refused(shape, prologue, message, lowering):
    with pytest.raises(ValueError, match=message) as caught:
        quantise_input(torch.zeros(shape), None, GROUPS["fp8"], lowering, prologue=prologue)
    assert "\n" not in str(caught.value)


def test_there_is_no_backward():
    x = torch.zeros(2, 160, requires_grad=True)
    with pytest.raises(ValueError, match=r"no backward: call them under torch.no_grad\(\), or detach x"):
        quantise_input(x, None, GROUPS["fp8"], "scaled_mm")
    with torch.no_grad():
        quantise_input(x, None, GROUPS["fp8"], "scaled_mm")
