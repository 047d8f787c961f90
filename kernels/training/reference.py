"""The products of a training linear layer in torch: they define what is correct.

Everything is float32, or float64 where the operands are.
"""

import math
from enum import IntEnum
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dma_diffusers.kernels.formats import hadamard, sign_is_changed
from dma_diffusers.kernels.training import quantisers, random
from dma_diffusers.kernels.training.quantisers import ROTATED, Quantised
from dma_diffusers.kernels.training.recipe import Quantiser, Recipe


class Towards(IntEnum):
    """The gradient that a product of the backward pass gives; its number is that of the stream of its signs."""

    INPUT = 0
    WEIGHT = 1


class Side(NamedTuple):
    """One operand of a product: numbers `[rows, inner]`, and a factor that they still need, `[rows, 1]`, `[1, 1]` or 1.

    The factor that undoes ¾ is none of this: `finish` has it.
    """

    numbers: Tensor
    outside: Tensor | float = 1.0


def forward_side(source: Tensor, recipe: Recipe) -> Side:
    """Input `[tokens, K]` or weight `[N, K]` as the forward pass multiplies it."""
    return _side(_forward(source, recipe))


def numbers(source: Tensor, recipe: Recipe) -> Tensor:
    """The same as a matrix `[rows, K]`, for products with a gradient that is not rounded."""
    return _forward(source, recipe).value


def backward_side(gradient: Tensor, recipe: Recipe, seed: Tensor, towards: Towards) -> Side:
    """The gradient of the output, `[tokens, N]`, for one product of the backward pass.

    It is rounded along N towards the input, along tokens towards the weight: transposed, and padded with zeros.
    """
    x = wide(gradient)
    along = x if towards is Towards.INPUT else padded(x.T)
    return _backward(along, x.abs().amax(), recipe, seed, towards, 2 + towards)


def requantised_side(source: Tensor, recipe: Recipe, seed: Tensor, towards: Towards) -> Side:
    """The other operand: the weight `[N, K]` towards the input, the input `[tokens, K]` towards the weight.

    What the forward pass made of it is transposed, padded with zeros, and rounded again.
    """
    along = padded(_forward(source, recipe).value.T)
    return _backward(along, wide(source).abs().amax(), recipe, seed, towards, 4 + towards)


def multiply(a: Side, b: Side, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a·bᵀ + bias, `[rows of a, rows of b]` in `dtype`."""
    outside = b.outside.T if isinstance(b.outside, Tensor) else b.outside
    y = a.numbers @ b.numbers.T * a.outside * outside
    return (y if bias is None else y + bias).to(dtype)


def finish(product: Tensor, source: Tensor, recipe: Recipe, factor: float) -> Tensor:
    """The gradient of a source `[rows, K]`, in its dtype, for that of the numbers that the forward pass made of it.

    It is multiplied by `factor`, loses what was clipped, and is rotated back.
    """
    x = wide(product) * factor
    if (mask := _forward(source, recipe).mask) is not None:
        x = x * mask
    return (hadamard(x, ROTATED) * _fixed_signs(x) if recipe.rotates else x).to(source.dtype)


def wide(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def padded(x: Tensor) -> Tensor:
    """Rows filled up with zeros to a multiple of 32."""
    return F.pad(x, (0, -x.shape[1] % ROTATED))


def bound_of_rotated(amax: Tensor) -> Tensor:
    """The largest number that a rotation can make of numbers up to `amax`, float32 `[1, 1]`."""
    return (amax.float() * math.sqrt(ROTATED)).view(1, 1)


def _forward(source: Tensor, recipe: Recipe) -> Quantised:
    x = wide(source)
    if recipe.rotates:
        x = hadamard(x * _fixed_signs(x), ROTATED)
    return quantisers.quantise(x, recipe.forward)


def _backward(
    along: Tensor, amax: Tensor, recipe: Recipe, seed: Tensor, towards: Towards, stream: int
) -> Side:
    quantiser = recipe.backward
    if quantiser.is_rotated:
        signs = random.signs(seed, towards, along.shape[1]).to(along.dtype)
        along = hadamard(along * signs, ROTATED)
    uniforms = None
    if quantiser.is_random:
        per_number = 16 if quantiser is Quantiser.MS_EDEN else 1
        uniforms = random.uniforms(seed, stream, (along.shape[0], along.shape[1] // per_number))
    return _side(quantisers.quantise(along, quantiser, uniforms, bound_of_rotated(amax)))


def _side(found: Quantised) -> Side:
    return Side(found.numbers, found.outside if isinstance(found.outside, Tensor) else 1.0)


def _fixed_signs(x: Tensor) -> Tensor:
    return _signs_of_channels(x.shape[1]).to(x.device, x.dtype)


@cache
def _signs_of_channels(channels: int) -> Tensor:
    """The signs of formats/rotation.py, on the CPU."""
    signs = [-1.0 if sign_is_changed(channel) else 1.0 for channel in range(channels)]
    return torch.tensor(signs, device="cpu")
