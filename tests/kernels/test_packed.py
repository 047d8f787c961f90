"""Integers of four bits lie two to a byte in the kernels' operands, which are half as large as those of 8 bits."""

import numpy as np
import pytest
import torch

from dma_diffusers.kernels.formats import get_format, pack
from dma_diffusers.kernels.lowerings import FAITHFUL, Storage
from dma_diffusers.kernels.precision import Precisions

pytest.importorskip("triton")


def encoded(x: torch.Tensor, fmt: str, is_key: bool):
    """The operand that the quantiser's kernel makes of x `[B, H, S, D]`."""
    from dma_diffusers.kernels.quantiser.launch import Source, encode
    from dma_diffusers.kernels.quantiser.operands import Stored

    stored = Stored(get_format(fmt), FAITHFUL[fmt], Storage.PLAIN)
    amax = x.abs().amax((-2, -1), keepdim=True)
    source = Source(k=x) if is_key else Source(q=x)
    found = encode(source, (stored, None), amax=(None, amax) if is_key else (amax, None))
    return (found.k if is_key else found.q)[0]


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("is_key", "head_dim"), [(False, 72), (True, 64)])
def test_even_channels_are_the_lower_halves_of_bytes(is_key, head_dim, kernel_device):
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(1, 2, 131, head_dim, generator=generator).to(kernel_device)
    operand = encoded(x, "int4", is_key)
    scales = operand.scales.cpu().double().view(2, -1, 1).numpy()
    divided = x[0].cpu().double().numpy() / (scales.repeat(128, 1) if is_key else scales)[:, :131]
    expected = np.clip(np.rint(divided), -7, 7).astype(int)
    packed = operand.elements[0].cpu().numpy().astype(int)
    assert packed.shape == (2, 256, 64 if head_dim == 72 else 32)
    low, high = (packed + 8) % 16 - 8, (packed + 128) // 16 - 8
    found = np.stack((low, high), -1).reshape(2, 256, -1)
    assert np.array_equal(found[:, :131, :head_dim], expected) and abs(expected).max() == 7
    assert not found[:, 131:].any() and not found[..., head_dim:].any()


@pytest.mark.kernel
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("fmt", ["mxint4", "nvint4"])
def test_block_formats_are_stored_as_the_codec_packs_them(fmt, kernel_device):
    x = torch.randn(1, 1, 200, 64, generator=torch.Generator().manual_seed(3)).to(kernel_device)
    x *= torch.exp2(torch.arange(200.0, device=kernel_device) / 4 - 20)[:, None]
    operand = encoded(x, fmt, True)
    expected = pack(x, fmt)
    assert torch.equal(operand.elements.view(torch.uint8)[:, :, :200], expected.data)
    columns, scales = expected.scales.shape[-1], operand.scales.view(torch.uint8)
    if columns % 4 == 0:  # tcgen05's layout: runs of 16 bytes, of rows r, r + 32, … for r < 32
        scales = scales.view(2, columns // 4, 32, 4, 4).permute(0, 3, 2, 1, 4)
    assert torch.equal(scales.reshape(256, columns)[:200], expected.scales[0, 0])


@pytest.mark.kernel
@pytest.mark.parametrize("fmt", ["int4", "mxint4", "nvint4"])
def test_on_hopper_they_lie_in_whole_numbers_and_score_the_same(fmt, kernel_device):
    """Integers in bytes and multiples of a scale in bf16 are multiplied exactly, as their packed bytes are."""
    from tests.kernels.calls import Call, launched

    call = Call(300, 300, 64, high="bf16/bf16", low=f"{fmt}/bf16", window=0)
    q, k, v, _ = call.tensors(kernel_device)
    sums = [
        launched(q, k, v, call.map(), call.high, call.low, lowering="faithful", target=target)[1]
        for target in ("sm_89", "sm_90")
    ]
    # The sums of both have probabilities rounded to bf16, under other maxima.
    torch.testing.assert_close(*sums, rtol=0, atol=5e-4)


def test_operands_take_half_the_memory():
    from dma_diffusers.kernels.attention.memory import workspace_bytes

    size, elements = (1, 4, 1024, 128), 4 * 1024 * 128
    for pair, target, saved in (
        (("bf16", "int8"), "sm_100", elements),
        (("int8", "int8/bf16"), "sm_80", elements),
        (("bf16", "int8"), "sm_90", 0),
    ):
        whole, packed = (
            workspace_bytes(size, Precisions.parse(high, low), "native", target)
            for high, low in (pair, (pair[0], pair[1].replace("int8", "int4")))
        )
        assert whole - packed == saved


@pytest.mark.parametrize(("target", "high", "low", "head_dim", "kind", "most_shared"), [
    ("sm_86", "int8/bf16", "int4/bf16", 128, "mma.sync s8", 99),
    ("sm_86", "mxint8", "mxint4/bf16", 128, "mma.sync bf16", 99),
])  # fmt: skip
def test_split_bytes_are_multiplied_as_meant_and_spill_nothing(
    target, high, low, head_dim, kind, most_shared
):
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton's compiler and its interpreter can't share a process")
    from dma_diffusers.kernels.ahead_of_time import compile as ahead

    *_, (kernel, arguments, options) = ahead.launches(target, high, low, head_dim)
    compiled = ahead.compile_launch(kernel, arguments, options, target)
    assert kernel.__name__ == "attend"
    assert kind in ahead.mma_kinds(compiled.asm["ptx"])
    assert ahead.resources(compiled.asm["cubin"])[1] == 0
    assert compiled.metadata.shared <= most_shared * 1024
