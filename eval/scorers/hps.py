"""HPS v2.1 (https://arxiv.org/abs/2306.09341): how much people would prefer a picture for its prompt, about .2 to .35.

`--scorer dma_diffusers.eval.scorers.hps:score` needs the package hpsv2, which fetches its weights at the first picture
unless they are in its cache (HPS_ROOT).
"""

import torch
from PIL import Image


def score(frames: torch.Tensor, prompt: str) -> float:
    """Score a picture, or a clip by its middle frame: uint8 `[F, 3, H, W]`; ModuleNotFoundError without the package."""
    try:
        import hpsv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("HPS needs its package: pip install hpsv2", name=error.name) from None
    picture = Image.fromarray(frames[len(frames) // 2].permute(1, 2, 0).cpu().numpy())
    (found,) = hpsv2.score([picture], prompt, hps_version="v2.1")
    return float(found)


score.title = "HPS v2.1"  # type: ignore[attr-defined]
score.digits = 4  # type: ignore[attr-defined]
