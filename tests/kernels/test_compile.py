"""Kernels for B200, B300, RTX 50 and Hopper GPUs are compiled here, and their MMA kinds, spills and buffers read."""

import re
from functools import lru_cache

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels.ahead_of_time import compile as ahead  # noqa: E402
from dma_diffusers.kernels.ahead_of_time.sass import loops  # noqa: E402
from dma_diffusers.kernels.device.tritons import TRITON  # noqa: E402
from dma_diffusers.kernels.formats import ROTATIONS  # noqa: E402
from dma_diffusers.kernels.routing.reference import Routing  # noqa: E402
from dma_diffusers.kernels.tiling.policies import Dense  # noqa: E402
from dma_diffusers.kernels.tiling.precision_map import Class, Phase, build_map  # noqa: E402
from tests.kernels.calls import NAMED_CALLS, Call, launched  # noqa: E402
from tests.kernels.format_calls import FORMAT_CALLS  # noqa: E402

KIND_OF_QK = {
    "mxfp8": "kind::mxf8f6f4",
    "mxfp8_e5m2": "kind::mxf8f6f4",
    "mxfp4": "kind::mxf4",
    "nvfp4": "kind::mxf4nvf4",
}
SINGLE = [("mxfp8", None), ("mxfp8_e5m2", None), (None, "mxfp4"), (None, "nvfp4")]
MOST_SHARED_BYTES = dict.fromkeys(("sm_90", "sm_100", "sm_103"), 227 * 1024)
MOST_REGISTERS = 208  # what launches for tcgen05 ask for; 65,536 hold one program of eight warps, as with 190
BARRIER = 8  # bytes; the smallest buffer has 512
MOST_SHARED_BYTES |= dict.fromkeys(("sm_86", "sm_89", "sm_120"), 99 * 1024)
MOST_SHARED_BYTES |= dict.fromkeys(("sm_80", "sm_87"), 163 * 1024)


@lru_cache
def attend(
    target, high, low, head_dim, is_causal=False, masks_keys=False, slots=None, skips=False, has_means=False
):
    variant = ahead.launches(
        target, high, low, head_dim, is_causal, masks_keys, slots, skips=skips, has_means=has_means
    )
    kernel, arguments, options = list(variant)[-1]
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
@pytest.mark.parametrize(("high", "low", "kinds"), [
    ("bf16", "int8", {"kind::f16", "kind::i8", "kind::f8f6f4"}), ("bf16", "fp8", {"kind::f16", "kind::f8f6f4"}),
    ("mxfp8", "mxfp6_e2m3", {"kind::mxf8f6f4", "kind::f16", "kind::f8f6f4"}),
])  # fmt: skip
def test_other_formats_multiply_natively_too(high, low, kinds, head_dim):
    if TRITON < (3, 8):  # multiplies int8 numbers as bf16 numbers
        kinds = kinds - {"kind::i8"}
    compiled = attend("sm_100", high, low, head_dim)
    assert set(ahead.mma_kinds(compiled.asm["ptx"])) == kinds
    assert compiled.metadata.shared <= MOST_SHARED_BYTES["sm_100"]
    assert ahead.resources(compiled.asm["cubin"])[1] == 0


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
    loops = [loop for loop in buffers_of_each_loop(compiled.asm["ttgir"]) if loop]
    classes = [high, low, high] if high and low else [high or low] * 2
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


@lru_cache
def everything(target):
    return ahead.compile_all(target)


@pytest.mark.parametrize("target", ["sm_100", "sm_120"])
def test_no_variant_spills_on_blackwell(target):
    variants = everything(target)
    assert {v["kernel"] for v in variants} == {"statistics", "encode", "attend"}
    assert {v["head_dim"] for v in variants} == {64, 128}
    spills_on = 32 if TRITON < (3, 7) and target == "sm_120" else 0  # kernels/tritons.md
    assert [v for v in variants if v["spills"] > spills_on] == []
    assert all(v["shared_bytes"] <= MOST_SHARED_BYTES[target] for v in variants)
    assert all(v["registers"] > 20 for v in variants)  # what ptxas can't build has 4
    if target == "sm_100":
        assert all(v["registers"] <= MOST_REGISTERS for v in variants if v["head_dim"] == 128)
    assert all(set(v) == {"kernel", "formats", "head_dim", "mma_kinds", "registers", "spills", "shared_bytes",
                          "loops"} for v in variants)  # fmt: skip


def test_the_special_function_unit_is_not_what_limits_low_on_a_b200():
    """With a share of the exponentials as polynomials, the LOW loop has another longest pipe."""
    for variant in everything("sm_100"):
        if variant["kernel"] == "attend" and variant["head_dim"] == 128 and len(variant["formats"]) == 2:
            high, low, masked = variant["loops"]
            assert low["longest"] != "xu"
            for loop in (high, low, masked):
                assert loop["clocks"]["xu"] < 0.9 * 1040


@pytest.mark.parametrize(("is_causal", "masks_keys"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low"), [("mxfp8", "mxfp4"), ("mxfp8", "nvfp4"), (None, "mxfp4")])
def test_masked_variants_are_native_and_do_not_spill(high, low, is_causal, masks_keys, head_dim):
    compiled = attend("sm_100", high, low, head_dim, is_causal, masks_keys)
    assert compiled.metadata.shared <= MOST_SHARED_BYTES["sm_100"]
    assert compiled.metadata.tmem_size <= 512
    assert {KIND_OF_QK[name] for name in (high, low) if name} <= set(ahead.mma_kinds(compiled.asm["ptx"]))
    registers, spills = ahead.resources(compiled.asm["cubin"])
    assert spills == 0 and 20 < registers <= (MOST_REGISTERS if head_dim == 128 else 255)


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low"), [("mxfp8", "mxfp4"), ("mxfp8", None), (None, "mxfp4")])
@pytest.mark.parametrize("target", ["sm_100", "sm_120"])
def test_variants_that_skip_tiles_do_not_spill_and_have_as_many_buffers(target, high, low, head_dim):
    plain, skipping = (attend(target, high, low, head_dim, skips=skips) for skips in (False, True))
    assert skipping.metadata.shared + BARRIER >= plain.metadata.shared
    assert skipping.metadata.shared <= MOST_SHARED_BYTES[target]
    assert ahead.mma_kinds(skipping.asm["ptx"]) == ahead.mma_kinds(plain.asm["ptx"])
    assert ahead.resources(skipping.asm["cubin"])[1] == 0


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("target", "low"), [("sm_86", "int8/bf16"), ("sm_89", "int8")])
def test_variants_that_skip_tiles_fit_and_do_not_spill_on_ampere_and_ada(target, low, head_dim):
    skipping = attend(target, "bf16", low, head_dim, skips=True)
    assert skipping.metadata.shared <= MOST_SHARED_BYTES[target]
    assert ahead.resources(skipping.asm["cubin"])[1] == 0


@pytest.mark.parametrize(("target", "high", "low", "head_dim", "skips"), [
    *((*each, head_dim, skips) for head_dim in ahead.HEAD_DIMS for skips in (False, True) for each in [
        ("sm_100", "mxfp8", "mxfp4"), ("sm_100", "mxfp8", None), ("sm_100", None, "mxfp4"),
        ("sm_103", "mxfp8", "mxfp4"), ("sm_120", "mxfp8", "mxfp4"), ("sm_120", None, "mxfp4"),
    ]),
    ("sm_100", "mxfp8", "nvfp4", 128, False), ("sm_103", None, "nvfp4", 128, False),
    ("sm_120", "mxfp8", None, 128, False),
])  # fmt: skip
def test_variants_with_means_do_not_spill(target, high, low, head_dim, skips):
    """They launch `encode` once more, for the means, and the attention kernel has one loop more."""
    found = list(ahead.launches(target, high, low, head_dim, skips=skips, has_means=True))
    assert [kernel.__name__ for kernel, *_ in found] == ["statistics", "means", "encode", "encode", "attend"]
    for kernel, arguments, options in (
        found[-1:] if skips else found[1:]
    ):  # `encode` knows nothing of skipping
        compiled = ahead.compile_launch(kernel, arguments, options, target)
        assert compiled.metadata.shared <= MOST_SHARED_BYTES[target]
        registers, spills = ahead.resources(compiled.asm["cubin"])
        spills_on = TRITON < (3, 7) and (target, head_dim) == ("sm_120", 128)  # kernels/tritons.md
        assert spills <= 48 * spills_on and registers > 20
    without = attend(target, high, low, head_dim, skips=skips)
    assert len(loops(compiled.asm["cubin"])) == len(loops(without.asm["cubin"])) + 1
    if high:  # otherwise HIGH, which MXFP4 leaves the means to, multiplies nothing else
        assert ahead.mma_kinds(compiled.asm["ptx"]) == ahead.mma_kinds(without.asm["ptx"])


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize("target", ["sm_100", "sm_103"])
def test_means_arrive_asynchronously_over_two_stages(target, head_dim):
    compiled = attend(target, "mxfp8", "mxfp4", head_dim, has_means=True)
    *_, buffers = [loop for loop in buffers_of_each_loop(compiled.asm["ttgir"]) if loop]
    assert buffers[128, head_dim, "i8"] >= 2 and buffers[128, head_dim, "bf16"] >= 2


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low", "slots"), [
    ("mxfp8", "mxfp4", 256), ("mxfp8", "mxfp4", 384), (None, "mxfp4", 256),
])  # fmt: skip
def test_ordered_variants_are_native_and_do_not_spill(high, low, head_dim, slots):
    for kernel, arguments, options in ahead.launches("sm_100", high, low, head_dim, slots=slots):
        compiled = ahead.compile_launch(kernel, arguments, options, "sm_100")
        assert compiled.metadata.shared <= MOST_SHARED_BYTES["sm_100"]
        registers, spills = ahead.resources(compiled.asm["cubin"])
        assert spills == 0 and 20 < registers <= (MOST_REGISTERS if head_dim == 128 else 255)
    assert {KIND_OF_QK[name] for name in (high, low) if name} <= set(ahead.mma_kinds(compiled.asm["ptx"]))


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low"), [("bf16", "int8"), (None, "int8"), ("bf16", None)])
def test_an_order_costs_hoppers_loops_nothing(high, low, head_dim):
    """Only the beginning and the end of a program know of it."""

    def instructions(slots):
        cubin = attend("sm_90", high, low, head_dim, slots=slots).asm["cubin"]
        return [sum(loop["every"].values()) for loop in loops(cubin)]

    plain, ordered = instructions(None), instructions(256)
    assert ordered == pytest.approx(plain, abs=3)


@pytest.mark.parametrize("low", ["mxfp4", "nvfp4"])
def test_b300_is_as_b200(low):
    compiled = attend("sm_103", "mxfp8", low, 128)
    assert {"kind::mxf8f6f4", KIND_OF_QK[low]} <= set(ahead.mma_kinds(compiled.asm["ptx"]))
    registers, spills = ahead.resources(compiled.asm["cubin"])
    assert spills == 0 and 20 < registers <= MOST_REGISTERS


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize("low", ["mxfp4", "nvfp4"])
def test_rtx_50_multiplies_natively(low, head_dim):
    kinds = ahead.mma_kinds(attend("sm_120", "mxfp8", low, head_dim).asm["ptx"])
    assert {"kind::mxf8f6f4", "kind::mxf4nvf4"} <= set(kinds)


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low"), [("mxfp8", "mxfp4"), (None, "mxfp4"), (None, "nvfp4")])
def test_rtx_50_multiplies_fp8_probabilities_at_the_block_scaled_rate(high, low, head_dim):
    """In LOW alone, P·V has the only products of e4m3 numbers."""
    ptx = attend("sm_120", high, low, head_dim).asm["ptx"]
    products = re.findall(r"mma\.sync\S*\.e4m3\.e4m3\S*", ptx)
    assert products and all("kind::mxf8f6f4.block_scale" in product for product in products)


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("high", "low", "kinds"), [
    ("bf16", "int8", {"wgmma bf16", "wgmma s8", "wgmma e4m3"}), ("bf16", "fp8", {"wgmma bf16", "wgmma e4m3"}),
    ("mxfp8", "mxfp4", {"wgmma bf16", "wgmma e4m3"}), (None, "mxfp4", {"wgmma e4m3"}),
])  # fmt: skip
def test_hopper_multiplies_at_its_own_rates(high, low, kinds, head_dim):
    """Re-encoded, MXFP4 takes FP8 wgmma: nothing of LOW is widened to bf16."""
    compiled = attend("sm_90", high, low, head_dim)
    assert set(ahead.mma_kinds(compiled.asm["ptx"])) == kinds
    assert compiled.metadata.shared <= MOST_SHARED_BYTES["sm_90"]


AMPERE = [("sm_80", "int8/bf16"), ("sm_86", "int8/bf16"), ("sm_89", "int8")]
AMPERE += [(target, "int8/fp16") for target in ("sm_80", "sm_86", "sm_89")]


@pytest.mark.parametrize("head_dim", ahead.HEAD_DIMS)
@pytest.mark.parametrize(("target", "low", "classes"), [
    *((*pair, "mixed") for pair in AMPERE), *((*pair, one) for pair in AMPERE[1:3] for one in ("high", "low")),
])  # fmt: skip
def test_ampere_and_ada_multiply_at_their_own_rates_without_spills(target, low, classes, head_dim):
    """INT8 Q·K; P·V in bf16, fp16, or FP8 on Ada; operands come asynchronously, K and V in two buffers."""
    high, low = "bf16" if classes != "low" else None, low if classes != "high" else None
    values = {"int8": "e4m3", "int8/bf16": "bf16", "int8/fp16": "f16"}[low or "int8"]
    for kernel, arguments, options in ahead.launches(target, high, low, head_dim):
        compiled = ahead.compile_launch(kernel, arguments, options, target)
        assert compiled.metadata.shared <= MOST_SHARED_BYTES[target]
        registers, spills = ahead.resources(compiled.asm["cubin"])
        assert spills == 0 and registers > 20
        if low != "int8":
            assert "e4m3" not in compiled.asm["ptx"] and "e5m2" not in compiled.asm["ptx"]
    expected = ({"mma.sync bf16"} if high else set()) | (
        {"mma.sync s8", f"mma.sync {values}"} if low else set()
    )
    assert set(ahead.mma_kinds(compiled.asm["ptx"])) == expected
    assert "ldmatrix" in compiled.asm["ptx"] and "cp.async.cg.shared.global" in compiled.asm["ptx"]
    buffers = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<(\d)x64x\d+x\w+,", compiled.asm["ttgir"])
    assert buffers and set(buffers) == {"2"}


@pytest.mark.parametrize(("target", "low", "head_dim"), [
    ("sm_86", "int8/bf16", 128), ("sm_89", "int8", 64), ("sm_86", "int8/fp16", 128), ("sm_89", "int8/fp16", 128),
])  # fmt: skip
@pytest.mark.parametrize("given", [
    {"is_causal": True, "masks_keys": True}, {"has_means": True}, {"slots": 384, "has_fine_mask": True},
    {"slots": 384, "has_fine_mask": True, "masks_keys": True},
], ids=str)  # fmt: skip
def test_other_variants_spill_nothing_on_ampere_and_ada(target, low, given, head_dim):
    for kernel, arguments, options in ahead.launches(target, "bf16", low, head_dim, **given):
        compiled = ahead.compile_launch(kernel, arguments, options, target)
        assert compiled.metadata.shared <= MOST_SHARED_BYTES[target]
        registers, spills = ahead.resources(compiled.asm["cubin"])
        both_masks = "masks_keys" in given and "has_fine_mask" in given
        spills_on = (
            TRITON < (3, 7) and both_masks and (target, head_dim) == ("sm_86", 128)
        )  # kernels/tritons.md
        assert spills <= 24 * spills_on and registers > 20


def test_every_head_dim_fits():
    """Triton compiles kernels that fit neither tensor nor shared memory all the same, and they can't start."""
    for target, high, low, head_dim in (
        ("sm_100", "mxfp8", "mxfp4", 256), ("sm_100", "bf16", "int8", 256), ("sm_90", "bf16", "int8", 256),
        ("sm_120", "mxfp8", "mxfp4", 256), ("sm_89", "bf16", "int8", 256), ("sm_103", "bf16", "fp8", 128),
        ("sm_86", "bf16", "int8/bf16", 256), ("sm_86", "bf16", "bf16/bf16", 256), ("sm_89", "bf16", "bf16/fp16", 256),
        ("sm_86", "bf16", "int8/bf16", 72), ("sm_80", "bf16", "int8/bf16", 40),
    ):  # fmt: skip
        for classes in ((high, low), (high, None), (None, low)):
            compiled = attend(target, *classes, head_dim)
            assert compiled.metadata.shared <= MOST_SHARED_BYTES[target]
            assert getattr(compiled.metadata, "tmem_size", None) in (None, 0, 64, 128, 256, 512)
            assert ahead.resources(compiled.asm["cubin"])[0] > 20


@pytest.mark.parametrize(("target", "high", "low", "fits"), [
    ("sm_86", "bf16", "int8/bf16", False), ("sm_86", "bf16", None, False), ("sm_86", None, "int8/fp16", True),
    ("sm_86", "int8/bf16", "int4/bf16", False), ("sm_86", None, "mxint4/bf16", False),
    ("sm_86", None, "int4/bf16", True), ("sm_89", "bf16", "int8", False), ("sm_89", "bf16/fp8", "int8", True),
    ("sm_89", "int8/fp8", "mxfp4", True), ("sm_80", "bf16", "int8/bf16", True),
])  # fmt: skip
def test_whole_tiles_fit_above_128_channels_or_are_refused(target, high, low, fits):
    """Tiles that may be skipped are held whole."""
    if fits:
        assert attend(target, high, low, 256, skips=True).metadata.shared <= MOST_SHARED_BYTES[target]
        return
    fp8 = "write P·V in fp8.* or" if target == "sm_89" else "128:"
    with pytest.raises(
        ValueError, match=f"threshold was given for .* at head_dim 136, .*{target}.* {fp8} leave"
    ):
        next(ahead.launches(target, high, low, 136, skips=True))
    assert attend(target, high, low, 128, skips=True).metadata.shared <= MOST_SHARED_BYTES[target]


@pytest.mark.parametrize(
    ("call", "target"),
    [(call, ("sm_100", "sm_90")[index % 2]) for index, call in enumerate([*NAMED_CALLS, *FORMAT_CALLS])],
    ids=str,
)
def test_named_calls_compile(call, target):
    """The calls that run in the interpreter and on a GPU: each fits one of the architectures."""
    lowering = ahead.choose(target, call.head_dim, call.high, call.low)
    recorded = []
    q, k, v, mask = call.tensors()
    launched(
        q, k, v, call.map(), call.high, call.low, key_mask=mask, scale=1.0, is_causal=call.is_causal,
        token_order=call.token_order,
        lowering=lowering.lowering, target=target, **call.ropes(), norms=call.norms(), **call.prepared,
        run=lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options)),
    )  # fmt: skip
    for kernel, arguments, options in recorded:
        compiled = ahead.compile_launch(kernel, arguments, options, target)
        assert compiled.metadata.shared <= MOST_SHARED_BYTES[target]
        assert ahead.resources(compiled.asm["cubin"])[0] > 10


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounds_twice", [False, True])
def test_norm_and_rope_move_nothing_between_threads(target, dtype, rounds_twice):
    """From the load to LOW's store each thread keeps its words of two channels, and reads 16 bytes at a time."""
    recorded = {}
    call = Call(
        256, 256, 128, high="bf16", low="int8", has_norms=True, rounds_twice=rounds_twice, has_rope=True, dtype=dtype
    )  # fmt: skip
    q, k, v, _ = call.tensors()
    launched(
        q, k, v, build_map(Dense(Class.LOW).classes(call.layout), call.layout), call.high, call.low, key_mask=None,
        scale=1.0, is_causal=False, lowering="native", target=target, **call.ropes(), norms=call.norms(),
        run=lambda kernel, grid, *rest, **options: recorded.update({kernel.__name__: (kernel, rest, options)}),
    )  # fmt: skip
    compiled = ahead.compile_launch(*recorded["encode"], target)
    assert "tensor<128x64xi32" in compiled.asm["ttgir"]
    assert re.findall(r"convert_layout .*tensor<128x64x", compiled.asm["ttgir"]) == []
    widths = re.findall(r"ld\.global\S*?(\.v\d)?\.b\d+", compiled.asm["ptx"])
    assert widths.count(".v4") > 20 and widths.count("") < 5


@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("rotation", ROTATIONS[1:])
def test_rotated_channels_stay_in_their_warps(target, rotation):
    """Numbers go from thread to thread without shared memory, and hardly any is spilled."""
    encoders = []
    for name in ("none", rotation):
        found = ahead.launches(target, "bf16", "int8", 128, rotation=name)
        encode = next(launch for launch in found if launch[0].__name__ == "encode")
        encoders.append(ahead.compile_launch(*encode, target))
    plain, rotated = encoders
    assert rotated.metadata.shared == plain.metadata.shared
    exchanged = [encoder.asm["ptx"].count("shfl.sync.bfly") for encoder in encoders]
    assert exchanged[1] >= exchanged[0] + {"hadamard16": 0, "hadamard32": 16, "head_dim": 48}[rotation]
    assert ahead.resources(rotated.asm["cubin"])[1] <= ahead.resources(plain.asm["cubin"])[1] + 64


def test_one_pair_can_be_asked_for():
    variants = ahead.compile_all("sm_100", high="mxfp8_e5m2", low="mxfp8")
    assert {tuple(v["formats"]) for v in variants if v["kernel"] == "attend"} == {
        ("mxfp8_e5m2", "mxfp8"), ("mxfp8_e5m2",), ("mxfp8",)}  # fmt: skip


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown target 'sm_42': choose from sm_100, sm_103, sm_120, sm_90"):
        ahead.compile_all("sm_42")
    with pytest.raises(
        ValueError, match="no kernel multiplies mxint8 on sm_100: choose from bf16, fp8, int8"
    ):
        ahead.compile_all("sm_100", low="mxint8")
    with pytest.raises(
        ValueError, match=r"no kernel multiplies bf16\|int8 on sm_80: native: .* write int8/bf16"
    ):
        ahead.compile_all("sm_80", low="int8")


@pytest.mark.parametrize("lengths", [(257, 1000), (1024, 1040), (1024, 257)])
def test_a_new_length_runs_the_same_kernels(lengths):
    """Nothing that Triton compiles in, constants or divisibility, changes with the length."""

    def compiled_in(length):
        recorded = []
        call = Call(length, length, 64, dtype=torch.bfloat16, tokens_first=True)
        q, k, v, _ = call.tensors()
        launched(
            q, k, v, call.map(), "mxfp8", "mxfp4", key_mask=None, scale=1.0, is_causal=False, lowering="native",
            run=lambda kernel, grid, *arguments, **options: recorded.append((kernel, arguments, options)),
        )  # fmt: skip
        return [ahead.specialisation(kernel, arguments, options) for kernel, arguments, options in recorded]

    assert compiled_in(lengths[0]) == compiled_in(lengths[1])


@pytest.mark.parametrize(("beyond", "by_rows"), [(None, False), (None, True), (int(Phase.MEAN), False)])
@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120", "sm_80"])
def test_routing_adds_few_kernels_without_spills(target, beyond, by_rows):
    pair = ahead.PAIRS[target][0]
    routing = Routing.of(torch.full((1, 1, 2, 2), Phase.LOW), 0.05, rest=beyond, by_rows=by_rows)
    without, launches = (
        {
            kernel.__name__: (kernel, *rest)
            for kernel, *rest in ahead.launches(target, *pair, 128, routing=routing)
        }
        for routing in (None, routing)
    )
    added = [name for name in launches if name not in without]
    counts = [] if beyond is not None else ["count"]
    scores = ["sample", "score_rows"] if by_rows else ["score"]
    assert added == ["pool", *scores, *counts, "choose", "write_block_lists"]
    for name in added:
        compiled = ahead.compile_launch(*launches[name], target)
        assert ahead.resources(compiled.asm["cubin"])[1] == 0
        # Triton flattens numbers and their mask in orders of their own before a histogram.
        assert "tt.histogram" not in compiled.asm["ttgir"] or "allow_reorder" not in compiled.asm["ttgir"]
