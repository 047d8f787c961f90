"""torch.compile on every family: one graph wherever stock has one, and the same bits, whatever modules it has."""

import os
import shutil

import pytest
import torch
from diffusers.hooks.layer_skip import LayerSkipConfig, apply_layer_skip

from dma_diffusers import apply
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.dma_diffusers.graphs import Graphs
from tests.tiny_pipelines import draw

LOW = {"min_length": 0, "policy": "dense(everywhere=low)"}
# Stock breaks these graphs as well: they branch on numbers of the device.
UNCOMPILED = {
    "hidream", "hunyuan15", "hunyuan_image", "lumina2", "lumina2, with refiners", "qwen21", "wan_animate2",
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(case, text) -> tuple[torch.Tensor, list[int]]:
    """The result of a compiled model, and the operator's nodes in each graph."""
    graphs = Graphs()
    case.model.compile(backend=graphs, fullgraph=True)
    torch.manual_seed(2)
    return case.run(text), graphs.nodes


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in tiny_models.EVERY if name not in UNCOMPILED])
def test_every_model_that_stock_compiles_is_one_graph(name):
    case = tiny_models.make(name)
    (text,) = case.texts(1)
    apply(case.model, **LOW)
    torch.manual_seed(2)
    eager = case.run(text)
    out, nodes = compiled(case, text)
    assert torch.equal(out, eager)
    assert [n for n in nodes if n] == [sum(case.calls.values())]  # hooks may have little graphs of their own


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(UNCOMPILED))
def test_what_stock_cannot_compile_is_not_ours(name):
    case = tiny_models.make(name)
    (text,) = case.texts(1)
    with pytest.raises(Exception, match=r"data-dependent|Data-dependent|is_inference|tolist"):
        compiled(case, text)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [21, 9, 0])
def test_texts_as_long_as_the_device_knows(tokens):
    """Mochi's graph knows the length of a text only as the number of ones in its mask, which is on the device."""
    case = tiny_models.make("mochi")
    (text,) = case.texts(1)
    apply(case.model, **LOW)
    compiled(case, text)
    case.inputs = {"encoder_attention_mask": torch.arange(21)[None] < tokens}
    out = case.run(text)
    eager = tiny_models.make("mochi")
    eager.inputs = case.inputs
    apply(eager.model, **LOW)
    torch.testing.assert_close(out, eager.run(text), rtol=0, atol=0)


WINDOWS = {f"single_transformer_blocks.{layer}.attn": {"window": 128 * layer} for layer in range(12)}


def graphs_of_drawings(pipe) -> tuple[torch.Tensor, list[int]]:
    """A first drawing; the graphs after it, after another one, and after one with more text; each as in eager mode."""
    drawings = ({}, {"seed": 1}, {"max_sequence_length": 31})
    eager = [draw(pipe, **fields) for fields in drawings]
    graphs, counts = Graphs(), []
    pipe.transformer.compile_repeated_blocks(backend=graphs, fullgraph=True)
    for fields, expected in zip(drawings, eager, strict=True):
        assert torch.equal(draw(pipe, **fields), expected)
        counts.append(len(graphs.nodes))
    return eager[0], counts


@torch._dynamo.config.patch(recompile_limit=8)
def test_twelve_windows_compile_as_often_as_one():
    drawn = []
    for fields in ({"modules": WINDOWS}, {}):
        torch.compiler.reset()
        pipe = tiny_pipelines.flux(num_layers=1, num_single_layers=12)
        apply(pipe, min_length=0, **fields)
        drawn.append(graphs_of_drawings(pipe))
    (own, counts), (one, counts_of_one) = drawn
    assert counts == counts_of_one and counts[0] == counts[1]  # another drawing compiles nothing
    assert not torch.equal(own, one)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen", "z_image"])
@pytest.mark.parametrize("where", ["in the graph", "around it"])
def test_skipped_attention_scores_are_skipped_in_graphs_too(name, where):
    outs = []
    for is_compiled, fields in ((False, None), (True, LOW)):
        torch.compiler.reset()
        case = tiny_models.make(name)
        torch.manual_seed(1)
        (text,) = case.texts(1)
        skips = LayerSkipConfig(
            indices=[0, 1], skip_attention=False, skip_attention_scores=True, skip_ff=False
        )
        if fields:
            apply(case.model, **fields)
        if where == "in the graph":
            apply_layer_skip(case.model, skips)
        if is_compiled and where == "in the graph":
            case.model.compile(backend="eager")
        elif is_compiled:  # a guider's hooks go onto a model whose blocks are compiled
            case.model.compile_repeated_blocks(backend="eager")
            apply_layer_skip(case.model, skips)
        elif where == "around it":
            apply_layer_skip(case.model, skips)
        outs.append(case.run(text))
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-5)


REMEMBERING = {"min_length": 0, "policy": "importance(budget=0.3)", "dense_above_sigma": 1}
ON_GRID = {"min_length": 0, "policy": "diagonal(near=grid)", "low": "mxfp4"}


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("flux", LOW),
        ("wan", LOW),
        ("flux", REMEMBERING),
        ("flux", ON_GRID | {"grid": (12, 25)}),
        ("wan", ON_GRID),
    ],
)
def test_an_exported_model_computes_the_same(name, fields):
    case = tiny_models.make(name)
    (text,) = case.texts(1)
    apply(case.model, **fields)
    call = case.call(text) | {"return_dict": False}
    eager = case.model(**call)[0]
    exported = torch.export.export(case.model, args=(), kwargs=call)
    nodes = [node for node in exported.graph.nodes if "dma_diffusers.attention" in str(node.target)]
    assert len(nodes) == sum(case.calls.values())
    assert torch.equal(exported.module()(**call)[0], eager)


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_made_ahead_of_time_computes_the_same(tmp_path):
    """AOTInductor hands an empty grid over as None."""
    case = tiny_models.make("flux, single blocks alone")
    (text,) = case.texts(1)
    apply(case.model, **LOW)
    call = case.call(text) | {"return_dict": False}
    eager = case.model(**call)[0]
    exported = torch.export.export(case.model, args=(), kwargs=call)
    path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    package = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(package(**call)[0], eager, rtol=0, atol=1e-5)


@pytest.mark.kernel
def test_cuda_graphs_take_new_lengths():
    """`mode="reduce-overhead"` records a graph for each length, after a call that makes its plan."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pipe = tiny_pipelines.flux(head_dim=64).to("cuda", torch.bfloat16)
    apply(pipe, min_length=0, high="bf16", low="int8")
    lengths = (19, 31, 19, 25)
    eager = [draw(pipe, max_sequence_length=length) for length in lengths]
    pipe.transformer.compile_repeated_blocks(mode="reduce-overhead", fullgraph=True)
    for length, expected in zip(lengths, eager, strict=True):
        for _ in range(3):  # a warm-up, a recording, a replay
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(draw(pipe, max_sequence_length=length), expected, rtol=0.05, atol=0.05)


@pytest.mark.kernel
@pytest.mark.parametrize("method", ["compile", "compile_repeated_blocks"])
def test_cuda_graphs_take_the_entries_of_a_schedule(method):
    """Steps under different policies replay different recordings of one compiled graph."""
    if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pipe = tiny_pipelines.flux(head_dim=64).to("cuda", torch.bfloat16)
    entries = ("dense(everywhere=high)", "importance(budget=0.5)", "dense(everywhere=low)")
    drawn = []
    for policy in entries:
        apply(pipe, min_length=0, high="bf16", low="int8", policy=policy)
        drawn.append(draw(pipe, num_inference_steps=4))
    schedule = "sigma>0.9: {}; sigma>0.4: {}; {}".format(*entries)
    apply(pipe, min_length=0, high="bf16", low="int8", schedule=schedule)
    eager = draw(pipe, num_inference_steps=4)
    assert not any(torch.equal(eager, other) for other in drawn)
    getattr(pipe.transformer, method)(mode="reduce-overhead", fullgraph=True)
    for _ in range(4):  # warm-ups, recordings, replays
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(draw(pipe, num_inference_steps=4), eager, rtol=0.05, atol=0.05)
