"""The kernels of training against the reference: the same operands, and the same gradients."""


import pytest
import torch

from dma_diffusers.kernels.formats import E2M1, E4M3
from dma_diffusers.kernels.formats.scale import Scale, decode_scales
from dma_diffusers.kernels.linears.layout import plain_scales
from dma_diffusers.kernels.training import reference
from dma_diffusers.kernels.training.linear import train_linear
from dma_diffusers.kernels.training.lowering import products_of
from dma_diffusers.kernels.training.recipe import Quantiser, Recipe, recipe_of
from dma_diffusers.kernels.training.reference import Towards

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
RECIPES = {
    "qat": recipe_of("qat"),
    "quartet": recipe_of("quartet"),
    "quartet, stochastic": recipe_of("quartet", "stochastic"),
    "quartet2": recipe_of("quartet2"),
    "mxint8": recipe_of("mxint8"),
}
SIDES = ["forward", "gradient to input", "gradient to weight", "requantised"]


def matrix(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Rows of very different size, one of zeros, one channel of outliers, one block with a single number."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp2(torch.randint(-6, 6, (rows, 1), generator=generator).float())
    x[:, 5] *= 60
    x[rows // 2] = 0
    x[0, :32] = 0
    x[0, 0] = 3.0
    return x.to(dtype)


def side_of(products, name, x, recipe, seed):
    match name:
        case "forward":
            return products.forward_side(x, recipe)
        case "gradient to input":
            return products.backward_side(x, recipe, seed, Towards.INPUT)
        case "gradient to weight":
            return products.backward_side(x, recipe, seed, Towards.WEIGHT)
        case _:
            return products.requantised_side(x, recipe, seed, Towards.WEIGHT)


def numbers_of(side) -> torch.Tensor:
    """The numbers that a kernel's side stores, float32 `[rows, inner]`."""
    if len(side.tensors) == 1:
        return side.tensors[0].float()
    elements, scales = side.tensors
    if elements.dtype == torch.float8_e4m3fn:
        return elements.float() * scales[:, None]
    codes = torch.stack((elements & 15, elements >> 4), -1).flatten(1)
    block = 16 if side.format == "nvfp4" else 32
    plain = plain_scales(scales.view(torch.uint8), len(codes), codes.shape[1] // block)
    kind = Scale.E4M3 if block == 16 else Scale.E8M0
    return (E2M1.decode(codes).unflatten(1, (-1, block)) * decode_scales(plain, kind)[..., None]).flatten(1)


@pytest.mark.parametrize("lowering", ["native", "plain"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_operands_equal_the_reference(recipe, lowering, kernel_device):
    if lowering == "native" and recipe.forward.format == "mxint8":
        pytest.skip("no MMA multiplies MXINT8")
    seed = torch.tensor([12345])
    for name in SIDES:
        if recipe.backward is Quantiser.NONE and name != "forward":
            continue
        for (rows, columns), dtype in (((111, 96), torch.bfloat16), ((1, 64), torch.float32)):
            x = matrix(rows, columns, dtype)
            expected = side_of(reference, name, x, recipe, seed)
            found = side_of(products_of(lowering), name, x.to(kernel_device), recipe, seed.to(kernel_device))
            stored = numbers_of(found).cpu()
            assert stored.shape == expected.numbers.shape
            # A sum in another order may turn a rounding, once in a million numbers.
            assert torch.equal(stored, expected.numbers), f"{name}, {rows}×{columns}"
            if isinstance(expected.outside, torch.Tensor):
                torch.testing.assert_close(found.outside.cpu(), expected.outside.flatten(), rtol=0, atol=0)
