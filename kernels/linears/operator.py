"""The kernels of linear layers as registered torch operators, of which `torch.compile` sees one node each."""

from functools import cache

import torch
from torch import Tensor

from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.operands import Operand
from dma_diffusers.kernels.linears.prologue import Prologue
from dma_diffusers.kernels.lowerings import architecture


def quantise(
    x: Tensor, permutation: Tensor | None, groups: Groups, prologue: Prologue, reencodes: bool
) -> list[Tensor]:
    """The tensors of the operand that `launch.quantise` makes of x `[rows, K]`."""
    scale, shift = prologue.scale, prologue.shift
    if permutation is not None and scale is not None and shift is not None:
        scale, shift = scale[:, permutation], shift[:, permutation]
    return torch.ops.dma_diffusers.linear_quantise(
        x, permutation, scale, shift, prologue.norm_eps, prologue.gelu,
        groups.formats, groups.widths, reencodes,
    )  # fmt: skip


def multiply(
    inputs: list[Tensor], weight: list[Tensor], bias: Tensor | None, groups: Groups, dtype: torch.dtype
) -> Tensor:
    """x·weightᵀ + bias, `[rows, N]` in `dtype`, for the tensors of two operands."""
    return torch.ops.dma_diffusers.linear_multiply(inputs, weight, bias, groups.formats, groups.widths, dtype)


def reencode(weight: list[Tensor], groups: Groups) -> tuple[Tensor, Tensor]:
    """An operand in MX formats as e4m3 `[N, K]`, and the power of two of each row, float32 `[N]`."""
    return torch.ops.dma_diffusers.linear_reencode(weight, groups.formats, groups.widths)


def _quantise(x, permutation, scale, shift, norm_eps, gelu, formats, widths, reencodes):
    from dma_diffusers.kernels.linears import launch

    if scale is not None:
        scale, shift = scale.contiguous(), shift.contiguous()
    prologue = Prologue(norm_eps, scale, shift, gelu)
    return launch.quantise(x, permutation, _groups(formats, widths), prologue, reencodes).present


def _fake_quantise(x, permutation, scale, shift, norm_eps, gelu, formats, widths, reencodes):
    return Operand.empty(x, _groups(formats, widths), reencodes).present


def _multiply(inputs, weight, bias, formats, widths, dtype):
    from dma_diffusers.kernels.linears import launch

    groups = _groups(formats, widths)
    x, w = (Operand.of_present(tensors, groups) for tensors in (inputs, weight))
    return launch.multiply(x, w, bias, groups, dtype, architecture(inputs[0].device))


def _fake_multiply(inputs, weight, bias, formats, widths, dtype):
    return inputs[0].new_empty((inputs[0].shape[0], weight[0].shape[0]), dtype=dtype)


def _reencode(weight, formats, widths):
    from dma_diffusers.kernels.linears import launch

    groups = _groups(formats, widths)
    return launch.reencode(Operand.of_present(weight, groups), groups)


def _fake_reencode(weight, formats, widths):
    rows = weight[0].shape[0]
    return weight[0].new_empty((rows, sum(widths)), dtype=torch.float8_e4m3fn), weight[0].new_empty(
        (rows,), dtype=torch.float32
    )


def _groups(formats, widths) -> Groups:
    return _checked_once(tuple(formats), tuple(widths))


_checked_once = cache(Groups)


_LIBRARY = torch.library.Library("dma_diffusers", "FRAGMENT")
for _signature, _run, _fake in (
    (
        "linear_quantise(Tensor x, Tensor? permutation, Tensor? scale, Tensor? shift, float? norm_eps, bool gelu, "
        "str[] formats, int[] widths, bool reencodes) -> Tensor[]",
        _quantise, _fake_quantise,
    ),
    (
        "linear_multiply(Tensor[] inputs, Tensor[] weight, Tensor? bias, str[] formats, int[] widths, "
        "ScalarType dtype) -> Tensor",
        _multiply, _fake_multiply,
    ),
    (
        "linear_reencode(Tensor[] weight, str[] formats, int[] widths) -> (Tensor, Tensor)",
        _reencode, _fake_reencode,
    ),
):  # fmt: skip
    _name = _signature.partition("(")[0]
    _LIBRARY.define(_signature, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dma_diffusers::{_name}", _fake, lib=_LIBRARY)
