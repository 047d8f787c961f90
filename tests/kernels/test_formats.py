"""Formats as their users see them: accuracy, blocks, NaN, shapes, dtypes, storage, messages."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dma_diffusers.kernels.formats import E2M1, FORMATS, Scale, fake_quantize, get_format, pack, unpack

QUANTISED = [name for name in FORMATS if name != "bf16"]
BLOCKED = [name for name in QUANTISED if FORMATS[name].block]
quantised = pytest.mark.parametrize("name", QUANTISED)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_l2(x, name, rounding="ceil"):
    return ((fake_quantize(x, name, rounding) - x).norm() / x.norm()).item()


# Accuracy


@pytest.mark.parametrize(
    ("name", "decibels"),
    [
        ("mxfp8", 31.52),
        ("mxfp6_e2m3", 30.96),
        ("mxint8", 41.61),
        ("mxint4", 16.84),
        ("mxfp4", 18.76),
        ("nvfp4", 20.43),
        ("nvint4", 21.28),
    ],
)
def test_gaussian_qsnr(name, decibels):
    """The expected figures are those of arXiv 2510.25602, with scales rounded up."""
    assert -20 * math.log10(relative_l2(gaussian(4096, 256), name)) == pytest.approx(decibels, abs=0.1)


@pytest.mark.parametrize(
    ("name", "rounding", "error"),
    [("mxfp4", "ceil", 0.115), ("mxfp4", "floor", 0.115), ("nvfp4", "ceil", 0.095)],
)
def test_gaussian_error_of_four_bits(name, rounding, error):
    """An MXFP4 scale with emax 3 would give .287, an E2M1 that doesn't round to nearest even .122."""
    assert relative_l2(gaussian(4096, 256), name, rounding) == pytest.approx(error, abs=5e-4)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "mxint8"])
def test_ceil_never_clips(name):
    largest = gaussian(4096, 32).abs().amax(-1)
    element = FORMATS[name].element
    scales = torch.exp2(pack(largest[:, None], name).scales[:, 0].float() - 127)
    assert (largest / scales <= element.max).all()
    assert (largest / scales > element.max / 2).all()


def test_bf16_passes_wider_inputs_through():
    x = gaussian(3, 40)
    assert torch.equal(fake_quantize(x, "bf16"), x)
    assert torch.equal(unpack(pack(x.double(), "bf16"), torch.float64), x.double())


# Zero, NaN, infinity


@pytest.mark.parametrize("shape", [(2, 64), (130, 40)], ids=str)
@quantised
def test_zeros_stay_zero(name, shape):
    zeros = torch.zeros(shape)
    assert torch.equal(fake_quantize(zeros, name), zeros)
    assert torch.equal(unpack(pack(zeros, name)), zeros)


@quantised
def test_a_block_of_zeros_beside_others_stays_zero(name):
    x = gaussian(4, 96)
    x[:, 32:64] = 0
    assert (fake_quantize(x, name)[:, 32:64] == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", FORMATS)
def test_nan_and_infinity_spoil_their_own_block(name, bad):
    clean = gaussian(2, 150, 72)
    spoilt = torch.zeros(clean.shape, dtype=torch.bool)
    width = {"bf16": 1}.get(name, FORMATS[name].block or 72)
    positions = [(0, 0, 0), (0, 140, 71), (1, 5, 33)]
    for batch, row, column in positions:
        clean[batch, row, column] = 0  # scales of other numbers must come out as with this zero
        clean[batch, row, 40] = 9  # is finite, so it counts for scales even in a spoilt row
        first = column // width * width
        spoilt[batch, row, first : first + width] = True
    dirty = clean.clone()
    for batch, row, column in positions:
        dirty[batch, row, column] = bad

    result = fake_quantize(dirty, name)
    if name == "bf16":
        assert torch.equal(result.nan_to_num(), dirty.nan_to_num())
    else:
        assert torch.equal(result.isnan(), spoilt)
        assert torch.equal(result[~spoilt], fake_quantize(clean, name)[~spoilt])
    assert torch.equal(unpack(pack(dirty, name)).nan_to_num(), result.nan_to_num())
    assert torch.equal(unpack(pack(dirty, name)).isnan(), result.isnan())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@quantised
def test_how_nan_is_stored(name, bad):
    x = gaussian(2, 64)
    x[1, 3] = bad
    packed = pack(x, name)
    if name == "int8_tile":
        assert packed.scales.isfinite().all()
        assert (packed.data[1] == 0x80).all()
        assert (packed.data[0] != 0x80).all()
    elif packed.format.scale is Scale.FP32:
        assert packed.scales.isnan().tolist() == [[False], [True]]
    else:
        nan = {Scale.E8M0: 0xFF, Scale.E4M3: 0x7F}[packed.format.scale]
        blocks = 64 // packed.format.block
        assert (packed.scales == nan).tolist() == [[False] * blocks, [True] + [False] * (blocks - 1)]


# Shapes and dtypes


@pytest.mark.parametrize("columns", [1, 40, 63, 64, 111])
@quantised
def test_any_last_dimension_equals_padding_with_zeros(name, columns):
    x = gaussian(2, 131, columns)
    result = fake_quantize(x, name)
    padded = fake_quantize(torch.nn.functional.pad(x, (0, 128 - columns)), name)
    assert torch.equal(result, padded[..., :columns])
    assert torch.equal(unpack(pack(x, name)), result)


@pytest.mark.parametrize("name", [name for name in QUANTISED if name != "int8_tile"])
def test_one_dimension(name):
    x = gaussian(63)
    assert torch.equal(fake_quantize(x, name), fake_quantize(x[None], name)[0])
    assert torch.equal(unpack(pack(x, name)), fake_quantize(x, name))


@quantised
def test_non_contiguous(name):
    x = gaussian(2, 40, 3, 130).transpose(1, 3)
    sliced = gaussian(2, 40, 96)[:, ::2, 1:90:2]
    for view in (x, sliced):
        assert not view.is_contiguous()
        assert torch.equal(fake_quantize(view, name), fake_quantize(view.contiguous(), name))
        assert torch.equal(unpack(pack(view, name)), fake_quantize(view, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@quantised
def test_dtypes(name, dtype):
    x = gaussian(130, 72).to(dtype)
    result = fake_quantize(x, name)
    assert result.dtype == dtype
    assert torch.equal(result, fake_quantize(x.float(), name).to(dtype))
    assert torch.equal(unpack(pack(x, name), dtype), result)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@quantised
def test_the_largest_finite_number_stays_finite(name, dtype):
    largest = torch.finfo(dtype).max
    result = fake_quantize(torch.full((2, 32), largest, dtype=dtype), name)
    assert result.isfinite().all()
    assert result.min().item() >= largest * 0.8


@quantised
def test_input_is_left_alone(name):
    x = gaussian(4, 64)
    before = x.clone()
    fake_quantize(x, name)
    pack(x, name)
    assert torch.equal(x, before)


@quantised
def test_no_value_is_read_back(name):
    """Fake tensors have no values: reading one, as `.item()` or a branch does, raises."""
    with FakeTensorMode():
        x = torch.empty(1, 2, 131, 72, dtype=torch.bfloat16)
        assert fake_quantize(x, name).shape == x.shape
        assert unpack(pack(x, name), x.dtype).dtype == x.dtype


# Storage


def test_two_e2m1_codes_per_byte_even_index_low():
    x = torch.tensor([[1.0, -2.0, 6.0, 0.5] + [0.0] * 28])
    packed = pack(x, "mxfp4")
    codes = E2M1.encode(x[0, :4]).tolist()
    assert packed.data[0, :2].tolist() == [codes[0] | codes[1] << 4, codes[2] | codes[3] << 4]
    assert packed.scales.tolist() == [[127]]


@quantised
def test_bits_stored(name):
    packed = pack(gaussian(2, 256, 96), name)
    format = get_format(name)
    elements = 2 * 256 * 96
    byte_per_element = 0.5 if format.bits == 4 else 1
    assert packed.data.dtype == torch.uint8
    assert packed.data.numel() == elements * byte_per_element
    scales = elements // (format.block or 96) // format.block_rows
    assert packed.scales.numel() == scales
    assert packed.scales.element_size() * 8 == format.scale.bits
    assert (packed.tensor_scale is not None) == format.has_tensor_scale


@pytest.mark.parametrize("name", BLOCKED)
def test_average_bits(name):
    format = get_format(name)
    packed = pack(gaussian(64, 96), name)
    unused = (8 - format.bits) * packed.data.numel() if format.bits == 6 else 0
    stored = 8 * (packed.data.numel() + packed.scales.numel()) - unused
    assert format.average_bits == stored / (64 * 96)


# Messages


def test_unknown_format_lists_what_exists():
    with pytest.raises(ValueError, match=r"^unknown format 'mxfp5': choose from bf16, fp8, .*mxfp4.*nvint4$"):
        fake_quantize(gaussian(2, 32), "mxfp5")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "bf16"])
def test_unknown_rounding_lists_what_exists(name):
    with pytest.raises(ValueError, match=r"^unknown scale rounding 'up': choose from ceil, floor, nearest$"):
        pack(gaussian(2, 32), name, "up")


@pytest.mark.parametrize(
    ("x", "name"), [(torch.ones(5), "int8_tile"), (torch.ones(3, 0), "mxfp4"), (torch.ones(()), "fp8")]
)
def test_shape_without_rows_or_columns(x, name):
    with pytest.raises(ValueError, match=rf"^{name} needs rows and columns: got shape"):
        fake_quantize(x, name)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"^mxfp4 stores floats: got torch.int64$"):
        fake_quantize(torch.arange(32), "mxfp4")
