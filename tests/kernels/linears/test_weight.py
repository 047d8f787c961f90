"""Quantised weights: the numbers they hold, in memory and in files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dma_diffusers.kernels.formats import fake_quantize, get_format, join_six_bits, split_six_bits
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.layout import plain_scales, tiled_scales
from dma_diffusers.kernels.linears.weight import LinearWeight, quantise
from tests.kernels.linears.cases import BLOCK_GROUPS, GROUPS, MIXED, permutation_of, weight_of


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Says whether two dictionaries hold the same bits."""

    def bits(x):
        return x.contiguous().view(torch.uint8)

    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and torch.equal(bits(one[name].flatten()), bits(other[name].flatten()))
        for name in one
    )


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("permuted", [False, True])
def test_it_holds_what_each_format_can(name, permuted):
    groups = GROUPS[name]
    weight = weight_of(groups, 50)
    permutation = permutation_of(groups) if permuted else None
    order = torch.arange(groups.in_features) if permutation is None else permutation.long()
    expected = torch.empty_like(weight)
    for format, channels in groups.slices:
        part = weight[:, order[channels]]
        nvfp4 = {"tensor_amax": part.abs().amax(1, keepdim=True), "four_over_six": True}
        expected[:, order[channels]] = fake_quantize(
            part, format, **(nvfp4 if format.has_tensor_scale else {})
        )
    stored = quantise(weight, groups, permutation)
    assert torch.equal(stored.dequantised(torch.float32), expected)
    assert torch.equal(stored.permuted(torch.float32), expected[:, order])


@pytest.mark.parametrize("name", GROUPS)
def test_files_and_buffers_give_the_same_weight(name):
    groups = GROUPS[name]
    weight = quantise(weight_of(groups, 50), groups, permutation_of(groups))
    assert same(LinearWeight.from_packed(groups, weight.packed()).tensors(), weight.tensors())
    again = LinearWeight.from_tensors(groups, weight.tensors())
    assert again.out_features == 50 and same(again.tensors(), weight.tensors())


def test_a_file_is_as_small_as_its_bits_say():
    groups = BLOCK_GROUPS["micromix"]
    weight = quantise(weight_of(groups, 128), groups)
    stored = sum(x.numel() * x.element_size() for x in weight.packed().values())
    assert stored == 128 * groups.in_features * groups.average_bits / 8
    wide = groups.widths[1] + groups.widths[2]  # 6-bit numbers take a byte in memory
    assert weight.bytes == 128 * (groups.widths[0] // 2 + wide + groups.in_features // 32)


def test_one_scale_for_a_whole_weight():
    weight = weight_of(GROUPS["fp8"], 48)
    stored = quantise(weight, GROUPS["fp8"], one_scale=True)
    assert stored.row_scales.shape == () and stored.row_scales == weight.abs().max() / 448
    expected = (weight / stored.row_scales).to(torch.float8_e4m3fn).float() * stored.row_scales
    assert torch.equal(stored.dequantised(torch.float32), expected)
    with pytest.raises(ValueError, match="one scale for a whole weight is for fp8, not for int8"):
        quantise(weight, GROUPS["int8"], one_scale=True)
    assert (
        quantise(torch.zeros(16, 160), GROUPS["fp8"], one_scale=True).dequantised(torch.float32) == 0
    ).all()


@pytest.mark.parametrize("name", BLOCK_GROUPS)
def test_one_bad_number_spoils_its_block_alone(name):
    groups = BLOCK_GROUPS[name]
    weight = weight_of(groups, 4)
    weight[1, 40] = torch.inf
    weight[2, 3] = torch.nan
    bad = ~quantise(weight, groups).dequantised(torch.float32).isfinite()
    block = groups.block
    expected = torch.zeros_like(bad)
    expected[1, 40 // block * block : 40 // block * block + block] = True
    expected[2, :block] = True
    assert torch.equal(bad, expected)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_weight_comes_back_from_its_file(data):
    widths = tuple(32 * data.draw(st.integers(1, 5)) for _ in MIXED)
    groups = Groups((MIXED[0], data.draw(st.sampled_from(["mxfp6_e2m3", "mxfp6_e3m2"])), MIXED[2]), widths)
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(data.draw(st.integers(1, 140)), groups.in_features, generator=generator)
    weight = weight * torch.exp2(torch.randint(-60, 60, weight.shape, generator=generator).float())
    stored = quantise(weight, groups, permutation_of(groups, seed))
    again = LinearWeight.from_packed(groups, stored.packed())
    assert same(again.tensors(), stored.tensors())
    assert torch.equal(again.dequantised(torch.float64), stored.dequantised(torch.float64))


@given(st.lists(st.integers(0, 63), min_size=4, max_size=64).filter(lambda codes: len(codes) % 4 == 0))
def test_four_codes_lie_in_three_bytes(codes):
    packed = join_six_bits(torch.tensor(codes, dtype=torch.uint8))
    number = int.from_bytes(bytes(packed.tolist()), "little")
    assert [number >> 6 * n & 63 for n in range(len(codes))] == codes
    assert split_six_bits(packed).tolist() == codes
    with pytest.raises(ValueError, match="four to three bytes: got 3 in a row"):
        join_six_bits(torch.zeros(2, 3, dtype=torch.uint8))


@pytest.mark.parametrize("element", ["mxfp6_e2m3", "mxfp6_e3m2"])
def test_e4m3_holds_every_six_bit_number(element):
    numbers = get_format(element).element.decode(torch.arange(64, dtype=torch.uint8))
    assert torch.equal(numbers.to(torch.float8_e4m3fn).float(), numbers)


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (130, 9)])
def test_scales_lie_as_tcgen05_reads_them(rows, blocks):
    scales = torch.randint(1, 255, (rows, blocks), dtype=torch.uint8)
    tiled = tiled_scales(scales)
    assert tiled.shape == (1, -(-rows // 128), -(-blocks // 4), 2, 256)
    flat = tiled.reshape(tiled.shape[1], tiled.shape[2], 512)
    for row, column in ((0, 0), (rows - 1, blocks - 1), (rows // 2, blocks // 2)):
        place = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        assert flat[row // 128, column // 4, place] == scales[row, column]
    assert (tiled != 0).sum() == rows * blocks  # padding is zero, never NaN
    assert torch.equal(plain_scales(tiled, rows, blocks), scales)


def test_bad_weights_and_permutations_are_refused():
    with pytest.raises(ValueError, match=r"groups of 160 channels don't fit a weight \[4, 96\]"):
        quantise(torch.zeros(4, 96), GROUPS["nvfp4"])
    for wrong in (torch.zeros(160), torch.arange(159), torch.arange(160) + 1):
        with pytest.raises(ValueError, match="a permutation must name each of 160 channels once"):
            quantise(torch.zeros(4, 160), GROUPS["nvfp4"], wrong.int())
