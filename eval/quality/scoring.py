"""The pictures of a row are scored beside full precision's, one batch at a time."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch

from dma_diffusers.eval.intervals import Interval
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.frechet import fid
from dma_diffusers.eval.metrics.inception import inception_features
from dma_diffusers.eval.metrics.kernel_distance import kid
from dma_diffusers.eval.metrics.lpips import lpips
from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim
from dma_diffusers.eval.metrics.video import each_frame, flicker_of_frames, pooled_psnr_db
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.eval.quality.stored_scores import stored
from dma_diffusers.eval.quality.summary import as_json

Batches = Sequence[Sequence[Sample]]
OnBatch = Callable[[int, int], None]
"""It is called with (batches done, batches in all)."""


@dataclass(frozen=True)
class Chunk:
    """A chunk is a batch of a row and of full precision: frames uint8 `[B, F, 3, H, W]`, latents float32 `[B, ...]`."""

    frames: torch.Tensor
    exact_frames: torch.Tensor
    latents: torch.Tensor
    exact_latents: torch.Tensor
    prompts: list[str]
    seeds: list[int]


Scorer = Callable[[Chunk], torch.Tensor]
"""A scorer gives one number for each sample of a batch, `[B]`."""


Sight = Callable[[torch.Tensor], torch.Tensor]
"""It gives the features `[B, D]` of uint8 frames `[B, F, 3, H, W]`."""

_OF_FRAMES = {"psnr_db": psnr_db, "ssim": ssim, "lpips": lpips}


class Scores(NamedTuple):
    """A row has scores by metric: one number for each sample, in order; for each frame, float64 `[samples, F]`.

    Flicker has one number less, because it is of a frame and the one before.
    """

    samples: dict[str, list[float]]
    frames: dict[str, torch.Tensor]


def aggregate(metric: str, scores: torch.Tensor, dim: int) -> torch.Tensor:
    """Return one score of several pictures: their mean, or the PSNR of their mean squared error."""
    return pooled_psnr_db(scores, dim) if metric == "psnr_db" else scores.mean(dim)


def prompt_scorer(score: Callable[[torch.Tensor, list[str]], torch.Tensor]) -> Scorer:
    """Make a scorer of how well pictures (of videos the middle frame) `[B, 3, H, W]` show their prompts."""
    return lambda chunk: score(_middle(chunk.frames), chunk.prompts)


def quality_scorer(score: Callable[[torch.Tensor], torch.Tensor]) -> Scorer:
    """Make a scorer of how good pictures (of videos the middle frame) `[B, 3, H, W]` look by themselves."""
    return lambda chunk: score(_middle(chunk.frames))


def row_scores(
    row: Pictures,
    exact: Pictures,
    batches: Batches,
    scorers: dict[str, Scorer],
    device: torch.device,
    on_batch: OnBatch,
) -> Scores:
    """Score what low precision changed, by every further scorer too; of videos, how they flicker as well.

    The paired scores are kept in the row's folder, batch by batch, and not measured again.
    """
    paired: list[dict[str, list]] = []
    scores: dict[str, list[float]] = {name: [] for name in scorers}
    for done, batch in enumerate(batches, 1):

        @cache
        def chunk(batch: Sequence[Sample] = batch) -> Chunk:
            loaders = (row.frames, exact.frames, row.latents, exact.latents)
            tensors = [_loaded(load, batch).to(device) for load in loaders]
            return Chunk(*tensors, [each.prompt.text for each in batch], [each.seed for each in batch])

        paired.append(stored(row, exact, batch, lambda chunk=chunk: _paired(chunk())))
        for name, scorer in scorers.items():
            scores[name] += scorer(chunk()).tolist()
        on_batch(done, len(batches))
    found = {
        name: torch.cat([torch.tensor(of[name], dtype=torch.float64) for of in paired]) for name in paired[0]
    }
    frames = {name: x for name, x in found.items() if x.dim() == 2}
    samples = {name: aggregate(name, x, 1) if name in frames else x for name, x in found.items()}
    return Scores({name: x.tolist() for name, x in samples.items()} | scores, frames)


def _paired(chunk: Chunk) -> dict[str, list]:
    """Return `[B, F]` numbers for a metric of frames, `[B, F - 1]` for flicker, else `[B]`, by metric."""
    found = {
        name: each_frame(metric, chunk.frames, chunk.exact_frames) for name, metric in _OF_FRAMES.items()
    }
    found["latents_relative_l2"] = relative_l2(chunk.latents, chunk.exact_latents)
    if chunk.frames.shape[1] > 1:
        found["flicker"] = flicker_of_frames(chunk.frames, chunk.exact_frames)
    return {name: scores.tolist() for name, scores in found.items()}


def of_first_frames(frames: torch.Tensor) -> torch.Tensor:
    """Return the features of pictures `[B, 1, 3, H, W]` that FID and KID compare."""
    return inception_features(frames[:, 0])


def features(
    pictures: Pictures, batches: Batches, device: torch.device, see: Sight, on_batch: OnBatch
) -> FeatureSet:
    """Return the features of a row's pictures or clips that `see` gives."""
    found = FeatureSet()
    for done, batch in enumerate(batches, 1):
        frames = _loaded(pictures.frames, batch).to(device)
        keys = [(sample.prompt.text, sample.seed) for sample in batch]
        found.update(see(frames), keys)
        on_batch(done, len(batches))
    return found


def distances(pictures: FeatureSet, reference: FeatureSet, suffix: str = "") -> dict[str, dict[str, Any]]:
    """Return FID, and KID times 1,000, as an evaluation's summary holds them."""
    thousandfold = Interval(*(1000 * bound for bound in kid(pictures, reference)))
    return {
        f"fid{suffix}": as_json(fid(pictures, reference), pictures.count),
        f"kid{suffix}": as_json(thousandfold, pictures.count),
    }


def distance_of_clips(clips: FeatureSet, reference: FeatureSet) -> dict[str, dict[str, Any]]:
    """Return FVD as an evaluation's summary holds it."""
    return {"fvd": as_json(fid(clips, reference), clips.count)}


def _loaded(load: Callable[[Sample], torch.Tensor], batch: Sequence[Sample]) -> torch.Tensor:
    with ThreadPoolExecutor() as pool:  # threads decode, because that takes longer than scoring
        return torch.stack(list(pool.map(load, batch)))


def _middle(frames: torch.Tensor) -> torch.Tensor:
    return frames[:, frames.shape[1] // 2]
