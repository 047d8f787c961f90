"""Elements: floats are compared with `ml_dtypes`, bit by bit, and integers with plain float64 arithmetic."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from dma_diffusers.kernels.formats import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT6, INT8

FLOATS = {
    E5M2: ml_dtypes.float8_e5m2,
    E4M3: ml_dtypes.float8_e4m3fn,
    E3M2: ml_dtypes.float6_e3m2fn,
    E2M3: ml_dtypes.float6_e2m3fn,
    E2M1: ml_dtypes.float4_e2m1fn,
}
INTEGERS = (INT8, INT6, INT4)
floats = pytest.mark.parametrize("element", FLOATS, ids=lambda element: element.name)
integers = pytest.mark.parametrize("element", INTEGERS, ids=lambda element: element.name)


def all_codes(element):
    return torch.arange(2**element.bits, dtype=torch.uint8)


def expected_codes(element, x):
    """The codes of ml_dtypes, whose 8-bit casts overflow to NaN or infinity, so that x is clipped first."""
    clipped = x.numpy().clip(-element.max, element.max)
    return torch.from_numpy(clipped.astype(FLOATS[element]).view(np.uint8))


def ties_and_neighbours(element):
    """The element's numbers, their midpoints, and the float32 numbers on either side of each, with both signs."""
    numbers = element.decode(all_codes(element))
    numbers = numbers[numbers.isfinite()].abs().unique()
    points = torch.cat((numbers, (numbers[1:] + numbers[:-1]) / 2))
    above, below = points.nextafter(torch.tensor(math.inf)), points.nextafter(torch.tensor(-math.inf))
    points = torch.cat((points, above, below))
    return torch.cat((points, -points))


@floats
def test_numbers_of_all_codes(element):
    expected = np.arange(2**element.bits, dtype=np.uint8).view(FLOATS[element]).astype(np.float32)
    finite = np.abs(expected) <= element.max
    decoded = element.decode(all_codes(element)).numpy()
    np.testing.assert_array_equal(decoded.view(np.uint32)[finite], expected.view(np.uint32)[finite])
    np.testing.assert_array_equal(np.isnan(decoded), np.isnan(expected))


@floats
def test_traits(element):
    info = ml_dtypes.finfo(FLOATS[element])
    assert element.max == float(info.max)
    assert 2.0**element.emin == float(info.smallest_normal)
    assert element.bits == info.bits
    assert 2.0**element.emax <= element.max < 2.0 ** (element.emax + 1)


@floats
def test_codes_at_ties(element):
    x = ties_and_neighbours(element)
    torch.testing.assert_close(element.encode(x), expected_codes(element, x), rtol=0, atol=0)


@floats
def test_codes_of_random_numbers(element):
    generator = torch.Generator().manual_seed(1)
    exponents = torch.empty(200_000).uniform_(-20, 18, generator=generator).exp2()
    x = exponents * torch.randn(200_000, generator=generator)
    torch.testing.assert_close(element.encode(x), expected_codes(element, x), rtol=0, atol=0)


@floats
def test_round_equals_decoded_codes(element):
    x = torch.cat((ties_and_neighbours(element), torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, math.inf])))
    rounded = element.round(x)
    assert torch.equal(rounded.view(torch.int32), element.decode(element.encode(x)).view(torch.int32))


@floats
def test_beyond_the_largest_number_saturates(element):
    x = torch.tensor([element.max * 1.01, 1e30, math.inf])
    assert element.round(x).tolist() == [element.max] * 3
    assert element.decode(element.encode(-x)).tolist() == [-element.max] * 3


def test_e2m1_ties_go_to_the_even_code():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert E2M1.round(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert E2M1.encode(ties).tolist() == [0, 2, 2, 4, 4, 6, 6]


@pytest.mark.parametrize("element", (*FLOATS, *INTEGERS), ids=lambda element: element.name)
def test_nan(element):
    nan = torch.tensor([math.nan])
    assert element.round(nan).isnan().all()
    decoded = element.decode(element.encode(nan))
    if element in (E3M2, E2M3, E2M1):  # no NaN among their codes
        assert decoded.item() == 0
    else:
        assert decoded.isnan().all()


@integers
def test_integers_round_half_to_even_and_clip_symmetrically(element):
    generator = torch.Generator().manual_seed(2)
    halves = torch.arange(-300, 301) / 2
    x = torch.cat((halves, torch.randn(10_000, generator=generator) * element.max))
    expected = np.clip(np.round(x.numpy().astype(np.float64)), -element.max, element.max)
    np.testing.assert_array_equal(element.round(x).numpy(), expected)
    np.testing.assert_array_equal(element.decode(element.encode(x)).numpy(), expected)


@integers
def test_integer_codes_are_twos_complement(element):
    x = torch.tensor([0.0, 1.0, element.max, -1.0, -element.max])
    top = 2**element.bits
    assert element.encode(x).tolist() == [0, 1, top // 2 - 1, top - 1, top // 2 + 1]
    assert not element.round(torch.tensor([-0.2])).signbit().any(), "integers have one zero"
