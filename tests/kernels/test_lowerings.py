import pytest
import torch

from dma_diffusers.kernels.lowerings import LOWERINGS, architecture, choose


@pytest.mark.parametrize("target", ["sm_100", "sm_103", "sm_120"])
@pytest.mark.parametrize("pair", [("mxfp8", "mxfp4"), ("mxfp8", "nvfp4"), ("mxfp8_e5m2", "mxfp8")])
def test_blackwell_runs_block_formats_natively(target, pair):
    pytest.importorskip("triton")
    assert choose(target, 128, *pair).lowering == "block_scaled"


@pytest.mark.parametrize(("target", "high", "low", "why"), [
    ("cpu", "mxfp8", "mxfp4", "cpu has no block-scaled MMA"),
    ("sm_90", "mxfp8", "mxfp4", "sm_90 has no block-scaled MMA"),
    ("sm_100", "bf16", "int8", "the kernel multiplies mxfp8, mxfp8_e5m2, mxfp4, nvfp4, not bf16, int8"),
])  # fmt: skip
def test_elsewhere_the_reference_runs_and_says_why(target, high, low, why):
    chosen = choose(target, 64, high, low)
    assert chosen.lowering == "reference"
    assert why in chosen.reason


def test_automatic_choice_never_takes_the_slow_emulation():
    assert choose("sm_90", 128, "mxfp8", "mxfp4").lowering == "reference"
    pytest.importorskip("triton")
    assert choose("sm_90", 128, "mxfp8", "mxfp4", "emulated").lowering == "emulated"


@pytest.mark.parametrize(("target", "pair", "lowering", "message"), [
    ("cpu", ("mxfp8", "mxfp4"), "block_scaled", "lowering block_scaled can't run mxfp8 | mxfp4 on cpu: cpu has no"),
    ("sm_80", ("mxfp8", "mxfp4"), "emulated", "sm_80 has no FP8 conversions"),
    ("sm_90", ("mxfp8", "mxint4"), "emulated", "not mxint4"),
    ("cpu", ("mxfp8", "mxfp4"), "magic", "unknown lowering 'magic': choose from auto, block_scaled"),
])  # fmt: skip
def test_a_request_that_cannot_be_met_raises(target, pair, lowering, message):
    with pytest.raises(ValueError) as error:
        choose(target, 64, *pair, lowering)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_lowering_takes_a_wide_head():
    for lowering in LOWERINGS:
        assert lowering.refuses("sm_100", 257, "mxfp8", "mxfp4") == "head_dim 257 is more than 256"
    with pytest.raises(ValueError, match=r"no lowering runs mxfp8 \| mxfp4: block_scaled: head_dim 257"):
        choose("sm_100", 257, "mxfp8", "mxfp4")


def test_architecture_of_the_cpu():
    assert architecture(torch.device("cpu")) == "cpu"
