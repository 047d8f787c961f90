"""FID against scipy.linalg.sqrtm in float64, and its interval against a simulation."""

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from dma_diffusers.eval.metrics import frechet
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.frechet import fid, fid_notes


def drawn(count, width=24, seed=0, shift=0.0, spread=1.0):
    """[count, width] features with correlations, at scales over three orders of magnitude."""
    noise = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) * np.logspace(0, -3, width)
    return noise.normal(size=(count, width)) @ mixing.T * spread + shift


def filled(features, seeds=1, sample=10_000, name="prompt"):
    found = FeatureSet(sample)
    found.update(
        torch.from_numpy(features), [(f"{name} {i // seeds}", i % seeds) for i in range(len(features))]
    )
    return found


def scipy_distance(x, y):
    means = np.sum((x.mean(0) - y.mean(0)) ** 2)
    x_covariance, y_covariance = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(x_covariance @ y_covariance)
    return means + np.trace(x_covariance + y_covariance - 2 * root.real)


@pytest.mark.parametrize("counts", [(200, 300), (300, 300), (20, 300), (16, 18)], ids=str)
def test_against_scipy(counts):
    x, y = drawn(counts[0]), drawn(counts[1], seed=1, shift=0.01, spread=1.05)
    assert fid(filled(x), filled(y)).estimate == pytest.approx(scipy_distance(x, y), rel=1e-6)


def test_many_features_against_scipy():
    x, y = np.random.default_rng(0).gamma(0.5, size=(2, 350, 300))
    for sample in (10_000, 40):  # from the features themselves, and from moments
        found = fid(filled(x, sample=sample), filled(y, sample=sample)).estimate
        assert found == pytest.approx(scipy_distance(x, y), rel=1e-6)


@pytest.mark.parametrize("count", [16, 400])
def test_sets_that_differ_little(count):
    """Against what scaling by s does, by hand: ‖(s − 1) μ‖² + (s − 1)² tr C. It is a millionth of the trace."""
    x = drawn(count, shift=0.01)
    expected = 1e-6 * (np.sum(x.mean(0) ** 2) + np.trace(np.cov(x, rowvar=False)))
    assert fid(filled(x), filled(1.001 * x)).estimate == pytest.approx(expected, rel=1e-6)


def test_more_pictures_than_the_sample_keeps():
    x, y = drawn(300), drawn(400, seed=1, shift=0.1)
    assert fid(filled(x, sample=50), filled(y, sample=50)).estimate == pytest.approx(
        scipy_distance(x, y), rel=1e-6
    )


@pytest.mark.parametrize("sample", [50, 10_000])
@pytest.mark.parametrize("count", [12, 90])
def test_a_set_against_itself_is_exactly_0(count, sample):
    x = drawn(count)
    assert fid(filled(x, sample=sample), filled(x.copy(), sample=sample)) == (0.0, 0.0, 0.0)


def clustered(seed, prompts, seeds, shift):
    noise = np.random.default_rng(seed)
    return shift + (
        noise.normal(size=(prompts, 1, 6)) + 0.5 * noise.normal(size=(prompts, seeds, 6))
    ).reshape(-1, 6)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_is_as_wide_as_repetitions_scatter(paired):
    """400 prompts with 2 pictures each, drawn 60 times: treating pictures as prompts would be a third too narrow."""
    reference = clustered(10**6, 400, 2, 0.0)
    intervals = []
    for seed in range(60):
        pictures = clustered(seed, 400, 2, 0.7)
        other = (
            pictures * 1.1 - 0.7 + np.random.default_rng(seed).normal(size=pictures.shape)
            if paired
            else reference
        )
        intervals.append(fid(filled(pictures, 2), filled(other, 2, name="prompt" if paired else "file")))
    scatter = np.std([each.estimate for each in intervals], ddof=1)
    errors = [(each.high - each.low) / 2 / scipy.stats.t.ppf(0.975, 19) for each in intervals]
    assert np.mean(errors) == pytest.approx(scatter, rel=0.25)


def test_students_t():
    np.testing.assert_allclose(frechet._T, scipy.stats.t.ppf(0.975, range(1, 20)), atol=6e-4)


def test_two_prompts_have_no_interval():
    found = fid(filled(drawn(8), seeds=4), filled(drawn(8, seed=1), seeds=4))
    assert found.estimate > 0
    assert np.isnan([found.low, found.high]).all()


@pytest.mark.parametrize("counts", [(1, 5), (5, 1), (0, 0)], ids=str)
def test_fewer_than_two_pictures_are_refused(counts):
    with pytest.raises(
        ValueError, match=f"at least 2 pictures in each set: there are {counts[0]} and {counts[1]}"
    ):
        fid(*(filled(drawn(count)) for count in counts))


def test_notes_say_what_few_pictures_do():
    many, few, fewest = (filled(drawn(count)) for count in (2_000, 1_999, 24))
    assert fid_notes(many, many) == []
    assert fid_notes(many, few) == ["FID over 1,999 pictures, fewer than 2,000, is biased upwards: KID leads"]
    assert "covariance is singular" in fid_notes(many, fewest)[1]
