"""Scores of a row's drawings beside full precision's, one for each held-out prompt."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from dma_diffusers.eval.metrics.alignment import AlignmentScorer
from dma_diffusers.eval.metrics.lpips import lpips
from dma_diffusers.eval.metrics.paired import psnr_db
from dma_diffusers.eval.metrics.video import each_frame
from dma_diffusers.eval.quality.scoring import aggregate
from dma_diffusers.pipelines.placement import own_device

_BATCH = 16
_PAIRED = {"psnr_db": psnr_db, "lpips": lpips}


def scores(frames: np.ndarray, exact: np.ndarray, prompts: Sequence[str]) -> dict[str, list[float]]:
    """Return scores of uint8 `[prompts, F, H, W, 3]` by metric.

    PSNR of a clip is that of all its pixels; a PSNR that is infinite, of identical drawings, is 100 dB, so that means
    exist. Pictures have an alignment score where the packages of its weights are installed.
    """
    device, found = own_device(), {name: [] for name in _PAIRED}
    for start in range(0, len(frames), _BATCH):
        ours, theirs = (_tensor(each[start : start + _BATCH], device) for each in (frames, exact))
        for name, metric in _PAIRED.items():
            found[name] += aggregate(name, each_frame(metric, ours, theirs), 1).tolist()
    found["psnr_db"] = [min(value, 100.0) for value in found["psnr_db"]]
    assert not any(map(math.isnan, found["psnr_db"]))
    if frames.shape[1] == 1 and (aligned := _alignment(frames, prompts, device)):
        found["alignment"] = aligned
    return {name: [float(f"{value:.5g}") for value in values] for name, values in found.items()}


def _alignment(frames: np.ndarray, prompts: Sequence[str], device: torch.device) -> list[float]:
    try:
        scorer = AlignmentScorer(device)
    except ModuleNotFoundError:
        return []
    found = []
    for start in range(0, len(frames), _BATCH):
        pictures = _tensor(frames[start : start + _BATCH], device)[:, 0]
        found += scorer.score(pictures, prompts[start : start + _BATCH]).tolist()
    return found


def _tensor(frames: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(frames).to(device).permute(0, 1, 4, 2, 3)
