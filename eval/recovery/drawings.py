"""The drawings of a row or of full precision: a PNG for each held-out prompt, a clip's frames below each other."""

from pathlib import Path

import numpy as np
from PIL import Image

from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.picture import encode


def save_drawings(folder: Path, frames: np.ndarray) -> None:
    """Write uint8 `[prompts, F, H, W, 3]`; the last file says that all are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, strip in enumerate(frames.reshape(len(frames), -1, *frames.shape[3:])):
        write_atomically(_path(folder, number), encode(Image.fromarray(strip), "PNG"))


def are_there(folder: Path, prompts: int) -> bool:
    """Tell whether all drawings of so many prompts were written."""
    return _path(folder, prompts - 1).is_file()


def read_drawings(folder: Path, prompts: int, height: int) -> np.ndarray:
    """Read uint8 `[prompts, F, H, W, 3]`; height: of a frame, in pixels."""
    strips = [np.asarray(Image.open(_path(folder, number))) for number in range(prompts)]
    return np.stack([strip.reshape(-1, height, *strip.shape[1:]) for strip in strips])


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:04d}.png"
