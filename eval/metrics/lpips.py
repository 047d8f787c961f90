"""LPIPS tells how different two pictures look, by the features of an AlexNet."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from dma_diffusers.eval.metrics.float32 import exact_float32

_WEIGHTS = Path(__file__).with_name("lpips_alex.safetensors")
_BATCH = 32
_SMALLEST = 31  # of a smaller picture nothing is left after the second pooling


def lpips(pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Return the learned perceptual distance of [B, 3, H, W] uint8 pictures, [B] float32 on their device.

    Identical pictures have 0. Zhang et al., 2018 (https://arxiv.org/abs/1801.03924), published it. This is version 0.1
    with the AlexNet backbone, as the `lpips` package has it, with most weights rounded to float16: ATTRIBUTION.md says
    what that changes. Raises ValueError where the shapes differ or a side is shorter than 31 pixels.
    """
    if pictures.shape != references.shape or min(pictures.shape[2:]) < _SMALLEST:
        raise ValueError(
            f"LPIPS compares pictures of one size, at least {_SMALLEST} pixels high and wide: given are "
            f"{list(pictures.shape)} and {list(references.shape)}"
        )
    network = _network(pictures.device)
    batches = zip(pictures.split(_BATCH), references.split(_BATCH), strict=True)
    with exact_float32(), torch.inference_mode():
        return torch.cat([network(*pair) for pair in batches])


class _Lpips(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # This is torchvision's AlexNet up to its last ReLU, without torchvision.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        self.heads = nn.ParameterList(torch.empty(1, width, 1, 1) for width in (64, 192, 384, 256, 256))

    def forward(self, pictures: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        # They are not one batch: only calls of one shape are sure to round alike, so that identical pictures give 0.
        layers = zip(self.heads, self._layers(pictures), self._layers(references), strict=True)
        return sum(((x - y).square() * head).sum(1).mean((1, 2)) for head, x, y in layers)

    def _layers(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """The output of each ReLU, each pixel's features at length 1."""
        shift = torch.tensor([-0.030, -0.088, -0.188], device=pictures.device).view(3, 1, 1)
        scale = torch.tensor([0.458, 0.448, 0.450], device=pictures.device).view(3, 1, 1)
        values = (pictures / 127.5 - 1 - shift) / scale
        layers = []
        for layer in self.features:
            values = layer(values)
            if isinstance(layer, nn.ReLU):
                layers.append(values / (values.norm(dim=1, keepdim=True) + 1e-10))
        return layers


@cache
def _network(device: torch.device) -> _Lpips:
    network = _Lpips()
    network.load_state_dict(load_file(_WEIGHTS))
    return network.to(device).eval()
