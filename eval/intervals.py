"""95 % intervals over prompts, by bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval."""

    estimate: float
    low: float
    high: float


def bootstrap(
    columns: Sequence[Sequence[float]],
    statistic: Callable[..., np.ndarray] = lambda mean: mean,
    seed: int = 0,
    resamples: int = 10_000,
) -> Interval:
    """The percentile interval of a function of paired columns' means.

    Args:
        columns: k columns of n values; entry i of each is prompt i, so that prompts are drawn together.
        statistic: takes the k means, each a number or [resamples], and works element by element.

    The same columns and seed give the same interval. Infinite values are allowed.
    """
    values = np.asarray(columns, np.float64)
    picks = np.random.default_rng(seed).integers(values.shape[1], size=(resamples, values.shape[1]))
    resampled = statistic(*values[:, picks].mean(axis=2))
    # inverted_cdf picks observed values and never subtracts, so ∞ stays ∞.
    low, high = np.quantile(resampled, [0.025, 0.975], method="inverted_cdf")
    return Interval(float(statistic(*values.mean(axis=1))), float(low), float(high))
