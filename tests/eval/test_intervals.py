"""Bootstrap intervals."""

import math
import tracemalloc

import numpy as np
import pytest

from dma_diffusers.eval.intervals import bootstrap


def test_a_constant_has_no_width():
    assert bootstrap([[2.0] * 8]) == (2.0, 2.0, 2.0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says():
    noise = np.random.default_rng(0)
    intervals = [bootstrap([noise.normal(5, 2, 64)], resamples=1000) for _ in range(400)]
    coverage = np.mean([low <= 5 <= high for _, low, high in intervals])
    assert 0.91 <= coverage <= 0.98


def test_the_width_is_that_of_the_normal_approximation():
    values = np.random.default_rng(1).normal(0, 1, 400)
    estimate, low, high = bootstrap([values])
    assert estimate == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.05)


def test_columns_are_resampled_together():
    first = np.random.default_rng(2).normal(0, 100, 64)
    estimate, low, high = bootstrap([first + 1, first], lambda a, b: a - b)
    assert (estimate, low, high) == pytest.approx((1, 1, 1))


def test_a_seed_gives_the_same_interval():
    values = np.random.default_rng(3).normal(size=32)
    assert bootstrap([values], seed=1) == bootstrap([values], seed=1)
    assert bootstrap([values], seed=1) != bootstrap([values], seed=2)


def test_infinite_values_stay_infinite():
    assert bootstrap([[math.inf] * 4]) == (math.inf, math.inf, math.inf)


def test_resamples_are_drawn_a_few_at_a_time_and_are_the_same_ones():
    values = np.random.default_rng(4).exponential(size=3000)
    tracemalloc.start()
    found = bootstrap([values], resamples=5000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6  # all at once take 240 MB
    means = values[np.random.default_rng(0).integers(3000, size=(5000, 3000))].mean(axis=1)
    expected = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    assert found == (values.mean(), *expected)
