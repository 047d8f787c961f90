"""The backward's kernels compiled ahead of time."""

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels.ahead_of_time.backward import KERNELS, compile_backward  # noqa: E402


def test_hopper_multiplies_bf16_by_wgmma_and_spills_nothing():
    found = compile_backward("sm_90", 128, "bf16", None)
    assert [each["kernel"] for each in found] == list(KERNELS)
    for each in found:
        assert each["mma_kinds"] == ["wgmma bf16"] and each["spills"] == 0
        # Two programs share a multiprocessor.
        assert each["registers"] <= 255 and each["shared_bytes"] <= 227 * 1024 // 2


def test_int8_products_are_int8_instructions():
    for each in compile_backward("sm_90", 64, None, "int8/bf16", "int8"):
        assert each["mma_kinds"] == ["wgmma bf16", "wgmma s8"] and each["spills"] == 0
    # Tensor memory has no room for sums of 256 channels, but registers have.
    for each in compile_backward("sm_100", 256, None, "int8/bf16", "int8"):
        assert each["mma_kinds"] == ["mma.sync bf16", "mma.sync s8"] and each["spills"] == 0


def test_both_classes_fit_the_shared_memory_of_consumers_gpus():
    found = compile_backward("sm_120", 128, "bf16", "int8/bf16")
    assert [each["spills"] for each in found] == [0, 0]
    assert max(each["shared_bytes"] for each in found) <= 99 * 1024


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match="unknown target 'sm_70': choose from"):
        compile_backward("sm_70", 64, "bf16", None)
