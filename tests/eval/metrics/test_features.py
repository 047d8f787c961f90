"""Sets of features against NumPy, in any order and batches."""

import numpy as np
import pytest
import torch

from dma_diffusers.eval.metrics.features import FeatureSet

KEYS = [(f"prompt {i // 3}", i % 3) for i in range(60)]


@pytest.fixture(scope="module")
def features():
    return torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) + 3


def filled(features, order=None, batch=7, sample=10_000):
    found = FeatureSet(sample)
    for places in (
        torch.arange(len(features)).split(batch) if order is None else torch.tensor(order).split(batch)
    ):
        found.update(features[places], [KEYS[at] for at in places])
    return found


def test_moments_against_numpy(features):
    found = filled(features, sample=9)
    assert found.count == 60
    np.testing.assert_allclose(found.mean, features.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features.double().numpy(), rowvar=False), rtol=1e-10)


@pytest.mark.parametrize("sample", [9, 10_000])
def test_order_and_batches_leave_the_sample_alone(features, sample):
    whole = filled(features, sample=sample)
    shuffled = filled(features, torch.randperm(60).tolist(), batch=4, sample=sample)
    assert (shuffled.count, shuffled.keys) == (whole.count, whole.keys)
    assert torch.equal(shuffled.features, whole.features)
    torch.testing.assert_close(shuffled.covariance, whole.covariance, rtol=1e-12, atol=0)


def test_features_stay_with_their_keys(features):
    found = filled(features)
    assert sorted(found.keys) == sorted(KEYS)
    assert torch.equal(found.features, features[[KEYS.index(key) for key in found.keys]])


def test_the_sample_keeps_prompts_whole(features):
    kept = filled(features, sample=9)
    assert len(kept.keys) == 9
    assert len(kept.prompts) == 3


def test_groups_are_of_whole_prompts_and_even(features):
    found = filled(features)
    groups = found.groups(8).tolist()
    assert len({(prompt, group) for (prompt, _), group in zip(found.keys, groups, strict=True)}) == 20
    assert {groups.count(group) for group in range(8)} == {6, 9}


def test_a_picture_given_twice_is_refused(features):
    found = filled(features)
    found.update(features[4:5], KEYS[4:5])
    with pytest.raises(ValueError, match="picture 1 of 'prompt 1' was given twice"):
        _ = found.features


def test_features_without_keys_are_refused(features):
    with pytest.raises(ValueError, match="60 features for 59 keys"):
        FeatureSet().update(features, KEYS[1:])
