"""Draw prompts with a trained pipeline, each with a seed of its own."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline


def draw(folder: Path, prompts: list[str], batch: int = 32, seed: int = 0) -> np.ndarray:
    """Draw prompt i with seed ``seed + i``; returns pictures, float32 ``[N, height, width, 3]`` in [0, 1]."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = FluxPipeline.from_pretrained(folder).to(device)
    pipeline.set_progress_bar_config(disable=True)
    arguments = json.loads((folder / "generation.json").read_text())
    negative = arguments.pop("negative_prompt")
    pictures = []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))]
        drawn = pipeline(
            chosen, negative_prompt=[negative] * len(chosen), generator=noise, output_type="np", **arguments
        )
        pictures.append(drawn.images)
    return np.concatenate(pictures)
