"""The pictures and clips that a configuration changed most are copied to where a report finds them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dma_diffusers.eval.quality.configurations import AGAIN
from dma_diffusers.eval.quality.pictures import Pictures, Sample
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.picture import animation, encode

COUNT = 10


def worst(
    name: str,
    row: Pictures,
    reference: Pictures,
    batches: Sequence[Sequence[Sample]],
    seeds: int,
    metric: str,
    scores: Sequence[float],
    folder: Path,
) -> list[dict[str, Any]]:
    """Return the ten prompts that `row` changed most by `metric` (more is worse), each with its worst seed.

    Their pictures go to `folder`/worst, as .png, and clips as .webp, which move; both are exact.
    """
    table = torch.tensor(scores).reshape(-1, seeds)
    samples = [sample for batch in batches for sample in batch]
    (folder / "worst").mkdir(exist_ok=True)
    found = []
    for rank, prompt in enumerate(table.amax(dim=1).argsort(descending=True)[:COUNT].tolist()):
        seed = int(table[prompt].argmax())
        sample = samples[prompt * seeds + seed]
        paths = {}
        for which, pictures in ((AGAIN.name, reference), ("row", row)):
            frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pictures.frames(sample)]
            kind = "png" if len(frames) == 1 else "webp"
            paths[which] = f"worst/{rank}-{which.replace(' ', '-')}.{kind}"
            data = (
                encode(frames[0], "PNG") if len(frames) == 1 else animation(frames, lossless=True, quality=0)
            )
            write_atomically(folder / paths[which], data)
        found.append(
            {"row": name, "prompt": prompt, "seed": sample.seed, "metric": metric,
             "value": table[prompt, seed].item(), "pictures": paths}
        )  # fmt: skip
    return found
