"""DMAConfig: what it allows, and its presets."""

import pytest
import torch

from dma_diffusers import DMAConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"high": "mxfp9"}, ["mxfp9", "mxfp8"]),
        ({"low": ""}, ["mxfp4"]),
        ({"window": -1}, ["window", "0 or more", "-1"]),
        ({"window": 1.5}, ["window", "whole", "1.5"]),
        ({"sink": True}, ["sink", "True"]),
        ({"min_length": -5}, ["min_length", "-5"]),
        ({"dense_above_sigma": 1.01}, ["dense_above_sigma", "between 0 and 1", "1.01"]),
        ({"dense_above_sigma": "high"}, ["dense_above_sigma", "high"]),
        ({"dense_above_sigma": float("nan")}, ["dense_above_sigma", "nan"]),
        ({"dense_layers": 3}, ["dense_layers", "3"]),
        ({"dense_layers": (0.5,)}, ["dense_layers", "0.5"]),
        ({"lowering": "magic"}, ["magic", "auto", "reference"]),
        ({"text": "middle"}, ["middle", "first", "last", "none"]),
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


def test_exact_quantises_nothing_and_takes_no_changes():
    assert "exact" in DMAConfig.preset("exact").why_stock(CPU, 64)
    with pytest.raises(ValueError, match="'exact' quantises nothing, so it takes no high"):
        DMAConfig.preset("exact", high="mxfp8")


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
        ("sm_100", {"low": "mxint4"}, "nothing is faster than stock: native: the kernel multiplies"),
        ("sm_90", {}, "lowering faithful is not shown to be faster than stock on sm_90"),
        ("sm_90", {"high": "bf16", "low": "int8"}, "lowering native is not shown to be faster than stock"),
        ("sm_89", {"high": "bf16", "low": "fp8"}, "lowering native is not shown to be faster than stock"),
        (
            "sm_80",
            {"high": "bf16", "low": "int8"},
            "nothing is faster than stock: native: no kernel is built for sm_80",
        ),
    ],
)
def test_only_blackwell_is_taken_to_be_faster(monkeypatch, architecture, formats, reason):
    pytest.importorskip("triton")
    monkeypatch.setattr("dma_diffusers.kernels.lowerings.architecture", lambda device: architecture)
    why = DMAConfig.preset("auto", **formats).why_stock(CPU, 128)
    assert why.startswith(reason) and bool(why) == bool(reason)


def test_lists_become_tuples_so_that_a_config_can_be_a_key():
    assert hash(DMAConfig(dense_layers=[0, -1])) == hash(DMAConfig(dense_layers=(0, -1)))


def test_of_changes_a_config_and_refuses_another_object():
    assert DMAConfig.of(DMAConfig(low="nvfp4"), window=384) == DMAConfig(low="nvfp4", window=384)
    with pytest.raises(TypeError, match="must be a DMAConfig, got str"):
        DMAConfig.of("b200")
