"""apply, restore, report, and every way in and out."""

import copy
import io
import json
import logging

import pytest
import torch
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from dma_diffusers import DMAAttnProcessor, DMAConfig, apply, report, restore
from dma_diffusers.kernels import operator
from tests import tiny_pipelines
from tests.kernels.calls import relative_l2
from tests.tiny_pipelines import draw


@pytest.fixture
def pipe():
    return tiny_pipelines.flux()


@pytest.fixture(params=["flux", "sd3", "wan", "hunyuan"])
def any_pipe(request):
    return getattr(tiny_pipelines, request.param)()


def is_clean(model) -> bool:
    return not model._forward_pre_hooks and not report(model).modules


def test_apply_takes_a_model_a_pipeline_and_fields(pipe):
    apply(pipe.transformer, DMAConfig(low="nvfp4"), window=384)
    by_model = draw(pipe)
    apply(pipe, low="nvfp4", window=384)
    assert torch.equal(draw(pipe), by_model)
    assert report(pipe).modules[0].policy == "diagonal(window=384, sink=128)"


def test_every_transformer_of_a_pipeline_is_taken():
    pipe = tiny_pipelines.wan()
    pipe.transformer_2 = tiny_pipelines.wan().transformer
    apply(pipe)
    names = [module.module for module in report(pipe).modules]
    assert {name.partition(".")[0] for name in names} == {"transformer", "transformer_2"}
    restore(pipe)
    assert is_clean(pipe.transformer) and is_clean(pipe.transformer_2)


def test_what_is_not_a_pipeline_or_has_no_transformer_is_refused(pipe):
    with pytest.raises(TypeError, match="expected a Diffusers pipeline or a transformer, got str"):
        apply("flux")
    with pytest.raises(ValueError, match="no known family"):
        apply(pipe.vae)
    pipe.transformer = None
    with pytest.raises(ValueError, match="FluxPipeline has no transformer"):
        apply(pipe)


def test_a_refused_apply_changes_nothing(pipe):
    apply(pipe)
    before = draw(pipe)
    with pytest.raises(
        ValueError, match=r"dense_layers \(3,\): FluxTransformer2DModel has 3 modules to intercept"
    ):
        apply(pipe, dense_layers=(3,))
    with pytest.raises(ValueError, match="unknown format"):
        apply(pipe, low="mxfp9")
    assert torch.equal(draw(pipe), before)


def test_setting_stock_processors_removes_dma(pipe, caplog):
    stock = draw(pipe)
    apply(pipe)
    pipe.transformer.set_attn_processor(FluxAttnProcessor())
    assert is_clean(pipe.transformer)
    assert torch.equal(draw(pipe), stock)
    assert "removed DMA attention" in caplog.text


def test_dicts_of_stock_processors_still_work(any_pipe):
    model = any_pipe.transformer
    stock, processors = draw(any_pipe), dict(model.attn_processors)
    apply(any_pipe)
    model.set_attn_processor(dict(processors))
    assert is_clean(model)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(draw(any_pipe), stock)


def test_a_models_own_processors_can_be_set_again(pipe):
    apply(pipe)
    before = draw(pipe)
    pipe.transformer.set_attn_processor(dict(pipe.transformer.attn_processors))
    assert torch.equal(draw(pipe), before)
    assert report(pipe).modules[0].intercepted == 4


def test_a_dict_chooses_modules(pipe):
    chosen = "transformer_blocks.0.attn.processor"
    ours = DMAAttnProcessor()
    processors = {
        name: ours if name == chosen else value for name, value in pipe.transformer.attn_processors.items()
    }
    pipe.transformer.set_attn_processor(processors)
    draw(pipe)
    modules = report(pipe.transformer).modules
    assert [(module.module, module.intercepted) for module in modules if module.lowering != "stock"] == [
        ("transformer_blocks.0.attn", 2)
    ]
    assert {module.reason for module in modules if module.lowering == "stock"} == {"not asked for"}


def test_a_dict_of_different_configurations_is_refused(pipe):
    processors = pipe.transformer.attn_processors
    mixed = {name: DMAAttnProcessor(window=128 * index) for index, name in enumerate(processors)}
    with pytest.raises(ValueError, match="must agree"):
        pipe.transformer.set_attn_processor(mixed)


def test_a_lone_module_says_what_to_do_instead(pipe):
    pipe.transformer.transformer_blocks[0].attn.set_processor(DMAAttnProcessor())
    with pytest.raises(
        RuntimeError, match=r"use model\.set_attn_processor\(\.\.\.\) or dma_diffusers\.apply"
    ):
        draw(pipe)


def test_the_report_is_json_and_says_what_ran_and_why():
    pipe = tiny_pipelines.hunyuan()
    apply(pipe, lowering="reference", dense_layers=(0,))
    draw(pipe)
    receipt = report(pipe)
    modules = {module["module"]: module for module in json.loads(json.dumps(receipt.to_dict()))["modules"]}
    refiner = modules["transformer.context_embedder.token_refiner.refiner_blocks.0.attn"]
    assert (refiner["lowering"], refiner["reason"]) == ("stock", "attention among tokens of text")
    double = modules["transformer.transformer_blocks.0.attn"]
    assert double["policy"] == "dense(everywhere=high)"
    assert modules["transformer.single_transformer_blocks.0.attn"] == {
        "module": "transformer.single_transformer_blocks.0.attn",
        "lowering": "reference",
        "architecture": "cpu",
        "high": "mxfp8",
        "low": "mxfp4",
        "policy": "diagonal(window=128, sink=128)",
        "reason": "asked for",
        "intercepted": 2,
        "fallbacks": {},
        "inexact_rows": 0,
        "notes": [],
        "by_entry": {},
        "relative_error": None,
        "sampled_rows": 0,
        "turned": [],
    }
    assert "mxfp8|mxfp4 diagonal(window=128, sink=128), lowering reference on cpu: asked for" in str(receipt)


def test_cross_attention_keeps_its_processor_and_is_no_layer():
    pipe = tiny_pipelines.wan()
    apply(pipe.transformer, dense_layers=(1,))
    draw(pipe)
    assert [
        (module.module, module.policy, module.intercepted) for module in report(pipe.transformer).modules
    ] == [
        ("blocks.0.attn1", "diagonal(window=128, sink=128)", 4),
        ("blocks.0.attn2", None, 0),
        ("blocks.1.attn1", "dense(everywhere=high)", 4),
        ("blocks.1.attn2", None, 0),
    ]


def test_the_report_counts_calls_left_to_stock():
    pipe = tiny_pipelines.sd3()
    apply(pipe, min_length=400)  # attn2 has 380 tokens, joint attention 480
    draw(pipe)
    fallbacks = {module.module: module.fallbacks for module in report(pipe).modules if module.fallbacks}
    assert fallbacks == {"transformer.transformer_blocks.0.attn2": {"fewer than 400 keys": 2}}
    assert "2 calls fell back to stock: fewer than 400 keys" in str(report(pipe))


def test_the_report_says_how_many_rows_are_inexact(pipe, monkeypatch):
    genuine, calls = operator.attention, []

    def attention(*args, **kwargs):
        calls.append(len(calls))
        rows = torch.tensor([len(calls)], dtype=torch.int32)
        return genuine(*args, **kwargs)._replace(inexact_rows=rows)

    apply(pipe)
    draw(pipe)
    assert "rows of q and k" not in str(report(pipe))
    monkeypatch.setattr(operator, "attention", attention)
    draw(pipe)
    receipt = report(pipe)
    assert [module.inexact_rows for module in receipt.modules] == [1 + 4, 2 + 5, 3 + 6]
    assert "21 rows of q and k lost small numbers that mxfp8|mxfp4 would keep" in str(receipt)
    assert json.loads(json.dumps(receipt.to_dict()))["modules"][0]["inexact_rows"] == 5
    apply(pipe)
    assert {module.inexact_rows for module in report(pipe).modules} == {0}


class OneHead(torch.nn.Module):
    """The norm of the first head in the place of every head's."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x[:, :1]).expand(x.shape)


def test_keys_that_share_memory_are_left_to_stock():
    pipe = tiny_pipelines.sd3()
    attention = pipe.transformer.transformer_blocks[0].attn2  # its keys go from the norm to attention
    attention.norm_k = OneHead(attention.norm_k)
    apply(pipe)
    draw(pipe)
    reasons = {module.module: list(module.fallbacks) for module in report(pipe).modules if module.fallbacks}
    assert reasons == {
        "transformer.transformer_blocks.0.attn2": ["elements of q, k or v share memory, as after expand"]
    }


def test_the_report_knows_lowerings_before_the_first_call(pipe):
    apply(pipe)
    assert {module.lowering for module in report(pipe).modules} == {"reference"}
    apply(pipe, lowering="native")
    assert {module.lowering for module in report(pipe).modules} == {"none"}
    assert "no block-scaled MMA" in report(pipe).modules[0].reason


def test_one_log_line_at_first_use(pipe, caplog):
    caplog.set_level(logging.INFO, "dma_diffusers")
    apply(pipe)
    draw(pipe)
    draw(pipe)
    assert [record.getMessage() for record in caplog.records] == [
        f"FluxTransformer2DModel: {report(pipe).modules[0]}"
    ]


def test_one_log_line_says_that_everything_is_left_to_stock(pipe, caplog):
    caplog.set_level(logging.INFO, "dma_diffusers")
    apply(pipe, DMAConfig.preset("auto"))
    draw(pipe)
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith("FluxTransformer2DModel: stock attention: nothing is faster than stock")


def test_a_copy_is_a_model_of_its_own(any_pipe):
    model = any_pipe.transformer
    stock = draw(any_pipe)
    apply(any_pipe)
    ours = draw(any_pipe)
    any_pipe.transformer = copy.deepcopy(model)
    assert torch.equal(draw(any_pipe), ours)
    restore(any_pipe)
    assert torch.equal(draw(any_pipe), stock)
    any_pipe.transformer = model
    assert torch.equal(draw(any_pipe), ours)


def test_a_model_can_be_saved_whole(any_pipe):
    stock = draw(any_pipe)
    apply(any_pipe)
    ours = draw(any_pipe)
    file = io.BytesIO()
    torch.save(any_pipe.transformer, file)
    file.seek(0)
    any_pipe.transformer = torch.load(file, weights_only=False)
    assert torch.equal(draw(any_pipe), ours)
    restore(any_pipe)
    assert torch.equal(draw(any_pipe), stock)


def test_save_pretrained_saves_the_stock_model(any_pipe, tmp_path):
    stock = draw(any_pipe)
    apply(any_pipe)
    any_pipe.transformer.save_pretrained(tmp_path)
    any_pipe.transformer = type(any_pipe.transformer).from_pretrained(tmp_path)
    torch.testing.assert_close(draw(any_pipe), stock)  # weights read from a file lie elsewhere in memory


def test_a_backend_that_is_chosen_afterwards_does_not_take_calls_away(pipe):
    apply(pipe)
    ours = draw(pipe)
    active = _AttentionBackendRegistry._active_backend
    try:
        pipe.transformer.set_attention_backend("flex")  # it does not call scaled_dot_product_attention
        assert torch.equal(draw(pipe), ours)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)
    restore(pipe)
    processors = pipe.transformer.attn_processors.values()
    assert {processor._attention_backend for processor in processors} == {AttentionBackendName.FLEX}


def test_a_processor_with_weights_keeps_them(pipe):
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    attention = pipe.transformer.transformer_blocks[0].attn
    attention.set_processor(FluxIPAdapterAttnProcessor(32, 8, num_tokens=(4,), scale=0.7))
    names = list(pipe.transformer.state_dict())
    adapter = {"ip_hidden_states": [torch.randn(1, 4, 8)]}
    stock = draw(pipe, joint_attention_kwargs=dict(adapter))

    pipe.transformer.set_attn_processor(DMAAttnProcessor(DMAConfig.preset("exact")))
    assert torch.equal(draw(pipe, joint_attention_kwargs=dict(adapter)), stock)
    apply(pipe)
    assert list(pipe.transformer.state_dict()) == names
    assert isinstance(attention.processor, FluxIPAdapterAttnProcessor)
    ours = draw(pipe, joint_attention_kwargs=dict(adapter))
    assert 0 < ((ours - stock).norm() / stock.norm()).item() < 0.01
    block = next(
        module for module in report(pipe).modules if module.module.endswith("transformer_blocks.0.attn")
    )
    assert (block.intercepted, list(block.fallbacks)) == (
        2,
        ["cross-attention: queries and keys are different tokens"],
    )
    restore(pipe)
    assert torch.equal(draw(pipe, joint_attention_kwargs=dict(adapter)), stock)


def test_lora_adapters_work_on_either_side(any_pipe):
    lora = pytest.importorskip("peft").LoraConfig(target_modules=["to_q", "to_v"], init_lora_weights=False)
    apply(any_pipe)
    plain = draw(any_pipe)
    torch.manual_seed(0)
    any_pipe.transformer.add_adapter(lora)
    after = draw(any_pipe)
    apply(any_pipe)
    assert torch.equal(draw(any_pipe), after)
    assert not torch.equal(after, plain)


def test_nan_stays_where_full_precision_has_it(pipe):
    apply(pipe)
    hook = pipe.transformer.x_embedder.register_forward_hook(lambda module, args, out: out * float("nan"))
    assert draw(pipe).isnan().all()
    hook.remove()
    assert draw(pipe).isfinite().all()


def test_training_runs_the_operator(pipe):
    apply(pipe, high="bf16", low="int8")
    call = {}
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: call.update(kwargs), with_kwargs=True
    )
    draw(pipe)
    hook.remove()
    before = report(pipe).modules[0].intercepted

    def gradients() -> dict[str, torch.Tensor]:
        pipe.transformer.zero_grad()
        pipe.transformer(**call)[0].sum().backward()
        return {name: x.grad for name, x in pipe.transformer.named_parameters() if x.grad is not None}

    ours = gradients()
    assert report(pipe).modules[0].intercepted == before + 1
    restore(pipe)
    stock = gradients()
    assert ours.keys() == stock.keys()
    errors = torch.tensor(
        [relative_l2(ours[name], stock[name]) for name in stock if stock[name].norm() > 1e-3]
    )
    assert errors.median() < 0.02 and errors.max() < 0.2 and (errors > 0).any()


def test_errors_of_the_operator_reach_the_caller(pipe, monkeypatch):
    def refuse(*args, **kwargs):
        raise ValueError("no")

    monkeypatch.setattr(operator, "attention", refuse)
    apply(pipe)
    with pytest.raises(ValueError, match="no"):
        draw(pipe)


def test_guiders_of_diffusers_know_the_wrapped_processors(pipe):
    apply(pipe)
    wrapped = type(pipe.transformer.transformer_blocks[0].attn.processor)
    assert AttentionProcessorRegistry.get(wrapped) is AttentionProcessorRegistry.get(FluxAttnProcessor)
