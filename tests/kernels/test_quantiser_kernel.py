"""The quantiser's kernel against the codecs: the same bytes."""

import pytest
import torch

from dma_diffusers.kernels.formats import get_format, pack
from dma_diffusers.kernels.quantiser import reference

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
FORMATS = ["mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4"]


def tiles_of(x: torch.Tensor, dim: int) -> torch.Tensor:
    """`[B, H, S, D]` padded with zeros to whole tiles and `dim` columns, `[B·H·tiles·128, dim]`."""
    x = torch.nn.functional.pad(x, (0, dim - x.shape[-1], 0, -x.shape[-2] % 128))
    return x.reshape(-1, dim)


def plain_scales(operand, columns: int) -> torch.Tensor:
    """An operand's scales, uint8 `[rows, columns]`, out of the MMA's layout."""
    scales = operand.scales.view(torch.uint8)
    if scales.ndim == 2:
        return scales.reshape(-1, columns)
    tiles = scales.shape[1]
    scales = scales.reshape(tiles, columns // 4, 32, 4, 4)  # tile, group, row % 32, row // 32, column % 4
    return scales.permute(0, 3, 2, 1, 4).reshape(-1, columns)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("length", "head_dim"), [(1, 64), (111, 40), (257, 128), (130, 256)])
@pytest.mark.parametrize("smooth", [False, True])
def test_bytes_equal_the_codec(fmt, length, head_dim, smooth, kernel_device):
    from dma_diffusers.kernels.quantiser.encode import encode, padded_dim

    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, 3, length, head_dim, generator=generator)
    x = x * torch.exp2(torch.randint(-12, 12, (2, 3, length, 1), generator=generator).float())
    x[..., : head_dim // 2][..., ::3, :] = 0  # blocks and rows of zeros
    x = x.to(kernel_device)
    mean = x.mean(-2, keepdim=True).contiguous() if smooth else None
    value = (x - mean if smooth else x) * 0.3
    amax = value.abs().amax((-2, -1), keepdim=True)
    operand, other = encode(x, (fmt, None), amax, 0.3, mean)
    assert other is None
    dim = padded_dim(head_dim)
    per_row = amax.expand(2, 3, -(-length // 128) * 128, 1).reshape(-1, 1)
    expected = pack(tiles_of(value, dim), fmt, tensor_amax=per_row)
    block = 16 if fmt == "nvfp4" else 32
    nonzero = (tiles_of(value, dim).unflatten(-1, (-1, block)) != 0).any(-1)
    assert torch.equal(plain_scales(operand, dim // block)[nonzero], expected.scales[nonzero])
    magnitude = operand.elements & (0x77 if expected.format.bits == 4 else 0x7F)
    assert torch.equal(magnitude, expected.data & (0x77 if expected.format.bits == 4 else 0x7F))
    kept = magnitude != 0
    assert torch.equal(operand.elements[kept], expected.data[kept])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_block_is_nan_and_no_other(fmt, bad, kernel_device):
    from dma_diffusers.kernels.quantiser.encode import encode

    x = torch.randn(1, 1, 128, 128, generator=torch.Generator().manual_seed(0)).to(kernel_device)
    amax = reference.finite_amax(x, (-2, -1))
    x[0, 0, 5, 70] = bad
    block = 16 if fmt == "nvfp4" else 32
    scales = plain_scales(encode(x, (fmt, None), amax, 1.0, None)[0], 128 // block)
    is_nan = scales == (0x7F if fmt == "nvfp4" else 0xFF)
    assert is_nan[5, 70 // block] and is_nan.sum() == 1


def test_both_classes_in_one_pass(kernel_device):
    from dma_diffusers.kernels.quantiser.encode import encode

    x = torch.randn(1, 2, 200, 64, generator=torch.Generator().manual_seed(1)).to(kernel_device)
    amax = x.abs().amax((-2, -1), keepdim=True)
    together = encode(x, ("mxfp8", "mxfp4"), amax, 1.0, None)
    alone = [encode(x, ("mxfp8", None), amax, 1.0, None)[0], encode(x, (None, "mxfp4"), amax, 1.0, None)[1]]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.elements, other.elements) and torch.equal(one.scales, other.scales)


def test_values_equal_the_reference(kernel_device):
    from dma_diffusers.kernels.quantiser.encode import encode_value

    v = torch.randn(2, 2, 300, 64, generator=torch.Generator().manual_seed(2)).to(kernel_device) * 5
    v[0, 0, 3, 7] = torch.nan
    stats = reference.statistics(v, v, v, 1.0, ("mxfp8",))
    encoded = encode_value(v, stats.v_scale.contiguous())
    expected = tiles_of(reference.quantised_v(v, stats).float(), 64)
    torch.testing.assert_close(encoded.float(), expected, rtol=0, atol=0, equal_nan=True)
    assert encoded.float().nan_to_num(0).abs().max() > 200  # the scale brings channels up to e4m3's range


@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_go_to_even(fmt, kernel_device):
    """Halfway between every two neighbouring numbers of the element, in blocks whose scale is one."""
    from dma_diffusers.kernels.quantiser.encode import encode

    element, block = get_format(fmt).element, get_format(fmt).block
    codes = torch.arange(2 ** (element.bits - 1), dtype=torch.uint8)
    numbers = element.decode(codes)
    numbers = numbers[numbers.isfinite()]
    ties = (numbers[:-1] + numbers[1:]) / 2
    ties = torch.cat([ties, -ties])
    blocks = torch.nn.functional.pad(ties, (0, -len(ties) % (block - 1))).reshape(-1, block - 1)
    blocks = torch.cat([torch.full((len(blocks), 1), element.max), blocks], dim=1)  # amax is q_max
    x = torch.zeros(1, 1, len(blocks), 64)
    x[..., :block] = blocks
    amax = torch.full((1, 1, 1, 1), 448.0 * element.max)  # tensor scale one
    operand = encode(x.to(kernel_device), (fmt, None), amax.to(kernel_device), 1.0, None)[0]
    expected = pack(x[0, 0], fmt, tensor_amax=amax[0, 0])

    def numbers(data: torch.Tensor) -> torch.Tensor:
        nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
        return element.decode(nibbles if element.bits == 4 else data)

    assert torch.equal(numbers(operand.elements[: len(blocks)].cpu()), numbers(expected.data))
