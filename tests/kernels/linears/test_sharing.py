"""Layers that read one tensor quantise it once, eager and compiled."""

import pytest
import torch
from torch import nn

from dma_diffusers.kernels.linears.linear import linear, multiply, quantise_input
from dma_diffusers.kernels.linears.sharing import SharedInput
from dma_diffusers.kernels.linears.weight import quantise
from tests.kernels.linears.cases import GROUPS, torch_device, weight_of

FP8 = GROUPS["fp8"]


@pytest.fixture(autouse=True)
def device():
    """Tensors are made here."""
    with torch_device() as device:
        yield device


class Layer(nn.Module):
    """A layer in fp8 that shares its input."""

    def __init__(self, seed: int, shared: SharedInput, quantised: list):
        super().__init__()
        self.weight, self.shared, self.quantised = quantise(weight_of(FP8, 48, seed), FP8), shared, quantised

    def forward(self, x):
        def quantise_now(x):
            if not torch.compiler.is_compiling():
                self.quantised.append(None)
            return quantise_input(x, None, FP8, "scaled_mm")

        return multiply(self.shared.get(x, quantise_now), self.weight, "scaled_mm", None, x.dtype)


class Attention(nn.Module):
    """Projections of q, k and v."""

    def __init__(self):
        super().__init__()
        self.shared, self.quantised = SharedInput(3), []
        self.layers = nn.ModuleList(Layer(seed, self.shared, self.quantised) for seed in range(3))

    def forward(self, x, other):
        return [layer(x) for layer in self.layers] + [layer(other) for layer in self.layers]


def test_each_input_is_quantised_once():
    model = Attention()
    x, other = torch.randn(2, 33, 160)
    found = model(x, other)
    assert len(model.quantised) == 2
    expected = [linear(t, layer.weight, "scaled_mm") for t in (x, other) for layer in model.layers]
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    assert model.shared._x is None  # nothing is held


def test_an_input_that_not_all_layers_read_is_not_taken_for_another():
    model = Attention()
    x, other = torch.randn(2, 33, 160)
    model.layers[0](x)
    found = model.layers[1](other)
    assert torch.equal(found, linear(other, model.layers[1].weight, "scaled_mm"))


def test_a_compiled_graph_has_one_quantisation_of_each_input():
    graphs = []

    def backend(graph, inputs):
        graphs.append([node for node in graph.graph.nodes if "amax" in str(node.target)])
        return graph.forward

    model = Attention()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, other = torch.randn(2, 33, 160)
    expected = model(x, other)
    for _ in range(2):
        assert all(torch.equal(one, two) for one, two in zip(compiled(x, other), expected, strict=True))
    assert len(graphs) == 1 and len(graphs[0]) == 2
