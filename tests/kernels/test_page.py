"""The page that says where each format runs: it is what the lowerings say, and what is claimed there is tested."""

import pytest

from dma_diffusers.kernels import page
from dma_diffusers.kernels.formats import FORMATS
from dma_diffusers.kernels.lowerings import KERNEL_ARCHITECTURES, RUN
from dma_diffusers.kernels.precision import Precisions
from tests.kernels.calls import NAMED_CALLS
from tests.kernels.format_calls import FORMAT_CALLS

MMA = {
    "int8_tile": {"sm_90": "wgmma s8", "sm_100": "kind::i8", "sm_120": "mma.sync s8"},
    "mxint8": {"sm_90": "wgmma bf16", "sm_100": "kind::f16", "sm_120": "mma.sync bf16"},
}
MMA |= dict.fromkeys(("int4",), MMA["int8_tile"]) | dict.fromkeys(
    ("mxint6", "mxint4", "nvint4"), MMA["mxint8"]
)


def test_the_page_is_what_the_lowerings_say():
    pytest.importorskip("triton")
    assert page.PAGE.read_text() == page.with_tables(page.PAGE.read_text())


def test_every_cell_says_how_or_why_not():
    pytest.importorskip("triton")
    for architecture in KERNEL_ARCHITECTURES:
        for name in FORMATS:
            words, reason = page.cell(architecture, name)
            assert (words == "reference") == bool(reason)
            assert words.split(": ")[-1] in ("run", "compiled", "interpreted", "reference")
    assert page.cell("sm_90", "int8") == page.cell("sm_90", "int8", "fp16") == ("native: run", "")
    assert page.cell("sm_103", "int4") == ("reference", "faithful: sm_103 has no INT8 MMA in tensor memory")
    assert page.cell("sm_90", "int8", "mxfp4")[0] == "refused"
    assert page.cell("sm_80", "int8") == ("native: compiled", "")
    assert page.cell("sm_80", "int8", "fp8")[1].endswith(
        "no FP8 MMA, which P·V in fp8 needs: write int8/bf16"
    )


def test_every_format_is_among_the_calls_that_are_interpreted():
    calls = [Precisions.parse(call.high, call.low) for call in (*NAMED_CALLS, *FORMAT_CALLS)]
    interpreted = {precision.qk for precisions in calls for precision in precisions}
    assert (
        interpreted | {"nvfp4"} == FORMATS.keys()
    )  # test_attention_kernel.py has nvfp4 in a test of its own


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("fmt", MMA)
def test_what_is_compiled_is_multiplied_as_meant(fmt, target):
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton's compiler and its interpreter can't share a process")
    from dma_diffusers.kernels.ahead_of_time import compile as ahead
    from dma_diffusers.kernels.device.tritons import TRITON

    assert page.cell(target, fmt)[0].endswith("run" if fmt in RUN.get(target, ()) else "compiled")
    *_, (kernel, arguments, options) = ahead.launches(target, None, fmt, 64)
    kinds = ahead.mma_kinds(ahead.compile_launch(kernel, arguments, options, target).asm["ptx"])
    widened = target == "sm_100" and TRITON < (3, 8)  # which multiplies int8 numbers as bf16 numbers there
    assert (MMA["mxint8"] if widened else MMA[fmt])[target] in kinds
