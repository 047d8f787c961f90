"""The product's kernel against the reference: the same numbers, summed in another order."""

import pytest
import torch

from dma_diffusers.kernels.linears import launch, reference
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.linear import linear, quantise_input
from dma_diffusers.kernels.linears.operands import Operand
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.linears.weight import quantise
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES, architecture
from tests.kernels.linears.cases import (
    BLOCK_GROUPS,
    MIXED,
    on,
    permutation_of,
    relative_l2,
    rows_of,
    weight_of,
)

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
CASES = [(name, rows, out) for name in BLOCK_GROUPS for rows, out in ((1, 40), (63, 130), (133, 257))]


@pytest.fixture
def native_device(kernel_device) -> torch.device:
    """The interpreter's CPU, or a GPU that has block-scaled MMA."""
    if kernel_device.type == "cuda" and architecture(kernel_device) not in BLOCK_SCALED_ARCHITECTURES:
        pytest.skip(f"{architecture(kernel_device)} has no block-scaled MMA: no lowering multiplies so there")
    return kernel_device


@pytest.mark.parametrize(("name", "rows", "out_features"), CASES)
def test_it_is_the_reference(name, rows, out_features, native_device):
    groups = BLOCK_GROUPS[name]
    if groups.in_features > 1000 and out_features > 200:
        pytest.skip("the interpreter takes its time")
    x, bias = rows_of(groups, rows), torch.randn(out_features)
    weight = quantise(weight_of(groups, out_features), groups, permutation_of(groups))
    expected = reference.linear(x, weight, bias)
    found = linear(*(on(native_device, t) for t in (x, weight)), "native", on(native_device, bias)).cpu()
    assert found.shape == expected.shape
    assert (found - expected).abs().amax(1).div(expected.abs().amax(1)).max() < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["uneven", "nvfp4"])
def test_the_output_has_the_inputs_dtype(name, dtype, native_device):
    groups = BLOCK_GROUPS[name]
    x, bias = torch.randn(2, 37, groups.in_features).to(dtype), torch.randn(48).to(dtype)
    weight = quantise(weight_of(groups, 48).to(dtype), groups)
    expected = reference.linear(x, weight, bias)
    found = linear(*(on(native_device, t) for t in (x, weight)), "native", on(native_device, bias)).cpu()
    assert found.dtype == dtype and found.shape == (2, 37, 48)
    assert relative_l2(found, expected) < 1e-3  # a sum in another order may round to the neighbour
    assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("name", ["uneven", "nvfp4"])
def test_a_bad_row_spoils_no_other(name, native_device):
    groups = BLOCK_GROUPS[name]
    x, weight = torch.randn(9, groups.in_features), quantise(weight_of(groups, 48), groups)
    x[6] = 0
    weight = on(native_device, weight)
    clean = linear(on(native_device, x), weight, "native").cpu()
    x[3, 70], x[5, 2] = torch.nan, torch.inf
    found = linear(on(native_device, x), weight, "native").cpu()
    others = [n for n in range(9) if n not in (3, 5)]
    assert torch.equal(found[others], clean[others]) and (found[6] == 0).all()
    assert found[[3, 5]].isnan().all()


def test_groups_are_added_before_they_are_rounded(native_device):
    """Large sums of two groups cancel: rounded to bf16 in between, nothing of the rest would be left."""
    groups = Groups(("mxfp4", "mxfp8"), (32, 32))
    x, weight = torch.zeros(1, 64), torch.zeros(16, 64)
    x[:, 0] = x[:, 32] = 4096.0
    weight[:, 0], weight[:, 32] = 1.0, -1.0
    x[:, 33], weight[:, 33] = 32.0, 1.0
    found = linear(on(native_device, x.bfloat16()), on(native_device, quantise(weight, groups)), "native")
    assert (found == 32).all()


@pytest.mark.parametrize("tiles", [launch.Tiles(columns=256), launch.Tiles(narrow=128, beside=1)], ids=str)
def test_every_variant_gives_the_same_numbers(tiles, native_device, monkeypatch):
    groups = Groups(MIXED, (288, 64, 96))
    x, bias = rows_of(groups, 300), torch.randn(400)
    weight = quantise(weight_of(groups, 400), groups)
    expected = reference.linear(x, weight, bias)
    monkeypatch.setattr(launch, "tiles_for", lambda *_: tiles)
    found = linear(*(on(native_device, t) for t in (x, weight)), "native", on(native_device, bias)).cpu()
    assert (found - expected).abs().amax(1).div(expected.abs().amax(1).clamp(min=1e-30)).max() < 2e-6


@pytest.mark.parametrize("name", ["uneven", "4 and 8 bits", "e3m2"])
def test_reencoded_it_is_nearly_the_reference(name, kernel_device):
    """The lowering for Hopper: the operands lose what e4m3 has no room for, and torch gives bf16."""
    groups = BLOCK_GROUPS[name]
    x, bias = torch.randn(37, groups.in_features), torch.randn(48)
    weight = quantise(weight_of(groups, 48), groups, permutation_of(groups))
    expected = reference.linear(x, weight, bias)
    found = linear(*(on(kernel_device, t) for t in (x, weight)), "scaled_mm", on(kernel_device, bias)).cpu()
    assert relative_l2(found, expected) < 5e-3


@pytest.mark.parametrize("lowering", ["native", "scaled_mm"])
def test_torch_compile_sees_one_node_for_each_step(lowering, kernel_device, request):
    if lowering == "native":
        request.getfixturevalue("native_device")
    groups = BLOCK_GROUPS["uneven"]
    weight = on(kernel_device, quantise(weight_of(groups, 48), groups, permutation_of(groups)))
    bias = torch.randn(48, device=kernel_device)
    modulation = torch.randn(2, 2, groups.in_features, device=kernel_device)
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if "dma_diffusers" in str(node.target)])
        return graph.forward

    def layer(x, scale, shift):
        return linear(x, weight, lowering, bias, prologue=Prologue(1e-6, scale, shift))

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for rows in (5, 6, 9):
        x = torch.randn(2, rows, groups.in_features, device=kernel_device)
        assert torch.equal(compiled(x, *modulation), layer(x, *modulation))
    assert len(graphs) == 1 and len(graphs[0]) == 2


@pytest.mark.parametrize("reencodes", [False, True])
def test_operators_pass_torchs_checks(reencodes, kernel_device, request):
    if not reencodes:
        request.getfixturevalue("native_device")
    groups = BLOCK_GROUPS["uneven"]
    weight = on(kernel_device, quantise(weight_of(groups, 48), groups))
    x = torch.randn(5, groups.in_features, device=kernel_device)
    tests = ("test_faketensor",)
    names = list(groups.formats), list(groups.widths)
    present = Operand.of_weight(weight).present
    arguments = (x, None, None, None, None, True, *names, reencodes)
    torch.library.opcheck(torch.ops.dma_diffusers.linear_quantise.default, arguments, test_utils=tests)
    if reencodes:
        torch.library.opcheck(
            torch.ops.dma_diffusers.linear_reencode.default, (present, *names), test_utils=tests
        )
    else:
        inputs = list(quantise_input(x, None, groups, "native"))
        arguments = (inputs, present, None, *names, torch.bfloat16)
        torch.library.opcheck(torch.ops.dma_diffusers.linear_multiply.default, arguments, test_utils=tests)
