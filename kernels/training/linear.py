"""A linear layer whose products are of few bits, in the forward pass and in the backward one.

>>> y = train_linear(x, weight, bias, recipe_of("quartet"), "reference")
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_diffusers.kernels.training import random
from dma_diffusers.kernels.training.lowering import products_of
from dma_diffusers.kernels.training.quantisers import ROTATED
from dma_diffusers.kernels.training.recipe import Quantiser, Recipe
from dma_diffusers.kernels.training.reference import Towards


def train_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    lowering: str,
    seed: int = 0,
    quantised_weight: Any = None,
) -> Tensor:
    """The layer's output `[..., N]`, in x's dtype, or in autocast's; gradients are those of the recipe.

    x: `[..., K]`, weight: `[N, K]`, bias: `[N]`, all of any float dtype; K and N are multiples of 32. Tokens, over
        which the weight's gradient is a sum, are filled up with zeros to a multiple of 32.
    lowering: as `lowering.choose` gave it.
    seed: of signs and rounding in the backward pass, with what `random.seed_of` takes from the gradient: equal calls
        have equal gradients, whether activations were kept or are computed again.
    quantised_weight: what `quantise_weight` made of a weight that doesn't train; None makes it in each call.
    It keeps x and the weight for the backward pass, as a stock layer does, and computes the rest again.
    Raises ValueError, in one line, for sides that are no multiples of 32, or an x of another width.
    """
    check_sides(*weight.shape)
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x must be [..., {weight.shape[1]}], as wide as the weight, got {list(x.shape)}")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
        # The quantisers want blocks to round.
        if x.numel() == 0:
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        y = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, recipe, lowering, seed, quantised_weight)
    return y.view(*x.shape[:-1], weight.shape[0])


@torch.no_grad()
def quantise_weight(weight: Tensor, recipe: Recipe, lowering: str) -> Any:
    """The weight `[N, K]` as the forward pass multiplies it, for `train_linear` with the same recipe and lowering."""
    return products_of(lowering).forward_side(weight, recipe)


def check_sides(out_features: int, in_features: int) -> None:
    """Raises ValueError where a side of a weight is no multiple of 32.

    Both are inner dimensions, in which 32 numbers share a scale and are rotated together: N towards the input.
    """
    if in_features % ROTATED or out_features % ROTATED or not in_features or not out_features:
        raise ValueError(
            f"layers that train at low precision have sides that {ROTATED} divides, the numbers that share a scale: "
            f"got {in_features} → {out_features}"
        )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, recipe, lowering, seed, quantised_weight):
        ctx.save_for_backward(x, weight)
        ctx.recipe, ctx.lowering, ctx.seed = recipe, lowering, seed
        ctx.bias_dtype = None if bias is None else bias.dtype
        products = products_of(lowering)
        if quantised_weight is None:
            quantised_weight = products.forward_side(weight, recipe)
        return products.multiply(products.forward_side(x, recipe), quantised_weight, bias, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        recipe, products = ctx.recipe, products_of(ctx.lowering)
        factor = recipe.backward.outside**2
        of_x = of_weight = of_bias = None
        with torch.autocast(x.device.type, enabled=False):
            product = _product_with(gradient, products, recipe, ctx.seed, x.dtype)
            if wants_x:
                of_x = products.finish(product(weight, Towards.INPUT), x, recipe, factor)
            if wants_weight:
                of_weight = products.finish(product(x, Towards.WEIGHT), weight, recipe, factor)
            if wants_bias:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                of_bias = gradient.sum(0, dtype=dtype).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None, None, None, None


def _product_with(
    gradient: Tensor, products: Any, recipe: Recipe, seed: int, dtype: torch.dtype
) -> Callable[[Tensor, Towards], Tensor]:
    """A function that multiplies the gradient `[tokens, N]` by what the forward pass made of the other operand."""
    if recipe.backward is Quantiser.NONE:

        def with_whole_gradient(other: Tensor, towards: Towards) -> Tensor:
            numbers = products.numbers(other, recipe)
            side = gradient if towards is Towards.INPUT else gradient.T
            return side.to(numbers.dtype) @ numbers

        return with_whole_gradient
    drawn = random.seed_of(gradient, seed)

    def with_rounded_gradient(other: Tensor, towards: Towards) -> Tensor:
        sides = (
            products.backward_side(gradient, recipe, drawn, towards),
            products.requantised_side(other, recipe, drawn, towards),
        )
        return products.multiply(*sides, None, dtype)

    return with_rounded_gradient
