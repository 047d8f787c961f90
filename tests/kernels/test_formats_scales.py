"""Scales are compared with exact rational arithmetic, `ml_dtypes`, and torchao's MX and NVFP4 quantisers."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

from dma_diffusers.kernels.formats import FORMATS, ScaleRounding, fake_quantize, get_format, pack
from dma_diffusers.kernels.formats.scale import Scale, decode_scales, encode_e8m0

E8M0 = [name for name, format in FORMATS.items() if format.scale is Scale.E8M0]
TORCHAO = {
    "mxfp8": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4": torch.float4_e2m1fn_x2,
}


def spread(rows, columns, seed):
    """Gaussian rows whose magnitudes span 2^-40 to 2^40."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    return x * torch.empty(rows, 1).uniform_(-40, 40, generator=generator).exp2()


def exact_exponent(amax, element, rounding):
    """The exponent of the scale by the rules of `ScaleRounding`, in rational numbers."""
    amax, q_max = Fraction(amax), Fraction(element.max)
    exponent = math.frexp(amax)[1] - 1 - element.emax  # OCP's rule; the other rules differ by at most one
    if rounding == "floor":
        return exponent
    limit, power = (q_max, 1) if rounding == "ceil" else (2 * q_max**2, 2)
    return next(
        e
        for e in (exponent - 1, exponent, exponent + 1, exponent + 2)
        if amax**power <= limit * Fraction(2) ** (e * power)
    )


@pytest.mark.parametrize("rounding", ScaleRounding)
@pytest.mark.parametrize("name", E8M0)
def test_e8m0_is_exact_around_every_threshold(name, rounding):
    element = FORMATS[name].element
    near = [element.max, element.max * math.sqrt(2), 2.0**element.emax, 1.0, 1.5]
    points = torch.tensor([value * 2.0**k for value in near for k in (-90, -31, -1, 0, 1, 2, 60, 100)])
    above, below = points.nextafter(torch.tensor(math.inf)), points.nextafter(torch.tensor(0.0))
    amax = torch.cat((points, above, below))
    expected = [exact_exponent(value, element, rounding) + 127 for value in amax.tolist()]
    assert encode_e8m0(amax, element, rounding).tolist() == expected


def test_e8m0_numbers_of_all_codes():
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    np.testing.assert_array_equal(decode_scales(torch.from_numpy(codes), Scale.E8M0).numpy(), expected)


@pytest.mark.parametrize("rounding", ScaleRounding)
def test_smallest_e8m0_scale(rounding):
    amax = torch.tensor([0.0, 1e-45, 2.0**-126])
    assert encode_e8m0(amax, get_format("mxfp4").element, rounding).tolist() == [0, 0, 0]


def test_mxfp4_emax_is_two():
    amax = torch.tensor([4.0, 6.0, 7.99, 8.0])
    assert encode_e8m0(amax, get_format("mxfp4").element, ScaleRounding.FLOOR).tolist() == [
        127,
        127,
        127,
        128,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rounding", "mode"), [("floor", ScaleCalculationMode.FLOOR), ("ceil", ScaleCalculationMode.RCEIL)]
)
@pytest.mark.parametrize("name", TORCHAO)
def test_codes_and_scales_equal_torchao(name, rounding, mode, dtype):
    x = spread(512, 128, seed=3).to(dtype)
    x[7] = 0
    scales, data = to_mx(x, TORCHAO[name], 32, mode)
    packed = pack(x, name, rounding)
    assert torch.equal(packed.scales, scales.view(torch.uint8))
    assert torch.equal(packed.data, data.view(torch.uint8))


def test_nvfp4_equals_torchao():
    # Random float32 numbers make no ties, which torchao may round away from even: it multiplies by a reciprocal.
    x = torch.randn(256, 128, generator=torch.Generator().manual_seed(4))
    packed = pack(x, "nvfp4")
    scales, data = nvfp4_quantize(x, per_tensor_scale=packed.tensor_scale)
    assert packed.tensor_scale == x.abs().max() / (448 * 6)
    assert torch.equal(packed.scales, scales.view(torch.uint8))
    assert torch.equal(packed.data, data)


def e4m3_scaled_oracle(x, q_max, round_elements):
    """The format in float64, with blocks of 16 and a tensor scale of one."""
    blocks = x.astype(np.float64).reshape(-1, 16)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / q_max
    scale = np.minimum(scale, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    ratio = np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0)
    return (round_elements(np.clip(ratio, -q_max, q_max)) * scale).reshape(x.shape)


@pytest.mark.parametrize(
    ("name", "q_max", "round_elements"),
    [
        ("nvfp4", 6, lambda ratio: ratio.astype(ml_dtypes.float4_e2m1fn).astype(np.float64)),
        ("nvint4", 7, np.round),
    ],
)
def test_e4m3_scaled_formats_in_float64(name, q_max, round_elements):
    # bf16 numbers and small integers make many exact ties; magnitudes reach saturated and zero block scales.
    generator = torch.Generator().manual_seed(5)
    x = (
        torch.randn(512, 64, generator=generator)
        * torch.empty(512, 1).uniform_(-14, 14, generator=generator).exp2()
    )
    x[:64] = torch.randint(-24, 25, (64, 64), generator=generator).float() / 2
    x = x.bfloat16().float()
    result = fake_quantize(x, name, tensor_amax=torch.tensor(448.0 * q_max))
    np.testing.assert_array_equal(result.numpy(), e4m3_scaled_oracle(x.numpy(), q_max, round_elements))
    assert (result == 0).all(dim=-1).any(), "no block scale rounded to zero"
    assert (result.abs() == 448 * q_max).any(), "no block scale saturated"


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
def test_tensor_scale_of_each_head(name):
    x = spread(6, 32 * 40, seed=6).view(2, 3, 32, 40)
    amax = x.abs().amax((-2, -1), keepdim=True)
    together = fake_quantize(x, name, tensor_amax=amax)
    apart = torch.stack([torch.stack([fake_quantize(head, name) for head in batch]) for batch in x])
    assert torch.equal(together, apart)
    assert pack(x, name, tensor_amax=amax).tensor_scale.shape == (2, 3, 1, 1)


@pytest.mark.parametrize("rounding", ScaleRounding)
@pytest.mark.parametrize("name", ["mxint8", "mxint6", "mxint4"])
def test_mx_integers_in_float64(name, rounding):
    format = FORMATS[name]
    x = spread(256, 64, seed=7)
    blocks = x.numpy().astype(np.float64).reshape(-1, 32)
    exponents = [exact_exponent(amax, format.element, rounding) for amax in np.abs(blocks).max(axis=1)]
    scale = np.exp2(exponents)[:, None]
    q_max = 2 ** (format.bits - 1) - 1
    expected = np.clip(np.round(blocks / scale), -q_max, q_max) * scale
    np.testing.assert_array_equal(fake_quantize(x, name, rounding).numpy(), expected.reshape(x.shape))


@pytest.mark.parametrize("name", ["int8", "int8_tile"])
def test_row_and_tile_integers_in_float64(name):
    x = torch.randn(2, 300, 40, generator=torch.Generator().manual_seed(8))
    amax = x.abs().amax(-1, keepdim=True).numpy().astype(np.float64)
    if name == "int8_tile":
        tiles = [slice(0, 128), slice(128, 256), slice(256, 300)]
        for tile in tiles:
            amax[:, tile] = amax[:, tile].max(axis=1, keepdims=True)
    scale = amax / 127
    expected = np.clip(np.round(x.numpy() / scale), -127, 127) * scale
    np.testing.assert_allclose(fake_quantize(x, name).numpy(), expected, rtol=1e-6)


def test_fp8_rows_in_float64():
    x = spread(64, 40, seed=9)
    scale = x.abs().amax(-1, keepdim=True).numpy() / np.float32(448)
    elements = np.clip(x.numpy() / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(fake_quantize(x, "fp8").numpy(), elements.astype(np.float32) * scale)
