"""Layers that read the same tensor quantise it once: eagerly, in compiled models and blocks, and in threads."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from unittest import mock

import pytest
import torch

from dma_diffusers import calibrate_linears, quantize_linears
from dma_diffusers.linears import module
from dma_diffusers.linears.module import QuantisedLinear
from tests.dma_diffusers import tiny_models

# One double block: the inputs of both streams' attention, of both its outputs, and of both MLPs' two layers. Two single
# blocks: what attention and MLP read, and their output.
LAYERS, INPUTS = 12 + 2 * 5, 8 + 2 * 2
METHODS = ["fp8", "int8", "mxfp4", "micromix", "fp8, fixed"]


@pytest.fixture(autouse=True)
def compile_anew():
    yield
    torch._dynamo.reset()


@pytest.fixture(params=METHODS)
def case(request):
    case = tiny_models.flux(num_attention_heads=4)
    case.model.eval()
    method, _, fixed = request.param.partition(", ")
    text = case.texts(1)[0]
    calibration = [case.call(text)] if fixed or method == "micromix" else None
    quantize_linears(case.model, method, calibration=calibration)
    return case


@contextmanager
def counted_inputs():
    with mock.patch.object(module, "quantise_input", side_effect=module.quantise_input) as spy:
        yield spy


@torch.no_grad()
def run(case, text, model=None) -> torch.Tensor:
    case.model, own = case.model if model is None else model, case.model
    try:
        return case.run(text)
    finally:
        case.model = own


def blocks_of(model) -> list[torch.nn.Module]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def test_each_tensor_is_quantised_once_and_freed(case):
    layers = [m for m in case.model.modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == LAYERS
    text = case.texts(1)[0]
    with counted_inputs() as spy:
        shared = run(case, text)
    assert spy.call_count == INPUTS
    assert all(layer.last.entry is None for layer in layers)
    for layer in layers:
        layer.keeps = False
    with counted_inputs() as spy:
        assert torch.equal(run(case, text), shared)
    assert spy.call_count == LAYERS


def test_an_equal_tensor_is_not_taken_for_the_same():
    layer = torch.nn.Linear(32, 32)
    block = torch.nn.Module()
    block.blocks = torch.nn.ModuleList(
        [torch.nn.ModuleDict({"to_q": layer, "to_v": torch.nn.Linear(32, 32)})]
    )
    quantize_linears(block, "int8")
    q, v = block.blocks[0]["to_q"].eval(), block.blocks[0]["to_v"].eval()
    x = torch.randn(4, 32)
    with torch.no_grad():
        q(x)
        y = x * 2
        expected = v(y)
        q(x)
        with counted_inputs() as spy:
            assert torch.equal(v(y), expected)
        assert spy.call_count == 1


@pytest.mark.parametrize("chosen", [["to_k"], ["to_q", "to_k"]])
@pytest.mark.parametrize("when", ["never", "before", "at once"])
def test_a_tensor_that_nobody_reads_again_is_not_held(chosen, when):
    case = tiny_models.flux(num_attention_heads=4, num_single_layers=0)
    case.model.eval()
    inputs = [case.call(case.texts(1)[0])]
    if when == "before":
        calibrate_linears(case.model, inputs)
    names = [f"*.attn.{name}" for name in chosen]
    method = "micromix" if when == "before" else "fp8"
    quantize_linears(case.model, method, modules=names, calibration=inputs if when == "at once" else None)
    layers = [m for m in case.model.modules() if isinstance(m, QuantisedLinear)]
    assert len(layers) == len(chosen)
    run(case, case.texts(1)[0])
    assert all(layer.last.entry is None for layer in layers)
    x = torch.randn(4, layers[-1].in_features)
    with torch.no_grad():
        layers[-1](x)
        x *= 2
        assert torch.equal(layers[-1](x), layers[-1](x.clone()))  # a buffer that is filled anew in each step


def graphs_of(case, text, whole: bool) -> tuple[list, torch.Tensor]:
    """The graphs of the compiled model, or of its blocks one by one, and what they draw."""
    graphs, model = [], case.model
    torch._dynamo.reset()

    def backend(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    if whole:
        model = torch.compile(model, fullgraph=True, backend=backend)
    else:
        for block in blocks_of(model):
            block.compile(fullgraph=True, backend=backend)
    run(case, text, model)
    return graphs, run(case, text, model)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_graphs_share_and_have_no_outputs_for_it(case, whole):
    text = case.texts(1)[0]
    expected = run(case, text)
    graphs, drawn = graphs_of(case, text, whole)
    assert torch.equal(drawn, expected)
    outputs = [len(graph.find_nodes(op="output")[0].args[0]) for graph in graphs]
    assert outputs == ([1] if whole else [2] * len(graphs))
    for layer in case.model.modules():
        if isinstance(layer, QuantisedLinear):
            layer.keeps = False
    alone, drawn = graphs_of(case, text, whole)
    assert torch.equal(drawn, expected)
    assert sum(len(graph.nodes) for graph in graphs) < sum(len(graph.nodes) for graph in alone)


def test_threads_do_not_mix_up_what_they_share(case):
    texts = case.texts(4)
    expected = [run(case, text) for text in texts]
    barrier = Barrier(4)

    def in_thread(text):
        barrier.wait()
        return [run(case, text) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        for drawn, one in zip(pool.map(in_thread, texts), expected, strict=True):
            assert all(torch.equal(each, one) for each in drawn)


def test_inductor_compiles_fp8_in_one_graph():
    case = tiny_models.flux(num_attention_heads=4, num_single_layers=1)
    case.model.eval()
    quantize_linears(case.model, "fp8")
    text = case.texts(1)[0]
    expected = run(case, text)
    compiled = run(case, text, torch.compile(case.model, fullgraph=True))
    torch.testing.assert_close(compiled, expected, rtol=1e-2, atol=1e-3)
