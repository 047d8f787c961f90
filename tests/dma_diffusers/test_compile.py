"""torch.compile: one operator node for each attention call, and no break in the graph."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dma_diffusers import DMAConfig, apply, report
from dma_diffusers.families import Family
from dma_diffusers.forward import ForwardContext
from dma_diffusers.interception import Interception
from dma_diffusers.kernels import operator
from dma_diffusers.mode import InterceptionMode
from dma_diffusers.stages import stages
from tests import tiny_pipelines
from tests.dma_diffusers.graphs import Graphs
from tests.tiny_pipelines import draw

LAYERS = {"flux": 3, "sd3": 3, "wan": 2, "hunyuan": 2}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


FIELDS = [{}, {"dense_above_sigma": 0.9, "dense_layers": (0,)}]
ON_GRID = {"policy": "diagonal(near=grid)"}
BY_DEFAULT = {
    "policy": "neighborhood(window=2x7x5)"
}  # has dense steps and layers, as the family's literature asks


@pytest.mark.parametrize(("name", "fields"), [
    *((name, fields) for name in LAYERS for fields in FIELDS),
    ("flux", {**ON_GRID, "dense_above_sigma": 0.9}), ("wan", ON_GRID), ("wan", BY_DEFAULT),
])  # fmt: skip
def test_a_whole_model_is_one_graph(name, fields):
    pipe = getattr(tiny_pipelines, name)()
    apply(pipe, **fields)
    eager = draw(pipe)
    graphs = Graphs()
    pipe.transformer.compile(backend=graphs, fullgraph=True)
    assert torch.equal(draw(pipe), eager)
    whole = [nodes for nodes in graphs.nodes if nodes]  # the hook may have a little graph of its own
    has_dense_steps = "dense_above_sigma" in fields or fields == BY_DEFAULT
    assert whole == [LAYERS[name]] * (2 if has_dense_steps else 1)  # dense steps, and others


@pytest.mark.parametrize(
    ("name", "method", "expected"),
    [
        ("cosmos", "compile", [2]),
        ("z_image", "compile", [3]),
        ("hunyuan15", "compile_repeated_blocks", [1]),
    ],
)
def test_lists_and_masks_and_backends_of_the_process_break_no_graph(name, method, expected):
    pipe = getattr(tiny_pipelines, name)()
    apply(pipe)
    eager = draw(pipe)
    graphs = Graphs()
    getattr(pipe.transformer, method)(backend=graphs, fullgraph=True)
    assert torch.equal(draw(pipe), eager)
    assert [nodes for nodes in graphs.nodes if nodes] == expected


def test_repeated_blocks_compile_with_dense_steps_layers_and_another_length():
    pipe = tiny_pipelines.flux(num_layers=3, num_single_layers=6)
    apply(pipe, dense_layers=(0, -1), dense_above_sigma=0.9)
    eager, longer = draw(pipe), draw(pipe, max_sequence_length=31)
    graphs = Graphs()
    pipe.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    assert torch.equal(draw(pipe), eager)
    assert torch.equal(draw(pipe, max_sequence_length=31), longer)
    assert set(graphs.nodes) == {1}


@pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
def test_heads_and_modules_of_their_own_break_no_graph(method):
    own = {"transformer_blocks.0.attn": {"window": 640}, "single_transformer_blocks.1.attn": {"dense": True}}
    pipe = tiny_pipelines.flux()
    apply(pipe, window=(0, 384), modules=own)
    eager = draw(pipe)
    graphs = Graphs()
    getattr(pipe.transformer, method)(backend=graphs, fullgraph=True)
    assert torch.equal(draw(pipe), eager) and torch.equal(draw(pipe), eager)
    attending = [nodes for nodes in graphs.nodes if nodes]
    assert attending == ([3] if method == "compile" else [1, 1, 1])


def test_a_new_length_recompiles_no_more_than_stock():
    assert graphs_of_three_lengths(apply) == graphs_of_three_lengths(lambda pipe: None)


def test_new_sizes_of_a_grid_compile_nothing():
    pipe = tiny_pipelines.flux()
    apply(pipe, policy="neighborhood(window=9x7, high=3x3)")
    sizes = ((48, 40), (36, 42), (44, 46), (42, 36))
    eager = [draw(pipe, height=height, width=width) for height, width in sizes]
    graphs = Graphs()
    pipe.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    counts = []
    for (height, width), expected in zip(sizes, eager, strict=True):
        assert torch.equal(draw(pipe, height=height, width=width), expected)
        counts.append(len(graphs.nodes))
    assert counts[1] == counts[3]  # a first size, and any other


def graphs_of_three_lengths(prepare) -> int:
    torch.compiler.reset()
    pipe = tiny_pipelines.flux()
    prepare(pipe)
    graphs = Graphs()
    pipe.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    for length in (19, 31, 25):
        draw(pipe, max_sequence_length=length)
    return len(graphs.nodes)


def test_an_aot_graph_gives_the_same_bits():
    pipe = tiny_pipelines.flux()
    apply(pipe)
    eager = draw(pipe)
    pipe.transformer.compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(draw(pipe), eager)


@pytest.mark.parametrize("dynamic", [None, True])
def test_models_left_to_stock_compile_too(dynamic):
    pipe = tiny_pipelines.flux()
    eager = draw(pipe)
    apply(pipe, lowering="fastest")
    graphs = Graphs()
    pipe.transformer.compile(backend=graphs, fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(draw(pipe), eager)
    assert set(graphs.nodes) == {0}


class Call(torch.nn.Module):
    """One attention call, keys a single head in the place of all."""

    def __init__(self, **fields):
        super().__init__()
        family = Family("none")
        config = DMAConfig(min_length=0)
        forward = ForwardContext(self, family, config)
        forward.begin(self.eval(), (), {})
        self.interception = Interception(
            stages(config, family, "Call", ("attn",)).modules["attn"], family, forward, None
        )
        self.fields = fields

    def forward(self, q, k, v):
        with InterceptionMode(self.interception, q.shape[2], 0):
            return scaled_dot_product_attention(q, k.expand(q.shape), v, **self.fields)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("heads, fields, nodes", [(1, {}, 0), (4, {}, 1), (4, {"scale": -0.3}, 0)])
def test_calls_that_the_operator_refuses_are_stock_in_a_graph_too(heads, fields, nodes, dynamic):
    call, graphs = Call(**fields), Graphs()
    compiled = torch.compile(call, backend=graphs, fullgraph=True, dynamic=dynamic)
    for length in (137, 150, 200):
        q, v = (torch.randn(2, 4, length, 40, dtype=torch.bfloat16) for _ in range(2))
        k = torch.randn(2, heads, length, 40, dtype=torch.bfloat16)
        assert torch.equal(compiled(q, k, v), call(q, k, v))
    assert set(graphs.nodes) == {nodes}
    assert len(graphs.nodes) <= 2  # a first length, and any other


def test_inexact_rows_are_not_counted_in_a_graph(monkeypatch):
    genuine = operator.attention

    def attention(*args, **kwargs):
        result = genuine(*args, **kwargs)
        return result._replace(inexact_rows=torch.ones(1, dtype=torch.int32))

    monkeypatch.setattr(operator, "attention", attention)
    pipe = tiny_pipelines.flux()
    apply(pipe)
    graphs = Graphs()
    pipe.transformer.compile(backend=graphs, fullgraph=True)
    draw(pipe)
    assert [nodes for nodes in graphs.nodes if nodes] == [LAYERS["flux"]]
    assert {module.inexact_rows for module in report(pipe).modules} == {0}


def test_a_model_that_was_wrapped_by_torch_compile_is_found():
    pipe = tiny_pipelines.flux()
    apply(pipe)
    eager = draw(pipe)
    graphs = Graphs()
    pipe.transformer = torch.compile(tiny_pipelines.flux().transformer, backend=graphs, fullgraph=True)
    apply(pipe)
    assert torch.equal(draw(pipe), eager)
    assert sum(graphs.nodes) == 3
