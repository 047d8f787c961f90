"""KID is the squared maximum mean discrepancy of two sets of features, without bias; here it has an interval."""

import math

import numpy as np
import torch

from dma_diffusers.eval.intervals import Interval
from dma_diffusers.eval.metrics.features import FeatureSet, require_pictures

_GROUPS = 1_000
_RESAMPLES = 2_000
_ROWS = 1_024


def kid(pictures: FeatureSet, reference: FeatureSet, seed: int = 0) -> Interval:
    """Compute the kernel inception distance (https://arxiv.org/abs/1801.01401) with its 95 % interval over prompts.

    It is the U-statistic over all pairs of the samples (at most 10,000 pictures each) with the kernel (x·y / D + 1)³:
    the mean that the literature's random subsets of 1,000 scatter around. A pair of one key with itself never counts,
    in one set or across: sets drawn from the same prompts and seeds are samples of pairs, whose unbiased estimate
    leaves such pairs out (Gretton et al., 2012, equation 4), and a set against itself is exactly 0. Small distances may
    come out below 0, as an unbiased estimate of 0 has to.

    The interval is a percentile bootstrap over prompts (1,000 groups of them where there are more), with the same draws
    for both sets where their prompts are the same; any other reference is taken as it is. A prompt drawn twice is not
    paired with its double, whose high similarity would bias the distance upwards. With fewer than 3 prompts the bounds
    are NaN.

    Raises ValueError where a set has fewer than 2 pictures.
    """
    require_pictures("KID", pictures, reference)
    x, y = pictures.features.double(), reference.features.double()
    paired = pictures.prompts == reference.prompts
    groups = min(len(pictures.prompts), _GROUPS)
    x_members = _members(pictures, groups)
    y_members = _members(reference, groups if paired else 1)
    sums = [
        _pair_sums(x, x, x_members, x_members, _matches(pictures, pictures)),
        _pair_sums(y, y, y_members, y_members, _matches(reference, reference)),
        _pair_sums(x, y, x_members, y_members, _matches(pictures, reference)),
    ]

    def distance(draws: torch.Tensor) -> np.ndarray:
        theirs = draws if paired else draws.new_ones(len(draws), 1)
        within = _mean(*sums[0], draws, draws, True) + _mean(*sums[1], theirs, theirs, True)
        return (within - 2 * _mean(*sums[2], draws, theirs, paired)).cpu().numpy()

    estimate = distance(x.new_ones(1, groups)).item()
    if groups < 3:
        return Interval(estimate, math.nan, math.nan)
    draws = np.random.default_rng(seed).multinomial(groups, [1 / groups] * groups, size=_RESAMPLES)
    low, high = np.nanquantile(distance(torch.from_numpy(draws).to(x)), [0.025, 0.975])
    return Interval(estimate, float(low), float(high))


def _members(pictures: FeatureSet, groups: int) -> torch.Tensor:
    """Return [n, groups] float64 that is 1 where a picture of the sample is in a group of prompts."""
    return torch.nn.functional.one_hot(pictures.groups(groups), groups).double()


def _matches(pictures: FeatureSet, reference: FeatureSet) -> torch.Tensor:
    """Return where the reference's sample has the same key, or −1: [n] int64."""
    places = {key: place for place, key in enumerate(reference.keys)}
    return torch.tensor([places.get(key, -1) for key in pictures.keys], device=pictures.features.device)


def _pair_sums(x, y, x_members, y_members, matches) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the kernel over the pairs of any two groups without those that match: sums and numbers, [P, Q] each."""
    sums = 0.0
    for rows in torch.arange(len(x), device=x.device).split(_ROWS):
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        matching = matches[rows] >= 0
        kernel[matching, matches[rows][matching]] = 0
        sums = sums + x_members[rows].T @ kernel @ y_members
    matching = matches >= 0
    pairs = x_members.sum(0).outer(y_members.sum(0)) - x_members[matching].T @ y_members[matches[matching]]
    return sums, pairs


def _mean(sums, pairs, x_draws, y_draws, same: bool) -> torch.Tensor:
    """Return the kernel's mean [R] with groups drawn [R, P] and [R, Q] times; a group is not paired with its double."""

    def total(values: torch.Tensor) -> torch.Tensor:
        everything = ((x_draws @ values) * y_draws).sum(1)
        return everything - (x_draws.square() - x_draws) @ values.diagonal() if same else everything

    return total(sums) / total(pairs)
