"""Quantising linears: what is taken, what is left alone and why, what the layers compute, and the way back."""

import copy
import json
import pickle

import pytest
import torch

from dma_diffusers import DMAConfig, apply, calibrate_linears, quantize_linears, report, restore
from dma_diffusers.attach import check
from dma_diffusers.kernels.linears import reference
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.linears import quantise
from dma_diffusers.linears.exclusions import choose
from dma_diffusers.linears.methods import METHODS
from dma_diffusers.linears.module import QuantisedLinear
from dma_diffusers.receipt import Receipt
from tests import tiny_pipelines
from tests.dma_diffusers import tiny_models
from tests.tiny_pipelines import draw

CALL = {"height": 48, "width": 40, "max_sequence_length": 19, "num_inference_steps": 2}


@pytest.fixture
def pipe():
    return tiny_pipelines.flux()


def quantised(model) -> dict[str, QuantisedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def calibrated(pipe, method="micromix", **options) -> None:
    quantize_linears(pipe, method, calibration=["a cat", "a dog"], call=CALL, progress=False, **options)


@pytest.mark.parametrize("method", METHODS)
def test_layers_compute_what_the_reference_says_and_come_back(pipe, method):
    stock = dict(pipe.transformer.named_modules())
    weights = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    drawn = draw(pipe)
    if method == "micromix":
        calibrated(pipe, bits=8)
    else:
        quantize_linears(pipe, method)
    low = draw(pipe)
    assert not torch.equal(low, drawn)
    seen = []
    for layer in quantised(pipe.transformer).values():
        layer.register_forward_hook(lambda layer, args, out: seen.append((layer, args[0], out)))
    assert torch.equal(draw(pipe), low)
    assert len({id(layer) for layer, *_ in seen}) == len(quantised(pipe.transformer)) > 20
    for layer, x, out in seen:
        expected = reference.linear(x, layer.quantised, layer.bias, layer.input_scale)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    restore(pipe)
    assert all(module is stock[name] for name, module in pipe.transformer.named_modules())
    after = pipe.transformer.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(draw(pipe), drawn)


def test_layers_of_blocks_that_tokens_pass_are_taken(pipe):
    choice = choose(pipe.transformer)
    taken = {
        name
        for name in choice.layers
        if name.startswith(("transformer_blocks.0.", "single_transformer_blocks.0."))
    }
    attn = [f"transformer_blocks.0.attn.{leaf}" for leaf in (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]  # fmt: skip
    ff = [f"transformer_blocks.0.{ff}.net.{leaf}" for ff in ("ff", "ff_context") for leaf in ("0.proj", "2")]
    single = [f"single_transformer_blocks.0.{leaf}" for leaf in (
        "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v")]  # fmt: skip
    assert taken == {*attn, *ff, *single}
    left = {
        "x_embedder": "outside the blocks", "context_embedder": "outside the blocks", "proj_out": "outside the blocks",
        "norm_out.linear": "outside the blocks", "transformer_blocks.0.norm1.linear": "modulation",
        "single_transformer_blocks.0.norm.linear": "modulation",
        "time_text_embed.timestep_embedder.linear_1": "outside the blocks",
    }  # fmt: skip
    assert all(choice.left[name].startswith(reason) for name, reason in left.items())


@pytest.mark.parametrize("name", list(tiny_models.EVERY))
def test_no_layer_that_is_taken_gets_one_vector_for_each_picture(name):
    case = tiny_models.EVERY[name]()
    # Sides don't matter here.
    choice = choose(case.model, sensitive=False)
    narrow = [layer for layer, reason in choice.left.items() if reason.startswith("its width")]
    layers = {layer: case.model.get_submodule(layer) for layer in [*choice.layers, *narrow]}
    shapes = {}
    for layer, module in layers.items():
        module.register_forward_pre_hook(lambda _, args, layer=layer: shapes.update({layer: args[0].shape}))
    with torch.no_grad():
        case.run(case.texts(1)[0])
    assert layers
    assert {layer: shape for layer, shape in shapes.items() if shape[:-1].numel() <= 4} == {}


def test_sensitive_parts_keep_more_bits():
    wan = tiny_models.EVERY["wan"]().model
    reasons = choose(wan).left
    assert "long clips of Wan 2.2 collapsed" in reasons["blocks.0.attn1.to_q"]
    assert all("attn" not in name for name in choose(wan).layers)
    assert any(
        "attn" in name for name in choose(wan, sensitive=False).layers | choose(wan, sensitive=False).left
    )
    qwen = tiny_models.EVERY["qwen"]().model
    assert "sgl-project/sglang #23155" in choose(qwen).left["transformer_blocks.0.img_mlp.net.2"]


def test_the_first_and_last_blocks_keep_eight_bits():
    import diffusers

    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=8, caption_channels=32,
    )  # fmt: skip
    quantize_linears(model, "mxfp4")
    for name, layer in quantised(model).items():
        block = int(name.split(".")[1])
        assert layer.groups.formats == (("mxfp4",) if 3 <= block < 5 else ("mxfp8",)), name
    assert "kept at eight bits: the three first and last blocks" in str(report(model))
    restore(model)
    quantize_linears(model, "mxfp4", sensitive=False)
    assert {layer.groups.formats for layer in quantised(model).values()} == {("mxfp4",)}


def test_modules_and_skip_take_names_with_stars(pipe):
    quantize_linears(pipe, "int8", modules=["transformer_blocks.*"], skip=["*.ff_context.*", "*.to_v"])
    names = quantised(pipe.transformer).keys()
    assert names and all(name.startswith("transformer_blocks.") for name in names)
    assert not any("ff_context" in name or name.endswith("to_v") for name in names)
    reasons = {each.module: each.reason for each in report(pipe).linears}
    assert reasons["transformer.transformer_blocks.0.attn.to_v"] == "left out by skip"
    assert reasons["transformer.single_transformer_blocks.0.proj_mlp"] == "not among modules"
    restore(pipe)
    with pytest.raises(ValueError, match=r"FluxTransformer2DModel has no linear layer 'blocks.7'"):
        quantize_linears(pipe, "int8", skip=["blocks.7"])
    with pytest.raises(ValueError, match="has no linear layer to quantise"):
        quantize_linears(pipe, "int8", modules=["x_embedder"])


@pytest.mark.parametrize("option", ["modules", "skip"])
def test_a_name_alone_is_not_taken_for_its_letters(pipe, option):
    with pytest.raises(ValueError, match=rf"^{option} must be a list of names, got '\*': give \['\*'\]$"):
        quantize_linears(pipe, "fp8", **{option: "*"})
    assert not quantised(pipe.transformer)


def test_widths_that_blocks_of_scales_do_not_divide_are_left_alone(pipe):
    ff = pipe.transformer.transformer_blocks[0].ff
    ff.net[0].proj = torch.nn.Linear(32, 72)
    ff.net[2] = torch.nn.Linear(72, 32)
    quantize_linears(pipe, "int8")
    reasons = {each.module: each.reason for each in report(pipe).linears}
    for index, sides in (("0.proj", "32 → 72"), ("2", "72 → 32")):
        assert (
            f"its width {sides} is no multiple of 32"
            in reasons[f"transformer.transformer_blocks.0.ff.net.{index}"]
        )
    assert type(ff.net[2]) is torch.nn.Linear


def test_micromix_has_groups_by_the_rule_and_one_order_for_layers_with_one_input(pipe):
    calibrated(pipe)
    layers = quantised(pipe.transformer)
    attn = "transformer_blocks.0.attn."
    q, k, v = (layers[attn + leaf] for leaf in ("to_q", "to_k", "to_v"))
    assert q.share == k.share == v.share
    assert (q.keeps, k.keeps, v.keeps) == (True, True, False)
    single = "single_transformer_blocks.0."
    shared = {layers[single + leaf].share for leaf in ("proj_mlp", "attn.to_q", "attn.to_k", "attn.to_v")}
    assert len(shared) == 1
    seen = pipe.transformer._dma_calibration
    for name, layer in layers.items():
        if layer.permutation is not None:
            mean = seen.statistics(name).mean_abs[layer.permutation.long()]
            assert bool((mean.diff() >= 0).all())
    mixed = [layer for layer in layers.values() if len(layer.groups.formats) > 1]
    assert all(layer.permutation is not None for layer in mixed)


def test_bits_are_met_and_shares_over_noise_levels_are_kept():
    pipe = tiny_pipelines.flux()
    # Wide enough for groups of 128.
    for block in pipe.transformer.transformer_blocks:
        block.ff.net[0].proj, block.ff.net[2] = torch.nn.Linear(32, 1024), torch.nn.Linear(1024, 32)
    calibrated(pipe, modules=["*.ff.net.*"], bits=6.5)
    layers = quantised(pipe.transformer)
    weights = {name: layer.in_features * layer.out_features for name, layer in layers.items()}
    average = sum(layers[name].groups.average_bits * count for name, count in weights.items()) / sum(
        weights.values()
    )
    assert 5.5 < average <= 6.5
    over_time = json.loads(json.dumps(pipe.transformer._dma_linears.over_time))
    assert over_time["tells_noise"] and over_time["levels"] == sorted(over_time["levels"], reverse=True)
    assert len(over_time["levels"]) == 2
    for rows in over_time["layers"].values():
        assert len(rows) == 2 and all(sum(row) == pytest.approx(1) for row in rows)


def test_groups_of_single_layers_can_be_given(pipe):
    own = {"single_transformer_blocks.0.proj_out": Groups(("mxfp4", "mxfp8"), (128, 32))}
    width = pipe.transformer.single_transformer_blocks[0].proj_out.in_features
    assert width == 160
    quantize_linears(pipe, "fp8", groups=own)
    layers = quantised(pipe.transformer)
    assert (
        layers["single_transformer_blocks.0.proj_out"].groups == own["single_transformer_blocks.0.proj_out"]
    )
    assert layers["single_transformer_blocks.1.proj_out"].groups == Groups.whole("fp8", width)
    restore(pipe)
    with pytest.raises(ValueError, match="has 160 channels, not 32"):
        quantize_linears(
            pipe, "fp8", groups={"single_transformer_blocks.0.proj_out": Groups.whole("fp8", 32)}
        )
    with pytest.raises(ValueError, match="there is no layer nothing"):
        quantize_linears(pipe, "fp8", groups={"nothing": Groups.whole("fp8", 32)})


def test_fp8_with_calibration_has_one_power_of_two_for_each_input(pipe):
    calibrated(pipe, "fp8")
    seen = pipe.transformer._dma_calibration
    layers = quantised(pipe.transformer)
    for name, layer in layers.items():
        scale, amax = float(layer.input_scale), seen.statistics(name).amax
        assert torch.tensor(scale).log2() % 1 == 0
        assert 4 * amax <= 448 * scale < 8 * amax
        assert layer.row_scales.ndim == 0
    attn = "transformer_blocks.0.attn."
    assert layers[attn + "to_q"].input_scale == layers[attn + "to_v"].input_scale


def test_calibration_is_kept_for_further_quantising(pipe):
    calibrate_linears(pipe, ["a cat", "a dog"], call=CALL)
    quantize_linears(pipe, "micromix", bits=8.25)
    first = draw(pipe)
    restore(pipe)
    calibrated(pipe, bits=8.25)
    assert torch.equal(draw(pipe), first)
    restore(pipe)
    apply(pipe, DMAConfig(linears="fp8"))
    assert all(layer.input_scale is not None for layer in quantised(pipe.transformer).values())


def test_a_model_is_calibrated_by_a_function_or_by_its_inputs():
    case = tiny_models.flux(num_attention_heads=4)
    text = case.texts(1)[0]
    outputs = []
    for calibration in (lambda: case.run(text), [case.call(text)]):
        quantize_linears(case.model, "micromix", calibration=calibration)
        outputs.append([layer.groups for layer in quantised(case.model).values()])
        restore(case.model)
    assert outputs[0] == outputs[1]


def test_one_dict_is_one_calibration_input():
    case = tiny_models.flux(num_attention_heads=4)
    case.model.eval()
    one, listed = (copy.deepcopy(case.model) for _ in range(2))
    inputs = case.call(case.texts(1)[0])
    quantize_linears(one, "fp8", calibration=inputs)
    quantize_linears(listed, "fp8", calibration=[inputs])
    scales = [[m.input_scale for m in quantised(model).values()] for model in (one, listed)]
    assert scales[0] == scales[1] and None not in scales[0]


def test_a_layer_that_calibration_never_ran_is_left_alone(pipe):
    pipe.transformer.transformer_blocks[0].ff.unused = torch.nn.Linear(32, 32)
    calibrated(pipe)
    reasons = {each.module: each.reason for each in report(pipe).linears}
    assert reasons["transformer.transformer_blocks.0.ff.unused"] == "calibration never ran it"


def test_nan_during_calibration_names_the_layer_and_the_prompt(pipe):
    layer = pipe.transformer.transformer_blocks[0].ff.net[0].proj
    layer.register_forward_hook(lambda layer, args, out: out * torch.nan)
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0.ff.net.2 was given NaN or infinity by prompt 'a cat'"
    ):
        calibrated(pipe)
    assert not quantised(pipe.transformer)
    # Hooks are gone: drawing works again.
    assert not layer._forward_pre_hooks and not pipe.transformer._forward_pre_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "int4"}, "unknown method 'int4' for linear layers; there are fp8, int8, mxfp8"),
        ({"method": "micromix"}, "micromix needs calibration: give quantize_linears"),
        ({"method": "micromix", "calibration": []}, "calibration has no prompts"),
        ({"method": "int8", "calibration": ["a"]}, "calibration is for micromix and fp8, not for int8"),
        ({"method": "fp8", "bits": 5}, "bits is for micromix, not for fp8"),
        (
            {"method": "micromix", "calibration": ["a"], "call": {"sizes": 3}},
            "can't be called for calibration",
        ),
        ({"method": "micromix", "calibration": lambda: None}, "calibration ran no linear layer of Flux"),
        ({"method": "fp8", "lowering": "scaled_mm"}, r"attn.to_q: lowering scaled_mm can't run fp8 on cpu"),
        ({"method": "fp8", "lowering": "fast"}, "unknown lowering 'fast'"),
    ],
)
def test_what_cannot_be_had_is_refused_and_nothing_changes(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        quantize_linears(pipe, **{"call": CALL} | options)
    assert not quantised(pipe.transformer) and not report(pipe).linears


def test_a_model_takes_no_prompts(pipe):
    with pytest.raises(ValueError, match="a model alone takes no prompts: give its pipeline"):
        quantize_linears(pipe.transformer, calibration=["a cat"])


def test_quantising_twice_is_refused(pipe):
    quantize_linears(pipe, "int8")
    with pytest.raises(ValueError, match=r"are quantised already: call dma_diffusers.restore first"):
        quantize_linears(pipe, "fp8")


def test_an_error_in_the_middle_puts_all_layers_back(pipe, monkeypatch):
    stock = dict(pipe.transformer.named_modules())
    real, calls = quantise.quantise, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 7:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **options)

    monkeypatch.setattr(quantise, "quantise", failing)
    with pytest.raises(torch.OutOfMemoryError):
        quantize_linears(pipe, "int8")
    assert all(module is stock[name] for name, module in pipe.transformer.named_modules())
    assert not report(pipe).linears


def test_without_the_stock_layers_there_is_no_way_back(pipe):
    apply(pipe)
    quantize_linears(pipe, "int8", keep_original=False)
    for refused in (restore, lambda pipe: check(pipe, {"": DMAConfig(linears="fp8")})):
        with pytest.raises(ValueError, match="were not kept"):
            refused(pipe)
    assert quantised(pipe.transformer) and report(pipe).modules


def test_an_error_in_the_middle_without_the_stock_layers_is_told(pipe, monkeypatch):
    real, calls = quantise.quantise, []

    def failing(*args, **options):
        calls.append(args)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **options)

    monkeypatch.setattr(quantise, "quantise", failing)
    with pytest.raises(torch.OutOfMemoryError):
        quantize_linears(pipe, "int8", keep_original=False)
    names = list(quantised(pipe.transformer))
    assert len(names) == 3
    told = [each.module for each in report(pipe).linears if each.formats]
    assert told == [f"transformer.{name}" for name in names]
    with pytest.raises(ValueError, match="were not kept"):
        restore(pipe)


def test_the_receipt_counts_bytes_and_survives_a_file(pipe):
    assert report(pipe).linears == ()
    quantize_linears(pipe.to(torch.bfloat16), "int8")
    receipt = report(pipe)
    layers = quantised(pipe.transformer)
    taken = [each for each in receipt.linears if each.formats]
    assert len(taken) == len(layers)
    for each in taken:
        layer = layers[each.module.removeprefix("transformer.")]
        numbers = layer.in_features * layer.out_features
        assert (each.bytes_before, each.bytes_after) == (2 * numbers, numbers + 4 * layer.out_features)
        assert (each.bits, each.lowering, each.architecture) == (8, "reference", "cpu")
    before, after = (sum(getattr(each, name) for each in taken) for name in ("bytes_before", "bytes_after"))
    assert f"take {after / 1e6:.4g} MB in the place of {before / 1e6:.4g} MB" in str(receipt)
    assert f"{len(layers)} linear layers (transformer.transformer_blocks.0.attn.to_q, …): int8" in str(
        receipt
    )
    stored = json.loads(json.dumps(receipt.to_dict()))
    for layer in stored["linears"]:
        layer["of_tomorrow"] = 1
    assert Receipt.from_dict(stored) == receipt


def test_a_layer_that_was_exchanged_afterwards_is_reported(pipe):
    quantize_linears(pipe, "int8")
    pipe.transformer.transformer_blocks[0].attn.to_q = torch.nn.Linear(32, 32)
    reasons = {each.module: each.reason for each in report(pipe).linears}
    assert reasons["transformer.transformer_blocks.0.attn.to_q"].startswith(
        "another layer was put in its place"
    )


def test_a_quantised_model_is_copied_and_pickled():
    case = tiny_models.flux(num_attention_heads=4)
    quantize_linears(case.model, "mxfp4")
    text = case.texts(1)[0]
    case.model.eval()
    with torch.no_grad():
        expected = case.run(text)
        for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            case.model = other
            assert torch.equal(case.run(text), expected)


def test_apply_quantises_linears_beside_attention(pipe):
    apply(pipe, DMAConfig(linears="int8", min_length=0))
    first = quantised(pipe.transformer)
    assert first and report(pipe).modules
    apply(pipe, DMAConfig(linears="int8", low="nvfp4"))
    assert quantised(pipe.transformer) == first
    apply(pipe, low="mxfp4")
    assert quantised(pipe.transformer) == first
    apply(pipe, linears="mxfp4")
    assert {layer.groups.formats for layer in quantised(pipe.transformer).values()} == {("mxfp4",)}
    restore(pipe)
    assert not quantised(pipe.transformer) and not report(pipe).modules


def test_apply_says_how_micromix_is_calibrated_and_changes_nothing(pipe):
    with pytest.raises(ValueError, match=r"calibrate_linears.*first, or load a file that save_linears wrote"):
        apply(pipe, linears="micromix")
    assert not report(pipe).modules and not report(pipe).linears
    calibrate_linears(pipe, "a cat", call=CALL)
    apply(pipe, linears="micromix")
    assert quantised(pipe.transformer)


def test_exact_attention_goes_with_low_linears(pipe):
    apply(pipe, DMAConfig.preset("exact", linears="int8"))
    low = draw(pipe)
    restore(pipe)
    quantize_linears(pipe, "int8")
    assert torch.equal(draw(pipe), low)
    assert str(report(pipe)).startswith("stock attention: nothing is applied\n")


@pytest.mark.parametrize("linears", ["int4", 7, ""])
def test_a_config_refuses_unknown_linears(linears):
    with pytest.raises(ValueError, match="linears"):
        DMAConfig(linears=linears)
