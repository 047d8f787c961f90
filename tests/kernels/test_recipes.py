"""The recipes of CONTRIBUTING.md for a policy, a format, a pair and an architecture, each followed once."""

from dataclasses import dataclass

import pytest
import torch

from dma_diffusers.kernels import defaults, formats, lowerings, operator
from dma_diffusers.kernels.formats import FloatElement, Format, Scale, fake_quantize, pack, unpack
from dma_diffusers.kernels.lowerings import LOWERINGS, Storage
from dma_diffusers.kernels.plan import make
from dma_diffusers.kernels.tiling import policies
from dma_diffusers.kernels.tiling.layout import Layout, tiles
from dma_diffusers.kernels.tiling.precision_map import Class
from tests.kernels.calls import Call, relative_l2
from tests.kernels.oracle import oracle


@dataclass(frozen=True)
class Comb(policies.Policy):
    """Every `step`-th pair of tiles is HIGH, the others are skipped."""

    step: int

    name = "comb"
    leaves_out = True

    def _of_tiles(self, layout, is_causal, tile_order):
        distance = torch.arange(tiles(layout.q_length))[:, None] - torch.arange(tiles(layout.k_length))
        return torch.where(distance % self.step == 0, int(Class.HIGH), int(Class.SKIP))[None, None]


def test_a_policy_is_a_class_with_a_name_and_classes(monkeypatch):
    monkeypatch.setitem(policies.KINDS, Comb.name, Comb)
    policy = policies.parse("comb(step=3)")
    assert policy == Comb(3) and str(policy) == "comb(step=3)"

    precision_map = make(policy, Layout(700, 700, (0, 20))).precision_map
    assert not precision_map.has_low
    assert precision_map.bounds[0, 0, 4].tolist() == [3, 3, 3]
    assert precision_map.indices[0, 0, 4, :3].tolist() == [0, 1, 4]  # the text, and every third tile

    q, k, v = torch.randn(3, 1, 2, 700, 64, generator=torch.Generator().manual_seed(0))
    found = operator.attention(q, k, v, high="bf16", low="bf16", policy=str(policy), text_stop=20).out
    tile = torch.arange(700) // 128
    seen = ((tile[:, None] - tile) % 3 == 0) | (tile[:, None] == 0) | (tile == 0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert relative_l2(found, expected) < 0.01
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert relative_l2(found, dense) > 0.1


def test_a_format_is_a_line_of_the_list(monkeypatch):
    e3m0 = FloatElement("e3m0", exponent_bits=3, mantissa_bits=0, max=16.0)
    monkeypatch.setitem(formats.FORMATS, "mx_e3m0", Format("mx_e3m0", e3m0, Scale.E8M0, 32))
    # The list of the reference was made when `lowerings` was imported.
    reference = next(lowering for lowering in LOWERINGS if lowering.name == "reference")
    monkeypatch.setitem(reference.stores, "mx_e3m0", Storage.PLAIN)

    numbers = torch.tensor([0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
    assert torch.equal(e3m0.decode(torch.arange(8, dtype=torch.uint8)), numbers)
    x = torch.linspace(0.01, 16, 500)
    nearest = (x[:, None] - numbers).abs().amin(-1)
    assert torch.equal((e3m0.round(x) - x).abs(), nearest)

    call = Call(200, 200, 64, high="mx_e3m0", low="mxfp4", window=10_000)
    q, k, v, mask = call.tensors()
    assert torch.equal(unpack(pack(k, "mx_e3m0")), fake_quantize(k, "mx_e3m0"))
    given = {"high": call.high, "low": call.low, "policy": "dense(everywhere=high)"}
    found = operator.attention(q, k, v, **given)
    assert relative_l2(found.out, oracle(call, q, k, v, mask)[0]) < 0.01
    assert relative_l2(found.out, operator.attention(q, k, v, **given | {"high": "bf16"}).out) > 0.02


def compiled_attention(target: str, high: str, low: str):
    """The attention kernel for these words, compiled ahead of time."""
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton's compiler and its interpreter can't share a process")
    from dma_diffusers.kernels.ahead_of_time import compile as ahead

    *_, (kernel, arguments, options) = ahead.launches(target, high, low, 64)
    return ahead, ahead.compile_launch(kernel, arguments, options, target)


def test_a_pair_is_a_row_of_the_defaults(monkeypatch):
    pair = ("bf16", "fp8/bf16")
    monkeypatch.setitem(defaults.FORMAT_PAIRS, "sm_90", (pair, *defaults.FORMAT_PAIRS["sm_90"]))
    assert defaults.default_formats("sm_90") == pair
    assert lowerings.choose("sm_90", 64, *pair).lowering == "native"
    ahead, compiled = compiled_attention("sm_90", *pair)
    assert ahead.mma_kinds(compiled.asm["ptx"]) == ["wgmma bf16", "wgmma e4m3"]


def test_an_architecture_is_a_name_and_a_row(monkeypatch):
    """A DGX Spark has the MMA of RTX 50."""
    with pytest.raises(ValueError, match="sm_121 has no block-scaled MMA"):
        lowerings.choose("sm_121", 64, "mxfp8", "mxfp4", "native")
    for names in ("KERNEL_ARCHITECTURES", "BLOCK_SCALED_ARCHITECTURES"):
        monkeypatch.setattr(lowerings, names, (*getattr(lowerings, names), "sm_121"))
    monkeypatch.setitem(defaults.FORMAT_PAIRS, "sm_121", defaults.FORMAT_PAIRS["sm_120"])
    pair = defaults.default_formats("sm_121")
    pytest.importorskip("triton")
    assert lowerings.choose("sm_121", 64, *pair).lowering == "native"
    ahead, compiled = compiled_attention("sm_121", *pair)
    assert {"kind::mxf4", "kind::mxf8f6f4"} & set(ahead.mma_kinds(compiled.asm["ptx"]))
