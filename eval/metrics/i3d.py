"""FVD sees a clip by the I3D of Carreira and Zisserman, 2017 (https://arxiv.org/abs/1705.07750)."""

from functools import cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from dma_diffusers.eval.metrics.float32 import exact_float32
from dma_diffusers.eval.metrics.i3d_weights import load
from dma_diffusers.eval.metrics.inception import resize

FEWEST_FRAMES = 9  # time is halved three times, rounded up, and two must be left to average
_SIDE = 224
_BATCH = 4

# The channels of each block: 1×1×1; 1×1×1 and 3×3×3; 1×1×1 and 3×3×3; and those after the pooling.
_BLOCKS = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


@torch.inference_mode()
def i3d_features(clips: torch.Tensor, weights: Path | None = None) -> torch.Tensor:
    """Return what FVD compares of uint8 `[B, F, 3, H, W]` clips: I3D's mean logits, `[B, 400]` float32 on their device.

    Frames are resized to 224 × 224 as TensorFlow 1 does it, and scaled to −1 … 1, as in the code of Unterthiner et al.,
    2018 (https://arxiv.org/abs/1812.01717), which takes the logits' mean over time, too.

    weights: as `i3d_weights.load` takes them; it raises what that raises. Raises ValueError for clips that are too
    short.
    """
    if clips.shape[1] < FEWEST_FRAMES:
        raise ValueError(f"I3D needs clips of at least {FEWEST_FRAMES} frames: given are {clips.shape[1]}")
    network = network_with(weights, clips.device)
    with exact_float32():
        return torch.cat([network(_prepared(batch)) for batch in clips.split(_BATCH)])


def _prepared(clips: torch.Tensor) -> torch.Tensor:
    """Return clips as I3D reads them, float32 `[B, 3, F, 224, 224]`."""
    frames = resize(clips.flatten(0, 1), _SIDE).unflatten(0, clips.shape[:2])
    return (2 * frames / 255 - 1).transpose(1, 2)


def same(size: torch.Size, kernel: tuple[int, ...], stride: tuple[int, ...]) -> list[int]:
    """Return the padding that TensorFlow calls SAME, as `functional.pad` takes it: more of it at the end."""
    padding: list[int] = []
    for length, window, step in zip(size, kernel, stride, strict=True):
        total = max((-(-length // step) - 1) * step + window - length, 0)
        padding = [total // 2, total - total // 2, *padding]
    return padding


class Unit(nn.Module):
    """A convolution with TensorFlow's padding, batch normalisation without a scale of its own, and a ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(channels, out, kernel, stride=stride, bias=False)
        self.bn = nn.BatchNorm3d(out, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, F, H, W]` to the unit's channels."""
        padding = same(x.shape[2:], self.conv3d.kernel_size, self.conv3d.stride)
        return functional.relu(self.bn(self.conv3d(functional.pad(x, padding))))


class Block(nn.Module):
    """An Inception block has four branches, whose channels are joined."""

    def __init__(self, channels: int, out: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit(channels, out[0])
        self.b1a, self.b1b = Unit(channels, out[1]), Unit(out[1], out[2], 3)
        self.b2a, self.b2b = Unit(channels, out[3]), Unit(out[3], out[4], 3)
        self.b3b = Unit(channels, out[5])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `[B, C, F, H, W]` to the joined channels."""
        pooled = pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], 1)


def pool(x: torch.Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
    """Take the maximum over windows with TensorFlow's padding, which no maximum takes."""
    padded = functional.pad(x, same(x.shape[2:], kernel, stride), value=-torch.inf)
    return functional.max_pool3d(padded, kernel, stride)


class I3D(nn.Module):
    """I3D for the 400 classes of Kinetics; its parameters have the names that ports to PyTorch agree on."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        for name, (channels, out) in _BLOCKS.items():
            self.add_module(name, Block(channels, out))
        self.logits = nn.Module()
        self.logits.conv3d = nn.Conv3d(1024, 400, 1)

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """Map `[B, 3, F, 224, 224]`, −1 … 1, to the logits' mean over time, `[B, 400]`."""
        small = partial(pool, kernel=(1, 3, 3), stride=(1, 2, 2))
        x = small(self.Conv3d_1a_7x7(clips))
        x = small(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)))
        for name in _BLOCKS:
            if name == "Mixed_4b":
                x = pool(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        return self.logits.conv3d(functional.avg_pool3d(x, (2, 7, 7), 1)).mean((2, 3, 4))


@cache
def network_with(weights: Path | None, device: torch.device) -> I3D:
    """Return I3D with these weights; raises what `i3d_weights.load` raises."""
    network = I3D()
    network.load_state_dict(load(weights, network.state_dict()))
    return network.to(device).eval()
