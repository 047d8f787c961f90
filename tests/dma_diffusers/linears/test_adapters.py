"""Quantised linears beside tools that change, wrap or move weights: LoRA, fused projections, offload, casts."""

import pytest
import torch

from dma_diffusers import quantize_linears, report, restore, save_linears
from dma_diffusers.linears.module import QuantisedLinear
from tests import tiny_pipelines
from tests.tiny_pipelines import draw

TARGETS = ["to_q", "to_v", "proj_mlp"]


def add_lora(pipe) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS, init_lora_weights=False, lora_alpha=32)
    pipe.transformer.add_adapter(config, "one")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_works_on_top_of_quantised_layers_before_and_after(lora_first):
    pipe = tiny_pipelines.flux()
    without = draw(pipe)
    add_lora(pipe)
    stock = draw(pipe)
    pipe = tiny_pipelines.flux()
    if lora_first:
        add_lora(pipe)
    quantize_linears(pipe, "int8")
    if not lora_first:
        low = draw(pipe)
        add_lora(pipe)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert isinstance(layer.base_layer, QuantisedLinear)
    drawn = draw(pipe)
    # LoRA acts as it does on stock layers: what quantising changes is small beside it.
    assert relative(drawn, stock) < 0.2 * relative(without, stock)
    if not lora_first:
        pipe.transformer.disable_adapters()
        assert torch.equal(draw(pipe), low)
        pipe.transformer.enable_adapters()
        assert torch.equal(draw(pipe), drawn)
    restore(pipe)
    assert torch.equal(draw(pipe), stock)
    pipe.transformer.unload_lora()
    assert torch.equal(draw(pipe), without)


def test_a_pipeline_loads_a_lora_onto_quantised_layers(tmp_path):
    from diffusers import FluxPipeline
    from peft.utils import get_peft_model_state_dict

    pipe = tiny_pipelines.flux()
    add_lora(pipe)
    stock = draw(pipe)
    FluxPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.transformer, adapter_name="one"))
    pipe = tiny_pipelines.flux()
    pipe.load_lora_weights(tmp_path)
    loaded = draw(pipe)
    pipe = tiny_pipelines.flux()
    quantize_linears(pipe, "int8")
    low = draw(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    drawn = draw(pipe)
    assert relative(drawn, loaded) < 0.2 * relative(low, loaded)
    pipe.set_adapters("one", 0.0)
    assert relative(draw(pipe), low) < 1e-6
    with pytest.raises(
        ValueError, match="this linear layer is quantised, and its weight can't be read or chan"
    ):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), low)
    assert stock.isfinite().all()


def test_projections_are_fused_before_not_after():
    pipe = tiny_pipelines.flux()
    pipe.transformer.fuse_qkv_projections()
    quantize_linears(pipe, "int8")
    fused = draw(pipe)
    assert isinstance(pipe.transformer.transformer_blocks[0].attn.to_qkv, QuantisedLinear)
    restore(pipe)
    pipe.transformer.unfuse_qkv_projections()
    quantize_linears(pipe, "int8")
    assert relative(fused, draw(pipe)) < 1e-5
    with pytest.raises(ValueError, match="fuse LoRA or projections"):
        pipe.transformer.fuse_qkv_projections()


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
def test_groups_of_quantised_layers_are_offloaded(level):
    pipe = tiny_pipelines.flux()
    quantize_linears(pipe, "mxfp4")
    low = draw(pipe)
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), level, num_blocks_per_group=1
    )
    assert torch.equal(draw(pipe), low)


def test_layers_whose_groups_are_offloaded_are_not_quantised():
    pipe = tiny_pipelines.flux()
    pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    with pytest.raises(ValueError, match="offloaded in groups: quantise before"):
        quantize_linears(pipe, "fp8")


def test_accelerate_offloads_quantised_layers():
    accelerate = pytest.importorskip("accelerate")
    pipe = tiny_pipelines.flux()
    quantize_linears(pipe, "mxfp4")
    low = draw(pipe)
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    assert torch.equal(draw(pipe), low)


@pytest.mark.parametrize("method", ["fp8", "int8", "mxfp8", "nvfp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_a_model_leaves_its_formats(method, dtype):
    model = tiny_pipelines.flux().transformer
    quantize_linears(model, method)
    layer = model.transformer_blocks[0].attn.to_q
    before = {name: tensor.clone() for name, tensor in layer.quantised.tensors().items()}
    model.to(dtype)
    after = layer.quantised.tensors()
    assert all(after[name].dtype == before[name].dtype for name in before)
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    assert layer.bias.dtype == layer.weight.dtype == dtype
    assert layer(torch.ones(1, 3, layer.in_features, dtype=dtype)).dtype == dtype
    restore(model)
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == dtype


def test_fp8_storage_is_cast_around_quantised_layers():
    pipe = tiny_pipelines.flux()
    quantize_linears(pipe, "int8")
    low = draw(pipe)
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    scales = layer.row_scales.clone()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    assert torch.equal(layer.row_scales, scales)
    assert relative(draw(pipe), low) < 0.1


def test_a_quantised_weight_tells_its_shape_and_refuses_the_rest():
    model = tiny_pipelines.flux().transformer
    quantize_linears(model, "fp8")
    layer = model.transformer_blocks[0].ff.net[2]
    weight = layer.weight
    assert weight.shape == (layer.out_features, layer.in_features)
    assert weight.data.device == torch.device("cpu")
    with pytest.raises(ValueError, match="this linear layer is quantised"):
        weight + 1
    with pytest.raises(ValueError, match="this linear layer is quantised"):
        weight.data += 1


def test_a_quantised_model_says_why_it_is_not_saved(tmp_path):
    model = tiny_pipelines.flux().transformer
    quantize_linears(model, "fp8")
    with pytest.raises(
        ValueError, match=r"this linear layer is quantised.*save_linears saves what is quantised"
    ):
        model.save_pretrained(tmp_path / "model")


def test_training_on_quantised_layers_is_refused():
    model = tiny_pipelines.flux().transformer
    quantize_linears(model, "int8")
    layer = model.transformer_blocks[0].attn.to_q.train()
    with pytest.raises(ValueError, match=r"don't train: call dma_diffusers.restore first"):
        layer(torch.ones(1, layer.in_features))


def test_layers_that_torchao_quantised_are_left_alone_and_reported(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    pipe = tiny_pipelines.flux()
    block = pipe.transformer.transformer_blocks[0].ff
    torchao.quantize_(block, torchao.Int8WeightOnlyConfig())
    packed = block.net[2].weight
    quantize_linears(pipe, "int8")
    left = {each.module: each.reason for each in report(pipe).linears if not each.formats}
    assert left["transformer.transformer_blocks.0.ff.net.2"].startswith("quantised already, or of a kind")
    assert block.net[2].weight is packed
    save_linears(pipe, tmp_path / "few.safetensors")


def test_packed_layers_are_left_alone():
    from tests.dma_diffusers.test_combinations_weights import PackedLinear

    pipe = tiny_pipelines.flux()
    attn = pipe.transformer.transformer_blocks[0].attn
    attn.to_k = PackedLinear(attn.to_k)
    quantize_linears(pipe, "int8")
    assert isinstance(attn.to_k, PackedLinear)
    reasons = {each.module: each.reason for each in report(pipe).linears}
    assert "PackedLinear" in reasons["transformer.transformer_blocks.0.attn.to_k"]
