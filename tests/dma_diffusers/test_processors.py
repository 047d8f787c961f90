"""Processors that Diffusers or the user sets, before or after DMA is applied, and processors of every form."""

import functools

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from dma_diffusers import DMAAttnProcessor, DMAConfig, apply, report, restore
from dma_diffusers.wrap import WrappedProcessor
from tests import tiny_pipelines
from tests.tiny_pipelines import draw

IMAGE = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))


def load_flux_adapter(model) -> None:
    torch.manual_seed(0)
    width, text = model.inner_dim, model.config.joint_attention_dim
    sizes = {"to_k_ip.weight": (width, text), "to_v_ip.weight": (width, text)}
    sizes |= {"to_k_ip.bias": (width,), "to_v_ip.bias": (width,)}
    projection = {"proj.weight": torch.randn(4 * text, 16), "proj.bias": torch.randn(4 * text)}
    projection |= {"norm.weight": torch.randn(text), "norm.bias": torch.randn(text)}
    layers = {f"0.{name}": torch.randn(size) for name, size in sizes.items()}
    model._load_ip_adapter_weights(
        [{"image_proj": projection, "ip_adapter": layers}], low_cpu_mem_usage=False
    )


def load_sd3_adapter(model) -> None:
    torch.manual_seed(0)
    width = model.inner_dim
    layers = {}
    for index in range(len(model.attn_processors)):
        made = SD3IPAdapterJointAttnProcessor2_0(width, width, model.config.attention_head_dim, 64)
        layers |= {f"{index}.{name}": torch.randn_like(value) for name, value in made.state_dict().items()}
    projection = IPAdapterTimeImageProjection(
        embed_dim=16, output_dim=width, hidden_dim=64, dim_head=64, heads=1, num_queries=4
    )
    adapter = {"image_proj": projection.state_dict(), "ip_adapter": layers}
    model._load_ip_adapter_weights(adapter, low_cpu_mem_usage=False)


# How an adapter is loaded, what its pictures are drawn with, and the class of its processors.
ADAPTERS = {
    "flux": (
        load_flux_adapter,
        {"ip_adapter_image_embeds": [IMAGE], "negative_ip_adapter_image_embeds": [IMAGE]},
        FluxIPAdapterAttnProcessor,
    ),
    "sd3": (
        load_sd3_adapter,
        {"ip_adapter_image_embeds": IMAGE.repeat(2, 1, 1)},
        SD3IPAdapterJointAttnProcessor2_0,
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("loads_first", [False, True])
def test_an_ip_adapter_comes_and_goes_under_dma(name, loads_first):
    load, images, kind = ADAPTERS[name]
    pipe = getattr(tiny_pipelines, name)()
    stock = draw(pipe)
    apply(pipe)
    plain = draw(pipe)
    restore(pipe)
    steps = [apply, lambda pipe: load(pipe.transformer)]
    for step in reversed(steps) if loads_first else steps:
        step(pipe)
    adapted = draw(pipe, **images)
    assert sum(isinstance(each, kind) for each in pipe.transformer.attn_processors.values())
    receipt = report(pipe)
    assert [module.intercepted for module in receipt.modules if module.policy] == [2, 2, 2]
    restore(pipe)
    exact = draw(pipe, **images)
    assert 0 < (adapted - exact).norm() < 0.02 * exact.norm()
    assert (exact - stock).norm() > 1e-3 * stock.norm()

    apply(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(draw(pipe), plain)
    assert [module.intercepted for module in report(pipe).modules] == [2, 2, 2]
    restore(pipe)
    assert torch.equal(draw(pipe), stock)
    assert not any(
        isinstance(each, kind | WrappedProcessor) for each in pipe.transformer.attn_processors.values()
    )


@pytest.mark.parametrize("name", ["sd3", "cogvideox", "flux", "wan"])
def test_projections_are_fused_and_unfused_under_dma(name):
    fields = {"dual_attention_layers": ()} if name == "sd3" else {}
    pipe, other = (getattr(tiny_pipelines, name)(**fields) for _ in range(2))
    stock = draw(pipe)
    other.transformer.fuse_qkv_projections()
    fused = draw(other)
    apply(pipe, min_length=0)
    ours = draw(pipe)
    calls = [module.intercepted for module in report(pipe).modules]
    assert any(calls)
    pipe.transformer.fuse_qkv_projections()
    assert 1e-4 < (draw(pipe) - fused).norm() / fused.norm() < 0.02
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(draw(pipe), ours)
    assert [module.lowering for module in report(pipe).modules if module.policy] == ["reference"] * sum(
        map(bool, calls)
    )
    restore(pipe)
    assert torch.equal(draw(pipe), stock)


POLICY = {"policy": "neighborhood(window=3x3x3)", "dense_layers": ()}  # with dense steps


@pytest.mark.parametrize("removed_by", ["set_attn_processor", "restore", "another configuration"])
def test_processors_that_were_read_are_set_again(removed_by):
    pipe = tiny_pipelines.wan()
    model, stock = pipe.transformer, draw(pipe)
    apply(pipe, **POLICY)
    right, saved = draw(pipe), dict(model.attn_processors)
    draw(pipe, num_inference_steps=20)  # a schedule that ends at low noise
    if removed_by == "restore":
        restore(model)
    elif removed_by == "another configuration":
        apply(pipe, low="int8")
    else:
        model.set_attn_processor(WanAttnProcessor())
        assert torch.equal(draw(pipe), stock) and not report(pipe).modules
    model.set_attn_processor(dict(saved))
    again = draw(pipe)
    if removed_by == "another configuration":  # one model has one configuration, and that is what it reports
        assert report(pipe).modules[0].low == "int8"
    else:
        assert torch.equal(again, right)
        assert (
            report(pipe).modules[0].policy
            == "sigma>0.907: dense(everywhere=high); neighborhood(window=3x3x3)"
        )
    draw(pipe, height=128)


def test_processors_that_come_back_one_by_one_fall_back_and_say_so():
    pipe = tiny_pipelines.flux()
    stock = draw(pipe)
    apply(pipe)
    module = pipe.transformer.transformer_blocks[0].attn
    ours = module.processor
    restore(pipe)
    module.processor = ours
    assert torch.equal(draw(pipe), stock)
    one, *others = report(pipe).modules
    assert (one.lowering, one.intercepted) == ("stock", 0) and "apply DMA again" in one.reason
    assert {other.reason for other in others} == {"it was not there when DMA was applied"}
    apply(pipe)
    assert {module.lowering for module in report(pipe).modules} == {"reference"}
    assert isinstance(ours.stock, FluxAttnProcessor)


def test_a_module_whose_processor_is_replaced_is_reported_as_that():
    pipe = tiny_pipelines.sd3()
    apply(pipe)
    pipe.transformer.transformer_blocks[0].attn.set_processor(JointAttnProcessor2_0())
    draw(pipe)
    reasons = {module.module.removeprefix("transformer."): module for module in report(pipe).modules}
    replaced = reasons.pop("transformer_blocks.0.attn")
    assert (replaced.lowering, replaced.intercepted) == ("stock", 0)
    assert replaced.reason == "its processor was replaced after DMA was applied"
    assert all(module.intercepted for module in reasons.values())


def test_dma_is_set_twice_and_restored_without_being_applied():
    pipe = tiny_pipelines.flux()
    stock = draw(pipe)
    restore(pipe)
    assert torch.equal(draw(pipe), stock)
    pipe.transformer.set_attn_processor(DMAAttnProcessor())
    once = draw(pipe)
    pipe.transformer.set_attn_processor(DMAAttnProcessor())
    assert torch.equal(draw(pipe), once)
    restore(pipe)
    restore(pipe)
    assert torch.equal(draw(pipe), stock)


class Logging(FluxAttnProcessor):
    def __call__(self, attn, *args, **kwargs):
        return super().__call__(attn, *args, **kwargs)


class Trainable(torch.nn.Module):
    def forward(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        return function(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self):
        self.scale = 1.0

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        return function(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


def function(attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
    return FluxAttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)


FORMS = {
    "*args": Logging, "a module": Trainable, "slots": Slotted,
    "a function": lambda: function, "a partial": lambda: functools.partial(function),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_processors_of_every_form_are_intercepted(form):
    pipe = tiny_pipelines.flux()
    stock = draw(pipe)
    apply(pipe)
    ours = draw(pipe)
    restore(pipe)
    processor = FORMS[form]()
    pipe.transformer.set_attn_processor(processor)
    assert torch.equal(draw(pipe), stock)
    apply(pipe, DMAConfig.preset("exact"))
    assert torch.equal(draw(pipe), stock)
    apply(pipe)
    assert torch.equal(draw(pipe), ours)
    assert [module.intercepted for module in report(pipe).modules] == [2, 2, 2]
    restore(pipe)
    assert torch.equal(draw(pipe), stock)
    assert all(each is processor for each in pipe.transformer.attn_processors.values())


def test_what_is_no_processor_is_refused_and_nothing_is_changed():
    class NoProcessor:
        def __call__(self, attn): ...

    pipe = tiny_pipelines.flux()
    apply(pipe)
    ours = draw(pipe)
    last = pipe.transformer.single_transformer_blocks[1].attn
    kept, last.processor = last.processor, NoProcessor()
    with pytest.raises(ValueError, match=r"NoProcessor is no attention processor: .*\(attn, hidden_states"):
        apply(pipe, low="int8")
    last.processor = kept
    assert torch.equal(draw(pipe), ours)
    assert {module.low for module in report(pipe).modules} == {"mxfp4"}


class Manual(FluxAttnProcessor):
    """A processor that computes its softmax itself."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        q, k, v = (
            proj(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for proj in (attn.to_q, attn.to_k, attn.to_v)
        )
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def test_a_processor_that_attends_in_its_own_way_is_counted_and_warned_about(caplog):
    pipe = tiny_pipelines.flux()
    for block in pipe.transformer.single_transformer_blocks:
        block.attn.set_processor(Manual())
    stock = draw(pipe)
    apply(pipe)
    caplog.clear()
    ours = draw(pipe)
    assert 0 < (ours - stock).norm() < 0.01 * stock.norm()  # the double block's
    double, *single = report(pipe).modules
    assert double.intercepted == 2
    reason = "test_processors.Manual attended in its own way, without scaled_dot_product_attention"
    for module in single:
        assert (module.lowering, module.intercepted, list(module.fallbacks.values())) == ("stock", 0, [2])
        assert module.reason.endswith(reason)
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert (
        str(report(pipe))
        .splitlines()[3]
        .startswith("2 modules (transformer.single_transformer_blocks.0.attn")
    )
    assert "stock attention: " in str(report(pipe))
    assert str(report(pipe)).startswith("transformer.transformer_blocks.0.attn: mxfp8|mxfp4 ")


def test_a_processor_that_attends_in_its_own_way_is_noted_in_graphs_too(caplog):
    torch.compiler.reset()
    pipe = tiny_pipelines.flux(num_layers=0, num_single_layers=12)
    for block in pipe.transformer.single_transformer_blocks:
        block.attn.set_processor(Manual())
    apply(pipe)
    caplog.clear()
    eager = draw(pipe)
    apply(pipe)
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(draw(pipe), eager)
    for module in report(pipe).modules:
        assert (module.lowering, module.intercepted) == ("stock", 0)
        assert (
            module.reason.startswith("in a compiled graph ")
            and "Manual attended in its own way" in module.reason
        )
    assert [record.levelname for record in caplog.records].count(
        "WARNING"
    ) == 2  # eager, and while it was traced

    torch.compiler.reset()
    apply(pipe)  # what a graph of before lacked is nothing that this application has
    assert not any("compiled graph" in module.reason for module in report(pipe).modules)
