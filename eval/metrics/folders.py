"""This module computes FID and KID of two folders of pictures."""

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

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
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

    Each picture, of any size, is resized as InceptionV3's graph does it. Each counts as a prompt of its own; where both
    folders hold the same names, they are taken as drawn from the same prompts.

    Raises FileNotFoundError for a folder that isn't there, and ValueError for one with fewer than 2 pictures or with a
    file that cannot be read, by its name.
    """
    sets, offset = [], 0
    total = sum(len(picture_paths(each)) for each in (folder, reference))
    for each in (folder, reference):
        sets.append(
            folder_features(each, device, lambda done, _, offset=offset: on_step(offset + done, total))
        )
        offset += sets[-1].count
    return Distances(fid(*sets), kid(*sets), sets[0].count, sets[1].count, fid_notes(*sets))


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
            keys = [(path.relative_to(folder).as_posix(), 0) for path in batch]
            found.update(inception_features(torch.cat(pictures)), keys)
            on_step(found.count, len(paths))
    return found


def picture_paths(folder: Path) -> list[Path]:
    """Find the pictures under a folder, by their suffixes, in the order of their names.

    Raises FileNotFoundError where it is no folder and ValueError where it holds fewer than 2.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name one that holds pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if len(paths) < 2:
        raise ValueError(
            f"{folder} holds {len(paths)} pictures ({', '.join(_SUFFIXES)}): FID and KID need at least 2"
        )
    return paths


def _read(path: Path) -> torch.Tensor:
    """Read a picture as uint8 [3, H, W]."""
    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a picture that can be read ({error}): mend or remove it") from error
