"""A folder of recorded attention calls has an index, and a safetensors file for each call."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.pipelines.files import write_atomically

FORMAT, VERSION = "dma-diffusers recordings", 1
INDEX = "recordings.json"


class Tensors(NamedTuple):
    """One attention call was given these tensors, which are stored as they are.

    q `[B, H, S, D]`, k and v `[B, Hkv, S, D]`, after RoPE. B counts the batch entries of guidance too, where the
    pipeline runs them as one batch. key_mask: bool `[B, S]`, True where a key is seen, or None.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None


@dataclass(frozen=True)
class Recording:
    """A recording is one attention call of a module.

    prompt, step: counted from 0. call: the transformer's, within the step: with true classifier-free guidance it runs
    twice. sigma: noise level, 0 to 1; None if not known. shape: of q, `[B, H, S, D]`. text: its tokens, from start to
    stop. scale: of the scores, None for D^-½. bytes: of the file. grid: the sides of what the other tokens lie on; ()
    if not known.
    """

    prompt: int
    step: int
    call: int
    module: str
    sigma: float | None
    shape: tuple[int, int, int, int]
    text: tuple[int, int]
    scale: float | None
    is_causal: bool
    file: str
    bytes: int
    grid: tuple[int, ...] = ()

    @property
    def layout(self) -> Layout:
        """Return the layout of the call's tokens: DMA takes no calls whose keys are others than the queries."""
        return Layout(self.shape[2], self.shape[2], self.text, self.grid)


@dataclass
class Recordings:
    """This is the index of a folder.

    settings: what was recorded, and of what; `model` has the transformer's `class`, the `modules` that DMA takes, and
    the `fingerprint` of its weights. notes: what a reader should know, such as prompts that were left out. recordings:
    those of finished prompts alone, by prompt, step, call and module. sigmas: the noise level (0 to 1; None if not
    known) of every step that was drawn, recorded or not; empty in an index from before it was kept.
    """

    folder: Path
    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    sigmas: list[float | None] = field(default_factory=list)

    @property
    def prompts(self) -> list[int]:
        """Return the numbers of the prompts that were recorded."""
        return sorted({recording.prompt for recording in self.recordings})

    @property
    def steps(self) -> list[int]:
        """Return the denoising steps that were recorded."""
        return sorted({recording.step for recording in self.recordings})

    @property
    def modules(self) -> list[str]:
        """Return the modules that were recorded, in module order."""
        recorded = {recording.module for recording in self.recordings}
        return [name for name in self.settings["model"]["modules"] if name in recorded]

    @property
    def bytes(self) -> int:
        """Return the bytes that the recordings take on disk."""
        return sum(recording.bytes for recording in self.recordings)

    def tensors(self, recording: Recording) -> Tensors:
        """Read a call's tensors, on the CPU; raises ValueError, naming the file, where it cannot be read."""
        path = self.folder / recording.file
        try:
            stored = load(path.read_bytes())  # a mapped file that changes under us would end the process
            return Tensors(stored["q"], stored["k"], stored["v"], stored.get("key_mask"))
        except (OSError, SafetensorError, KeyError) as error:
            raise ValueError(
                f"{path} is damaged ({error}): delete {self.folder / INDEX}, record again"
            ) from None

    def save(self) -> None:
        """Write the index."""
        document = {
            "format": FORMAT, "version": VERSION, "settings": self.settings, "notes": self.notes,
            "sigmas": self.sigmas, "recordings": [asdict(recording) for recording in self.recordings],
        }  # fmt: skip
        write_atomically(self.folder / INDEX, json.dumps(document, indent=1, allow_nan=False).encode())

    def __iter__(self) -> Iterator[Recording]:
        return iter(self.recordings)

    def __len__(self) -> int:
        return len(self.recordings)


def serialise(tensors: Tensors, names: Sequence[str], values: Sequence[Any]) -> bytes:
    """Return a recording's file: the tensors, and as metadata the values of these names, as JSON."""
    stored = {name: x.contiguous() for name, x in tensors._asdict().items() if x is not None}
    metadata = {name: json.dumps(value) for name, value in zip(names, values, strict=True)}
    return save(stored, metadata)


def read_recordings(folder: Path) -> Recordings:
    """Read the recordings in a folder; raises FileNotFoundError for none, ValueError for a damaged index."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"there are no recordings in {folder}: it has no {INDEX}")
    try:
        document = json.loads(path.read_bytes())
        if (document["format"], document["version"]) != (FORMAT, VERSION):
            raise ValueError(f"it is {document['format']!r}, version {document['version']}")
        recordings = [
            Recording(
                **entry | {name: tuple(entry[name]) for name in ("shape", "text", "grid") if name in entry}
            )
            for entry in document["recordings"]
        ]
        sigmas = document.get("sigmas", [])
        return Recordings(folder, document["settings"], document["notes"], recordings, sigmas)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no index of recordings: {error}") from None
