"""The choice of a linear layer's lowering, and its reasons."""

import pytest

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.lowering import LOWERINGS, choose
from tests.kernels.linears.cases import BLOCK_GROUPS

MICROMIX = BLOCK_GROUPS["micromix"]


@pytest.mark.parametrize(("architecture", "groups", "lowering"), [
    ("sm_100", MICROMIX, "native"), ("sm_103", MICROMIX, "native"), ("sm_120", Groups.whole("nvfp4", 96), "native"),
    ("sm_90", MICROMIX, "scaled_mm"), ("sm_90", Groups.whole("nvfp4", 96), "reference"),
    ("sm_89", MICROMIX, "reference"), ("cpu", MICROMIX, "reference"), ("sm_80", MICROMIX, "reference"),
    ("sm_89", Groups.whole("fp8", 96), "scaled_mm"), ("sm_90", Groups.whole("fp8", 96), "scaled_mm"),
    ("sm_100", Groups.whole("fp8", 96), "scaled_mm"), ("sm_80", Groups.whole("fp8", 96), "reference"),
    ("sm_80", Groups.whole("int8", 96), "int_mm"), ("sm_120", Groups.whole("int8", 96), "int_mm"),
    ("cpu", Groups.whole("int8", 96), "reference"), ("sm_100", Groups.whole("bf16", 96), "reference"),
])  # fmt: skip
def test_auto_takes_the_first_that_can(architecture, groups, lowering):
    pytest.importorskip("triton")
    chosen = choose(architecture, groups)
    assert chosen.lowering == lowering and chosen.reason


def test_reasons():
    fallback = choose("cpu", MICROMIX).reason
    assert "cpu has no block-scaled MMA (sm_100, sm_103, sm_120 have)" in fallback
    assert "re-encoded for sm_90 alone, not for cpu" in fallback
    assert choose("sm_90", Groups.whole("fp8", 96), out_features=100).reason == (
        "scaled_mm: torch wants multiples of 16, got 96 inputs and 100 outputs"
    )
    assert "multiples of 8, got 100 inputs" in choose("sm_90", Groups.whole("int8", 100)).reason
    assert choose("sm_100", MICROMIX, "reference").reason == "asked for"


@pytest.mark.parametrize(("architecture", "groups", "lowering", "message"), [
    ("sm_90", MICROMIX, "native", "lowering native can't run mxfp4 | mxfp6_e2m3 | mxfp8 on sm_90: sm_90 has no block"),
    ("sm_90", Groups.whole("nvfp4", 96), "scaled_mm", "it multiplies fp8, mxfp4, mxfp6_e2m3, mxfp6_e3m2, mxfp8, not"),
    ("sm_100", Groups.whole("fp8", 96), "int_mm", "it multiplies int8, not fp8"),
    ("rocm", Groups.whole("int8", 96), "int_mm", "it is for NVIDIA GPUs from sm_80 on, not for rocm"),
    ("sm_90", MICROMIX, "fast", "unknown lowering 'fast': choose from auto, native, scaled_mm, int_mm, reference"),
])  # fmt: skip
def test_a_named_one_that_cannot_is_refused(architecture, groups, lowering, message):
    with pytest.raises(ValueError) as caught:
        choose(architecture, groups, lowering)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_reference_takes_everything():
    assert all(
        set(lowering.formats) <= set(LOWERINGS["reference"].formats) for lowering in LOWERINGS.values()
    )
    assert choose("sm_42", Groups.whole("fp8", 7), "reference").lowering == "reference"
