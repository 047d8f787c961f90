"""The quantisers of training: their errors on normal numbers, their bias, and the random numbers that they draw."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from dma_diffusers.kernels.formats import E2M1, E4M3, fake_quantize, hadamard, rotate_blocks
from dma_diffusers.kernels.training import random
from dma_diffusers.kernels.training.quantisers import quantise, quest, stochastic, three_quarters
from dma_diffusers.kernels.training.recipe import LINEARS, Quantiser, recipe_of

ROWS, COLUMNS, STEPS = 2048, 128, 8
SEED = torch.tensor([7])


def normal(seed: int = 0) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed), device="cpu")


def uniforms_for(quantiser: Quantiser, stream: int = 0) -> torch.Tensor | None:
    if not quantiser.is_random:
        return None
    columns = COLUMNS // 16 if quantiser is Quantiser.MS_EDEN else COLUMNS
    return random.uniforms(SEED, stream, (ROWS, columns))


def over_an_octave(measure) -> float:
    """The mean of what `measure` gives of normal numbers whose σ goes through an octave."""
    x = normal()
    return sum(measure(x * 2 ** (step / STEPS)) for step in range(STEPS)) / STEPS


def error(x: torch.Tensor, rounded: torch.Tensor) -> float:
    return ((rounded - x).square().mean() / x.square().mean()).item()


def error_of(quantiser: Quantiser) -> float:
    return over_an_octave(lambda x: error(x, quantise(x, quantiser, uniforms_for(quantiser)).value))


@pytest.mark.parametrize(
    ("quantiser", "expected"),
    [(Quantiser.STOCHASTIC, 2.77e-2), (Quantiser.NEAREST, 1.37e-2), (Quantiser.QUEST, 1.34e-2)],
)
def test_errors_on_normal_numbers_are_the_published_ones(quantiser, expected):
    """Mean squares relative to σ², averaged over one octave of σ (arXiv 2505.14669 v4)."""
    assert error_of(quantiser) == pytest.approx(expected, rel=0.04)


def test_quest_rounds_exponents_as_it_is_told():
    x = normal()
    assert error(x, quest(x).value) == pytest.approx(1.27e-2, rel=0.04)
    floored = over_an_octave(lambda x: error(x, quest(x, "floor").value))
    assert floored == pytest.approx(2.24e-2, rel=0.04)


def test_rounding_to_nearest_shrinks():
    def shrinkage(x):
        return 1 - ((three_quarters(x, None).value * x).sum() / x.square().sum()).item()

    assert over_an_octave(shrinkage) == pytest.approx(9.3e-3, rel=0.04)


def test_ms_eden_errs_half_as_much_as_stochastic_rounding_to_the_same_format():
    """NVFP4 by chance, its scales a sixteenth larger, so that E4M3 never makes them too small for a block."""

    def by_chance(x):
        outside = x.abs().amax() * (17 / 16) / (6 * 448)
        blocks = (x / outside).unflatten(1, (-1, 16))
        scale = E4M3.round(blocks.abs().amax(-1) * (17 / 16) / 6)[..., None]
        uniforms = random.uniforms(SEED, 1, tuple(blocks.shape))
        return (stochastic(blocks / scale, uniforms, E2M1) * scale * outside).flatten(1)

    assert 2 * error_of(Quantiser.MS_EDEN) < over_an_octave(lambda x: error(x, by_chance(x)))
    assert error_of(Quantiser.MS_EDEN) == pytest.approx(9.8e-3, rel=0.04)


@pytest.mark.parametrize("quantiser", [Quantiser.STOCHASTIC, Quantiser.MS_EDEN])
def test_what_rounds_by_chance_is_right_in_the_mean(quantiser):
    """One row is drawn many times, each time after another rotation."""
    draws, x = 4096, normal(3)[:1, :64] * 3
    signs = random.signs(SEED, 0, draws * 64).view(draws, 64)
    rotated = hadamard(x * signs, 32)
    columns = 4 if quantiser is Quantiser.MS_EDEN else 64
    drawn = random.uniforms(SEED, 2, (draws, columns))
    rounded = quantise(rotated, quantiser, drawn, torch.full((1, 1), 20.0)).value
    found = (hadamard(rounded, 32) * signs).double()
    deviation = found.std(0) / math.sqrt(draws)
    assert ((found.mean(0) - x).abs() < 4 * deviation).all()
    # The same numbers to nearest even are not.
    nearest = hadamard(three_quarters(rotated, None).numbers, 32) * signs
    assert ((nearest.double().mean(0) - 0.75 * x).abs() > 4 * nearest.double().std(0) / 64).any()


def test_stochastic_rounding_of_one_number_is_unbiased_everywhere():
    n = 1 << 14
    for element, values in ((E2M1, (0.1, 0.6, 1.3, 2.2, 3.9, 5.5)), (E4M3, (1e-3, 0.017, 3.3, 250.0, 440.0))):
        for stream, value in enumerate(values):
            x = torch.full((n,), -value)
            found = stochastic(x, random.uniforms(SEED, stream, (n,)), element)
            assert torch.equal(found, element.round(found)) and found.unique().numel() == 2
            assert abs(found.double().mean() + value) < 4 * found.double().std() / math.sqrt(n)
        on_grid = torch.tensor([element.max, 0.0, -element.max / 2])
        assert torch.equal(stochastic(on_grid, torch.full((3,), 1 - 2.0**-24), element), on_grid)


def test_quest_equals_its_formula_in_float64():
    x = normal(1)[:64] * torch.exp2(torch.randint(-20, 20, (64, 1)).float())
    blocks = x.double().numpy().reshape(64, -1, 32)
    scale = 2.0 ** np.round(np.log2(2.92247856 / 6 * blocks.std(-1, keepdims=True)))
    rounded = (blocks / scale).clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float64) * scale
    found = quest(x)
    assert np.array_equal(found.value.double().numpy(), rounded.reshape(64, -1))
    assert np.array_equal(found.mask.numpy(), (abs(blocks / scale) <= 6).reshape(64, -1))
    assert 1e-4 < 1 - found.mask.float().mean() < 0.02


def test_quest_keeps_blocks_without_deviation_and_spoils_those_with_nan():
    x = torch.zeros(4, 32)
    x[0] = 3.0
    x[2] = torch.randn(32)
    x[3] = x[2]
    x[3, 5] = torch.nan
    found = quest(x)
    assert found.mask[0].all() and (found.value[0] - 3.0).abs().max() <= 0.5
    assert (found.value[1] == 0).all() and found.value[2].isfinite().all() and found.value[3].isnan().all()


def test_other_quantisers_are_the_codecs_of_their_formats():
    x = normal(2)[:32] * torch.exp2(torch.randint(-9, 9, (32, 1)).float())
    assert torch.equal(quantise(x, Quantiser.MXINT8).value, fake_quantize(x, "mxint8"))
    amax = x.abs().amax(1, keepdim=True)
    expected = fake_quantize(x, "nvfp4", tensor_amax=amax, four_over_six=True)
    torch.testing.assert_close(quantise(x, Quantiser.FOUR_OVER_SIX).value, expected, rtol=1e-6, atol=0)
    assert quantise(x, Quantiser.NONE).value is x or torch.equal(quantise(x, Quantiser.NONE).value, x)


def test_words_are_those_of_philox():
    """The known answers of the authors' Random123 (kat_vectors, philox4x32 10), and the same words again and again."""
    assert random.words(torch.tensor([0]), 0, 4).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    first = random.words(SEED, 3, 1000)
    assert torch.equal(first, random.words(SEED, 3, 1000)) and torch.equal(
        first[:7], random.words(SEED, 3, 7)
    )
    assert not torch.equal(first, random.words(SEED, 4, 1000))
    uniforms = random.uniforms(SEED, 0, (100, 100))
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(uniforms.mean() - 0.5) < 4 * math.sqrt(1 / 12) / 100
    assert abs(random.signs(SEED, 0, 10_000).mean()) < 4 / 100


@pytest.mark.parametrize("drawn", range(20))
def test_seeds_depend_on_the_gradient_and_on_the_given_seed_alone(drawn):
    gradient = torch.randn(7, 96, generator=torch.Generator().manual_seed(drawn)).bfloat16()
    first = random.seed_of(gradient, 0)
    assert torch.equal(first, random.seed_of(gradient.clone(), 0)) and 0 <= first.item() < 2**32
    others = [random.seed_of(gradient, seed).item() for seed in range(1, 100)]
    others += [random.seed_of(gradient + step, 0).item() for step in range(1, 100)]
    assert len({first.item(), *others}) == 199
    assert random.seed_of(torch.zeros(1, 3), 0).shape == (1,)
    wide = torch.randn(256, 64)
    wide[:, 0] = 0
    assert random.seed_of(wide, 0) != random.seed_of(wide * 2, 0)


def test_rotations_of_the_forward_pass_are_those_of_the_formats():
    from dma_diffusers.kernels.training.reference import numbers

    recipe, x = recipe_of("qat"), normal()[:8]
    assert torch.equal(numbers(x, recipe), quest(rotate_blocks(x, 32)).value)
    assert [recipe_of(name).forward.format for name in LINEARS] == ["mxfp4", "mxfp4", "nvfp4", "mxint8"]
