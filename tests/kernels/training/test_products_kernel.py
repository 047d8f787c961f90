"""The kernels of training against the reference: the same operands, and the same gradients."""

import pytest
import torch

from dma_diffusers.kernels.formats import E2M1
from dma_diffusers.kernels.formats.scale import Scale, decode_scales
from dma_diffusers.kernels.linears.layout import plain_scales
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES, architecture
from dma_diffusers.kernels.training import reference
from dma_diffusers.kernels.training.linear import train_linear
from dma_diffusers.kernels.training.lowering import products_of
from dma_diffusers.kernels.training.recipe import RECIPES, Quantiser
from dma_diffusers.kernels.training.reference import Towards
from tests.kernels.linears.cases import relative_l2, torch_device

pytestmark = [pytest.mark.kernel, pytest.mark.usefixtures("poisoned")]
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


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("qat", "native"),
        ("quartet", "native"),
        ("quartet", "plain"),
        ("quartet, stochastic", "native"),
        ("quartet2", "native"),
        ("quartet2", "plain"),
        ("mxint8", "plain"),
    ],
)
def test_operands_equal_the_reference(name, lowering, kernel_device):
    """Bit for bit. A sum in another order could turn a rounding, once in millions of numbers."""
    recipe, seed = RECIPES[name], torch.tensor([12345])
    for side in SIDES if recipe.backward is not Quantiser.NONE else ["forward"]:
        for (rows, columns), dtype in (((63, 96), torch.bfloat16), ((1, 64), torch.float32)):
            # This one is like the forward pass.
            if rows == 1 and side == "gradient to input":
                continue
            x = matrix(rows, columns, dtype)
            expected = side_of(reference, side, x, recipe, seed)
            found = side_of(products_of(lowering), side, x.to(kernel_device), recipe, seed.to(kernel_device))
            assert torch.equal(numbers_of(found).cpu(), expected.numbers), f"{side}, {rows}×{columns}"
            if isinstance(expected.outside, torch.Tensor):
                assert torch.equal(found.outside.cpu(), expected.outside.flatten())


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        ("qat", "plain"),
        ("quartet", "native"),
        ("quartet, stochastic", "scaled_mm"),
        ("quartet2", "native"),
        ("quartet2", "plain"),
        ("mxint8", "plain"),
    ],
)
def test_layers_equal_the_reference(name, lowering, kernel_device):
    """Output and gradients; products in bf16 and float32 differ by their own rounding alone."""
    if lowering == "scaled_mm":
        # It skips where torch takes no scales of rows.
        torch_device()
    elif lowering == "native" and architecture(kernel_device) not in (*BLOCK_SCALED_ARCHITECTURES, "cpu"):
        pytest.skip(f"{architecture(kernel_device)} has no block-scaled MMA")
    recipe, dtype = RECIPES[name], torch.float32 if lowering == "native" else torch.bfloat16
    # Re-encoding goes row by row, for which the interpreter takes its time.
    rows, width = (5, 32) if lowering == "scaled_mm" else (37, 64)
    x, weight, bias = matrix(rows, width, dtype), matrix(32, width, dtype, 1), torch.randn(32, dtype=dtype)
    gradient = matrix(rows, 32, dtype, 2)

    def run(lowering, device):
        leaves = [t.to(device).requires_grad_() for t in (x, weight, bias)]
        y = train_linear(*leaves, recipe, lowering, seed=5)
        return [y, *torch.autograd.grad(y, leaves, gradient.to(device))]

    found, expected = run(lowering, kernel_device), run("reference", torch.device("cpu"))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype == dtype
        assert relative_l2(one.cpu(), other) < (2e-6 if dtype == torch.float32 else 6e-3)


def test_layers_compile_into_one_graph(kernel_device):
    recipe = RECIPES["quartet"]
    x, weight = (matrix(rows, 32, torch.bfloat16).to(kernel_device).requires_grad_() for rows in (5, 32))

    def run(layer):
        y = layer(x, weight, None, recipe, "plain", 5)
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))]

    compiled = torch.compile(train_linear, backend="aot_eager", fullgraph=True)
    for one, other in zip(run(compiled), run(train_linear), strict=True):
        assert torch.equal(one, other)
