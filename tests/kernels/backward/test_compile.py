"""The backward's kernels compiled ahead of time."""

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels.ahead_of_time.backward import KERNELS, compile_backward  # noqa: E402


def test_hopper_multiplies_bf16_by_wgmma_and_spills_nothing():
    found = compile_backward("sm_90", 128, "bf16", None)
    assert [each["kernel"] for each in found] == ["query_gradients", "key_gradients"]
    for each in found:
        assert each["mma_kinds"] == ["wgmma bf16"] and each["spills"] == 0
        # Two programs share a multiprocessor.
        assert each["registers"] <= 255 and each["shared_bytes"] <= 227 * 1024 // 2


@pytest.mark.parametrize(
    ("target", "head_dim", "kind", "has_means", "most_spilled"),
    [
        ("sm_90", 64, "wgmma bf16", True, 0),
        ("sm_100", 128, "kind::f16", True, 16),
        ("sm_103", 128, "kind::f16", False, 0),
    ],
)
def test_maps_of_one_class_and_means_compile(target, head_dim, kind, has_means, most_spilled):
    found = compile_backward(target, head_dim, "bf16", None, has_means=has_means)
    assert [each["kernel"] for each in found] == [
        name for name in KERNELS if has_means or name != "mean_gradients"
    ]
    assert all(each["mma_kinds"] == [kind] for each in found)
    assert max(each["spills"] for each in found) <= most_spilled


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
