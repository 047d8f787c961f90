"""ImageReward (https://arxiv.org/abs/2304.05977): how much people would like a picture for its prompt; 0 is the mean.

`--scorer dma_diffusers.eval.scorers.image_reward:score` needs the package image-reward. The environment variable
IMAGE_REWARD names its file of weights; without it the package fetches ImageReward-v1.0 at the first picture.
"""

import os
from functools import cache
from typing import Any

import torch
from PIL import Image


def score(frames: torch.Tensor, prompt: str) -> float:
    """Score a picture, or a clip by its middle frame: uint8 `[F, 3, H, W]`; ModuleNotFoundError without the package."""
    picture = Image.fromarray(frames[len(frames) // 2].permute(1, 2, 0).cpu().numpy())
    return float(_model(frames.device).score(prompt, picture))


score.title = "ImageReward"  # type: ignore[attr-defined]


@cache
def _model(device: torch.device) -> Any:
    try:
        import ImageReward
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "ImageReward needs its package: pip install image-reward", name=error.name
        ) from None
    return ImageReward.load(os.environ.get("IMAGE_REWARD", "ImageReward-v1.0"), device=device)
