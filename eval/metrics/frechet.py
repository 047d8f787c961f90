"""FID is the Fréchet distance of two sets of features, each taken as a Gaussian; here it has an interval."""

import math
from typing import NamedTuple

import torch

from dma_diffusers.eval.intervals import Interval
from dma_diffusers.eval.metrics.features import FeatureSet, require_pictures

_GROUPS = 20
_FEW = 2_000
# These are Student's t at 0.975, by degrees of freedom from 1.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
      2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093)  # fmt: skip


class _Gaussian(NamedTuple):
    mean: torch.Tensor  # it is [D] float64
    root: torch.Tensor  # it is [m, D] float64, and rootᵀ root is the covariance


def fid(pictures: FeatureSet, reference: FeatureSet) -> Interval:
    """Compute the Fréchet inception distance (https://arxiv.org/abs/1706.08500) with its 95 % interval.

    It is 0 for equal sets. The interval is a delete-group jackknife: the prompts are cut into 20 groups (one per prompt
    where there are fewer), FID is taken again without each group, and the spread of these G values, scaled by (G − 1)²
    / G, is the variance of the estimate; the interval is symmetric, with Student's t of G − 1 degrees. Where both sets
    have the same prompts, a group leaves both; any other reference is taken as it is. Beyond the sample's 10,000
    pictures the spread is the sample's, scaled to the number of all. With fewer than 3 prompts the bounds are NaN.

    FID of n pictures is biased upwards by a term that falls with 1/n, and the interval does not cover that bias: it
    tells how much FID *at this n* depends on the prompts. It errs on the wide side (Efron and Stein, 1981), most with
    fewer pictures than features: it was 1.6 times too wide in a simulation of 100 pictures with 256 features. A
    bootstrap would shift FID itself, since doubled pictures make a smaller set.

    Raises ValueError where a set has fewer than 2 pictures.
    """
    require_pictures("FID", pictures, reference)
    whole = _of(reference)
    estimate = _distance(_of(pictures), whole)
    count = min(len(pictures.prompts), _GROUPS)
    if count < 3:
        return Interval(estimate, math.nan, math.nan)
    paired = pictures.prompts == reference.prompts
    mine, theirs = pictures.groups(count), reference.groups(count)
    without = torch.tensor(
        [
            _distance(
                _fit(pictures.features[mine != group]),
                _fit(reference.features[theirs != group]) if paired else whole,
                quickly=True,
            )
            for group in range(count)
        ],
        dtype=torch.float64,
    )
    variance = (count - 1) ** 2 / count * without.var() * (len(pictures.keys) / pictures.count)
    half = _T[count - 2] * math.sqrt(variance)
    return Interval(estimate, max(estimate - half, 0.0), estimate + half)


def fid_notes(
    pictures: FeatureSet,
    reference: FeatureSet,
    name: str = "FID",
    of: str = "pictures",
    leads: str = ": KID leads",
) -> list[str]:
    """Return what a reader of their FID has to know: too few pictures, a singular covariance.

    name, of, leads: the distance's name, what it compares, and what is better than it for few, for FVD of clips.
    """
    fewest, features = min(pictures.count, reference.count), pictures.features.shape[1]
    notes = []
    if fewest < _FEW:
        notes.append(f"{name} over {fewest:,} {of}, fewer than {_FEW:,}, is biased upwards{leads}")
    if fewest <= features:
        notes.append(
            f"{name} over {fewest:,} {of}, not more than its {features:,} features: the covariance is singular, and "
            f"only {name}s of equally many {of} compare"
        )
    return notes


def _distance(x: _Gaussian, y: _Gaussian, quickly: bool = False) -> float:
    """Compute ‖μ − μ'‖² + tr(C + C' − 2 (C C')^½) of two Gaussians.

    tr (C C')^½ is the sum of the singular values of root root'ᵀ, as many as the smaller set has pictures.
    """
    if torch.equal(x.root, y.root) and torch.equal(x.mean, y.mean):
        return 0.0
    product = x.root @ y.root.T
    singular = _quick_singular_values(product) if quickly else torch.linalg.svdvals(product.cpu())
    traces = x.root.square().sum() + y.root.square().sum() - 2 * singular.sum().to(product.device)
    return max(((x.mean - y.mean).square().sum() + traces).item(), 0.0)


def _quick_singular_values(product: torch.Tensor) -> torch.Tensor:
    """Compute singular values by way of their squares, which GPUs find fast; those near 0 have half the digits."""
    if product.shape[0] > product.shape[1]:
        product = product.T
    return torch.linalg.eigvalsh(product @ product.T).clamp(min=0).sqrt()


def _of(pictures: FeatureSet) -> _Gaussian:
    if pictures.count == len(pictures.keys):
        return _fit(pictures.features)
    return _from_moments(pictures.mean, pictures.covariance)


def _fit(features: torch.Tensor) -> _Gaussian:
    features = features.double()
    mean = features.mean(0)
    root = (features - mean) / math.sqrt(len(features) - 1)
    if len(features) > features.shape[1]:
        root = torch.linalg.qr(root, mode="r").R
    return _Gaussian(mean, root)


def _from_moments(mean: torch.Tensor, covariance: torch.Tensor) -> _Gaussian:
    values, vectors = torch.linalg.eigh(covariance)
    return _Gaussian(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)
