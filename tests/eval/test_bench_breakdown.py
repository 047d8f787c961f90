"""Kernels by the names that PyTorch's profiler gave them on an H200, sorted into the parts of a step."""

import gzip
import json
from pathlib import Path

import pytest

from dma_diffusers.eval.bench.breakdown import (
    ATTENTION,
    ATTENTION_QUANTISER,
    LINEARS,
    PARTS,
    POINTWISE,
    QUANTISING,
    REST,
    part_of,
    parts,
)

RESULTS = Path(__file__).parents[2] / "eval" / "results"


@pytest.mark.parametrize(("kernel", "part"), [
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0", ATTENTION),
    ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::Collective", ATTENTION),
    ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel", ATTENTION),
    ("attend_hopper", ATTENTION),
    ("encode", ATTENTION_QUANTISER), ("means", ATTENTION_QUANTISER), ("choose", ATTENTION_QUANTISER),
    ("quantise", ATTENTION_QUANTISER),
    ("quantise_rows", QUANTISING),
    ("reencode_rows", QUANTISING),
    ("multiply", LINEARS),
    ("statistics", ATTENTION_QUANTISER),
    ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", LINEARS),
    ("nvjet_sm90_qqtst_128x128_128x6_2x1_v_bz_ovscale_bias_TNT", LINEARS),
    ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel", LINEARS),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16", LINEARS),
    ("triton_tem_fused_addmm_3", LINEARS),
    ("triton_poi_fused__scaled_mm__to_copy_cat_clamp_div_gelu_permute_view_5", QUANTISING),
    ("triton_red_fused_abs_amax_cat_gelu_permute_view_3", QUANTISING),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::float8_copy_kernel_cuda(at::Tensor", QUANTISING),
    ("triton_red_fused__fused_rms_norm__scaled_dot_product_cudnn_attention__to_copy_add_mul_neg", POINTWISE),
    ("triton_red_fused__fused_rms_norm__to_copy_add_attention_mul_neg_permute_stack_unbind_view_2", POINTWISE),
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<c10::BFloat16, float, true>", POINTWISE),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy_vectorized<at::native", POINTWISE),
    ("Memset (Device)", REST),
])  # fmt: skip
def test_a_kernels_part(kernel, part):
    assert part_of(kernel) == part


def test_parts_of_a_measured_step():
    """The committed step of FLUX.1-dev: its kernels that take the most time are all known."""
    result = json.loads(gzip.decompress((RESULTS / "h200_flux_steps.json.gz").read_bytes()))["shapes"]
    for linears in ("bf16", "fp8"):
        for entry in result[f"flux-1k, {linears} linears"]["entries"]:
            found = parts({kernel["name"]: kernel["ms"] for kernel in entry["kernels"]})
            assert list(found) == list(PARTS) and found[REST] == 0
            assert 22 < found[ATTENTION] < 27
            assert (38 < found[LINEARS] < 46) if linears == "fp8" else (74 < found[LINEARS] < 85)
            assert (found[QUANTISING] > 5) == (linears == "fp8")
            assert (found[ATTENTION_QUANTISER] > 0) <= ("int8" in entry["name"])
