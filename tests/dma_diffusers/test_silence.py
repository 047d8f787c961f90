"""Nothing in silence: attention that others replace is counted, with its reason, and the report says what ran."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from dma_diffusers import DMAConfig, apply, report, restore
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.tiny_pipelines import draw

ROOT = Path(__file__).parents[2]


def another(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Attention of another package, which is not quite PyTorch's."""
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5) + 0.1 * torch.eye(key.shape[-2])
    return scores.softmax(-1) @ value


@torch.no_grad()
def test_attention_that_is_replaced_after_the_import_is_still_intercepted(monkeypatch):
    case = tiny_models.make("flux")
    (text,) = case.texts(1)
    apply(case.model, min_length=0)
    ours = case.run(text)
    monkeypatch.setattr(F, "scaled_dot_product_attention", another)
    assert torch.equal(case.run(text), ours)
    assert [module.intercepted for module in report(case.model).modules] == [2, 2, 2]


def test_what_falls_back_gets_the_attention_that_stock_would_get(monkeypatch):
    pipe = tiny_pipelines.flux()
    genuine = draw(pipe)
    monkeypatch.setattr(F, "scaled_dot_product_attention", another)
    stock = draw(pipe)
    for fields in ({"min_length": 10_000}, {"lowering": "stock"}):
        apply(pipe, **fields)
        assert torch.equal(draw(pipe), stock) and not torch.equal(stock, genuine)


class Helped:
    """A user's own processor, which asks for attention by the name that was replaced."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        x = hidden_states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


def test_a_replaced_attention_that_takes_calls_away_is_named(monkeypatch, caplog):
    pipe = tiny_pipelines.flux(num_layers=0)
    for block in pipe.transformer.single_transformer_blocks:
        block.attn.set_processor(Helped())
    apply(pipe)
    ours = draw(pipe)
    assert all(module.intercepted for module in report(pipe).modules)
    monkeypatch.setattr(F, "scaled_dot_product_attention", another)
    apply(pipe)
    caplog.clear()
    assert not torch.equal(draw(pipe), ours)
    for module in report(pipe).modules:
        reason = "scaled_dot_product_attention was replaced by tests.dma_diffusers.test_silence.another"
        assert (module.lowering, module.fallbacks) == ("stock", {reason: 2})
    assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == 1


def test_attention_that_was_replaced_during_the_import_and_put_back_is_intercepted():
    script = """
import torch, torch.nn.functional as F
genuine = F.scaled_dot_product_attention
F.scaled_dot_product_attention = lambda *args, **kwargs: genuine(*args, **kwargs) + 1
from dma_diffusers import apply, report
from tests import tiny_pipelines
pipe = tiny_pipelines.flux()
F.scaled_dot_product_attention = genuine
apply(pipe)
tiny_pipelines.draw(pipe)
print([module.intercepted for module in report(pipe).modules])
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[2, 2, 2]"


class RingMode(TorchFunctionMode):
    """A package's mode that attends on several GPUs, and must not be passed by."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls += 1
        return func(*args, **(kwargs or {}))


def test_another_packages_function_mode_gets_its_calls():
    pipe = tiny_pipelines.flux()
    stock = draw(pipe)
    apply(pipe)
    ours = draw(pipe)
    with RingMode() as mode:
        assert torch.equal(draw(pipe), stock)
    assert mode.calls >= 6
    (reason,) = {reason for module in report(pipe).modules for reason in module.fallbacks}
    assert reason.endswith("test_silence.RingMode may attend in its own way: it is a torch function mode")
    with torch.device("cpu"):  # which is a function mode, too
        assert torch.equal(draw(pipe), ours)


def test_the_headline_is_what_ran():
    pipe = tiny_pipelines.flux()
    apply(pipe)
    assert (
        str(report(pipe))
        .splitlines()[0]
        .startswith("3 modules (transformer.transformer_blocks.0.attn, …): mxfp8")
    )
    apply(pipe, min_length=10_000)
    draw(pipe)
    assert str(report(pipe)).splitlines() == [
        "3 modules (transformer.transformer_blocks.0.attn, …): stock attention: fewer than 10000 keys",
        "  0 calls intercepted",
        "  6 calls fell back to stock: fewer than 10000 keys",
    ]


def test_modules_that_attend_without_a_processor_are_listed():
    case = tiny_models.make("mochi")
    apply(case.model, min_length=0)
    last = report(case.model).modules[-1]
    assert (last.module, last.lowering) == ("time_embed.pooler", "stock")
    assert last.reason == "it attends without a processor"


def test_every_transformer_and_control_net_of_a_pipeline_is_answered():
    from diffusers import AutoencoderKL, FluxControlNetModel, FluxControlNetPipeline, SanaControlNetModel

    pipe = tiny_pipelines.flux()
    control = FluxControlNetModel.from_transformer(
        pipe.transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    pipe = FluxControlNetPipeline(**pipe.components, controlnet=control)
    apply(pipe)
    names = [module.module for module in report(pipe).modules]
    assert names == [
        "transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.0.attn",
        "transformer.single_transformer_blocks.1.attn", "controlnet.transformer_blocks.0.attn",
        "controlnet.single_transformer_blocks.0.attn",
    ]  # fmt: skip
    apply(pipe, modules={"single_transformer_blocks.1.attn": {"window": 384}})
    left = [module for module in report(pipe).modules if module.module.startswith("controlnet.")]
    assert {(module.lowering, module.reason) for module in left} == {
        ("stock", "modules: FluxControlNetModel has no single_transformer_blocks.1.attn to intercept")
    }
    pipe.controlnet = SanaControlNetModel(
        in_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8, patch_size=1,
    )  # fmt: skip
    apply(pipe)
    reasons = {module.reason for module in report(pipe).modules if module.module.startswith("controlnet.")}
    assert all("SanaControlNetModel can't be had: its self-attention is linear" in each for each in reasons)
    assert not any(module.module.startswith("vae") for module in report(pipe).modules)
    assert isinstance(pipe.vae, AutoencoderKL)
    restore(pipe)
    assert not report(pipe).modules


def test_a_receipt_before_the_first_call_knows_where_an_offloaded_model_will_run():
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_pipelines.flux()
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    apply(pipe)
    assert {module.architecture for module in report(pipe).modules} == {"cpu"}


class Wrapper(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@torch.no_grad()
def test_wrapped_models_are_unwrapped_or_named():
    peft = pytest.importorskip("peft")
    case = tiny_models.make("flux")
    (text,) = case.texts(1)
    lora = peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)
    wrapped = peft.get_peft_model(case.model, lora)
    stock = case.run(text)
    apply(wrapped, min_length=0)
    assert not torch.equal(case.run(text), stock)
    assert [module.intercepted for module in report(wrapped).modules] == [1, 1, 1]
    restore(wrapped)
    assert torch.equal(case.run(text), stock)
    with pytest.raises(
        ValueError, match="Wrapper holds a FluxTransformer2DModel as inner: apply DMA to that"
    ):
        apply(Wrapper(tiny_models.make("flux").model))


def test_presets_leave_nothing_behind_that_the_report_denies():
    pipe = tiny_pipelines.sd3()
    stock = draw(pipe)
    apply(pipe, DMAConfig.preset("exact"))
    assert torch.equal(draw(pipe), stock)
    assert {module.lowering for module in report(pipe).modules} == {"stock"}
    assert {module.reason for module in report(pipe).modules} == {"exact: nothing is quantised"}


def test_a_processor_that_asks_for_a_backend_of_its_own_gets_it():
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21FlexAttnProcessor

    case = tiny_models.make("qwen21")
    (text,) = case.texts(1)
    with torch.no_grad():
        case.model.set_attn_processor(QwenImage21FlexAttnProcessor())
        stock = case.run(text)
        apply(case.model, min_length=0)
        assert torch.equal(case.run(text), stock)
    for module in report(case.model).modules:
        assert (module.lowering, module.reason) == ("stock", "its processor asks for the backend flex")


def test_a_diffusers_that_lacks_what_is_private_is_told_with_both_versions():
    script = """
import diffusers.models.attention_dispatch as dispatch
del dispatch._templated_context_parallel_attention
import dma_diffusers
try:
    dma_diffusers.apply
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    import diffusers

    words = f"dma-diffusers does not know diffusers {diffusers.__version__} with torch {torch.__version__}: "
    assert run.stdout.startswith(words) and "_templated_context_parallel_attention" in run.stdout
