import pytest
import torch

from dma_diffusers.kernels.defaults import default_formats
from dma_diffusers.kernels.lowerings import LOWERINGS, WITHOUT_FP8, architecture, choose
from dma_diffusers.kernels.precision import Precisions


@pytest.mark.parametrize("target", ["sm_100", "sm_103", "sm_120"])
@pytest.mark.parametrize(
    "pair", [("mxfp8", "mxfp4"), ("mxfp8", "nvfp4"), ("mxfp8_e5m2", "mxfp6_e2m3"), ("bf16", "fp8")]
)
def test_blackwell_runs_every_format_natively(target, pair):
    pytest.importorskip("triton")
    assert choose(target, 128, *pair).lowering == "native"


@pytest.mark.parametrize("target", ["sm_89", "sm_90"])
@pytest.mark.parametrize(("pair", "lowering"), [
    (("bf16", "int8"), "native"), (("bf16", "fp8"), "native"),
    (("mxfp8", "mxfp4"), "faithful"), (("mxfp8", "nvfp4"), "faithful"), (("bf16", "mxfp6_e3m2"), "faithful"),
    (("int8_tile", "int4"), "native"),
])  # fmt: skip
def test_hopper_reencodes_block_formats(target, pair, lowering):
    pytest.importorskip("triton")
    chosen = choose(target, 128, *pair)
    assert chosen.lowering == lowering
    assert lowering == "native" or f"native: {target} has no block-scaled MMA" in chosen.reason


@pytest.mark.parametrize("target", WITHOUT_FP8)
def test_ampere_multiplies_int8_and_bf16(target):
    pytest.importorskip("triton")
    assert default_formats(target) == ("bf16", "int8/bf16")
    assert choose(target, 128, *default_formats(target)).lowering == "native"
    assert choose(target, 128, "mxfp8", "mxfp8/bf16").lowering == "faithful"  # such numbers are bf16 numbers


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("fmt", ["mxint8", "mxint6", "mxint4", "nvint4"])
def test_integers_in_blocks_are_bf16_numbers(target, fmt):
    pytest.importorskip("triton")
    chosen = choose(target, 128, "mxint8", fmt)
    assert chosen.lowering == "faithful" and "native: the kernel multiplies Q·K in bf16" in chosen.reason


@pytest.mark.parametrize(("target", "high", "low", "why"), [
    ("cpu", "mxfp8", "mxfp4", "cpu has no block-scaled MMA"),
    ("sm_80", "bf16", "int8", "native: sm_80 has no FP8 MMA, which P·V in fp8 needs: write int8/bf16"),
    ("sm_86", "bf16", "fp8/bf16", "sm_86 has no FP8 MMA, which Q·K in fp8 needs: write int8/bf16"),
    ("sm_87", "mxfp8", "mxfp4/bf16", "faithful: sm_87 has no FP8 MMA, which Q·K in mxfp4 needs: write int8/bf16"),
    ("sm_80", "mxfp8", "nvfp4/bf16", "sm_80 has no FP8 conversions, which the scales of nvfp4 need: write int8/bf16"),
    ("sm_75", "bf16", "int8/bf16", "no kernel is built for sm_75 (there are some for sm_80, sm_86, sm_87, sm_89,"),
    ("sm_121", "mxfp8", "mxfp4", "no kernel is built for sm_121"),
    ("sm_103", "bf16", "int8", "sm_103 has no INT8 MMA in tensor memory"),
    ("sm_100", "mxfp8", "mxfp4/int8", "its probabilities are unsigned"),
])  # fmt: skip
def test_elsewhere_the_reference_runs_and_says_why(target, high, low, why):
    chosen = choose(target, 64, high, low)
    assert chosen.lowering == "reference"
    assert why in chosen.reason


@pytest.mark.parametrize(("target", "pair", "lowering", "message"), [
    ("cpu", ("mxfp8", "mxfp4"), "native", "lowering native can't run mxfp8 | mxfp4 on cpu: cpu has no"),
    ("sm_80", ("mxfp8", "mxfp4"), "faithful", "sm_80 has no FP8 MMA, which P·V in fp8 needs: write int8/bf16"),
    ("sm_86", ("bf16", "int8/fp8"), "native", "sm_86: sm_86 has no FP8 MMA, which P·V in fp8 needs: write int8/bf16"),
    ("sm_90", ("mxfp8", "mxint4"), "native", "not mxint4"),
    ("sm_90", ("mxfp8", "mxint4/mxfp8"), "faithful", "multiplies P·V in bf16, fp16, fp8, not mxfp8"),
    ("cpu", ("mxfp8", "mxfp4"), "magic", "unknown lowering 'magic': choose from auto, native, faithful"),
])  # fmt: skip
def test_a_request_that_cannot_be_met_raises(target, pair, lowering, message):
    with pytest.raises(ValueError) as error:
        choose(target, 64, *pair, lowering)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("head_dim, runs", [(8, False), (12, False), (16, True), (1, True)])
def test_fp8_takes_no_head_that_ptxas_fills_with_garbage(head_dim, runs):
    choice = choose("sm_90", head_dim, "fp8/bf16", "fp8")
    assert (choice.lowering == "native") == runs and (runs or "ptxas" in choice.reason)
    assert choose("sm_90", head_dim, "bf16", "int8").lowering == "native"


def test_int4_takes_no_odd_head():
    with pytest.raises(
        ValueError, match=r"int4 stores two channels in a byte, and head_dim 33 is odd$"
    ) as error:
        choose("sm_90", 33, "bf16", "int4")
    assert "\n" not in str(error.value)


def test_no_lowering_takes_a_wide_head():
    for lowering in LOWERINGS:
        assert (
            lowering.refuses("sm_100", 257, Precisions.parse("mxfp8", "mxfp4"))
            == "head_dim 257 is more than 256"
        )
    with pytest.raises(ValueError, match=r"no lowering runs mxfp8 \| mxfp4: native: head_dim 257"):
        choose("sm_100", 257, "mxfp8", "mxfp4")


def test_architecture_of_the_cpu():
    assert architecture(torch.device("cpu")) == "cpu"
