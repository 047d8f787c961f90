"""KID against its formula in NumPy and torchmetrics', without bias, and 0 for a set against itself."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from dma_diffusers.eval.metrics import kernel_distance
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.kernel_distance import kid


def drawn(count, seed=0, shift=0.0, width=16):
    return np.random.default_rng(seed).normal(size=(count, width)) + shift


def filled(features, seeds=1, name="prompt"):
    found = FeatureSet()
    found.update(
        torch.from_numpy(features), [(f"{name} {i // seeds}", i % seeds) for i in range(len(features))]
    )
    return found


def kernel(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_of_others(values):
    return (values.sum() - np.trace(values)) / (len(values) * (len(values) - 1))


@pytest.mark.parametrize("rows", [1024, 7])
def test_a_reference_of_other_pictures_against_the_formula(monkeypatch, rows):
    monkeypatch.setattr(kernel_distance, "_ROWS", rows)
    x, y = drawn(30), drawn(45, seed=1, shift=0.3)
    expected = mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y)) - 2 * kernel(x, y).mean()
    assert kid(filled(x), filled(y, name="file")).estimate == pytest.approx(expected, rel=1e-10)


def test_a_reference_of_other_pictures_against_torchmetrics():
    x, y = drawn(40), drawn(40, seed=1, shift=0.3)
    expected = poly_mmd(torch.from_numpy(y), torch.from_numpy(x)).item()
    assert kid(filled(x), filled(y, name="file")).estimate == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("seeds", [1, 4])
def test_pairs_against_the_formula(seeds):
    x, y = drawn(32), drawn(32, seed=1, shift=0.3)
    expected = mean_of_others(kernel(x, x)) + mean_of_others(kernel(y, y)) - 2 * mean_of_others(kernel(x, y))
    assert kid(filled(x, seeds), filled(y, seeds)).estimate == pytest.approx(expected, rel=1e-10)


def test_a_set_against_itself_is_exactly_0():
    x = drawn(50)
    assert kid(filled(x, 2), filled(x.copy(), 2)) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("paired", [True, False])
def test_no_bias_between_sets_of_one_distribution(paired):
    """Pairs that differ a little, or not at all related: with a picture's own pair counted, pairs come out below 0."""
    found = []
    for seed in range(300):
        x, other = drawn(12, seed=2 * seed), drawn(12, seed=2 * seed + 1)
        y = 0.9 * x + np.sqrt(1 - 0.81) * other if paired else other
        found.append(kid(filled(x), filled(y, name="prompt" if paired else "file")).estimate)
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(len(found))


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_is_as_wide_as_repetitions_scatter(paired):
    """50 prompts of 2 pictures, drawn 60 times: the bounds lie as far out, and in the middle, as they should."""
    reference = drawn(100, seed=10**6)
    intervals = []
    for seed in range(60):
        noise = np.random.default_rng(seed)
        x = (noise.normal(size=(50, 1, 16)) + 0.5 * noise.normal(size=(50, 2, 16)) + 0.5).reshape(100, 16)
        y = x - 0.5 + noise.normal(size=x.shape) if paired else reference
        intervals.append(kid(filled(x, 2), filled(y, 2, name="prompt" if paired else "file"), seed=seed))
    estimates, lows, highs = np.transpose(intervals)
    scatter = np.std(estimates, ddof=1)
    assert np.mean(highs - lows) / 3.92 == pytest.approx(scatter, rel=0.25)
    assert np.mean((highs + lows) / 2 - estimates) == pytest.approx(0, abs=0.3 * scatter)


def test_more_prompts_than_groups(monkeypatch):
    x, y = filled(drawn(60)), filled(drawn(60, seed=1, shift=0.2))
    whole = kid(x, y)
    monkeypatch.setattr(kernel_distance, "_GROUPS", 20)
    grouped = kid(x, y)
    assert grouped.estimate == pytest.approx(whole.estimate, rel=1e-10)
    assert grouped.high - grouped.low == pytest.approx(whole.high - whole.low, rel=0.5)


def test_one_seed_one_interval():
    sets = filled(drawn(30)), filled(drawn(30, seed=1))
    assert kid(*sets) == kid(*sets)
    assert kid(*sets) != kid(*sets, seed=1)


def test_two_prompts_have_no_interval():
    found = kid(filled(drawn(8), 4), filled(drawn(8, seed=1), 4))
    assert np.isnan([found.low, found.high]).all()


def test_fewer_than_two_pictures_are_refused():
    with pytest.raises(ValueError, match="KID needs at least 2 pictures in each set: there are 1 and 4"):
        kid(filled(drawn(1)), filled(drawn(4)))
