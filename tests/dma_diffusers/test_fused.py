"""FLUX's norm and RoPE inside of the operator: the same picture as without, and as before where a call is unusual."""

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import nn

import dma_diffusers
from dma_diffusers import fused
from dma_diffusers.attach import interceptions
from dma_diffusers.interception import FUSES
from dma_diffusers.kernels import operator
from tests.dma_diffusers.tiny_models import flux

EXACT = {"high": "bf16", "low": "bf16", "lowering": "reference"}


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of the operator's calls."""
    seen, attention = [], operator.attention

    def observed(*args, **kwargs):
        seen.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(operator, "attention", observed)
    return seen


def prepared(dtype=torch.bfloat16, **config):
    """A tiny FLUX, whose norms have weights, and a call."""
    torch.manual_seed(0)
    case = flux(**config)
    for module in case.model.modules():
        if isinstance(module, nn.RMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    case.model.to(dtype).eval()
    call = {
        name: x.to(dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and "ids" not in name
        else x
        for name, x in case.call(case.texts(1)[0]).items()
    }
    return case.model, call


@torch.no_grad()
def run(model, call) -> torch.Tensor:
    return model(**call, return_dict=False)[0].float()


def notes(model) -> set[bool]:
    return {FUSES in module.notes for module in dma_diffusers.report(model).modules}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operator_norms_and_turns_as_stock_does(dtype, calls):
    model, call = prepared(dtype)
    stock = run(model, call)
    dma_diffusers.apply(model, **EXACT)
    found = run(model, call)
    assert len(calls) == 3 and all(call["norms"] is not None and call["k_rope"] is not None for call in calls)
    assert [call["norms"].first for call in calls] == [21, 0, 0]  # one double block, two single ones
    assert notes(model) == {True}
    error = (found - stock).norm() / stock.norm()
    assert error < (0.02 if dtype is torch.bfloat16 else 0.005)  # the operator's bf16, in either
    model.transformer_blocks[0].attn.norm_added_k.weight.data.mul_(-1)
    assert not torch.allclose(run(model, call), found, atol=1e-4)


def test_fused_as_unfused(monkeypatch):
    model, call = prepared()
    dma_diffusers.apply(model, high="bf16", low="int8", window=128, lowering="reference")
    within = run(model, call)
    monkeypatch.setattr(fused, "_is_plain", lambda *_: False)
    before = run(model, call)
    assert (within - before).norm() < 0.02 * before.norm()


def test_a_call_that_falls_back_is_stock_to_the_last_bit(calls):
    model, call = prepared()
    stock = run(model, call)
    dma_diffusers.apply(model, min_length=10_000, **EXACT)
    assert torch.equal(run(model, call), stock) and not calls
    assert notes(model) == {False}


def unaffine(model):
    model.transformer_blocks[0].attn.norm_q = nn.RMSNorm(16, 1e-6, elementwise_affine=False)


def hooked(model):
    model.single_transformer_blocks[0].attn.norm_k.register_forward_hook(lambda module, args, out: out * 2)


def other_positions(model):
    class Positions(type(model.pos_embed)):
        def forward(self, ids):
            return tuple(x.flip(-1) for x in super().forward(ids))

    model.pos_embed.__class__ = Positions


def other_eps(model):
    model.transformer_blocks[0].attn.norm_added_k.eps = 1e-3


@pytest.mark.parametrize(("change", "unfused"), [
    (unaffine, 1), (hooked, 1), (other_eps, 1), (other_positions, 3),
])  # fmt: skip
def test_what_is_unusual_stays_with_the_stock_processor(change, unfused, calls):
    model, call = prepared()
    change(model)
    stock = run(model, call)
    dma_diffusers.apply(model, **EXACT)
    found = run(model, call)
    assert sum("norms" not in call for call in calls) == unfused and len(calls) == 3
    assert (found - stock).norm() < 0.02 * stock.norm()


def test_fused_projections_and_stand_ins(calls):
    model, call = prepared()
    dma_diffusers.apply(model, **EXACT)
    found = run(model, call)
    model.fuse_qkv_projections()
    assert (
        type(model.transformer_blocks[0].attn.processor.stock) is not FluxAttnProcessor or model is not None
    )
    assert (run(model, call) - found).norm() < 0.02 * found.norm()
    shapes = []

    def stand_in(q, k, v, **given):
        shapes.append("norms" in given)
        return operator.attention(q, k, v, **given)

    for interception in interceptions(model).values():
        interception.stand_in = stand_in
    run(model, call)
    assert shapes == [False] * 3


@pytest.mark.parametrize("per_block", [False, True])
def test_compiled_in_one_graph_as_eager(per_block, calls):
    torch.compiler.reset()
    model, call = prepared()
    dma_diffusers.apply(model, **EXACT)
    eager, graphs = run(model, call), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    if per_block:
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
    else:
        model.compile(fullgraph=True, backend=backend)
    assert (run(model, call) - eager).norm() < 1e-3 * eager.norm()
    nodes = [
        node
        for graph in graphs
        for node in graph.graph.nodes
        if "dma_diffusers.attention" in str(node.target)
    ]
    assert len(nodes) == 3  # the second single block reads a view, for which it has a graph of its own
    assert all(node.args[8] is not None for node in nodes)  # q's weight


def test_no_other_processor_is_taken_for_fluxs():
    assert fused.can_fuse(FluxAttnProcessor)
    assert not fused.can_fuse(type("Other", (FluxAttnProcessor,), {}))
    assert not fused.can_fuse(diffusers.models.attention_processor.AttnProcessor2_0)
