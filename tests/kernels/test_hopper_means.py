"""Tiles of means on sm_90: probabilities by their e4m3 codes, what the compiler makes of the loop, and GPU runs."""

import re
import subprocess
import tempfile

import pytest
import torch

from dma_diffusers.kernels.attention.reference import e4m3_power
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.plan import Plan
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.fine_mask import hide_empty_slots
from dma_diffusers.kernels.tiling.layout import Layout, tiles
from dma_diffusers.kernels.tiling.precision_map import Class, build_map
from tests.kernels.calls import relative_l2

PRECISIONS = Precisions.parse("bf16", "int8")
MEAN, LOW, HIGH, SKIP = (int(x) for x in (Class.MEAN, Class.LOW, Class.HIGH, Class.SKIP))


def test_powers_by_their_codes_have_no_bias_and_small_errors():
    x = torch.linspace(-6, 8, 100_001)
    found = e4m3_power(x).double()
    error = found / 2 ** x.double() - 1
    assert error.mean().abs() < 1e-3 and error.square().mean().sqrt() < 0.032 and error.abs().max() < 0.1
    assert (found.diff() >= 0).all()
    assert e4m3_power(torch.tensor([-torch.inf, -7.0, 8.0])).float().tolist() == [0.0, 0.0, 256.0]
    assert e4m3_power(torch.tensor(torch.nan)).float().isnan()


def sass_of_means(high: str | None, low: str | None, head_dim: int, has_means: bool = True) -> str:
    knobs = pytest.importorskip("triton").knobs
    if knobs.runtime.interpret:
        pytest.skip("kernels are interpreted")

    from dma_diffusers.kernels.ahead_of_time import compile as ahead

    launched = list(ahead.launches("sm_90", high, low, head_dim, has_means=has_means))[-1]
    assert launched[0].__name__ == "attend_hopper"
    cubin = ahead.compile_launch(*launched, "sm_90").asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = (knobs.nvidia.nvdisasm.path, "-c", file.name)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("high", "low"), [("bf16", "int8"), (None, "int8"), ("bf16", None), ("mxfp8", "mxfp4")]
)
def test_products_are_not_serialised(high, low, head_dim):
    """Where registers are too few, ptxas awaits each product before it starts the next, in the whole kernel."""
    sass = sass_of_means(high, low, head_dim)
    products, waits = (len(re.findall(name, sass)) for name in (r"\b[HIQ]GMMA\.", r"WARPGROUP\.DEPBAR"))
    assert products > 60 and waits < products / 3


@pytest.mark.parametrize("head_dim", [64, 128])
def test_means_take_no_exponentials(head_dim):
    """With LOW's operands, a score more costs no instruction of the special-function unit."""
    plain, found = (sass_of_means(None, "int8", head_dim, has_means) for has_means in (False, True))
    exponentials = [len(re.findall(r"MUFU\.EX2", sass)) for sass in (plain, found)]
    assert exponentials[1] - exponentials[0] < 3 * 16  # warpgroups; a tile of scores takes 64 in each


@pytest.fixture
def gpu() -> torch.device:
    triton = pytest.importorskip("triton")
    from dma_diffusers.kernels.lowerings import architecture

    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device = torch.device("cuda")
    if architecture(device) != "sm_90":
        pytest.skip("needs a GPU of sm_90")
    return device


def classes_of(name: str, count: int) -> torch.Tensor:
    """Classes `[1, 1, count, count]` whose words of bits are of a kind."""
    q_tile, k_tile = torch.arange(count)[:, None], torch.arange(count)[None, :]
    distance = (q_tile - k_tile).abs()
    match name:
        case "whole words":
            classes = torch.where(distance < 3, LOW, MEAN)
        case "empty words":  # the first 32 KV tiles, or the last ones, of some Q tiles
            classes = torch.where(distance < 3, LOW, MEAN)
            classes = torch.where((k_tile < 32) == (q_tile % 3 == 0), classes, SKIP)
        case "no words":  # of the first Q tiles
            classes = torch.where((distance < 3) | (q_tile < 10), LOW, MEAN)
        case "scattered":
            generator = torch.Generator().manual_seed(0)
            classes = torch.randint(1, 4, (count, count), generator=generator)
        case "all classes":
            generator = torch.Generator().manual_seed(0)
            classes = torch.randint(0, 4, (count, count), generator=generator)
        case "all":
            classes = torch.full((count, count), MEAN)
    return classes[None, None]


CASES = [
    ("whole words", 9000, 128, {}), ("whole words", 8192, 64, {"v_mean": 5.0}), ("empty words", 9000, 128, {}),
    ("no words", 9000, 64, {}), ("scattered", 5000, 128, {"kv_heads": 1}), ("all classes", 5000, 128, {}),
    ("all", 9000, 128, {}), ("all", 100, 64, {}), ("whole words", 9000, 64, {"is_causal": True}),
    ("all classes", 5000, 64, {"is_causal": True}), ("scattered", 1500, 64, {"hides": True}),
    ("all classes", 1500, 128, {"hides": True, "kv_heads": 1}), ("scattered", 5000, 128, {"empty": 200}),
    ("all classes", 5000, 64, {"empty": 0}), ("all", 1, 128, {}),  # less their mean, the keys are zero
]  # fmt: skip


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("name", "tokens", "head_dim", "options"), CASES, ids=str)
def test_sm_90_agrees_with_the_reference(name, tokens, head_dim, options, gpu):
    from dma_diffusers.kernels.attention import launch, reference

    generator = torch.Generator(gpu).manual_seed(0)
    heads, kv_heads = 2, options.get("kv_heads", 2)
    q, k, v = (
        torch.randn(2, tokens, h, head_dim, device=gpu, generator=generator, dtype=torch.bfloat16).transpose(
            1, 2
        )
        for h in (heads, kv_heads, kv_heads)
    )
    v = v + options.get("v_mean", 0.0)
    mask, order, fine_mask, is_causal = None, None, None, options.get("is_causal", False)
    if "hides" in options:
        mask = torch.rand(2, tokens, device=gpu, generator=generator) < 0.7
        mask[0, 256:512], mask[1, :96] = False, False  # two tiles, and three sub-tiles
    slots = tokens + options.get("empty", 0)
    if "empty" in options:
        order = torch.randperm(slots, generator=torch.Generator().manual_seed(0)).int()
        order = torch.where(order < tokens, order, -1)
        fine_mask = hide_empty_slots(order) if slots > tokens else None
    precision_map = build_map(classes_of(name, tiles(slots)), Layout(slots, slots), is_causal, order)
    plan = Plan(precision_map, None, order, fine_mask).to(gpu)
    call = Call(q, k, v, mask, is_causal=is_causal)
    variant = launch.Variant.of(call, plan, PRECISIONS, "native")
    assert variant.in_gluon and variant.means is not None
    out, lse, _ = launch.attention(call, plan, PRECISIONS)
    again, again_lse, _ = launch.attention(call, plan, PRECISIONS)
    expected, expected_lse = reference.attention(call, plan, PRECISIONS, means_by_codes=True)
    assert torch.equal(out, again) and torch.equal(lse, again_lse)
    assert relative_l2(out, expected) < 4e-3
    assert torch.equal(lse.isinf(), expected_lse.isinf())
    finite = expected_lse.isfinite()
    assert ((lse - expected_lse)[finite].abs() < 1e-2).all()
