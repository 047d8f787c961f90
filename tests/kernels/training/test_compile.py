"""The kernels of training compiled ahead of time: the largest of them, for each architecture."""

import pytest

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's compiler and its interpreter can't share a process", allow_module_level=True)

from dma_diffusers.kernels.ahead_of_time import training as ahead  # noqa: E402
from dma_diffusers.kernels.ahead_of_time.compile import compile_launch, resources  # noqa: E402


@pytest.mark.parametrize(
    ("target", "name", "step"),
    [
        ("sm_90", "quartet2", "requantised input"),
        ("sm_100", "quartet2", "requantised input"),
        ("sm_103", "quartet2", "requantised input"),
        ("sm_120", "quartet, stochastic", "backward weight"),
        ("sm_120", "quartet", "finish"),
    ],
)
def test_kernels_compile_without_spills(target, name, step):
    kernel, arguments, options = dict(ahead.launches(target, ahead.RECIPES[name]))[step]
    compiled = compile_launch(kernel, arguments, options, target)
    registers, spills = resources(compiled.asm["cubin"])
    assert spills == 0 and registers > 20
    assert compiled.metadata.shared <= 48 * 1024
    # Philox draws, rows are turned by exchanges between threads, and nothing is divided approximately.
    ptx = compiled.asm["ptx"]
    assert ("-766435501" in ptx) == (step != "finish")
    assert "shfl.sync" in ptx and "div.full" not in ptx and "div.approx" not in ptx


def test_every_step_of_every_recipe_is_listed():
    steps = {name: [step for step, _ in ahead.launches("sm_90", r)] for name, r in ahead.RECIPES.items()}
    backward = [f"{step} {t}" for step in ("backward", "requantised") for t in ("input", "weight")]
    assert steps["qat"] == ["forward input", "finish"]
    assert steps["quartet"] == ["forward input", *backward, "finish"]
    assert steps["quartet2"] == steps["mxint8"] == ["forward input", *backward]
    with pytest.raises(ValueError, match="unknown target 'sm_89': choose from sm_100, sm_103, sm_120, sm_90"):
        ahead.compile_all("sm_89")
