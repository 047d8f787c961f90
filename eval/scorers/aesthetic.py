"""LAION's aesthetic score: a small network on CLIP's embedding of a picture, about 1 to 10.

`--scorer dma_diffusers.eval.scorers.aesthetic:score` needs two files, named by environment variables: AESTHETIC_CLIP, a
folder or hub id of CLIP ViT-L/14 with safetensors weights, and AESTHETIC_HEAD, the predictor for it, such as
sac+logos+ava1-l14-linearMSE.pth of https://github.com/christophschuhmann/improved-aesthetic-predictor (Apache-2.0).
"""

import os
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional

from dma_diffusers.eval.metrics.clip import ClipScorer


def score(frames: torch.Tensor, prompt: str) -> float:
    """Score a picture, or a clip by its middle frame: uint8 `[F, 3, H, W]`.

    Raises FileNotFoundError where a variable is not set, ValueError where the head is for another CLIP, and what the
    CLIP's loader raises.
    """
    clip, layers = _models(_named("AESTHETIC_CLIP"), Path(_named("AESTHETIC_HEAD")), frames.device)
    seen = clip.embed(frames[len(frames) // 2][None])
    for weight, bias in layers:  # there is nothing between them: it was trained with dropout alone
        if seen.shape[1] != weight.shape[1]:
            raise ValueError(
                f"AESTHETIC_HEAD reads {weight.shape[1]} numbers, AESTHETIC_CLIP gives {seen.shape[1]}"
            )
        seen = functional.linear(seen, weight, bias)
    return seen.item()


score.title = "Aesthetic score"  # type: ignore[attr-defined]


@cache
def _models(
    clip: str, head: Path, device: torch.device
) -> tuple[ClipScorer, list[tuple[torch.Tensor, torch.Tensor]]]:
    stored = torch.load(head, map_location=device, weights_only=True)
    places = sorted(int(name.split(".")[1]) for name in stored if name.endswith(".weight"))
    layers = [(stored[f"layers.{place}.weight"], stored[f"layers.{place}.bias"]) for place in places]
    return ClipScorer(clip, device), layers


def _named(variable: str) -> str:
    value = os.environ.get(variable)
    if not value:
        raise FileNotFoundError(f"set the environment variable {variable}: eval/README.md says what it names")
    return value
