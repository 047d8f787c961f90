"""The scores of pictures are summed up as means with 95 % intervals over prompts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dma_diffusers.eval.intervals import Interval, bootstrap


def summarise(scores: Sequence[float], seeds: int) -> dict[str, Any]:
    """Estimate the mean of `[prompts · seeds]` scores and its interval, prompts drawn whole; None where infinite."""
    return as_json(bootstrap([np.asarray(scores).reshape(-1, seeds).mean(axis=1)]), len(scores))


def as_json(interval: Interval, n: int) -> dict[str, Any]:
    """Return an interval as JSON can hold it: None where a bound is infinite."""
    return {name: finite(bound) for name, bound in interval._asdict().items()} | {"n": n}


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None where infinite.

    Raises ValueError for NaN, which would read as infinite.
    """
    if math.isnan(value):
        raise ValueError("a score is NaN: a picture's latents are all 0, or a model that scores gives NaN")
    return value if math.isfinite(value) else None
