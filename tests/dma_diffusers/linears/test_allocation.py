"""The threshold rule: thresholds, shares, groups, the order of channels, and thresholds for an average of bits."""

import math

import ml_dtypes
import pytest
import torch

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.linears.allocation import (
    ALIGNMENT,
    FACTORS,
    Shares,
    factor_for,
    groups_of,
    permutation_of,
    threshold,
)
from dma_diffusers.linears.calibration import InputStatistics


@pytest.mark.parametrize(
    ("format", "published"), [("mxfp4", 0.0105), ("mxfp6_e3m2", 0.0360), ("mxfp6_e2m3", 0.0336)]
)
def test_thresholds_are_the_published_ones(format, published):
    assert round(threshold(format), 4) == published


@pytest.mark.parametrize(
    ("format", "type"),
    [("mxfp4", ml_dtypes.float4_e2m1fn), ("mxfp6_e2m3", ml_dtypes.float6_e2m3fn)],
)
def test_at_its_threshold_a_format_errs_no_more_than_int8(format, type):
    # A block whose largest element is at the threshold of a tensor with max|X| = 1, with its scale rounded up.
    limit = threshold(format)
    info = ml_dtypes.finfo(type)
    scale = 2.0 ** math.ceil(math.log2(limit / float(info.max)))
    x = torch.linspace(0, limit, 4001, dtype=torch.float64)
    rounded = torch.from_numpy((x / scale).numpy().astype(type).astype("float64")) * scale
    of_int8 = 1 / 127 / 2
    # The bound is for the exact scale; one that is a power of two may be up to twice as large.
    assert float((rounded - x).abs().max()) <= 2 * of_int8


def shares(under_4: float, under_6: float) -> Shares:
    """The same shares whatever the factor."""
    return Shares(*(torch.full((len(FACTORS),), value, dtype=torch.float64) for value in (under_4, under_6)))


@pytest.mark.parametrize(
    ("width", "of", "groups"),
    [
        (3072, (0.5, 0.3, 0.2), {"mxfp4": 3072 - 1024 - 640, "mxfp6_e2m3": 1024, "mxfp8": 640}),
        (3072, (1.0, 0.0, 0.0), {"mxfp4": 3072}),
        (3072, (0.0, 0.0, 1.0), {"mxfp8": 3072}),
        (3072, (0.999, 0.0, 0.001), {"mxfp4": 2944, "mxfp8": 128}),
        (256, (0.4, 0.3, 0.3), {"mxfp6_e2m3": 128, "mxfp8": 128}),
        (96, (0.9, 0.05, 0.05), {"mxfp8": 96}),
        (160, (0.9, 0.05, 0.05), {"mxfp6_e2m3": 32, "mxfp8": 128}),
        (384, (2 / 3, 1 / 3, 0.0), {"mxfp4": 256, "mxfp6_e2m3": 128}),
    ],
)
def test_groups_are_rounded_up_to_128_from_the_outliers_on(width, of, groups):
    found = groups_of(width, of)
    assert dict(zip(found.formats, found.widths, strict=True)) == groups
    assert found.in_features == width
    if width % ALIGNMENT == 0:
        assert all(each % ALIGNMENT == 0 for each in found.widths)


def test_channels_are_sorted_by_mean_magnitude_outliers_last():
    x = torch.randn(64, 8) * torch.tensor([3.0, 1, 9, 2, 0.1, 7, 5, 4])
    order = permutation_of(x.abs().mean(0))
    assert order.dtype == torch.int32
    assert order.tolist() == [4, 1, 3, 0, 7, 6, 5, 2]


def test_shares_between_factors_and_beyond_them():
    rising = torch.linspace(0, 1, len(FACTORS), dtype=torch.float64)
    found = Shares(rising, rising.sqrt())
    assert found.at(1.0) == pytest.approx((0.5, math.sqrt(0.5) - 0.5, 1 - math.sqrt(0.5)))
    assert found.at(2.0**-30) == (0, 0, 1)
    assert found.at(2.0**30) == (1, 0, 0)
    between = found.at(2.0**0.125)[0]
    assert rising[28] < between < rising[29]


def test_statistics_count_elements_under_thresholds():
    torch.manual_seed(0)
    x = torch.randn(2, 50, 64, dtype=torch.float64) ** 3
    statistics = InputStatistics(torch.zeros(64, dtype=torch.float64))
    statistics.add(x[:1], 0.5)
    statistics.add(x[1:], 0.25)
    expected = [[float((part.abs() <= threshold(f) * part.abs().max()).double().mean()) for part in x]
                for f in ("mxfp4", "mxfp6_e2m3")]  # fmt: skip
    for level, index in ((0.5, 0), (0.25, 1)):
        four, six, eight = statistics.shares(level).at(1.0)
        assert four == pytest.approx(expected[0][index])
        assert four + six == pytest.approx(expected[1][index])
        assert four + six + eight == pytest.approx(1)
    assert statistics.shares().at(1.0)[0] == pytest.approx(sum(expected[0]) / 2)
    assert torch.allclose(statistics.mean_abs, x.abs().mean((0, 1)))
    assert statistics.amax == pytest.approx(float(x.abs().max()))


def test_an_input_of_zeros_needs_four_bits():
    statistics = InputStatistics(torch.zeros(64, dtype=torch.float64))
    statistics.add(torch.zeros(3, 64), 0.0)
    assert statistics.shares().at(1.0) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("bits", [4.5, 5.0, 5.5, 6.0, 7.0])
def test_an_average_of_bits_is_met_from_below(bits):
    torch.manual_seed(0)
    layers, weights = {}, {}
    for index, power in enumerate((1, 2, 3, 5)):
        statistics = InputStatistics(torch.zeros(4096, dtype=torch.float64))
        statistics.add(torch.randn(8, 4096) ** power, 0.5)
        layers[str(index)], weights[str(index)] = statistics.shares(), 4096 * (index + 1)

    def groups_at(name: str, factor: float) -> Groups:
        return groups_of(4096, layers[name].at(factor))

    factor = factor_for(bits, weights, groups_at)
    taken = sum(groups_at(name, factor).average_bits * count for name, count in weights.items())
    assert bits - 0.15 < taken / sum(weights.values()) <= bits


@pytest.mark.parametrize("bits", [4.0, 9.0])
def test_an_average_that_cannot_be_had_is_refused(bits):
    with pytest.raises(ValueError, match=rf"bits={bits:g} can't be had: these layers take 4.25 to 8.25 bits"):
        factor_for(
            bits, {"a": 1}, lambda name, factor: groups_of(256, (1, 0, 0) if factor > 1 else (0, 0, 1))
        )


def test_kept_layers_bound_the_average_from_below():
    with pytest.raises(ValueError, match=r"take 8.25 to 8.25 bits"):
        factor_for(5, {"a": 1}, lambda name, factor: Groups.whole("mxfp8", 256))
