"""Draw prompts with a trained pipeline, each with a seed of its own."""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline

from dma_diffusers.pipelines.demo_video_training.clips import HEIGHT, WIDTH
from dma_diffusers.pipelines.demo_video_training.model import SpreadPositions
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES


def draw_clips(
    folder: Path,
    prompts: list[str],
    height: int = HEIGHT,
    frame_stride: int = 1,
    batch: int = 20,
    seed: int = 0,
) -> np.ndarray:
    """Draw prompt i with seed ``seed + i``; returns clips, uint8 ``[N, F, height, width, 3]``.

    ``height`` and ``frame_stride`` must be those with which the weights were trained.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    arguments = json.loads((folder / "generation.json").read_text())
    if (height, frame_stride) != (HEIGHT, 1):
        width, frames = height * WIDTH // HEIGHT, (FRAMES - 1) // frame_stride + 1
        arguments |= {"height": height, "width": width, "num_frames": frames}
        grid = ((frames - 1) // 4 + 1, height // 8, width // 8)
        head_dim = pipeline.transformer.config.attention_head_dim
        pipeline.transformer.rope = SpreadPositions(grid, (frame_stride, HEIGHT // height), head_dim).to(
            device
        )
    clips = []
    for start in range(0, len(prompts), batch):
        chosen = prompts[start : start + batch]
        noise = [torch.Generator().manual_seed(seed + start + i) for i in range(len(chosen))]
        frames = pipeline(chosen, generator=noise, output_type="np", **arguments).frames
        clips.append((frames * 255).round().astype(np.uint8))
    return np.concatenate(clips)
