"""The scores of pictures are summed up as means with 95 % intervals over prompts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dma_diffusers.eval.intervals import Interval, bootstrap, prompt_means


def summarise(scores: Sequence[float], seeds: int) -> dict[str, Any]:
    """Estimate the mean of `[prompts · seeds]` scores and its interval, prompts drawn whole; None where infinite.

    Where scores are infinite, `identical` says how many.
    """
    mean = bootstrap([np.asarray(scores).reshape(-1, seeds).mean(axis=1)])
    return as_json(mean, len(scores)) | _identical(scores)


def summarise_differing(scores: Sequence[float], seeds: int) -> dict[str, Any]:
    """Estimate the mean as `summarise` does, of the pictures that differ from their reference, whose scores are finite.

    One identical picture would make a mean of decibels infinite. `identical` says how many are left out; None stands
    for a mean only where all are identical.
    """
    return as_json(bootstrap([prompt_means(scores, seeds)]), len(scores)) | _identical(scores)


def summarise_scored(scores: Sequence[float], seeds: int) -> dict[str, Any]:
    """Estimate the mean as `summarise` does, of the pictures that have a score; others have ∞, and are not in `n`."""
    scored = int(np.isfinite(scores).sum())
    return as_json(bootstrap([prompt_means(scores, seeds)]), scored)


def _identical(scores: Sequence[float]) -> dict[str, int]:
    identical = int(np.isinf(scores).sum())
    return {"identical": identical} if identical else {}


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
