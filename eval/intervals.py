"""This module computes 95 % intervals over prompts, by bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_DRAWN = 2**22  # so many values are drawn at a time, however many there are


class Interval(NamedTuple):
    """An interval is an estimate with the bounds of its 95 % interval."""

    estimate: float
    low: float
    high: float


def prompt_means(scores: Sequence[float], seeds: int) -> np.ndarray:
    """Compute the mean of each prompt's scores, of those that are finite; prompts that have none are left out.

    Args:
        scores: `[prompts · seeds]`, prompt by prompt.

    Where no score is finite, the only mean is infinite.
    """
    table = np.asarray(scores, np.float64).reshape(-1, seeds)
    differing = ~np.isinf(table)
    counts = differing.sum(axis=1)
    if not counts.any():
        return np.array([np.inf])
    return np.where(differing, table, 0).sum(axis=1)[counts > 0] / counts[counts > 0]


def bootstrap(
    columns: Sequence[Sequence[float]],
    statistic: Callable[..., np.ndarray] = lambda mean: mean,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """Compute the percentile interval of a function of paired columns' means.

    Args:
        columns: k columns of n values; entry i of each is prompt i, so that prompts are drawn together.
        statistic: takes the k means, each a number or [resamples], and works element by element.

    The same columns and seed give the same interval. Infinite values are allowed.
    """
    values = np.asarray(columns, np.float64)
    size, rng = values.shape[1], np.random.default_rng(seed)
    most = max(_DRAWN // size, 1)
    means = [
        values[:, rng.integers(size, size=(min(most, resamples - done), size))].mean(axis=2)
        for done in range(0, resamples, most)
    ]
    resampled = statistic(*np.concatenate(means, axis=1))
    # This method picks observed values and never subtracts, so ∞ stays ∞.
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    return Interval(float(statistic(*values.mean(axis=1))), float(low), float(high))
