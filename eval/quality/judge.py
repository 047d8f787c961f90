"""The judge holds what the rows of an evaluation are scored by, put together before anything is drawn."""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dma_diffusers.eval.metrics.alignment import AlignmentScorer
from dma_diffusers.eval.metrics.clip import ClipScorer
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.folders import folder_features, left_out
from dma_diffusers.eval.metrics.frechet import fid_notes
from dma_diffusers.eval.quality.configurations import AGAIN, ANOTHER_KERNEL
from dma_diffusers.eval.quality.drawing import OnStep
from dma_diffusers.eval.quality.pictures import Pictures
from dma_diffusers.eval.quality.scoring import (
    Batches,
    Scorer,
    aggregate,
    distances,
    features,
    prompt_scorer,
    row_scores,
)
from dma_diffusers.eval.quality.summary import summarise, summarise_differing
from dma_diffusers.pipelines.load import DEMO_MODEL

_NO_DISTANCES = (
    "no FID and no KID: they compare sets of independent pictures, and a clip's frames are nearly one picture"
)


class Scored(NamedTuple):
    """A row has one score for each sample, by metric, and every metric's summary; a video's is its frames' mean."""

    samples: dict[str, list[float]]
    summary: dict[str, dict[str, Any]]
    frames: dict[str, list[float]] | None = None


class Judge:
    """The judge gives paired scores, for pictures FID and KID, for the demo model of pictures the alignment score.

    clip: folder or id of a CLIP, for CLIPScore. reference: a folder of pictures, for FID and KID to them too. Raises
    what their loaders raise.
    """

    def __init__(
        self,
        model: str | Path,
        clip: str | None,
        reference: Path | None,
        device: torch.device,
        on_step: OnStep,
    ):
        self.device, self.on_step = device, on_step
        self.scorers: dict[str, Scorer] = {}
        self.clip = ClipScorer(clip, device) if clip is not None else None
        if self.clip:
            self.scorers["clip_score"] = prompt_scorer(self.clip.score)
        if Path(model) == DEMO_MODEL:
            self.scorers["alignment"] = prompt_scorer(AlignmentScorer(device).score)
        watch = partial(on_step, "reference pictures")
        self.reference = folder_features(reference, device, watch) if reference is not None else None
        self.left_out = left_out(reference) if reference is not None else []

    def check(self, video: bool) -> None:
        """Raise ValueError where the reference folder's pictures would be compared with clips."""
        if video and self.reference:
            raise ValueError(
                "a reference folder is for FID and KID of pictures; this model draws clips: leave it out"
            )

    def judge(
        self, exact: Pictures, compared: dict[str, Pictures], batches: Batches, seeds: int
    ) -> tuple[dict[str, Scored], list[str]]:
        """Return scores of each row beside full precision's pictures, and what a reader of them has to know."""
        video = len(exact.frames(batches[0][0])) > 1
        seen = None if video else self._features("full precision", exact, batches)
        judged = {}
        for name, pictures in compared.items():
            watch = partial(self.on_step, f"scores of {name}")
            samples, frames = row_scores(pictures, exact, batches, self.scorers, self.device, watch)
            summary = {
                metric: (summarise_differing if metric == "psnr_db" else summarise)(values, seeds)
                for metric, values in samples.items()
            }
            if video:
                of_frames = {
                    metric: aggregate(metric, scores, 0).tolist() for metric, scores in frames.items()
                }
                judged[name] = Scored(samples, summary, of_frames)
                continue
            found = self._features(name, pictures, batches)
            summary |= distances(found, seen)
            if self.reference:
                summary |= distances(found, self.reference, "_reference")
            judged[name] = Scored(samples, summary)
        notes = [_NO_DISTANCES] if video else fid_notes(seen, self.reference or seen)
        notes += self.left_out
        if self.clip and self.clip.truncated:
            notes.append(
                f"CLIP read the first {self.clip.length} tokens of {len(self.clip.truncated)} prompts only"
            )
        return judged, notes

    def _features(self, name: str, pictures: Pictures, batches: Batches) -> FeatureSet:
        return features(pictures, batches, self.device, partial(self.on_step, f"features of {name}"))


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
