"""A transformer's calls, as its pipeline makes them: recorded, stored sample by sample, and put together in batches.

Whatever the pipeline hands to its transformer (text, positions, guidance) is recorded as it is, so that a call can be
made again in training without the pipeline and its text encoders.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from dma_diffusers.pipelines.files import write_atomically

LATENTS, NOISE = "hidden_states", "timestep"
"""The arguments of a transformer's call that have the noisy latents and the noise level."""

_POSITIONS = ("img_ids", "txt_ids")  # FLUX has one table of positions for all samples
_OPEN_FILES = 256
_Opened = tuple[Callable[[str], Tensor], list[dict[str, Any]]]  # reads a tensor by its name; all calls


@dataclass(frozen=True)
class Part:
    """A call's part in a drawing.

    step: a number that all calls of one step of the sampler share. weight: of the call's velocity in that of its step,
    where guidance adds several up.
    """

    step: int = 0
    weight: float = 1.0


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
class Call:
    """One call of a transformer, with one sample or several.

    inputs: keyword arguments. shared: the names of tensors that hold for all samples; others have a sample in each
    entry of their first dimension. output: what the transformer returned, None where nobody asked it. sums: float32
    `[sums, samples]`, the weights with which outputs are added up before they are compared; None for each alone.
    """

    inputs: Mapping[str, Any]
    shared: frozenset[str]
    output: Tensor | None = None
    sums: Tensor | None = None

    @property
    def level(self) -> float:
        """The noise level in the transformer's own unit, of the first sample."""
        return float(self.inputs[NOISE].flatten()[0])

    def samples(self) -> list["Call"]:
        """Return a call for each sample."""
        return [
            Call(
                {
                    name: value[i : i + 1] if isinstance(value, Tensor) and name not in self.shared else value
                    for name, value in self.inputs.items()
                },
                self.shared,
                None if self.output is None else self.output[i : i + 1],
            )
            for i in range(len(self.inputs[LATENTS]))
        ]


def joined(calls: Sequence[Call], device: torch.device) -> Call:
    """Put the samples of several calls into one, on `device`; what is no tensor must be equal in all of them."""
    first, inputs = calls[0], {}
    for name, value in first.inputs.items():
        if isinstance(value, Tensor) and name not in first.shared:
            value = torch.cat([call.inputs[name] for call in calls])
        inputs[name] = value.to(device) if isinstance(value, Tensor) else value
    outputs = [call.output for call in calls if call.output is not None]
    return Call(inputs, first.shared, torch.cat(outputs).to(device) if outputs else None)


class _FirstCall(Exception):
    """It ends a pipeline's call before its transformer computes anything."""


def first_call(
    pipe: DiffusionPipeline, model: torch.nn.Module, prompt: str | list[str], call: Mapping[str, Any]
) -> Call:
    """Return the first call that the pipeline makes of its transformer for a prompt, which computes nothing.

    The scheduler's noise levels are those of the call afterwards.
    """
    seen: list[Call] = []

    def stop(model: torch.nn.Module, args: tuple, inputs: dict[str, Any]) -> None:
        seen.append(_call(model, args, inputs, None))
        raise _FirstCall

    hook = model.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    with suppress(_FirstCall):
        try:
            pipe(prompt=prompt, generator=torch.Generator().manual_seed(0), output_type="latent", **call)
        finally:
            hook.remove()
    return seen[0]


@contextmanager
def recording(model: torch.nn.Module) -> Iterator[list[Call]]:
    """Yield a list to which every call of `model` is added, on the CPU, when it returns."""
    calls: list[Call] = []

    def ended(model: torch.nn.Module, args: tuple, inputs: dict[str, Any], output: Any) -> None:
        calls.append(_call(model, args, inputs, output[0]))

    hook = model.register_forward_hook(ended, with_kwargs=True)
    try:
        yield calls
    finally:
        hook.remove()


def _call(model: torch.nn.Module, args: tuple, inputs: dict[str, Any], output: Tensor | None) -> Call:
    """Keep a call on the CPU; raises ValueError for arguments that can't be stored."""
    if args or LATENTS not in inputs or NOISE not in inputs:
        raise ValueError(
            f"{type(model).__name__} is called without {LATENTS} and {NOISE} by name: fine-tuning knows pipelines "
            "like FLUX's and Wan's"
        )
    batch, kept = len(inputs[LATENTS]), {}
    for name, value in inputs.items():
        if not (isinstance(value, Tensor) or _is_plain(value)):
            raise ValueError(
                f"{type(model).__name__} is called with {name}, a {type(value).__name__}: leave it out"
            )
        kept[name] = value.detach().cpu() if isinstance(value, Tensor) else value
    shared = frozenset(
        name
        for name, value in kept.items()
        if isinstance(value, Tensor) and (name in _POSITIONS or value.ndim == 0 or len(value) != batch)
    )
    return Call(kept, shared, None if output is None else output.detach().cpu())


def _is_plain(value: Any) -> bool:
    return value is None or value == {} or isinstance(value, bool | int | float | str)


class CallStore:
    """The calls of each sample, in a folder: a file for each, in which equal tensors are stored once.

    held_on: the device in whose memory everything that was read stays; None reads files again and again.
    """

    def __init__(self, folder: Path, held_on: torch.device | None = None):
        self.folder, self.held_on = folder, held_on
        self._held: dict[int, _Opened] = {}

    def __contains__(self, sample: int) -> bool:
        return self._path(sample).is_file()

    def write(self, sample: int, calls: Sequence[Call], parts: Sequence[Part] = (Part(),)) -> None:
        """Store the calls of one sample, each of which has one, with the part of each."""
        tensors: dict[str, Tensor] = {}

        def key(tensor: Tensor) -> str:
            data = tensor.clone(memory_format=torch.contiguous_format)  # of a view, what it shows alone
            digest = hashlib.sha256(f"{data.dtype} {list(data.shape)}".encode())
            digest.update(data.flatten().view(torch.uint8).numpy().data)
            name = digest.hexdigest()[:32]
            tensors[name] = data
            return name

        written = [
            {
                "tensors": {
                    name: key(value) for name, value in call.inputs.items() if isinstance(value, Tensor)
                },
                "others": {
                    name: value for name, value in call.inputs.items() if not isinstance(value, Tensor)
                },
                "shared": sorted(call.shared),
                "output": None if call.output is None else key(call.output),
                "level": call.level,
                **asdict(part),
            }
            for call, part in zip(calls, parts, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(sample), save(tensors, {"calls": json.dumps(written)}))

    def steps(self, samples: int) -> list[Step]:
        """Return the sampler's steps in the drawings of the first so many samples."""
        found = []
        for sample in range(samples):
            calls, groups = self._opened(sample)[1], defaultdict(list)
            for number, call in enumerate(calls):
                groups[call["step"]].append(number)
            for numbers in groups.values():
                weights = tuple(calls[number]["weight"] for number in numbers)
                found.append(Step(sample, tuple(numbers), weights, calls[numbers[0]]["level"]))
        return found

    def read(self, sample: int, number: int) -> Call:
        """Return a sample's call of this number."""
        tensor, calls = self._opened(sample)
        call = calls[number]
        tensors = {name: tensor(key) for name, key in call["tensors"].items()}
        output = tensor(call["output"]) if call["output"] else None
        return Call(tensors | call["others"], frozenset(call["shared"]), output)

    def _opened(self, sample: int) -> _Opened:
        if self.held_on is None:
            return _file(self._path(sample))
        if sample not in self._held:
            path = self._path(sample)
            self._held[sample] = load_file(path, str(self.held_on)).__getitem__, _file(path)[1]
        return self._held[sample]

    def _path(self, sample: int) -> Path:
        return self.folder / f"{sample:06d}.safetensors"


@lru_cache(maxsize=_OPEN_FILES)
def _file(path: Path) -> _Opened:
    file = safe_open(path, "pt")
    return file.get_tensor, json.loads(file.metadata()["calls"])
