"""The kernels of linear layers, compiled for each architecture at FLUX's sizes: MMA kinds, spills, shared memory."""

from functools import lru_cache

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels.ahead_of_time import linears as ahead  # noqa: E402
from dma_diffusers.kernels.ahead_of_time.compile import compile_launch, specialisation  # noqa: E402
from dma_diffusers.kernels.device.launch import Launcher  # noqa: E402
from dma_diffusers.kernels.linears import launch  # noqa: E402
from dma_diffusers.kernels.linears.groups import Groups  # noqa: E402
from dma_diffusers.kernels.linears.operands import Operand  # noqa: E402

MICROMIX = ["mxfp4", "mxfp6_e2m3", "mxfp8"]
NARROW = {"sm_100": "kind::mxf4", "sm_103": "kind::mxf4", "sm_120": "kind::mxf4nvf4"}
MOST_SHARED_BYTES = {"sm_100": 227 * 1024, "sm_103": 227 * 1024, "sm_90": 227 * 1024, "sm_120": 99 * 1024}
NATIVE = [target for target in ahead.TARGETS if target != "sm_90"]


@lru_cache
def everything(target):
    return ahead.compile_all(target)


@pytest.mark.parametrize("target", NATIVE)
def test_groups_multiply_natively(target):
    """Never as bf16 numbers, and 4-bit groups at the rate of 4 bits."""
    products = [v for v in everything(target) if v["kernel"] == "multiply"]
    assert {v["size"] for v in products} == {"3072×9216", "12288×3072"}
    for variant in products:
        kinds = {kind for kind in variant["mma_kinds"] if kind.startswith("kind::")}
        of_formats = {"mxfp4": NARROW[target], "nvfp4": "kind::mxf4nvf4"}
        expected = {of_formats.get(name, "kind::mxf8f6f4") for name in variant["formats"]}
        assert kinds == expected
        assert not any("bf16" in kind for kind in variant["mma_kinds"])
        assert variant["spills"] == 0 and variant["registers"] > 20
        assert variant["shared_bytes"] <= MOST_SHARED_BYTES[target]


@pytest.mark.parametrize("target", ahead.TARGETS)
def test_quantisers_do_not_spill(target):
    quantisers = [v for v in everything(target) if v["kernel"] != "multiply"]
    names = {"quantise_rows", "reencode_rows"} if target == "sm_90" else {"quantise_rows"}
    assert {v["kernel"] for v in quantisers} == names
    sizes = {v["size"] for v in quantisers if v["formats"] == MICROMIX}
    assert sizes == {"3072×9216", "12288×3072"}
    assert [v for v in quantisers if v["spills"]] == []
    assert all(v["shared_bytes"] <= MOST_SHARED_BYTES[target] and v["registers"] > 10 for v in quantisers)


@pytest.mark.parametrize("target", ["sm_100", "sm_103"])
def test_operands_and_scales_arrive_asynchronously(target):
    """Both groups' loops load through TMA, and scales go to tensor memory without passing registers."""
    groups = Groups(tuple(MICROMIX), (2304, 512, 256))
    *_, (kernel, arguments, options) = ahead.launches(target, groups, 3072, 9216)
    ptx = compile_launch(kernel, arguments, options, target).asm["ptx"]
    assert kernel.__name__ == "multiply"
    assert "cp.async.bulk.tensor.2d" in ptx and "cp.async.bulk.tensor.5d" in ptx
    assert "tcgen05.cp" in ptx and "ld.global.nc.b8" not in ptx


def test_unknown_targets_are_refused():
    with pytest.raises(ValueError, match="unknown target 'sm_89': choose from sm_100, sm_103, sm_120, sm_90"):
        ahead.compile_all("sm_89")


def test_new_numbers_of_rows_and_widths_of_groups_run_the_same_kernels():
    """Every layer of a model has widths of its own, every picture a number of rows."""

    def compiled_in(rows, widths):
        recorded = []
        launcher = Launcher(lambda kernel, grid, *a, **options: recorded.append((kernel, a, options)))
        groups = Groups(tuple(MICROMIX), widths)
        x, weight = (torch.empty(n, 3072, dtype=torch.bfloat16) for n in (rows, 96))
        operand = launch.quantise(
            x, torch.arange(3072).int(), groups, ahead.Prologue(gelu=True), False, launcher
        )
        rows_of_weight = Operand.empty(weight, groups, reencoded=False)
        launch.reencode(rows_of_weight, groups, launcher)
        launch.multiply(operand, rows_of_weight, None, groups, torch.bfloat16, "sm_100", launcher)
        return [specialisation(kernel, arguments, options) for kernel, arguments, options in recorded]

    first = compiled_in(256, (2304, 512, 256))
    assert len(first) == 3
    assert first == compiled_in(257, (2048 + 32, 480, 512)) == compiled_in(1, (32, 32, 3008))
