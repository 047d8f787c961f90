"""Files of quantised linears: the same picture after loading, as small as the bits say, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dma_diffusers import DMAConfig, apply, load_linears, quantize_linears, report, restore, save_linears
from dma_diffusers.linears.module import QuantisedLinear
from dma_diffusers.pipelines.generate import draw as draw_prompts
from dma_diffusers.pipelines.load import load_pipeline
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.tiny_pipelines import draw

CALL = {"height": 48, "width": 40, "max_sequence_length": 19, "num_inference_steps": 2}
DEMO_CALL = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 128,
}


def quantise(pipe, method: str, **options) -> None:
    needs = {"calibration": ["a cat"], "call": CALL} if method in ("micromix", "fp8, fixed") else {}
    quantize_linears(pipe, method.partition(",")[0], **needs | options)


def buffers(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{part}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, QuantisedLinear)
        for part, tensor in [*layer.quantised.tensors().items(), ("input_scale", layer.input_scale)]
        if tensor is not None
    }


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def loaded_alike(path, drawn: torch.Tensor, saved: dict[str, torch.Tensor], receipt):
    """A pipeline with the linears of a file, which must have these buffers, picture and receipt."""
    pipe = tiny_pipelines.flux()
    load_linears(pipe, path)
    loaded = buffers(pipe.transformer)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(bytes_of(loaded[name]), bytes_of(saved[name])) for name in saved)
    assert torch.equal(draw(pipe), drawn)
    assert report(pipe) == receipt
    return pipe


@pytest.mark.parametrize("method", ["fp8", "fp8, fixed", "int8", "mxfp8", "mxfp4", "nvfp4", "micromix"])
def test_a_loaded_pipeline_draws_the_same_picture(tmp_path, method):
    path = tmp_path / "linears.safetensors"
    pipe = tiny_pipelines.flux()
    quantise(pipe, method)
    drawn, saved, receipt = draw(pipe), buffers(pipe.transformer), report(pipe)
    save_linears(pipe, path)
    pipe = loaded_alike(path, drawn, saved, receipt)
    again = tmp_path / "again.safetensors"
    save_linears(pipe, again)
    tensors, others = load_file(path), load_file(again)
    assert tensors.keys() == others.keys()
    restore(pipe)
    assert torch.equal(draw(pipe), draw(tiny_pipelines.flux()))


@pytest.mark.parametrize(("bits", "most"), [(8.25, 0.55), (5.0, 0.36), (4.5, 0.31)])
def test_files_of_the_demo_are_as_small_as_the_bits_say(tmp_path, bits, most):
    path = tmp_path / "linears.safetensors"
    pipe = load_pipeline()
    quantize_linears(pipe, "micromix", calibration=["a red circle"], call=DEMO_CALL, bits=bits)
    layers = [m for m in pipe.transformer.modules() if isinstance(m, QuantisedLinear)]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    assert len(layers) == 44
    save_linears(pipe, path)
    assert path.stat().st_size <= most * 2 * weights
    average = sum(m.groups.average_bits * m.in_features * m.out_features for m in layers) / weights
    assert bits - 0.5 < average <= bits
    drawn = draw_prompts(pipe, ["a blue square"], [0], DEMO_CALL)
    restore(pipe)
    load_linears(pipe, path)
    assert torch.equal(draw_prompts(pipe, ["a blue square"], [0], DEMO_CALL).latents, drawn.latents)


def test_a_model_without_weights_takes_a_file(tmp_path):
    path = tmp_path / "linears.safetensors"
    pipe = tiny_pipelines.flux()
    quantise(pipe, "mxfp4")
    drawn = draw(pipe)
    save_linears(pipe, path)
    pipe = tiny_pipelines.flux()
    for name, layer in pipe.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks." in name and "norm" not in name:
            layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    load_linears(pipe, path, keep_original=False)
    assert torch.equal(draw(pipe), drawn)


@pytest.mark.parametrize("method", ["fp8, fixed", "nvfp4", "micromix"])
def test_a_file_without_weights_quantises_those_of_the_model(tmp_path, method):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "linears.safetensors"
    pipe = tiny_pipelines.flux()
    quantise(pipe, method)
    drawn, saved, receipt = draw(pipe), buffers(pipe.transformer), report(pipe)
    save_linears(pipe, whole)
    save_linears(pipe, path, weights=False)
    assert {name.rpartition(":")[2] for name in load_file(path)} <= {"permutation"}
    assert path.stat().st_size < whole.stat().st_size
    loaded_alike(path, drawn, saved, receipt)


def test_a_weight_that_neither_file_nor_model_has(tmp_path):
    path = tmp_path / "linears.safetensors"
    pipe = tiny_pipelines.flux()
    quantise(pipe, "mxfp4")
    save_linears(pipe, path, weights=False)
    pipe = tiny_pipelines.flux()
    name, layer = "transformer_blocks.0.attn.to_k", pipe.transformer.transformer_blocks[0].attn.to_k
    layer.weight = torch.nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(ValueError, match=f"nor the model has the weight of {name}"):
        load_linears(pipe, path)
    assert type(pipe.transformer.transformer_blocks[0].attn.to_q) is torch.nn.Linear


def test_a_config_names_a_file(tmp_path):
    path = tmp_path / "linears.safetensors"
    pipe = tiny_pipelines.flux()
    quantise(pipe, "micromix")
    apply(pipe)
    drawn = draw(pipe)
    save_linears(pipe, path)
    restore(pipe)
    apply(pipe, DMAConfig(linears=path))
    assert torch.equal(draw(pipe), drawn)
    layers = buffers(pipe.transformer)
    apply(pipe, DMAConfig(linears=str(path), low="nvfp4"))
    assert all(tensor is layers[name] for name, tensor in buffers(pipe.transformer).items())


def test_a_file_that_was_written_anew_is_loaded_anew(tmp_path, saved):
    pipe, other = tiny_pipelines.flux(), tiny_pipelines.flux()
    apply(pipe, DMAConfig(linears=saved))
    quantize_linears(other, "mxfp4")
    save_linears(other, saved)
    apply(pipe, DMAConfig(linears=saved))
    found = {m.groups.formats for m in pipe.transformer.modules() if isinstance(m, QuantisedLinear)}
    assert found == {("mxfp4",)}


def test_two_transformers_are_saved_in_one_file(tmp_path):
    def two():
        pipe = tiny_pipelines.wan()
        torch.manual_seed(1)
        pipe.transformer_2 = type(pipe.transformer).from_config(pipe.transformer.config).eval()
        return pipe

    pipe = two()
    quantize_linears(pipe, "int8")
    save_linears(pipe, tmp_path / "two.safetensors")
    saved = [buffers(pipe.transformer), buffers(pipe.transformer_2)]
    pipe = two()
    load_linears(pipe, tmp_path / "two.safetensors")
    for before, after in zip(saved, [buffers(pipe.transformer), buffers(pipe.transformer_2)], strict=True):
        assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(ValueError, match="is for 2 transformers, not for 1"):
        load_linears(tiny_pipelines.wan(), tmp_path / "two.safetensors")


@pytest.fixture
def saved(tmp_path):
    pipe = tiny_pipelines.flux()
    quantise(pipe, "int8")
    save_linears(pipe, tmp_path / "linears.safetensors")
    return tmp_path / "linears.safetensors"


def test_another_model_is_told_by_its_layers(saved):
    pipe = tiny_pipelines.flux()
    with torch.no_grad():
        pipe.transformer.transformer_blocks[0].attn.to_k.weight += 0.1
        pipe.transformer.single_transformer_blocks[0].proj_out.weight *= 1.5
    message = (
        r"was made for another FluxTransformer2DModel: these layers have other sides or weights: "
        r"transformer_blocks.0.attn.to_k, single_transformer_blocks.0.proj_out$"
    )
    for load in (load_linears, lambda pipe, path: apply(pipe, linears=path)):
        with pytest.raises(ValueError, match=message):
            load(pipe, saved)
        assert not report(pipe).linears and not report(pipe).modules
    with pytest.raises(ValueError, match=r"is for FluxTransformer2DModel, not for SD3Transformer2DModel"):
        load_linears(tiny_pipelines.sd3(), saved)


def test_a_deeper_model_is_another_one(tmp_path):
    model, deeper = (tiny_models.flux(num_single_layers=number).model for number in (1, 2))
    deeper.load_state_dict(model.state_dict(), strict=False)
    quantize_linears(model, "int8")
    save_linears(model, tmp_path / "linears.safetensors")
    with pytest.raises(ValueError, match=r"other sides or weights: single_transformer_blocks\.1\."):
        load_linears(deeper, tmp_path / "linears.safetensors")
    assert not report(deeper).linears


def test_layers_that_something_else_quantised_take_no_file(saved):
    torchao = pytest.importorskip("torchao.quantization")
    pipe = tiny_pipelines.flux()
    torchao.quantize_(pipe.transformer.transformer_blocks[0].ff, torchao.Int8WeightOnlyConfig())
    message = r"^transformer_blocks\.0\.ff\.net\.\S+ is quantised already, or of a kind of its own: .*Int8Tensor: load"
    for load in (load_linears, lambda pipe, path: apply(pipe, linears=path)):
        with pytest.raises(ValueError, match=message):
            load(pipe, saved)
        assert not report(pipe).linears and not report(pipe).modules


def test_a_model_without_biases_takes_no_file(saved):
    pipe = tiny_pipelines.flux()
    layer = pipe.transformer.transformer_blocks[0].attn.to_k
    layer.bias = torch.nn.Parameter(layer.bias.to("meta"))
    with pytest.raises(
        ValueError, match=r"^transformer_blocks\.0\.attn\.to_k has no bias yet, and files have none"
    ):
        load_linears(pipe, saved)
    assert not report(pipe).linears


def test_a_model_of_another_dtype_is_the_same(saved):
    pipe = tiny_pipelines.flux()
    pipe.transformer.to(torch.bfloat16)
    load_linears(pipe, saved)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.bfloat16


def test_loading_onto_quantised_layers_is_refused(saved):
    pipe = tiny_pipelines.flux()
    quantize_linears(pipe, "fp8")
    with pytest.raises(ValueError, match="quantised already"):
        load_linears(pipe, saved)


def test_files_that_are_none_are_refused(tmp_path, saved):
    pipe = tiny_pipelines.flux()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_linears(pipe, tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match="is no safetensors file"):
        load_linears(pipe, tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no file of linear layers: save_linears writes them"):
        load_linears(pipe, tmp_path / "other.safetensors")
    metadata = {"dma-diffusers linears": json.dumps({"version": 2})}
    save_file({"a": torch.zeros(1)}, tmp_path / "new.safetensors", metadata)
    with pytest.raises(ValueError, match="has version 2, and only 1 can be read"):
        load_linears(pipe, tmp_path / "new.safetensors")
    with pytest.raises(ValueError, match="are not quantised: nothing to save"):
        save_linears(pipe, tmp_path / "nothing.safetensors")
    assert not (tmp_path / "nothing.safetensors").exists()
