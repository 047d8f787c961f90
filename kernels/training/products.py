"""The products of a training linear layer with the kernels, as reference.py defines them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dma_diffusers.kernels.formats import E2M1
from dma_diffusers.kernels.formats.scale import FOUR_OVER_SIX_MAX, fp32_tensor_scale
from dma_diffusers.kernels.linears import operator as linears
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.linear import scaled_mm
from dma_diffusers.kernels.training.launch import Step
from dma_diffusers.kernels.training.operator import run_finish, run_quantise
from dma_diffusers.kernels.training.quantisers import eden_outside
from dma_diffusers.kernels.training.recipe import Quantiser, Recipe
from dma_diffusers.kernels.training.reference import Towards, bound_of_rotated


class Side(NamedTuple):
    """One operand of a product, as its lowering stores it.

    tensors: bf16 numbers `[rows, inner]`; elements and block scales, for "native"; or e4m3 numbers and the power of two
    of each row, for "scaled_mm". outside: the factor that each row still needs, float32 `[rows]`, or all of it, `[1]`;
    None without one. format: the name of the format.
    """

    tensors: tuple[Tensor, ...]
    outside: Tensor | None
    format: str


@dataclass(frozen=True)
class KernelProducts:
    """The functions of reference.py, by the name of a lowering: "native", "scaled_mm", or "plain"."""

    lowering: str

    def forward_side(self, source: Tensor, recipe: Recipe) -> Side:
        """Input or weight as the forward pass multiplies it."""
        return self._side(source, recipe, Step.FORWARD, Towards.INPUT, None)

    def numbers(self, source: Tensor, recipe: Recipe) -> Tensor:
        """The same as a bf16 matrix, for products with a gradient that is not rounded."""
        return run_quantise(source, recipe, Step.FORWARD, Towards.INPUT, None, None, None, True)[0]

    def backward_side(self, gradient: Tensor, recipe: Recipe, seed: Tensor, towards: Towards) -> Side:
        """The gradient of the output for one product of the backward pass."""
        return self._side(gradient, recipe, Step.BACKWARD, towards, seed)

    def requantised_side(self, source: Tensor, recipe: Recipe, seed: Tensor, towards: Towards) -> Side:
        """The other operand."""
        return self._side(source, recipe, Step.REQUANTISED, towards, seed)

    def multiply(self, a: Side, b: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """a·bᵀ + bias in `dtype`; products come out in bf16, but for those of "native"."""
        if self.lowering == "plain":
            return _plain(a, b, bias, dtype)
        if self.lowering == "scaled_mm":
            return scaled_mm(a.tensors[0], a.tensors[1][:, None], *b.tensors, bias, dtype)
        groups = Groups.whole(a.format, 2 * a.tensors[0].shape[1])
        inputs, weight = (
            [*side.tensors, *(_of_rows(side) if groups.has_row_scales else [])] for side in (a, b)
        )
        return linears.multiply(inputs, weight, bias, groups, dtype)

    def finish(self, product: Tensor, source: Tensor, recipe: Recipe, factor: float) -> Tensor:
        """The gradient of a source, in its dtype."""
        if not recipe.rotates and recipe.forward is not Quantiser.QUEST and factor == 1:
            return product.to(source.dtype)
        return run_finish(product, source, recipe, factor)

    def _side(
        self, source: Tensor, recipe: Recipe, step: Step, towards: Towards, seed: Tensor | None
    ) -> Side:
        quantiser = recipe.forward if step is Step.FORWARD else recipe.backward
        is_plain = self.lowering == "plain"
        first_outside = outside = None
        if step is not Step.BACKWARD and recipe.forward is Quantiser.FOUR_OVER_SIX:
            first_outside = _outside_of_rows(source)
        if quantiser is Quantiser.MS_EDEN:
            outside = eden_outside(bound_of_rotated(_amax(source))).view(1)
        elif quantiser is Quantiser.FOUR_OVER_SIX:
            first_outside, outside = None, first_outside
        tensors = run_quantise(source, recipe, step, towards, seed, first_outside, outside, is_plain)
        if self.lowering == "scaled_mm" and not is_plain:
            groups = Groups.whole(quantiser.format, 2 * tensors[0].shape[1])
            tensors = linears.reencode(tensors, groups)
        return Side(tuple(tensors), outside, quantiser.format)


def _plain(a: Side, b: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product of bf16 numbers, then their factors outside."""
    (x,), (weight,) = a.tensors, b.tensors
    if a.outside is None and b.outside is None:
        added = bias if bias is not None and bias.dtype == x.dtype else None
        y = x @ weight.T if added is None else torch.addmm(added, x, weight.T)
        y = y if bias is added else y + bias
        # A conversion that changes nothing would, in a Function compiled by torch 2.11, cut the gradient off.
        return y if y.dtype == dtype else y.to(dtype)
    y = (x @ weight.T).float()
    if a.outside is not None and b.outside is not None:
        y = y * a.outside[:, None] * b.outside
    return (y if bias is None else y + bias).to(dtype)


def _of_rows(side: Side) -> list[Tensor]:
    """The factor outside of each row, as the kernel of linear layers reads it."""
    assert side.outside is not None
    return [side.outside.expand(len(side.tensors[0])).contiguous()]


def _outside_of_rows(source: Tensor) -> Tensor:
    """The float32 scale of each row under four-over-six scales, `[rows]`."""
    return fp32_tensor_scale(_amax(source, 1), E2M1, FOUR_OVER_SIX_MAX)


def _amax(source: Tensor, dimension: int | None = None) -> Tensor:
    """The largest magnitude, float32, read once."""
    return torch.linalg.vector_norm(source, torch.inf, dimension, dtype=torch.float32)
