"""Sample sheets: a few prompts as the trained model draws them, beside full precision and their difference."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.generate import draw
from dma_diffusers.pipelines.picture import GAP, PAPER, amplified_difference, encode, side_by_side


def frames_of(pipe: DiffusionPipeline, prompts: Sequence[str], call: dict[str, Any]) -> np.ndarray:
    """Draw the prompts, and return each one's middle frame: uint8 `[prompts, H, W, 3]`.

    Random numbers of the training that draws between two steps stay as they are.
    """
    with torch.random.fork_rng():
        drawn = [draw(pipe, [prompt], [seed], call).frames for seed, prompt in enumerate(prompts)]
    return np.concatenate([frames[:, frames.shape[1] // 2] for frames in drawn])


def exact_frames(
    pipe: DiffusionPipeline, prompts: Sequence[str], call: dict[str, Any], path: Path
) -> np.ndarray:
    """Return what the pipeline draws in full precision, from a file if it is there."""
    if not path.is_file():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, frames=frames_of(pipe, prompts, call))
        write_atomically(path, buffer.getvalue())
    with np.load(path) as stored:
        return stored["frames"]


def write_sheet(
    frames: np.ndarray, exact: np.ndarray, prompts: Sequence[str], title: str, path: Path
) -> None:
    """Write a row for each prompt: full precision, the model, and the difference of the two."""
    rows = []
    for drawn, reference, prompt in zip(
        map(Image.fromarray, frames), map(Image.fromarray, exact), prompts, strict=True
    ):
        difference, factor = amplified_difference(drawn, reference)
        captions = [("full precision", prompt), (title, ""), (f"difference × {factor}", "")]
        rows.append(side_by_side([reference, drawn, difference], captions))
    sheet = Image.new("RGB", (rows[0].width, sum(row.height + GAP for row in rows)), PAPER)
    for number, row in enumerate(rows):
        sheet.paste(row, (0, number * (row.height + GAP)))
    write_atomically(path, encode(sheet, "PNG"))
