"""This module computes FID and KID of two folders of pictures."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from dma_diffusers.eval.intervals import Interval
from dma_diffusers.eval.metrics.features import FeatureSet
from dma_diffusers.eval.metrics.frechet import fid, fid_notes
from dma_diffusers.eval.metrics.inception import inception_features, resize
from dma_diffusers.eval.metrics.kernel_distance import kid
from dma_diffusers.pipelines.files import files_below
from dma_diffusers.pipelines.reading import UNREADABLE, to_rgb

_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp",
)  # fmt: skip
_BATCH = 64

OnStep = Callable[[int, int], None]
"""It is called with the number of pictures done and the number of all."""


class Distances(NamedTuple):
    """This says how far two folders of pictures are apart, over how many, and what a reader has to know."""

    fid: Interval
    kid: Interval
    pictures: int
    reference_pictures: int
    notes: list[str]


def distances(
    folder: Path,
    reference: Path,
    device: torch.device | str,
    on_step: OnStep = lambda done, total: None,
) -> Distances:
    """Compute FID and KID of the pictures in `folder`, subfolders included, against those in `reference`.

    Each picture, of any size and depth, is resized as InceptionV3's graph does it; transparent ones lie over white.
    Each counts as a prompt of its own; where both folders hold the same names, they are taken as drawn from the same
    prompts. Notes name files that are no pictures by their suffixes.

    Raises FileNotFoundError for a folder that isn't there, and ValueError for one with fewer than 2 pictures or with a
    file that cannot be read or holds several pictures, by its name.
    """
    sets, offset = [], 0
    total = sum(len(picture_paths(each)) for each in (folder, reference))
    for each in (folder, reference):
        sets.append(
            folder_features(each, device, lambda done, _, offset=offset: on_step(offset + done, total))
        )
        offset += sets[-1].count
    notes = [*fid_notes(*sets), *(note for each in (folder, reference) for note in left_out(each))]
    return Distances(fid(*sets), kid(*sets), sets[0].count, sets[1].count, list(dict.fromkeys(notes)))


def folder_features(
    folder: Path, device: torch.device | str, on_step: OnStep = lambda done, total: None
) -> FeatureSet:
    """Return the features of the pictures in a folder that FID and KID compare; raises as `distances` does."""
    paths = picture_paths(folder)
    found = FeatureSet()
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(paths), _BATCH):
            batch = paths[first : first + _BATCH]
            pictures = [resize(each.to(device)[None]) for each in pool.map(_read, batch)]
            keys = [(_name(path.relative_to(folder)), 0) for path in batch]
            found.update(inception_features(torch.cat(pictures)), keys)
            on_step(found.count, len(paths))
    return found


def picture_paths(folder: Path) -> list[Path]:
    """Find the pictures under a folder, behind symbolic links too, by their suffixes, in the order of their names.

    Raises FileNotFoundError where it is no folder and ValueError where it holds fewer than 2.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name one that holds pictures")
    paths = sorted(path for path in files_below(folder) if path.suffix.lower() in _SUFFIXES)
    if len(paths) < 2:
        raise ValueError(
            f"{folder} holds {len(paths)} pictures ({', '.join(_SUFFIXES)}): FID and KID need at least 2"
        )
    return paths


def left_out(folder: Path) -> list[str]:
    """Say in one line which files under a folder are no pictures by their suffixes; nothing where all are."""
    others = sorted(path for path in files_below(folder) if path.suffix.lower() not in _SUFFIXES)
    if not others:
        return []
    return [f"{len(others)} files in {folder} are no pictures and were left out, such as {_name(others[0])}"]


def _name(path: Path) -> str:
    """Return a path as text, whatever encoding its bytes have."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _read(path: Path) -> torch.Tensor:
    """Read a picture as uint8 [3, H, W]."""
    try:
        with Image.open(path) as picture:
            frames = getattr(picture, "n_frames", 1)
            if frames > 1 and picture.format != "MPO":  # cameras put thumbnails into these
                raise ValueError(f"it holds {frames} pictures")
            return torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1)
    except UNREADABLE as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}): mend or remove it") from error
