"""The calls of drawings, in a folder: a file for the samples that were drawn together."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.finetuning.calls import Call, Part, joined

_OPEN_FILES = 256


@dataclass(frozen=True)
class Step:
    """A step of the sampler in the drawing of a stored sample.

    calls: their numbers. weights: of their velocities in the step's. level: the noise level, in the transformer's own
    unit.
    """

    sample: int
    calls: tuple[int, ...]
    weights: tuple[float, ...]
    level: float


@dataclass(frozen=True)
class Chunk:
    """A file: samples that were drawn together, and what was stored of each call of theirs.

    A call has the names of its tensors in the file, each of which has an entry for each sample unless it is `shared`.
    """

    path: Path
    samples: Sequence[int]
    calls: Sequence[Mapping[str, Any]]

    def tensors(self, number: int) -> dict[str, str]:
        """Return the names in the file of a call's tensors, by their names in the call; its output is at ""."""
        call = self.calls[number]
        return call["tensors"] | ({"": call["output"]} if call["output"] else {})


class CallStore:
    """The calls of samples, in a folder: a file for those drawn together, in which equal inputs are stored once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._chunks: dict[Path, Chunk] = {}
        self._place: dict[int, tuple[Chunk, int]] = {}  # of each sample

    def stored(self) -> set[int]:
        """Return the samples that are there now, whichever process wrote them."""
        paths = sorted(self.folder.glob("[0-9]*.safetensors"))
        self._chunks = {path: self._chunks.get(path) or _chunk(path) for path in paths}
        self._place = {
            sample: (chunk, row)
            for chunk in self._chunks.values()
            for row, sample in enumerate(chunk.samples)
        }
        return set(self._place)

    def write(self, samples: Sequence[int], calls: Sequence[Call], parts: Sequence[Part] = (Part(),)) -> None:
        """Store calls, each of which has all of these samples, with the part of each."""
        tensors: dict[str, Tensor] = {}

        def kept(tensor: Tensor, name: str = "") -> str:
            data = tensor.clone(memory_format=torch.contiguous_format)  # of a view, what it shows alone
            name = name or _digest(data)
            tensors[name] = data
            return name

        written = [
            {
                "tensors": {
                    name: kept(value) for name, value in call.inputs.items() if isinstance(value, Tensor)
                },
                "others": {
                    name: value for name, value in call.inputs.items() if not isinstance(value, Tensor)
                },
                "shared": sorted(call.shared),
                "output": None if call.output is None else kept(call.output, f"output.{number}"),
                "level": call.level,
                **asdict(part),
            }
            for number, (call, part) in enumerate(zip(calls, parts, strict=True))
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"chunk": json.dumps({"samples": list(samples), "calls": written})}
        write_atomically(self.folder / f"{samples[0]:06d}.safetensors", save(tensors, about))
        _file.cache_clear()  # one of this name may be open still that was removed since

    def chunks(self, samples: int) -> list[Chunk]:
        """Return the files that have any of the first so many samples, in order."""
        self.stored()
        return list({id(chunk): chunk for chunk, _ in map(self._place.__getitem__, range(samples))}.values())

    def steps(self, samples: int) -> list[Step]:
        """Return the sampler's steps in the drawings of the first so many samples."""
        found = []
        for chunk in self.chunks(samples):
            groups = defaultdict(list)
            for number, call in enumerate(chunk.calls):
                groups[call["step"]].append(number)
            for sample in chunk.samples:
                for numbers in groups.values():
                    weights = tuple(chunk.calls[number]["weight"] for number in numbers)
                    found.append(Step(sample, tuple(numbers), weights, chunk.calls[numbers[0]]["level"]))
        found.sort(key=lambda step: step.sample)  # those of a sample stay in order
        return [step for step in found if step.sample < samples]

    def read(self, sample: int, number: int) -> Call:
        """Return a sample's call of this number."""
        if sample not in self._place:
            self.stored()
        chunk, row = self._place[sample]
        call, file = chunk.calls[number], _file(chunk.path)
        tensors = {
            name: file.get_tensor(key) if name in call["shared"] else file.get_slice(key)[row : row + 1]
            for name, key in chunk.tensors(number).items()
        }
        output = tensors.pop("", None)
        return Call(tensors | call["others"], frozenset(call["shared"]), output)

    def batch(self, places: Sequence[tuple[int, int]], device: torch.device) -> Call:
        """Return calls, each given as a sample and a number, as one."""
        return joined([self.read(*place) for place in places], device)


class HeldCalls:
    """The calls of a store's first so many samples, in a device's memory: a batch takes a look-up for each argument.

    All calls must have the same arguments, and shared ones that are equal.
    """

    def __init__(self, store: CallStore, samples: int, device: torch.device):
        chunks = store.chunks(samples)
        self._steps = store.steps(samples)
        self._like = store.read(0, 0)
        self._first: dict[int, int] = {}  # the place of each sample's first call among all calls
        calls = 0
        for chunk in chunks:
            for sample in chunk.samples:
                self._first[sample] = calls
                calls += len(chunk.calls)
        names = [name for name in chunks[0].tensors(0) if name not in self._like.shared]
        self._columns = {name: _column(chunks, name, device) for name in names}

    def steps(self, samples: int) -> list[Step]:
        """Return the sampler's steps in the drawings of the first so many samples."""
        return [step for step in self._steps if step.sample < samples]

    def batch(self, places: Sequence[tuple[int, int]], device: torch.device) -> Call:
        """Return calls, each given as a sample and a number, as one."""
        numbers = torch.tensor([self._first[sample] + number for sample, number in places]).to(device)
        tensors = {name: table[rows[numbers]] for name, (table, rows) in self._columns.items()}
        output = tensors.pop("", None)
        others = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self._like.inputs.items()
            if name not in tensors
        }
        return Call(tensors | others, self._like.shared, output)


def _column(chunks: Sequence[Chunk], name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return an argument's distinct tensors `[rows, …]` on a device, and the row of each call, int64 `[calls]`."""
    rows, places, count = [], [], 0
    for chunk in chunks:
        keys = [chunk.tensors(number)[name] for number in range(len(chunk.calls))]
        starts = {key: count + i * len(chunk.samples) for i, key in enumerate(dict.fromkeys(keys))}
        count += len(starts) * len(chunk.samples)
        places += [(chunk, key, start) for key, start in starts.items()]
        of_calls = torch.tensor([starts[key] for key in keys])
        rows.append((torch.arange(len(chunk.samples))[:, None] + of_calls).flatten())
    like = _file(chunks[0].path).get_tensor(places[0][1])
    table = torch.empty(count, *like.shape[1:], dtype=like.dtype, device=device)
    for chunk, key, start in places:
        table[start : start + len(chunk.samples)] = _file(chunk.path).get_tensor(key)
    return table, torch.cat(rows).to(device)


def _chunk(path: Path) -> Chunk:
    about = _file(path).metadata() or {}
    if "chunk" not in about:
        raise ValueError(
            f"{path} holds calls as an earlier version stored them: draw them anew, in another folder"
        )
    return Chunk(path, **json.loads(about["chunk"]))


def _digest(data: Tensor) -> str:
    digest = hashlib.sha256(f"{data.dtype} {list(data.shape)}".encode())
    digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


@lru_cache(maxsize=_OPEN_FILES)
def _file(path: Path) -> Any:
    return safe_open(path, "pt")
