"""DMAConfig: what it allows, and its presets."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from dma_diffusers import DMAConfig
from dma_diffusers.gains import GAINS_FROM, LOW_GAINS_FROM

CPU = torch.device("cpu")
RESULTS = Path(__file__).parents[2] / "eval" / "results" / "h200_bench.json.gz"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"high": "mxfp9"}, ["mxfp9", "mxfp8"]),
        ({"low": ""}, ["mxfp4"]),
        ({"low": "int8/"}, ["int8/", "int8/bf16", "mxfp4"]),
        ({"high": "bf16/fp8/fp8"}, ["bf16/fp8/fp8", "int8/bf16"]),
        ({"low": "int8/mxfp9"}, ["mxfp9", "mxfp8"]),
        ({"modules": {"attn": {"low": "int8/mxfp9"}}}, ["modules: attn: ", "mxfp9"]),
        ({"window": -1}, ["window", "0 or more", "-1"]),
        ({"window": 1.5}, ["window", "whole", "1.5"]),
        ({"sink": True}, ["sink", "True"]),
        ({"min_length": -5}, ["min_length", "-5"]),
        ({"dense_above_sigma": 1.01}, ["dense_above_sigma", "between 0 and 1", "1.01"]),
        ({"dense_above_sigma": "high"}, ["dense_above_sigma", "high"]),
        ({"dense_above_sigma": float("nan")}, ["dense_above_sigma", "nan"]),
        ({"dense_layers": 3}, ["dense_layers", "3"]),
        ({"dense_layers": (0.5,)}, ["dense_layers", "0.5"]),
        ({"quality_first": 0.5}, ["quality_first", "true or false", "0.5"]),
        ({"guard": True}, ["guard must be a relative error more than 0, such as 0.2", "True"]),
        ({"guard": 0}, ["guard must be a relative error more than 0, such as 0.2", "got 0"]),
        ({"guard": -0.1}, ["guard must be a relative error more than 0, such as 0.2", "-0.1"]),
        ({"guard": float("nan")}, ["guard must be a relative error more than 0, such as 0.2", "nan"]),
        ({"guard": "0.2"}, ["guard must be a relative error more than 0, such as 0.2", "'0.2'"]),
        ({"lowering": "magic"}, ["magic", "auto", "reference"]),
        ({"text": "middle"}, ["middle", "first", "last", "none"]),
        ({"smooth_k": "no"}, ["smooth_k must be true or false", "'no'"]),
        ({"smooth_v": 1}, ["smooth_v must be true or false", "got 1"]),
        ({"backward": "int8"}, ["backward=int8 multiplies", "int8, int8_tile, int4, got mxfp8 | mxfp4"]),
        ({"rotation": "hadamard"}, ["'hadamard'", "none, hadamard16, hadamard32, head_dim"]),
        ({"modules": {"attn": {"rotation": 32}}}, ["modules: attn: ", "32", "hadamard32"]),
    ],
)
def test_bad_fields_are_refused_in_one_line(fields, words):
    with pytest.raises(ValueError) as error:
        DMAConfig(**fields)
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unknown_preset_lists_what_exists():
    with pytest.raises(ValueError, match="unknown preset 'h100'; there are auto, b200, hopper, exact"):
        DMAConfig.preset("h100")


def test_unknown_option_lists_what_exists():
    with pytest.raises(ValueError, match="unknown option bits; there are high, low, window"):
        DMAConfig.of(None, bits=4)


def test_presets():
    b200, hopper = DMAConfig.preset("b200"), DMAConfig.preset("hopper", window=384)
    assert (b200.high, b200.low, b200.window, b200.sink) == ("mxfp8", "mxfp4", 128, 128)
    assert (hopper.high, hopper.low, hopper.window) == ("bf16", "int8", 384)
    assert not b200.why_stock(CPU, 64)
    assert not hopper.why_stock(CPU, 64)


def test_a_module_may_have_a_rotation_of_its_own():
    config = DMAConfig(rotation="hadamard32", modules={"attn": {"rotation": "head_dim"}, "other": {}})
    found = [config.of_module(name).arguments((0, 0))["rotation"] for name in ("attn", "other")]
    assert found == ["head_dim", "hadamard32"]


def test_precisions_are_kept_as_the_shortest_words():
    own = {"attn": {"low": "int8/fp8", "high": "fp8/fp8"}}
    config = DMAConfig(high="bf16/bf16", low="int8/fp8", modules=own)
    assert (config.high, config.low) == ("bf16", "int8")
    assert config.modules == (("attn", (("high", "fp8/fp8"), ("low", "int8"))),)
    assert config == DMAConfig(high="bf16", low="int8", modules={"attn": {"low": "int8", "high": "fp8/fp8"}})
    other = DMAConfig(high="bf16/fp8", low="int8/bf16")
    assert (other.high, other.low) == ("bf16/fp8", "int8/bf16")
    assert other.arguments((0, 0)).items() >= {"high": "bf16/fp8", "low": "int8/bf16"}.items()


def test_auto_compares_precisions_by_their_shortest_words(monkeypatch):
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: "sm_90")
    pytest.importorskip("triton")
    assert DMAConfig.preset("auto", low="int8/fp8", high="bf16/bf16").why_stock(CPU, 128) == ""


def test_exact_quantises_nothing_and_takes_no_changes():
    assert "exact" in DMAConfig.preset("exact").why_stock(CPU, 64)
    with pytest.raises(ValueError, match="'exact' quantises nothing, so it takes no high"):
        DMAConfig.preset("exact", high="mxfp8")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_87"])
def test_auto_has_bf16_values_where_there_is_no_fp8(monkeypatch, architecture):
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: architecture)
    auto = DMAConfig.preset("auto")
    assert (auto.high, auto.low) == ("bf16", "int8/bf16")
    pytest.importorskip("triton")
    assert "nobody has run it: it was compiled" in auto.why_stock(CPU, 64)


def test_auto_is_stock_where_nothing_is_faster_and_says_why(monkeypatch):
    auto = DMAConfig.preset("auto")
    assert "block-scaled MMA" in auto.why_stock(CPU, 64)
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: "sm_100")
    assert auto.why_stock(CPU, 64) == ""
    assert "head_dim 264" in auto.why_stock(CPU, 264)


@pytest.mark.parametrize(
    "architecture, formats, reason",
    [
        ("sm_100", {}, ""),
        ("sm_103", {"low": "nvfp4"}, ""),
        ("sm_120", {"high": "bf16", "low": "int8"}, ""),
        ("sm_100", {"low": "mxint4"}, "mxfp8|mxint4 (faithful) at head_dim 128 is not shown"),
        ("sm_100", {"low": "mxfp4/int8"}, "nothing is faster than stock: native: the kernel multiplies"),
        ("sm_90", {}, ""),
        (
            "sm_90",
            {"low": "fp8"},
            "bf16|fp8 (native) at head_dim 128 is not shown to be faster than stock on sm_90",
        ),
        ("sm_90", {"high": "mxfp8", "low": "mxfp4"}, "mxfp8|mxfp4 (faithful) at head_dim 128 is not shown"),
        ("sm_89", {"high": "bf16", "low": "int8"}, "bf16|int8 (native) at head_dim 128 is not shown"),
        (
            "sm_80",
            {"high": "bf16", "low": "int8"},
            "nothing is faster than stock: native: sm_80 has no FP8 MMA, which P·V in fp8 needs: write int8/bf16",
        ),
        (
            "sm_86",
            {"high": "bf16", "low": "int8/bf16"},
            "bf16|int8/bf16 (native) at head_dim 128 is not shown to be faster than stock on sm_86, where nobody has",
        ),
    ],
)
def test_only_what_is_faster_is_taken(monkeypatch, architecture, formats, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: architecture)
    why = DMAConfig.preset("auto", **formats).why_stock(CPU, 128)
    assert why.startswith(reason) and bool(why) == bool(reason)


@pytest.mark.parametrize(
    ("architecture", "head_dim", "least"),
    [
        ("sm_90", 64, 17_664),
        ("sm_90", 40, 17_664),
        ("sm_90", 96, 4608),
        ("sm_100", 128, 2048),
        ("cpu", 64, 2048),
    ],
)
def test_auto_leaves_calls_shorter_than_those_measured_to_gain(monkeypatch, architecture, head_dim, least):
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: architecture)
    auto = DMAConfig.preset("auto")
    assert (auto.high, auto.low) == (("bf16", "int8") if architecture == "sm_90" else ("mxfp8", "mxfp4"))
    assert auto.least_keys(CPU, head_dim) == least
    assert DMAConfig.preset("auto", min_length=20_000).least_keys(CPU, head_dim) == 20_000
    assert DMAConfig.preset("hopper").least_keys(CPU, head_dim) == 256


def test_auto_takes_every_tile_low_on_hopper_unless_a_map_is_asked_for(monkeypatch):
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: "sm_90")
    assert DMAConfig.preset("auto", min_length=512).words == "dense(everywhere=low)"
    for asked, words in (
        ({"window": 384}, "diagonal(window=384, sink=128)"),
        ({"sink": 0}, "diagonal(window=128, sink=0)"),
        ({"policy": "importance(budget=0.05)"}, "importance(budget=0.05)"),
    ):
        config = DMAConfig.preset("auto", **asked)
        assert config.words == words
        assert config.least_keys(CPU, 128) == 16_384
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: "sm_100")
    assert DMAConfig.preset("auto").words == DMAConfig().words


def test_auto_leaves_what_was_not_measured(monkeypatch):
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: "sm_90")
    auto = DMAConfig.preset("auto")
    assert "head_dim 192 is not shown" in auto.why_stock(CPU, 192)
    assert auto.why_stock(CPU, 128, masked="text") == ""
    assert "head_dim 128 with masked keys is not shown" in auto.why_stock(CPU, 128, masked="keys")
    assert "head_dim 64 with masked text is not shown" in auto.why_stock(CPU, 64, masked="text")
    assert not DMAConfig.preset("hopper").why_stock(CPU, 128, masked="keys")


def test_every_length_from_which_a_call_gains_was_measured_to_gain():
    """Against the best full-precision peer of the same run, quantisation included; the next shorter length is not."""
    shapes = json.loads(gzip.decompress(RESULTS.read_bytes()))["shapes"]
    for (_, dim), least in GAINS_FROM.items():
        gains = {}
        for shape in shapes.values():
            if shape["size"][3] == dim:
                own = next(e for e in shape["entries"] if e["name"] == "bf16|int8, window 128, sink 128")
                gains[shape["size"][2]] = own["whole"]["over_full"]
        assert least in gains
        assert all((gain > 1) == (length >= least) for length, gain in gains.items())


def test_a_step_whose_tiles_are_all_low_was_measured_to_gain():
    """Both compiled, stock with its fastest backend; no shorter step was measured."""
    (measured,) = json.loads((RESULTS.parent / "h200_pipeline_flux_1k.json").read_text())["shapes"].values()
    _, _, tokens, head_dim = measured["attention"]
    ours = next(entry for entry in measured["entries"] if entry["name"] == "LOW int8")
    assert {("sm_90", head_dim): tokens} == LOW_GAINS_FROM
    assert ours["over_stock"] > 1.05


def test_lists_become_tuples_so_that_a_config_can_be_a_key():
    assert hash(DMAConfig(dense_layers=[0, -1])) == hash(DMAConfig(dense_layers=(0, -1)))


def test_of_changes_a_config_and_refuses_another_object():
    assert DMAConfig.of(DMAConfig(low="nvfp4"), window=384) == DMAConfig(low="nvfp4", window=384)
    with pytest.raises(TypeError, match="must be a DMAConfig, got str"):
        DMAConfig.of("b200")
