"""Low-bit linear layers in torch: they define what is correct."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_diffusers.kernels.formats import E4M3, fake_quantize
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.prologue import NOTHING, Prologue
from dma_diffusers.kernels.linears.weight import LinearWeight


def linear(
    x: Tensor,
    weight: LinearWeight,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    prologue: Prologue = NOTHING,
) -> Tensor:
    """The layer's output `[..., N]`, in x's dtype, for x `[..., K]`.

    x goes through the prologue, is permuted and rounded group by group, and multiplied with the numbers of the weight:
    in float32 with one accumulator (in float64 if x is).
    input_scale: float32 `[]`, the scale of all of x in fp8; None for one scale for each row.
    """
    rounded = quantised_input(prologue(x), weight.groups, weight.permutation, input_scale)
    return product(rounded, weight, bias).to(x.dtype)


def quantised_input(
    x: Tensor, groups: Groups, permutation: Tensor | None, input_scale: Tensor | None = None
) -> Tensor:
    """x `[..., K]` permuted, and rounded to what its groups can store; float32, or float64 if x is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if permutation is not None:
        x = x[..., permutation.long()]
    if input_scale is not None and groups.formats == ("fp8",):
        return E4M3.round(x.float() / input_scale) * input_scale
    parts = []
    for format, channels in groups.slices:
        part = x[..., channels]
        amax = part.abs().nan_to_num(nan=0.0, posinf=0.0).amax(-1, keepdim=True)
        four_over_six = format.has_tensor_scale
        parts.append(fake_quantize(part, format, tensor_amax=amax, four_over_six=four_over_six))
    return torch.cat(parts, dim=-1)


def product(x: Tensor, weight: LinearWeight, bias: Tensor | None) -> Tensor:
    """x `[..., K]`, in the order of the groups, times the numbers of the weight, plus the bias; in x's dtype."""
    with torch.autocast(x.device.type, enabled=False):  # it would round them
        return F.linear(x, weight.permuted(x.dtype), None if bias is None else bias.to(x.dtype))
