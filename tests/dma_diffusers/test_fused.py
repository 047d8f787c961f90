"""Norm and RoPE of FLUX and of Qwen-Image inside of the operator, and outside of it where a call is unusual.

The pictures are the same either way.
"""

import pytest
import torch
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers import transformer_qwenimage
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_qwenimage import (
    QwenDoubleStreamAttnProcessor2_0,
    QwenEmbedLayer3DRope,
)
from peft import LoraConfig
from torch import nn

import dma_diffusers
from dma_diffusers import fused
from dma_diffusers.attach import interceptions
from dma_diffusers.interception import FUSES, Interception
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.quantiser import reference
from tests.dma_diffusers import tiny_models
from tests.dma_diffusers.tiny_case import AXES

EXACT = {"high": "bf16", "low": "bf16", "lowering": "reference"}
# The text tokens of each call. One double block of FLUX and two single ones, two blocks of Qwen-Image.
TEXTS = {
    "flux": [21, 0, 0],
    "qwen": [21, 21],
    "qwen without a mask": [21, 21],
    "qwen edits": [21, 21],
    "qwen in layers": [21, 21],
    "controlnet of qwen": [21, 21],
}


@pytest.fixture
def calls(monkeypatch):
    """The keyword arguments of the operator's calls."""
    seen, attention = [], operator.attention

    def observed(*args, **kwargs):
        seen.append(kwargs)
        return attention(*args, **kwargs)

    monkeypatch.setattr(operator, "attention", observed)
    return seen


def case_of(name):
    """The tiny model of this name; variants of Qwen-Image are given two pictures, or layers of which one is given."""
    if not name.startswith("qwen"):
        return tiny_models.make(name)
    case = tiny_models.make("qwen")
    if name != "qwen":
        case.inputs["encoder_hidden_states_mask"] = None
    if name == "qwen edits":
        case.inputs["img_shapes"] = [[(1, 10, 19), (1, 6, 19)]]
    if name == "qwen in layers":
        case.inputs["img_shapes"] = [[(1, 5, 19), (1, 5, 19), (1, 6, 19)]]
        case.model.pos_embed = QwenEmbedLayer3DRope(10000, list(AXES), scale_rope=True)
    return case


def prepared(dtype=torch.bfloat16, name="flux"):
    """A tiny model, whose norms have weights, and a call."""
    torch.manual_seed(0)
    case = case_of(name)
    for module in case.model.modules():
        if isinstance(module, nn.RMSNorm | RMSNorm):
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
    """Returns the picture that the model draws, or the last of a ControlNet's outputs."""
    out = model(**call, return_dict=False)
    return (out[0] if isinstance(out, tuple) else out[-1]).float()


def notes(model) -> set[bool]:
    return {FUSES in module.notes for module in dma_diffusers.report(model).modules}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TEXTS)
def test_the_operator_norms_and_turns_as_stock_does(name, dtype, calls):
    model, call = prepared(dtype, name)
    stock = run(model, call)
    dma_diffusers.apply(model, min_length=0, **EXACT)
    found = run(model, call)
    assert all(call["norms"] is not None and call["k_rope"] is not None for call in calls)
    assert [call["norms"].first for call in calls] == TEXTS[name]
    assert {call["norms"].rounds_twice for call in calls} == {name != "flux"}
    assert notes(model) == {True}
    error = (found - stock).norm() / stock.norm()
    assert error < (0.02 if dtype is torch.bfloat16 else 0.005)  # the operator's bf16, in either
    model.transformer_blocks[0].attn.norm_added_k.weight.data.mul_(-1)
    assert not torch.allclose(run(model, call), found, atol=1e-4)


@pytest.mark.parametrize("name", TEXTS)
def test_fused_as_unfused(name, monkeypatch):
    model, call = prepared(name=name)
    dma_diffusers.apply(model, high="bf16", low="int8", window=128, lowering="reference", min_length=0)
    within = run(model, call)
    monkeypatch.setattr(fused, "_is_plain", lambda *_: False)
    before = run(model, call)
    assert (within - before).norm() < 0.02 * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", TEXTS)
def test_q_and_k_of_the_operator_are_those_of_stock(name, dtype, monkeypatch):
    """They are rounded at the same places: bf16 numbers are the same, but for ties that float32 does not tell."""
    model, call = prepared(dtype, name)
    dma_diffusers.apply(model, min_length=0, **EXACT)
    changes, attention = [], Interception.attention

    def observed(self, call, query, key, value, *rest, **given):
        change = call.change
        own = Call(query, key, value, q_rope=change.rope, k_rope=change.rope, norms=change.norms)
        changes.append(((reference.changed_q(own), reference.changed_k(own)), change.applied(query, key)))
        return attention(self, call, query, key, value, *rest, **given)

    monkeypatch.setattr(Interception, "attention", observed)
    run(model, call)
    assert len(changes) == len(TEXTS[name])
    for found, expected in changes:
        for one, other in zip(found, expected, strict=True):
            assert (one.to(dtype) != other).float().mean() < (1e-3 if dtype is torch.bfloat16 else 1)
            torch.testing.assert_close(one.to(dtype), other)


@pytest.mark.parametrize("name", TEXTS)
def test_a_call_that_falls_back_is_stock_to_the_last_bit(name, calls):
    model, call = prepared(name=name)
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


def biased(model):
    model.transformer_blocks[0].attn.norm_q = RMSNorm(16, 1e-6, bias=True).to(torch.bfloat16)
    nn.init.normal_(model.transformer_blocks[0].attn.norm_q.bias)


def hooked_text(model):
    model.transformer_blocks[0].attn.norm_added_k.register_forward_hook(lambda module, args, out: out * 2)


def finer_positions(model):
    positions = model.pos_embed.forward
    model.pos_embed.forward = lambda *args, **given: tuple(
        x.to(torch.complex128) for x in positions(*args, **given)
    )


@pytest.mark.parametrize(("name", "change", "unfused"), [
    ("flux", unaffine, 1), ("flux", hooked, 1), ("flux", other_eps, 1), ("flux", other_positions, 3),
    ("qwen", unaffine, 1), ("qwen", biased, 1), ("qwen", hooked_text, 1), ("qwen", other_eps, 1),
    ("qwen", finer_positions, 2),
])  # fmt: skip
def test_what_is_unusual_stays_with_the_stock_processor(name, change, unfused, calls):
    model, call = prepared(name=name)
    change(model)
    stock = run(model, call)
    dma_diffusers.apply(model, **EXACT)
    found = run(model, call)
    assert sum("norms" not in call for call in calls) == unfused and len(calls) == len(TEXTS[name])
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


@pytest.mark.parametrize(("name", "per_block", "attentions"), [
    ("flux", False, 3), ("flux", True, 3),  # the second single block reads a view, for which it has a graph of its own
    ("qwen", False, 2), ("qwen", True, 1), ("qwen without a mask", True, 1), ("controlnet of qwen", False, 2),
])  # fmt: skip
def test_compiled_in_one_graph_as_eager(name, per_block, attentions):
    torch.compiler.reset()
    model, call = prepared(name=name)
    dma_diffusers.apply(model, min_length=0, **EXACT)
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
    assert len(nodes) == attentions
    assert all(node.args[8] is not None for node in nodes)  # q's weight


def test_processors_that_call_other_functions_are_left_alone(calls, monkeypatch):
    model, call = prepared(name="qwen")
    monkeypatch.setattr(transformer_qwenimage, "apply_rotary_emb_qwen", lambda x, *_, **__: x)
    stock = run(model, call)
    dma_diffusers.apply(model, **EXACT)
    assert (run(model, call) - stock).norm() < 0.02 * stock.norm()
    assert len(calls) == 2 and not any("norms" in call for call in calls)


def test_a_lora_is_added_to_projections(calls):
    model, call = prepared(name="qwen")
    model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "add_k_proj"]))
    model.to(torch.bfloat16)
    stock = run(model, call)
    dma_diffusers.apply(model, **EXACT)
    assert (run(model, call) - stock).norm() < 0.02 * stock.norm()
    assert len(calls) == 2 and all("norms" in call for call in calls)


def test_no_other_processor_is_taken_for_these():
    assert set(fused.KINDS) == {FluxAttnProcessor, QwenDoubleStreamAttnProcessor2_0}
    for kind in fused.KINDS:
        model, call = prepared(name="flux" if kind is FluxAttnProcessor else "qwen")
        module = model.transformer_blocks[0].attn
        module.set_processor(type("Other", (kind,), {})())
        dma_diffusers.apply(model, **EXACT)
        run(model, call)
        assert [FUSES in module.notes for module in dma_diffusers.report(model).modules].count(False) == 1
