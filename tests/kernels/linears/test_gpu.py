"""Linear layers that need a GPU: FLUX's sizes, CUDA graphs, few rows, what Inductor makes of them."""

import pytest
import torch

from dma_diffusers.kernels.linears import reference
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.linear import linear, quantise_input
from dma_diffusers.kernels.linears.lowering import choose
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.linears.weight import quantise
from dma_diffusers.kernels.lowerings import architecture
from tests.kernels.linears.cases import MIXED, permutation_of, relative_l2, weight_of

pytestmark = pytest.mark.kernel
NAMES = {
    "fp8": Groups.whole("fp8", 3072), "int8": Groups.whole("int8", 3072), "mxfp8": Groups.whole("mxfp8", 3072),
    "mxfp4": Groups.whole("mxfp4", 3072), "micromix": Groups(MIXED, (2304, 512, 256)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def gpu():
    """Tensors are made on a GPU; skips where there is none."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    with torch.device("cuda") as device:
        yield device


def case(name: str, rows: int, out_features: int):
    """Input, weight, bias and lowering of a layer in bf16, as this GPU runs it."""
    groups = NAMES[name]
    chosen = choose(architecture(torch.device("cuda")), groups, out_features=out_features).lowering
    if chosen == "reference":
        pytest.skip(f"no lowering multiplies {name} here")
    x = torch.randn(rows, 3072, dtype=torch.bfloat16)
    weight = quantise(weight_of(groups, out_features), groups, permutation_of(groups))
    return x, weight, torch.randn(out_features, dtype=torch.bfloat16), chosen


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "out_features"), [(1, 3072), (16, 3072), (4608, 9216), (4609, 3072)])
def test_it_is_the_reference(name, rows, out_features):
    """But for the order of sums, tensor cores' fewer bits in them, and what re-encoding rounds."""
    x, weight, bias, lowering = case(name, rows, out_features)
    assert relative_l2(linear(x, weight, lowering, bias), reference.linear(x, weight, bias)) < 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_cuda_graph_takes_the_whole_layer(name):
    x, weight, bias, lowering = case(name, 300, 3072)
    modulation = torch.randn(2, 1, 3072, dtype=torch.bfloat16)

    def layer():
        return linear(x[None], weight, lowering, bias, prologue=Prologue(1e-6, *modulation))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(captured, layer())


@pytest.mark.parametrize("name", NAMES)
def test_inductor_makes_the_same_of_it(name):
    x, weight, bias, lowering = case(name, 300, 3072)

    def layer(x):
        return linear(x, weight, lowering, bias, prologue=Prologue(gelu=True))

    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for rows in (300, 77):
        assert relative_l2(compiled(x[:rows]), layer(x[:rows])) < 2e-3


def test_more_than_two_to_the_31_elements():
    if torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU of 60 GiB")
    groups = NAMES["micromix"]
    x = torch.randn(2**31 // 3072 + 300, 3072, dtype=torch.bfloat16)
    elements, scale = quantise_input(x, None, groups, "scaled_mm")
    expected = quantise_input(x[-300:], None, groups, "scaled_mm")
    assert torch.equal(elements[-300:].view(torch.uint8), expected[0].view(torch.uint8))
    assert torch.equal(scale[-300:], expected[1])
