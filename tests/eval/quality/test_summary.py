"""Pictures that are identical to their reference have no finite PSNR, and do not hide what the others have."""

import math

import numpy as np
import pytest

from dma_diffusers.eval.intervals import prompt_means
from dma_diffusers.eval.quality.summary import summarise, summarise_differing

SOME = [20.0, 22.0, math.inf, 30.0, math.inf, math.inf]  # three prompts, two seeds


def test_the_mean_is_of_the_pictures_that_differ():
    found = summarise_differing(SOME, 2)
    assert found["estimate"] == (21 + 30) / 2 and (found["low"], found["high"]) == (21, 30)
    assert (found["n"], found["identical"]) == (6, 3)


def test_one_identical_picture_is_counted():
    assert summarise_differing([20.0, 20.0, 20.0, math.inf], 1) == {
        "estimate": 20, "low": 20, "high": 20, "n": 4, "identical": 1
    }  # fmt: skip
    assert summarise([20.0, 20.0, 20.0, math.inf], 1) == {
        "estimate": None, "low": 20, "high": None, "n": 4, "identical": 1
    }  # fmt: skip


def test_only_where_all_are_identical_it_is_infinite():
    assert summarise_differing([math.inf] * 4, 2) == {
        "estimate": None, "low": None, "high": None, "n": 4, "identical": 4
    }  # fmt: skip


def test_without_identical_pictures_both_are_the_same():
    scores = np.random.default_rng(0).normal(30, 5, 12).tolist()
    assert summarise_differing(scores, 3) == summarise(scores, 3)
    assert "identical" not in summarise(scores, 3)


def test_nan_is_not_taken_for_an_identical_picture():
    with pytest.raises(ValueError, match="a score is NaN"):
        summarise_differing([math.nan, 1.0, math.inf, 3.0], 2)


def test_prompts_count_once_however_many_of_their_pictures_differ():
    assert prompt_means(SOME, 2).tolist() == [21, 30]
    assert prompt_means([math.inf] * 4, 2).tolist() == [math.inf]
    assert prompt_means([1.0, 2.0, 3.0, 4.0], 2).tolist() == [1.5, 3.5]
