"""Score the pictures of a row beside full precision's, a few at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dma_diffusers.eval.metrics.paired import psnr_db, relative_l2, ssim
from dma_diffusers.eval.quality.pictures import Pictures, Sample


@dataclass(frozen=True)
class Chunk:
    """Pictures uint8 `[B, 3, H, W]` and latents float32 `[B, ...]` of a row and of full precision, and prompts."""

    pictures: torch.Tensor
    references: torch.Tensor
    latents: torch.Tensor
    reference_latents: torch.Tensor
    prompts: list[str]


Scorer = Callable[[Chunk], torch.Tensor]
"""One number for each picture of a chunk."""

PAIRED: dict[str, Scorer] = {
    "psnr_db": lambda chunk: psnr_db(chunk.pictures, chunk.references),
    "ssim": lambda chunk: ssim(chunk.pictures, chunk.references),
    "latents_relative_l2": lambda chunk: relative_l2(chunk.latents, chunk.reference_latents),
}


def scores(
    row: Pictures,
    reference: Pictures,
    batches: Sequence[Sequence[Sample]],
    scorers: dict[str, Scorer],
    device: torch.device,
    on_step: Callable[[int, int], None],
) -> dict[str, list[float]]:
    """Every scorer's numbers, one for each sample in order; only one batch of pictures is held at a time."""
    found: dict[str, list[float]] = {name: [] for name in scorers}
    for done, batch in enumerate(batches, 1):
        chunk = Chunk(
            torch.stack([row.picture(sample) for sample in batch]).to(device),
            torch.stack([reference.picture(sample) for sample in batch]).to(device),
            torch.stack([row.latents(sample) for sample in batch]).to(device),
            torch.stack([reference.latents(sample) for sample in batch]).to(device),
            [sample.prompt.text for sample in batch],
        )
        for name, score in scorers.items():
            found[name] += score(chunk).tolist()
        on_step(done, len(batches))
    return found
