"""The pictures of one row are on disk: each is written once, whole, and never taken for another row's."""

import hashlib
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from dma_diffusers.eval.quality.prompts import Prompt
from dma_diffusers.pipelines.files import remove_leftovers, write_atomically
from dma_diffusers.pipelines.picture import encode


@dataclass(frozen=True)
class Sample:
    """A sample is one picture that every row has: a prompt, a seed, and a name that is the same in every run."""

    prompt: Prompt
    seed: int
    key: str


Together = list[tuple[str, int]]
"""The prompts and seeds that are drawn in one batch."""


def batches(
    prompts: Sequence[Prompt], seeds: Sequence[int], size: int, known: Sequence[Together] = ()
) -> list[list[Sample]]:
    """Return all pairs of prompts and seeds, prompt by prompt, in the batches they are drawn in.

    A sample's key holds what is drawn together with it, because another batch may round otherwise. So batches of a
    former run are kept wherever their samples still follow each other, and a prompt that is inserted between them
    leaves their pictures valid.

    Args:
        size: the most samples of a batch.
        known: the batches of former runs of this size.
    """
    pairs = [(prompt, seed) for prompt in prompts for seed in seeds]
    named = [(prompt.text, seed) for prompt, seed in pairs]
    kept = defaultdict(list)  # by their first sample, the longest first
    for chunk in sorted(known, key=len, reverse=True):
        kept[chunk[0]].append(chunk)
    found, start = [], 0
    while start < len(pairs):
        stop = _stop(named, start, size, kept)
        chunk = pairs[start:stop]
        together = json.dumps(named[start:stop])
        keys = [hashlib.sha256(f"{i} {together}".encode()).hexdigest()[:16] for i in range(len(chunk))]
        found.append([Sample(prompt, seed, key) for (prompt, seed), key in zip(chunk, keys, strict=True)])
        start = stop
    return found


def _stop(named: Together, start: int, size: int, kept: Mapping[tuple[str, int], list[Together]]) -> int:
    """Return where the batch ends that begins at `start`: a kept one whole, a new one where a kept one begins."""

    def length_of_kept(at: int) -> int:
        fitting = (len(chunk) for chunk in kept.get(named[at], ()) if named[at : at + len(chunk)] == chunk)
        return next(fitting, 0)

    most = min(start + size, len(named))
    if length := length_of_kept(start):
        return start + length
    return next((at for at in range(start + 1, most) if length_of_kept(at)), most)


class KnownBatches:
    """The file of a run's folder that remembers which samples were drawn together, by the size of a batch."""

    def __init__(self, folder: Path, size: int):
        self.path, self.size = folder / "batches.json", str(size)

    def read(self) -> list[Together]:
        """Return the batches of former runs; none where there was no run, or the file is damaged."""
        return [[(text, seed) for text, seed in chunk] for chunk in self._all().get(self.size, ())]

    def write(self, chunks: Sequence[Sequence[Sample]]) -> None:
        """Remember these batches beside former ones."""
        together = [[(sample.prompt.text, sample.seed) for sample in chunk] for chunk in chunks]
        together += [chunk for chunk in self.read() if chunk not in together]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self._all() | {self.size: together}).encode())

    def _all(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}


class Pictures:
    """A folder holds the pictures and last latents of one row.

    A picture is two files: latents with the seconds it took, and then the picture, whose presence says that both are
    whole. The folder's name holds a digest of `settings`, so that other settings find another folder.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')[:60]}-{digest}"
        self.settings = settings

    def create(self) -> None:
        """Make the folder, and say in it what it is for."""
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        write_atomically(self.folder / "settings.json", json.dumps(self.settings, indent=1).encode())

    def __contains__(self, sample: Sample) -> bool:
        return self.file(sample).is_file()

    def remove_corrupt(self, samples: Sequence[Sample]) -> list[Path]:
        """Remove the pictures that are not what was written, and name their files."""
        corrupt = []
        for sample in filter(self.__contains__, samples):
            path = self.file(sample)
            try:
                with PngImageFile(path) as picture:
                    picture.verify()
                path = self._latents(sample)
                whole = self._metadata(sample).get("checksum") == _checksum(self.latents(sample))
            except (SafetensorError, OSError, SyntaxError):
                whole = False
            if not whole:
                self.file(sample).unlink()
                corrupt.append(path)
        return corrupt

    def write(
        self,
        sample: Sample,
        frames: np.ndarray,
        latents: torch.Tensor,
        seconds: float,
        notes: Sequence[str] = (),
    ) -> None:
        """Store uint8 `[F, H, W, 3]` frames, the last latents (any shape, float32), and the seconds both took.

        notes: what a reader should know of the drawing.
        """
        strip = Image.fromarray(
            frames.reshape(-1, *frames.shape[2:])
        )  # the frames of a video stand below each other
        metadata = {"seconds": repr(seconds), "frames": str(len(frames))}
        metadata |= {"prompt": sample.prompt.text, "seed": str(sample.seed)}
        metadata |= {"notes": json.dumps([*notes])}
        metadata |= {"checksum": _checksum(latents)}  # PNG has a checksum of its own
        write_atomically(self._latents(sample), save({"latents": latents.contiguous()}, metadata))
        write_atomically(
            self.file(sample), encode(strip, "PNG", compress_level=1)
        )  # level 6 takes six times as long

    def frames(self, sample: Sample) -> torch.Tensor:
        """Read the picture, or the frames of the video, as uint8 `[F, 3, H, W]`."""
        with PngImageFile(self.file(sample)) as strip:  # Image.open would take long videos for bombs
            pixels = torch.from_numpy(np.array(strip))
        return pixels.unflatten(0, (int(self._metadata(sample)["frames"]), -1)).permute(0, 3, 1, 2)

    def latents(self, sample: Sample) -> torch.Tensor:
        """Read the last latents."""
        with safe_open(self._latents(sample), "pt") as file:
            return file.get_tensor("latents")

    def seconds(self, sample: Sample) -> float:
        """Return the seconds that the picture took: the time of its batch, shared equally."""
        return float(self._metadata(sample)["seconds"])

    def notes(self, sample: Sample) -> list[str]:
        """Return what was noted when the picture was drawn."""
        return json.loads(self._metadata(sample).get("notes", "[]"))

    def checksums(self, samples: Sequence[Sample]) -> list[str]:
        """Return what tells these pictures from others: the samples' keys, and checksums of the latents."""
        return [f"{sample.key} {self._metadata(sample)['checksum']}" for sample in samples]

    def write_receipt(self, receipt: dict[str, Any]) -> None:
        write_atomically(self.folder / "receipt.json", json.dumps(receipt).encode())

    def receipt(self) -> dict[str, Any] | None:
        """Return the receipt of the attention that drew the pictures; None for full precision, or a damaged one."""
        try:
            return json.loads((self.folder / "receipt.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def _metadata(self, sample: Sample) -> dict[str, str]:
        with safe_open(self._latents(sample), "pt") as file:
            return file.metadata()

    def file(self, sample: Sample) -> Path:
        """Return the path of a picture, or of a video's frames below each other."""
        return self.folder / f"{sample.key}.png"

    def _latents(self, sample: Sample) -> Path:
        return self.folder / f"{sample.key}.safetensors"


def _checksum(latents: torch.Tensor) -> str:
    return f"{zlib.crc32(latents.contiguous().numpy()):08x}"
