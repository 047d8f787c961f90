"""Laws of formats that hold for every tensor; hypothesis searches for counterexamples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers.kernels.formats import FORMATS, FloatElement, Scale, fake_quantize, pack, unpack
from dma_diffusers.kernels.formats.scale import decode_scales

QUANTISED = [name for name in FORMATS if name != "bf16"]
E8M0 = [name for name in QUANTISED if FORMATS[name].scale is Scale.E8M0]
ROUNDINGS = ["ceil", "floor", "nearest"]


@st.composite
def tensors(draw):
    """Matrices of odd sizes with some zeros: Gaussian, with few bits (many ties), or spread over 2^±20."""
    shape = draw(st.tuples(st.integers(1, 140), st.integers(1, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator)
    match draw(st.sampled_from(["gaussian", "ties", "spread"])):
        case "ties":
            x = (x * 8).round() / 4
        case "spread":
            x = x * torch.empty(shape).uniform_(-20, 20, generator=generator).exp2()
    return x.masked_fill(torch.rand(shape, generator=generator) < draw(st.sampled_from([0, 0.1, 0.9])), 0.0)


laws = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", QUANTISED)
@laws
@given(x=tensors(), rounding=st.sampled_from(ROUNDINGS))
def test_pack_and_unpack_equal_fake_quantize(name, x, rounding):
    stored, rounded = unpack(pack(x, name, rounding)), fake_quantize(x, name, rounding)
    assert torch.equal(stored.view(torch.int32), rounded.view(torch.int32))


@pytest.mark.parametrize("name", QUANTISED)
@laws
@given(x=tensors(), rounding=st.sampled_from(ROUNDINGS))
def test_sign_symmetry(name, x, rounding):
    assert torch.equal(fake_quantize(-x, name, rounding), -fake_quantize(x, name, rounding))


@pytest.mark.parametrize("name", E8M0)
@laws
@given(x=tensors(), rounding=st.sampled_from(["ceil", "floor"]))
def test_e8m0_formats_are_idempotent(name, x, rounding):
    """This fails with "nearest": MXFP4 rounds a maximum of 4.3 to 4, whose own scale, half as large, clips it."""
    once = fake_quantize(x, name, rounding)
    assert torch.equal(fake_quantize(once, name, rounding), once)


@pytest.mark.parametrize("name", ["nvfp4", "nvint4"])
@laws
@given(x=tensors())
def test_e4m3_scaled_formats_are_idempotent_under_one_tensor_scale(name, x):
    """This holds where block scales are normal: a subnormal one may round to zero the second time."""
    x = x.clamp(-100, 100)
    x = torch.where(x.abs() < 2**-4, 0.0, x)
    once = fake_quantize(x, name, tensor_amax=torch.tensor(100.0))
    assert torch.equal(fake_quantize(once, name, tensor_amax=torch.tensor(100.0)), once)


@pytest.mark.parametrize("name", ["fp8", "int8", "int8_tile"])
@laws
@given(x=tensors())
def test_fp32_scaled_formats_are_idempotent_to_rounding(name, x):
    once = fake_quantize(x, name)
    torch.testing.assert_close(fake_quantize(once, name), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", E8M0)
@laws
@given(x=tensors(), rounding=st.sampled_from(ROUNDINGS), exponent=st.integers(-40, 40))
def test_e8m0_formats_commute_with_powers_of_two(name, x, rounding, exponent):
    factor = 2.0**exponent
    assert torch.equal(fake_quantize(x * factor, name, rounding), fake_quantize(x, name, rounding) * factor)


@pytest.mark.parametrize("name", E8M0)
@laws
@given(x=tensors())
def test_error_is_half_a_step_at_most(name, x):
    """Scales rounded up never clip, so the element's rounding is the only error."""
    format = FORMATS[name]
    packed = pack(x, name, "ceil")
    scale = decode_scales(packed.scales, format.scale).repeat_interleave(format.block, -1)[:, : x.shape[-1]]
    if isinstance(format.element, FloatElement):
        power = torch.frexp(x / scale).exponent.sub(1).clamp_min(format.element.emin)
        step = torch.ldexp(scale, power - format.element.mantissa_bits)
    else:
        step = scale
    assert ((unpack(packed) - x).abs() <= step / 2).all()
