"""A linear layer in two steps, so that layers which read one tensor quantise it once.

>>> inputs = quantise_input(x, weight.permutation, weight.groups, "scaled_mm")
>>> y = multiply(inputs, weight, "scaled_mm", bias, x.dtype)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_diffusers.kernels.formats import E4M3, INT8, Element
from dma_diffusers.kernels.formats.scale import fp32_scale
from dma_diffusers.kernels.linears import operator, reference
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.operands import Operand
from dma_diffusers.kernels.linears.prologue import NOTHING, Prologue
from dma_diffusers.kernels.linears.weight import LinearWeight

_SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
_FEWEST_ROWS = 17  # torch._int_mm takes no fewer on a GPU


def linear(
    x: Tensor,
    weight: LinearWeight,
    lowering: str,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    prologue: Prologue = NOTHING,
) -> Tensor:
    """The layer's output `[..., N]`, in x's dtype: both steps in one."""
    inputs = quantise_input(x, weight.permutation, weight.groups, lowering, input_scale, prologue)
    return multiply(inputs, weight, lowering, bias, x.dtype).view(*x.shape[:-1], weight.out_features)


def quantise_input(
    x: Tensor,
    permutation: Tensor | None,
    groups: Groups,
    lowering: str,
    input_scale: Tensor | None = None,
    prologue: Prologue = NOTHING,
) -> tuple[Tensor, ...]:
    """x `[..., K]` as `multiply` wants it: each layer with these groups and this permutation can read it.

    lowering: as `lowering.choose` gave it.
    input_scale: float32 `[]`, the scale of all of x in fp8, for weights with one scale; what lies beyond it saturates.
        None for a scale for each row, measured now.
    prologue: what happens to x first.
    Raises ValueError, in one line, for an x or a prologue of other sizes, or an x that wants a gradient.
    """
    _check(x, groups, prologue)
    if lowering == "reference":
        return (reference.quantised_input(prologue(x), groups, permutation, input_scale).flatten(0, -2),)
    if groups.block is not None:
        return tuple(
            operator.quantise(x.flatten(0, -2), permutation, groups, prologue, lowering == "scaled_mm")
        )
    x = (x if prologue is NOTHING else prologue(x)).flatten(0, -2)
    if permutation is not None:
        x = x[:, permutation]
    if groups.formats == ("int8",):
        scale = _row_scales(x, INT8)
        return (x / scale).round().to(torch.int8), scale
    if input_scale is not None:
        return (x / input_scale).clamp(-E4M3.max, E4M3.max).to(torch.float8_e4m3fn), input_scale
    scale = _row_scales(x, E4M3)
    return (x / scale).to(torch.float8_e4m3fn), scale


def multiply(
    inputs: Sequence[Tensor],
    weight: LinearWeight,
    lowering: str,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The layer's output `[rows, N]` in `dtype`, for x as `quantise_input` gave it.

    bias: `[N]`. Scales of x and of the weight are both of rows, or both of whole tensors.
    """
    if lowering == "reference":
        return reference.product(inputs[0], weight, bias).to(dtype)
    if lowering == "native":
        return operator.multiply(list(inputs), Operand.of_weight(weight).present, bias, weight.groups, dtype)
    if lowering == "int_mm":
        rows, scale = inputs
        padded = F.pad(rows, (0, 0, 0, max(0, _FEWEST_ROWS - len(rows))))
        y = torch._int_mm(padded, weight.wide.T)[: len(rows)] * scale * weight.row_scales
        return (y if bias is None else y + bias).to(dtype)
    rows, scale = inputs
    wide, weight_scale = weight.wide, weight.row_scales
    if weight.groups.block is not None:
        scale = scale[:, None]
        wide, weight_scale = operator.reencode(Operand.of_weight(weight).present, weight.groups)
    return scaled_mm(rows, scale, wide, weight_scale, bias, dtype)


def _check(x: Tensor, groups: Groups, prologue: Prologue) -> None:
    if x.ndim < 2 or x.shape[-1] != groups.in_features:
        raise ValueError(f"x must be [..., {groups.in_features}], as wide as its groups, got {list(x.shape)}")
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "low-bit linear layers have no backward: call them under torch.no_grad(), or detach x"
        )
    if (prologue.scale is None) != (prologue.shift is None):
        raise ValueError("a prologue has both a scale and a shift, or neither")
    for table in (prologue.scale, prologue.shift):
        if table is not None and (table.shape[0] not in (1, x.shape[0]) or table.shape[1:] != x.shape[-1:]):
            batches = f"{x.shape[0]} or 1"
            raise ValueError(
                f"scale and shift must be [{batches}, {x.shape[-1]}] for x {list(x.shape)}, got {list(table.shape)}"
            )


def _row_scales(x: Tensor, element: Element) -> Tensor:
    """The scale of each row of x `[rows, K]`, float32 `[rows, 1]`; NaN for a row that isn't finite."""
    return fp32_scale(x.abs().amax(1, keepdim=True).float(), element).clamp(min=_SMALLEST_NORMAL)


def scaled_mm(
    rows: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """e4m3 rows `[M, K]` times e4m3 weight `[N, K]`: torch gives bf16, and adds a bias in it."""
    added = bias if dtype == torch.bfloat16 and bias is not None and bias.dtype == dtype else None
    y = torch._scaled_mm(
        rows,
        weight.T,
        scale_a=scale,
        scale_b=weight_scale if weight_scale.ndim == 0 else weight_scale[None, :],
        bias=added,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    y = y if bias is added else y + bias
    # A conversion that changes nothing would, in a Function compiled by torch 2.11, cut the gradient off.
    return y if y.dtype == dtype else y.to(dtype)
