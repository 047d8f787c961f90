"""The quantiser's kernel of linear layers against the codecs and the reference: the same bytes."""

import pytest
import torch

from dma_diffusers.kernels.formats import E2M1, E4M3
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.layout import plain_scales
from dma_diffusers.kernels.linears.linear import quantise_input
from dma_diffusers.kernels.linears.operands import Operand
from dma_diffusers.kernels.linears.prologue import NOTHING, Prologue
from dma_diffusers.kernels.linears.reference import quantised_input
from dma_diffusers.kernels.linears.weight import LinearWeight, quantise
from tests.kernels.linears.cases import BLOCK_GROUPS, permutation_of, relative_l2, rows_of

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
MX = [name for name in BLOCK_GROUPS if name != "nvfp4"]


def encoded(x, groups, permutation=None, prologue=NOTHING) -> Operand:
    """x `[..., K]` through the kernel."""
    return Operand.of_present(quantise_input(x, permutation, groups, "native", None, prologue), groups)


def numbers(operand: Operand, groups: Groups) -> torch.Tensor:
    """The numbers of an operand, `[rows, K]`."""
    return LinearWeight(groups, len(operand.elements), *operand).permuted(torch.float32)


def stored(operand: Operand, groups: Groups) -> list[torch.Tensor]:
    """All that an operand stores, with zeros that have lost their sign, and NaN blocks by their scales alone."""
    rows, found = len(operand.elements), []
    for elements, scales, width, element in (
        (operand.narrow, operand.narrow_scales, groups.narrow, E2M1),
        (operand.wide, operand.wide_scales, groups.wide, E4M3),
    ):
        if elements is None:
            continue
        codes = elements.view(torch.uint8)
        if element is E2M1:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
        plain = plain_scales(scales.view(torch.uint8), rows, width // groups.block)
        is_nan = plain == (0x7F if groups.has_row_scales else 255)
        decoded = element.decode(codes).unflatten(1, (-1, groups.block)) + 0.0
        found += [decoded.masked_fill(is_nan[:, :, None], 0), plain]
    return [*found, *([operand.row_scales] if groups.has_row_scales else [])]


@pytest.mark.parametrize("name", BLOCK_GROUPS)
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.bfloat16), (63, torch.float32), (133, torch.float16)])
@pytest.mark.parametrize("permuted", [False, True])
def test_bytes_equal_the_codecs(name, rows, dtype, permuted, kernel_device):
    groups = BLOCK_GROUPS[name]
    if rows > 1 and groups.in_features > 1000:
        rows = 20  # the interpreter takes its time
    x = rows_of(groups, rows).clamp(-6e4, 6e4).to(dtype)
    x[-1, 3::7] = 0
    permutation = permutation_of(groups) if permuted else None
    expected = Operand.of_weight(quantise(x, groups, permutation))
    if permuted:
        permutation = permutation.to(kernel_device)
    found = encoded(x.to(kernel_device), groups, permutation)
    for one, other in zip(stored(found, groups), stored(expected, groups), strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("name", BLOCK_GROUPS)
def test_scales_are_padded_with_numbers(name, kernel_device):
    """TMA fills up elements with zeros, which a NaN scale would spoil."""
    groups = BLOCK_GROUPS[name]
    found = encoded(rows_of(groups, 5).to(kernel_device), groups)
    for scales, width in ((found.narrow_scales, groups.narrow), (found.wide_scales, groups.wide)):
        if scales is not None:
            columns = scales.shape[2] * 4
            plain = plain_scales(scales.view(torch.uint8), 5, columns)
            assert (plain[:, width // groups.block :] == 0).all()
            assert columns - width // groups.block < 4


@pytest.mark.parametrize("name", BLOCK_GROUPS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_block_is_nan_and_no_other(name, bad, kernel_device):
    groups = BLOCK_GROUPS[name]
    x = rows_of(groups, 7)
    x[2, 40], x[4] = bad, torch.nan
    expected = quantised_input(x, groups, None)
    found = numbers(encoded(x.to(kernel_device), groups), groups).cpu()
    assert expected[2].isnan().sum() == groups.block and expected[4].isnan().all()
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("name", ["uneven", "nvfp4"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", ["norm", "modulated norm", "modulation", "one modulation", "gelu"])
def test_the_prologue_comes_first(name, permuted, kind, kernel_device):
    """Its sums and exponentials may differ in the last bit, which moves few numbers by a step."""
    groups = BLOCK_GROUPS[name]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 11, groups.in_features, generator=generator)
    scale, shift = (
        torch.randn(2, groups.in_features, generator=generator).to(kernel_device) for _ in range(2)
    )
    prologue = {
        "norm": Prologue(1e-6), "modulated norm": Prologue(1e-6, scale, shift),
        "modulation": Prologue(None, scale, shift), "one modulation": Prologue(None, scale[:1], shift[:1]),
        "gelu": Prologue(gelu=True),
    }[kind]  # fmt: skip
    x, permutation = x.to(kernel_device), permutation_of(groups).to(kernel_device) if permuted else None
    expected = quantised_input(prologue(x), groups, permutation).flatten(0, 1)
    found = numbers(encoded(x, groups, permutation, prologue), groups)
    assert relative_l2(found, expected) < 0.01
    # The scale of an nvfp4 row is a float32 number itself.
    moved = (found - expected).abs() > 1e-5 * expected.abs()
    assert moved.float().mean() < 0.01


@pytest.mark.parametrize("name", MX)
@pytest.mark.parametrize("permuted", [False, True])
def test_reencoded_rows_are_the_same_numbers_where_e4m3_has_room(name, permuted, kernel_device):
    groups = BLOCK_GROUPS[name]
    rows = 12
    x = torch.randn(rows, groups.in_features, generator=torch.Generator().manual_seed(5))
    x[3] = 0
    x[4] *= 1e-30
    permutation = permutation_of(groups) if permuted else None
    expected = quantised_input(x, groups, permutation)
    order = permutation.to(kernel_device) if permuted else None
    elements, scale = quantise_input(x.to(kernel_device), order, groups, "scaled_mm")
    assert elements.shape == x.shape and (torch.frexp(scale)[0] == 0.5).all()
    found = (elements.float() * scale[:, None]).cpu()
    # Numbers under the step of e4m3's subnormals are rounded to that step; all others are exact.
    step = 2.0**-9 * scale[:, None].cpu()
    assert ((found - expected).abs() <= step / 2).all()
    assert ((found == expected) | (expected.abs() < 2.0**-6 * scale[:, None].cpu())).all()
    if name == "all 4 bits":
        assert torch.equal(found, expected)
    assert (found[3] == 0).all() and (found[4] != 0).any()


@pytest.mark.parametrize("name", MX)
def test_a_reencoded_weight_is_that_of_its_rows(name, kernel_device):
    """The weight's kernel reads what the input's kernel would have read: both write the same bytes."""
    from dma_diffusers.kernels.linears import launch

    groups = BLOCK_GROUPS[name]
    weight = rows_of(groups, 20)
    weight[7, 5] = torch.nan
    packed = Operand.of_weight(quantise(weight, groups))
    packed = Operand(*(x if x is None else x.to(kernel_device) for x in packed))
    found = launch.reencode(packed, groups)
    expected = quantise_input(weight.to(kernel_device), None, groups, "scaled_mm")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.float().nan_to_num(7.0), other.float().nan_to_num(7.0))
    assert found[0][7].float().isnan().sum() == 32


def test_rows_of_any_stride_and_none(kernel_device):
    groups = BLOCK_GROUPS["uneven"]
    wide = torch.randn(5, 2 * groups.in_features).to(kernel_device)
    for x in (wide[:, : groups.in_features], wide[:, ::2], wide[:0, ::2]):
        alone = encoded(x.contiguous(), groups)
        for one, other in zip(stored(encoded(x, groups), groups), stored(alone, groups), strict=True):
            assert torch.equal(one, other)
