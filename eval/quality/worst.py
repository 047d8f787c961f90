"""The pictures and clips that each configuration changed most are copied to where a report finds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dma_diffusers.eval.quality.configurations import AGAIN
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.picture import animation, encode

COUNT = 6


def worst(
    rows: Mapping[str, tuple[Pictures, Sequence[float]]],
    reference: Pictures,
    batches: Sequence[Sequence[Sample]],
    seeds: int,
    metric: str,
    folder: Path,
) -> list[dict[str, Any]]:
    """Return the six prompts that each row changed most by `metric` (more is worse), each with its worst seed.

    Their pictures go to `folder`/worst, as .png, and clips as .webp, which move; both are exact.

    rows: pictures and their scores `[prompts · seeds]`, by name.
    """
    samples = [sample for batch in batches for sample in batch]
    (folder / "worst").mkdir(exist_ok=True)
    found = []
    for number, (name, (row, scores)) in enumerate(rows.items()):
        table = torch.tensor(scores).reshape(-1, seeds)
        for rank, prompt in enumerate(table.amax(dim=1).argsort(descending=True)[:COUNT].tolist()):
            seed = int(table[prompt].argmax())
            sample = samples[prompt * seeds + seed]
            paths = {}
            for which, pictures in ((AGAIN.name, reference), ("row", row)):
                path, data = _file(pictures, sample)
                paths[which] = f"worst/{number}-{rank}-{which.replace(' ', '-')}{path}"
                write_atomically(folder / paths[which], data)
            found.append(
                {"row": name, "prompt": prompt, "seed": sample.seed, "metric": metric,
                 "value": table[prompt, seed].item(), "pictures": paths}
            )  # fmt: skip
    return found


def _file(pictures: Pictures, sample: Sample) -> tuple[str, bytes]:
    """Return the suffix and the bytes of a file that shows a sample."""
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pictures.frames(sample)]
    if len(frames) == 1:
        return ".png", encode(frames[0], "PNG")
    return ".webp", animation(frames, lossless=True, quality=0)
