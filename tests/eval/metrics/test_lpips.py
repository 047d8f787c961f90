"""LPIPS against the package of its authors."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torchmetrics
from safetensors.torch import load_file
from torch import nn

from dma_diffusers.eval.metrics import lpips as module
from dma_diffusers.eval.metrics.lpips import lpips

WEIGHTS = load_file(Path(module.__file__).with_name("lpips_alex.safetensors"))


def convolution(layer: int, **options) -> nn.Conv2d:
    weight = WEIGHTS[f"features.{layer}.weight"]
    made = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2:], **options)
    made.load_state_dict({"weight": weight, "bias": WEIGHTS[f"features.{layer}.bias"]})
    return made


@pytest.fixture
def authors_lpips(monkeypatch):
    """The `lpips` package with our backbone's weights, its torchvision a stand-in with the one network it takes."""
    alexnet = nn.Sequential(
        convolution(0, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        convolution(3, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(kernel_size=3, stride=2),
        convolution(6, padding=1),
        nn.ReLU(inplace=True),
        convolution(8, padding=1),
        nn.ReLU(inplace=True),
        convolution(10, padding=1),
        nn.ReLU(inplace=True),
    )
    torchvision = ModuleType("torchvision")
    torchvision.models = SimpleNamespace(alexnet=lambda pretrained: SimpleNamespace(features=alexnet))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    package = pytest.importorskip("lpips")
    return package.LPIPS(pnet_rand=True, verbose=False)


@pytest.mark.parametrize("strength", [2, 30, 120])
def test_against_the_authors_package(authors_lpips, demo_pictures, noisy, strength):
    pictures, references = noisy(strength)[:6], demo_pictures[:6]
    with torch.inference_mode():
        expected = authors_lpips(pictures / 127.5 - 1, references / 127.5 - 1).flatten()
    torch.testing.assert_close(lpips(pictures, references), expected, rtol=0, atol=1e-5)


def test_values_that_the_authors_package_gave(demo_pictures):
    given = torch.tensor([0.574029, 0.618814, 0.791045])
    # It had all weights in float32.
    torch.testing.assert_close(lpips(demo_pictures[:3], demo_pictures[3:6]), given, rtol=2e-4, atol=0)


def test_heads_are_those_that_torchmetrics_carries():
    path = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/alex.pth"
    for name, weight in torch.load(path, map_location="cpu", weights_only=True).items():
        assert torch.equal(weight, WEIGHTS[f"heads.{name[3]}"])


def test_identical_pictures_are_at_0(demo_pictures):
    assert lpips(demo_pictures, demo_pictures.clone()).tolist() == [0.0] * 16


def test_batches_change_nothing(demo_pictures, noisy, monkeypatch):
    whole = lpips(noisy(20), demo_pictures)
    monkeypatch.setattr(module, "_BATCH", 5)
    torch.testing.assert_close(lpips(noisy(20), demo_pictures), whole, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 64, 32), (1, 3, 64, 30)], ids=str)
def test_other_sizes_and_tiny_pictures_are_refused(shape):
    pictures, references = torch.zeros(shape).byte(), torch.zeros(1, 3, 64, 30).byte()
    with pytest.raises(ValueError, match="one size, at least 31 pixels"):
        lpips(pictures, references)


def test_the_smallest_pictures_are_measured():
    pictures = torch.arange(3 * 31 * 31).view(1, 3, 31, 31).remainder(256).byte()
    assert lpips(pictures, 255 - pictures).item() > 0
