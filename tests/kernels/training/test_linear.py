"""A linear layer's gradients: without quantisers, through straight-through estimators with masks, and in the mean."""

import math

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from dma_diffusers.kernels.formats import rotate_blocks
from dma_diffusers.kernels.lowerings import KERNEL_ARCHITECTURES
from dma_diffusers.kernels.training import quantisers, random
from dma_diffusers.kernels.training.linear import train_linear
from dma_diffusers.kernels.training.lowering import choose
from dma_diffusers.kernels.training.quantisers import Quantised, quantise, quest
from dma_diffusers.kernels.training.recipe import LINEARS, RECIPES, Quantiser, Recipe

SEED = 3


def layer(rows=63, in_features=64, out_features=96, dtype=torch.float32, seed=0):
    """x, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (rows, in_features), (out_features, in_features), (out_features,), (rows, out_features)
    x, weight, bias, gradient = (torch.randn(size, generator=generator).to(dtype) for size in sizes)
    return x.requires_grad_(), (weight * 0.1).requires_grad_(), bias.requires_grad_(), gradient * 1e-3


def gradients(y, leaves, gradient):
    return torch.autograd.grad(y, leaves, gradient)


@pytest.mark.parametrize(
    "recipe", [Recipe(Quantiser.NONE, Quantiser.NONE, rotates) for rotates in (False, True)]
)
def test_gradients_are_right_without_quantisers(recipe):
    x, weight, bias, _ = layer(5, 32, 32, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: train_linear(*leaves, recipe, "reference"), (x, weight, bias), fast_mode=True
    )
    assert torch.allclose(train_linear(x, weight, bias, recipe, "reference"), F.linear(x, weight, bias))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_gradients_are_right_where_quantisers_change_nothing(recipe, monkeypatch):
    """Rotations, signs, padding and factors cancel in both products."""
    monkeypatch.setattr(quantisers, "quantise", lambda x, quantiser, *_: Quantised(x / quantiser.outside))
    x, weight, bias, _ = layer(5, 32, 32, torch.float64)
    assert torch.autograd.gradcheck(
        lambda *leaves: train_linear(*leaves, recipe, "reference"), (x, weight, bias), fast_mode=True
    )


class StraightThrough(torch.autograd.Function):
    """Rounds as the forward pass does; its gradient is one, and zero where QuEST clips."""

    @staticmethod
    def forward(ctx, x, quantiser):
        found = quantise(x, quantiser)
        ctx.mask = 1.0 if found.mask is None else found.mask
        return found.value

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.mask, None


class Product(torch.autograd.Function):
    """x·weightᵀ, whose gradients come from rounded operands, each rotated by signs of its product."""

    @staticmethod
    def forward(ctx, x, weight, quantiser, seed):
        ctx.save_for_backward(x, weight)
        ctx.quantiser, ctx.seed = quantiser, seed
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        of_x = rounded_product(ctx, gradient, weight.T, 0)
        return of_x, rounded_product(ctx, gradient.T, x.T, 1), None, None


def rounded_product(ctx, a, b, number):
    """a·bᵀ, the operands rounded along their rows after a rotation by one dense matrix."""
    length = a.shape[1]
    quantiser, per_number = ctx.quantiser, 16 if ctx.quantiser is Quantiser.MS_EDEN else 1
    rotation = torch.eye(-(-length // 32) * 32)
    if quantiser.is_rotated:
        signs = random.signs(ctx.seed, number, len(rotation))
        hadamard = torch.tensor(scipy.linalg.hadamard(32), dtype=torch.float32) / math.sqrt(32)
        rotation = signs[:, None] * torch.block_diag(*[hadamard] * (len(rotation) // 32))
    rotation = rotation[:length]
    rounded = []
    for stream, x in ((2 + number, a), (4 + number, b)):
        rotated = (x.double() @ rotation.double()).float()
        uniforms = None
        if quantiser.is_random:
            uniforms = random.uniforms(ctx.seed, stream, (len(x), rotated.shape[1] // per_number))
        amax = x.abs().amax().view(1, 1) * math.sqrt(32)
        rounded.append(quantise(rotated, quantiser, uniforms, amax).value)
    return rounded[0] @ rounded[1].T


@pytest.mark.parametrize("rows", [1, 63, 111])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_gradients_are_those_of_straight_through_estimators(recipe, rows):
    x, weight, bias, gradient = layer(rows)
    seed = random.seed_of(gradient, SEED)
    turned = [rotate_blocks(t, 32) if recipe.rotates else t for t in (x, weight)]
    a, b = (StraightThrough.apply(t, recipe.forward) for t in turned)
    whole = recipe.backward is Quantiser.NONE
    expected = (a @ b.T if whole else Product.apply(a, b, recipe.backward, seed)) + bias
    found = train_linear(x, weight, bias, recipe, "reference", SEED)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leaves = x, weight, bias
    for one, other in zip(
        gradients(found, leaves, gradient), gradients(expected, leaves, gradient), strict=True
    ):
        # A number that lies on the edge between two may go to the other one after a rotation in float64.
        assert (one - other).norm() < 2e-3 * other.norm()
    if recipe.forward is Quantiser.QUEST and rows > 1:
        mask = quest(turned[0].detach()).mask
        assert 0 < (~mask).sum() < 0.02 * mask.numel()


@pytest.mark.parametrize("name", ["quartet, stochastic", "quartet2", "quartet"])
def test_rounding_by_chance_gives_the_right_gradients_in_the_mean(name):
    """Over seeds, those of the numbers that the forward pass multiplied; rounding to nearest gives others."""
    recipe, draws = RECIPES[name], 96
    x, weight, _, gradient = layer(32, 32, 32)
    leaves = x, weight
    whole = Recipe(recipe.forward, Quantiser.NONE, recipe.rotates)
    expected = gradients(train_linear(x, weight, None, whole, "reference"), leaves, gradient)
    drawn = [
        gradients(train_linear(x, weight, None, recipe, "reference", seed), leaves, gradient)
        for seed in range(draws)
    ]
    for right, several in zip(expected, zip(*drawn, strict=True), strict=True):
        several = torch.stack(several).double()
        distance = (several.mean(0) - right) / (several.std(0) / math.sqrt(draws)).clamp_min(1e-12)
        # Some of so many numbers lie beyond 3 σ; a bias moves their mean square, which is 1 without one.
        is_right = distance[right != 0].square().mean() < 1.25
        assert is_right == (name != "quartet")
        assert (several[0] - right).norm() > 0.1 * right.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_of_weights_and_inputs_are_kept(dtype):
    x, weight, bias, gradient = layer(9, dtype=dtype)
    for other in (weight, weight.float()):
        other = other.detach().requires_grad_()
        y = train_linear(x[None], other, bias, RECIPES["quartet2"], "reference")
        assert y.shape == (1, 9, 96) and y.dtype == dtype
        found = gradients(y, (x, other, bias), gradient[None])
        assert [g.dtype for g in found] == [dtype, other.dtype, dtype]
        assert (found[2].float() - gradient.float().sum(0)).norm() < 0.01 * gradient.float().sum(0).norm()


def test_frozen_weights_and_first_layers_get_no_gradient_and_change_no_other():
    recipe = RECIPES["quartet, stochastic"]
    x, weight, bias, gradient = layer()
    both = gradients(train_linear(x, weight, bias, recipe, "reference"), (x, weight), gradient)
    for number, leaf in enumerate((x, weight)):
        leaves = [t if t is leaf else t.detach() for t in (x, weight)]
        y = train_linear(*leaves, None, recipe, "reference")
        assert torch.equal(gradients(y, (leaf,), gradient)[0], both[number])


def test_sides_that_32_does_not_divide_are_refused():
    x, weight, bias, _ = layer(2, 48, 32)
    with pytest.raises(
        ValueError, match="sides that 32 divides, the numbers that share a scale: got 48 → 32"
    ):
        train_linear(x, weight, bias, RECIPES["qat"], "reference")
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 64\], as wide as the weight, got \[2, 48\]"):
        train_linear(x, layer()[1], bias, RECIPES["qat"], "reference")
    empty = train_linear(torch.empty(0, 64), layer()[1], None, RECIPES["quartet"], "reference")
    assert empty.shape == (0, 96)


def test_lowerings_say_what_they_can_run_and_why_not():
    names = {
        (architecture, name): choose(architecture, RECIPES[name]).lowering
        for architecture in (*KERNEL_ARCHITECTURES, "cpu")
        for name in LINEARS
    }
    pytest.importorskip("triton")
    for name, blackwell, hopper, ampere in (
        ("qat", "native", "scaled_mm", "plain"), ("quartet", "native", "scaled_mm", "plain"),
        ("quartet2", "native", "plain", "reference"), ("mxint8", "plain", "plain", "plain"),
    ):  # fmt: skip
        assert [names[a, name] for a in ("sm_100", "sm_90", "sm_80", "cpu")] == [
            blackwell,
            hopper,
            ampere,
            "reference",
        ]
        assert names["sm_120", name] == blackwell
    assert "has no block-scaled MMA" in choose("sm_90", RECIPES["quartet"]).reason
    with pytest.raises(
        ValueError, match="lowering native can't train in mxint8 on sm_100: it multiplies mxfp4, nvfp4"
    ):
        choose("sm_100", RECIPES["mxint8"], "native")
    with pytest.raises(ValueError, match="unknown lowering 'fast'"):
        choose("sm_100", RECIPES["mxint8"], "fast")
