"""Score the pictures of a row beside full precision's, one batch at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from dma_diffusers.eval.intervals import Interval
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.frechet import fid
from dma_diffusers.eval.metrics.inception import inception_features
from dma_diffusers.eval.metrics.kernel_distance import kid
from dma_diffusers.eval.metrics.lpips import lpips
from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim
from dma_diffusers.eval.metrics.video import flicker, mean_over_frames
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.eval.quality.summary import as_json

Batches = Sequence[Sequence[Sample]]
OnBatch = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Chunk:
    """One batch of a row and of full precision: frames uint8 `[B, F, 3, H, W]`, latents float32 `[B, ...]`."""

    frames: torch.Tensor
    exact_frames: torch.Tensor
    latents: torch.Tensor
    exact_latents: torch.Tensor
    prompts: list[str]


Scorer = Callable[[Chunk], torch.Tensor]
"""One number for each sample of a batch, `[B]`."""


def paired_scorers(video: bool) -> dict[str, Scorer]:
    """What low precision changed; of a video, means over frames, and how it flickers."""
    scorers: dict[str, Scorer] = {
        "psnr_db": lambda chunk: mean_over_frames(psnr_db, chunk.frames, chunk.exact_frames),
        "ssim": lambda chunk: mean_over_frames(ssim, chunk.frames, chunk.exact_frames),
        "lpips": lambda chunk: mean_over_frames(lpips, chunk.frames, chunk.exact_frames),
        "latents_relative_l2": lambda chunk: relative_l2(chunk.latents, chunk.exact_latents),
    }
    return scorers | ({"flicker": lambda chunk: flicker(chunk.frames, chunk.exact_frames)} if video else {})


def prompt_scorer(score: Callable[[torch.Tensor, list[str]], torch.Tensor]) -> Scorer:
    """How well pictures (of videos the middle frame) `[B, 3, H, W]` show their prompts."""
    return lambda chunk: score(_middle(chunk.frames), chunk.prompts)


def sample_scores(
    row: Pictures,
    exact: Pictures,
    batches: Batches,
    scorers: dict[str, Scorer],
    device: torch.device,
    on_batch: OnBatch,
) -> dict[str, list[float]]:
    """Every scorer's numbers, one for each sample in order."""
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    for done, batch in enumerate(batches, 1):
        loaders = (row.frames, exact.frames, row.latents, exact.latents)
        tensors = [_loaded(load, batch).to(device) for load in loaders]
        chunk = Chunk(*tensors, [sample.prompt.text for sample in batch])
        for name, scorer in scorers.items():
            scores[name] += scorer(chunk).tolist()
        on_batch(done, len(batches))
    return scores


def features(pictures: Pictures, batches: Batches, device: torch.device, on_batch: OnBatch) -> FeatureSet:
    """What FID and KID see of a row's pictures; of videos, the middle frame."""
    found = FeatureSet()
    for done, batch in enumerate(batches, 1):
        frames = _loaded(pictures.frames, batch).to(device)
        keys = [(sample.prompt.text, sample.seed) for sample in batch]
        found.update(inception_features(_middle(frames)), keys)
        on_batch(done, len(batches))
    return found


def distances(pictures: FeatureSet, reference: FeatureSet, suffix: str = "") -> dict[str, dict[str, Any]]:
    """FID, and KID times 1,000, as an evaluation's summary holds them."""
    thousandfold = Interval(*(1000 * bound for bound in kid(pictures, reference)))
    return {
        f"fid{suffix}": as_json(fid(pictures, reference), pictures.count),
        f"kid{suffix}": as_json(thousandfold, pictures.count),
    }


def _loaded(load: Callable[[Sample], torch.Tensor], batch: Sequence[Sample]) -> torch.Tensor:
    with ThreadPoolExecutor() as pool:  # decoding takes longer than scoring
        return torch.stack(list(pool.map(load, batch)))


def _middle(frames: torch.Tensor) -> torch.Tensor:
    return frames[:, frames.shape[1] // 2]
