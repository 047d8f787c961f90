"""What a B200, a B300, an RTX 50 and a Hopper GPU would run, compiled here: the MMA kinds, spills, pipelining."""

import re
from functools import lru_cache

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels import compile as ahead  # noqa: E402

KIND_OF_QK = {
    "mxfp8": "kind::mxf8f6f4",
    "mxfp8_e5m2": "kind::mxf8f6f4",
    "mxfp4": "kind::mxf4",
    "nvfp4": "kind::mxf4nvf4",
}
SINGLE = [("mxfp8", None), ("mxfp8_e5m2", None), (None, "mxfp4"), (None, "nvfp4")]


@lru_cache
def attend(target, high, low, head_dim, is_causal=False, masks_keys=False):
    kernel, arguments, options = list(ahead.launches(target, high, low, head_dim, is_causal, masks_keys))[-1]
    return ahead.compile_launch(kernel, arguments, options, target)


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low"), SINGLE)
@pytest.mark.parametrize("target", ["sm_100", "sm_103"])
def test_each_class_multiplies_natively(target, high, low, head_dim):
    """Alone, a class shows which kind its own products take: Q·K block-scaled, P·V bf16 (HIGH) or fp8 (LOW)."""
    values = "kind::f16" if high else "kind::f8f6f4"
    assert set(ahead.mma_kinds(attend(target, high, low, head_dim).asm["ptx"])) == {
        KIND_OF_QK[high or low],
        values,
    }


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize("high", ["mxfp8"])
@pytest.mark.parametrize("low", ["mxfp4", "nvfp4"])
def test_q_k_is_never_widened(high, low, head_dim):
    """In the mixed kernel `kind::f16` multiplies probabilities and values alone: as many as in HIGH alone."""

    def count(compiled, kind):
        return len(re.findall(rf"tcgen05\.mma\S*{kind}\b", compiled.asm["ptx"]))

    mixed, alone = attend("sm_100", high, low, head_dim), attend("sm_100", high, None, head_dim)
    assert count(mixed, "kind::f16") == count(alone, "kind::f16") > 0
    assert count(mixed, KIND_OF_QK[low]) > 0 and count(mixed, KIND_OF_QK[high]) > 0


def buffers_of_each_loop(ttgir):
    """For each tile loop, the shared-memory buffers made for it: {(tile shape, dtype): number of stages}."""
    loops, buffers = [], {}
    for line in ttgir.splitlines():
        if allocated := re.search(r"ttg\.local_alloc : \(\) -> !ttg\.memdesc<([\dx]+)x(\w+),", line):
            stages, *tile = map(int, allocated[1].split("x"))
            buffers[*tile, allocated[2]] = stages
        elif " scf.for " in line:
            loops.append(buffers)
            buffers = {}
    return loops


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(
    ("high", "low"), [("mxfp8", "mxfp4"), ("mxfp8", "nvfp4"), ("mxfp8", None), (None, "mxfp4")]
)
@pytest.mark.parametrize("masks_keys", [False, True])
def test_operands_and_scales_arrive_asynchronously_over_two_stages(high, low, head_dim, masks_keys):
    compiled = attend("sm_100", high, low, head_dim, False, masks_keys)
    loops = buffers_of_each_loop(compiled.asm["ttgir"])
    classes = [high, low, high] if high and low else [high, high] if high else [low]
    assert len(loops) == len(classes)
    for fmt, buffers in zip(classes, loops, strict=True):
        columns = head_dim // (16 if fmt == "nvfp4" else 32)
        scale = "f8E4M3FN" if fmt == "nvfp4" else "i8"
        assert buffers[128, head_dim if fmt == high else head_dim // 2, "i8"] >= 2  # K
        assert buffers[128, head_dim, "bf16" if fmt == high else "f8E4M3FN"] >= 2  # V
        assert (
            buffers[(1, 1, columns // 4, 2, 256, scale) if columns % 4 == 0 else (1, 128 * columns, scale)]
            >= 2
        )
    assert "cp.async.bulk.tensor" in compiled.asm["ptx"]
    if head_dim == 128:
        assert "tcgen05.cp" in compiled.asm["ptx"]  # scales go to tensor memory without passing registers


def test_no_variant_spills_on_a_b200():
    variants = ahead.compile_all("sm_100")
    assert {v["kernel"] for v in variants} == {"quantise", "quantise_value", "attend"}
    assert {v["head_dim"] for v in variants} == {64, 128}
    assert [v for v in variants if v["spills"]] == []
    assert all(set(v) == {"kernel", "formats", "head_dim", "mma_kinds", "registers", "spills", "shared_bytes"}
               for v in variants)  # fmt: skip
    assert all(v["shared_bytes"] <= 227 * 1024 and 0 < v["registers"] <= 255 for v in variants)


@pytest.mark.parametrize(("is_causal", "masks_keys"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
def test_masked_variants_are_native_and_do_not_spill(is_causal, masks_keys, head_dim):
    compiled = attend("sm_100", "mxfp8", "mxfp4", head_dim, is_causal, masks_keys)
    ptx = compiled.asm["ptx"]
    assert compiled.metadata.shared <= 227 * 1024
    assert {"kind::mxf4", "kind::mxf8f6f4"} <= set(ahead.mma_kinds(ptx))
    assert ahead.ptxas_report(ptx)[1] == 0


@pytest.mark.parametrize("low", ["mxfp4", "nvfp4"])
def test_rtx_50_multiplies_natively(low):
    kinds = ahead.mma_kinds(attend("sm_120", "mxfp8", low, 64).asm["ptx"])
    assert {"kind::mxf8f6f4", "kind::mxf4nvf4"} <= set(kinds)


@pytest.mark.parametrize("low", ["mxfp4", "nvfp4"])
def test_hopper_compiles_with_widened_products(low):
    kinds = ahead.mma_kinds(attend("sm_90", "mxfp8", low, 64).asm["ptx"])
    assert set(kinds) == {"wgmma bf16", "wgmma e4m3"}


def test_one_pair_can_be_asked_for():
    variants = ahead.compile_all("sm_100", high="mxfp8_e5m2", low="mxfp8")
    assert {tuple(v["formats"]) for v in variants if v["kernel"] == "attend"} == {
        ("mxfp8_e5m2", "mxfp8"), ("mxfp8_e5m2",), ("mxfp8",)}  # fmt: skip


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown target 'sm_42': choose from sm_100, sm_103, sm_120, sm_90"):
        ahead.compile_all("sm_42")
    with pytest.raises(ValueError, match="no kernel multiplies int8 on sm_100: choose from mxfp8"):
        ahead.compile_all("sm_100", low="int8")


@pytest.mark.parametrize("lengths", [(257, 1000), (1024, 1040), (1024, 257)])
def test_a_new_length_runs_the_same_kernels(lengths):
    """Nothing that Triton compiles in, constants or divisibility, changes with the length."""
    from dma_diffusers.kernels.attention import launch
    from tests.kernels.calls import Call

    def compiled_in(length):
        recorded = []
        call = Call(length, length, 64, dtype=torch.bfloat16, tokens_first=True)
        q, k, v, _ = call.tensors()
        launch.attention(
            q, k, v, call.map(), "mxfp8", "mxfp4", key_mask=None, scale=1.0, is_causal=False, emulated=False,
            run=lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options)),
        )  # fmt: skip
        return [ahead.specialisation(kernel, arguments, options) for kernel, arguments, options in recorded]

    assert compiled_in(lengths[0]) == compiled_in(lengths[1])
