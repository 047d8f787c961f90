"""The two rows that every evaluation has tell something of it; some scores are none."""

import math

import pytest

from dma_diffusers.eval.quality.configurations import AGAIN, ANOTHER_KERNEL
from dma_diffusers.eval.quality.judge import Scored, caveats
from dma_diffusers.eval.quality.summary import summarise


@pytest.mark.parametrize(
    ("again", "floor", "words"),
    [
        ([0.0, 0.0], [0.0, 1e-6], []),
        ([0.0, 1e-6], [1e-6, 1e-6], ["not deterministic"]),
        ([0.0, 0.0], [0.0, 0.0], ["the noise floor is not one"]),
    ],
)
def test_doubts(again, floor, words):
    judged = {
        AGAIN.name: Scored({"latents_relative_l2": again}, {}),
        ANOTHER_KERNEL.name: Scored({"latents_relative_l2": floor}, {}),
    }
    found = caveats(judged)
    assert len(found) == len(words) and all(word in note for word, note in zip(words, found, strict=True))


def test_nan_is_not_taken_for_infinity():
    assert summarise([math.inf, 1.0, 2.0, 3.0], 2)["estimate"] is None
    with pytest.raises(ValueError, match="a score is NaN"):
        summarise([math.nan, 1.0, 2.0, 3.0], 2)
