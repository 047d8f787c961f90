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


class Sheets:
    """Draws a few prompts with full precision, when it is made, and again whenever a sheet is written.

    pipe: at full precision then. The full-precision pictures are kept in the folder for a run that goes on.
    """

    def __init__(self, pipe: DiffusionPipeline, prompts: Sequence[str], call: dict[str, Any], folder: Path):
        self.pipe, self.prompts, self.call, self.folder = pipe, prompts, call, folder
        # Another run in this folder may ask for more prompts.
        kept = folder / f"full-precision-{len(prompts)}.npz"
        if not kept.is_file():
            buffer = io.BytesIO()
            np.savez_compressed(buffer, frames=self._drawn())
            write_atomically(kept, buffer.getvalue())
        with np.load(kept) as stored:
            self.exact = stored["frames"]

    def write(self, step: int) -> None:
        """Write `samples-STEP.png`, with a row for each prompt: full precision, the model, their difference."""
        rows = []
        for frame, reference, prompt in zip(self._drawn(), self.exact, self.prompts, strict=True):
            drawn, exact = Image.fromarray(frame), Image.fromarray(reference)
            difference, factor = amplified_difference(drawn, exact)
            captions = [("full precision", prompt), (f"step {step}", ""), (f"difference × {factor}", "")]
            rows.append(side_by_side([exact, drawn, difference], captions))
        sheet = Image.new("RGB", (rows[0].width, sum(row.height + GAP for row in rows)), PAPER)
        for number, row in enumerate(rows):
            sheet.paste(row, (0, number * (row.height + GAP)))
        write_atomically(self.folder / f"samples-{step:06d}.png", encode(sheet, "PNG"))

    def _drawn(self) -> np.ndarray:
        """Draw each prompt's middle frame, uint8 `[prompts, H, W, 3]`; training's random numbers stay as they are."""
        with torch.random.fork_rng():
            drawn = [draw(self.pipe, [prompt], [seed], self.call) for seed, prompt in enumerate(self.prompts)]
        return np.concatenate([each.frames[:, each.frames.shape[1] // 2] for each in drawn])
