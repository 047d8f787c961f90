"""Put LoRA files on a pipeline, with weights of their own."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from dma_diffusers.errors import first_line
from dma_diffusers.pipelines.fingerprint import file_fingerprint


class Lora(NamedTuple):
    """A LoRA file, and the factor by which its change of the weights counts."""

    path: Path
    weight: float = 1.0

    @property
    def identity(self) -> tuple[str, float]:
        """Return what tells its effect from another's: a digest of the file, and the weight."""
        return file_fingerprint(self.path), self.weight


def parse(text: str, folder: Path = Path()) -> Lora:
    """Read `FILE` or `FILE:weight`, as in `style.safetensors:0.8`; a file with a colon in its name needs a weight.

    Args:
        folder: what a relative path starts from.

    Raises FileNotFoundError for a file that isn't there, ValueError for one that is no safetensors file.
    """
    name, _, last = text.rpartition(":")
    try:
        lora = Lora(folder / name, float(last)) if name else Lora(folder / text)
    except ValueError:
        lora = Lora(folder / text)
    if not lora.path.is_file():
        raise FileNotFoundError(f"there is no LoRA file {lora.path}: give FILE or FILE:weight")
    try:
        with safe_open(lora.path, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{lora.path} is no safetensors file: {error}") from None
    return lora


def check(kind: type[DiffusionPipeline], loras: Sequence[Lora]) -> None:
    """Raise ValueError if there are LoRAs, and pipelines of this class take none, or peft is not installed."""
    if loras and not hasattr(kind, "load_lora_weights"):
        raise ValueError(f"{kind.__name__} takes no LoRA: leave {loras[0].path} out")
    if loras and find_spec("peft") is None:
        raise ValueError("LoRA needs peft: pip install peft")


def add(pipe: DiffusionPipeline, loras: Sequence[Lora]) -> None:
    """Load the LoRAs, and make all of them active with their weights.

    Raises ValueError, naming the file, for a pipeline that takes none, and for a LoRA of another model.
    """
    kind = type(pipe).__name__
    check(type(pipe), loras)
    names = [f"lora_{number}" for number, _ in enumerate(loras)]
    for name, (path, _) in zip(names, loras, strict=True):
        try:
            pipe.load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=name, local_files_only=True
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise ValueError(f"{path} is no LoRA for this {kind}: {first_line(error)}") from error
        # Diffusers only warns of layers that its models have not.
        if (absent := _stored(path) - _loaded(pipe, name)) > 0 or not _loaded(pipe, name):
            raise ValueError(
                f"{path} is no LoRA for this {kind}: it has no place for {max(absent, 1)} of its tensors"
            )
    if loras:
        pipe.set_adapters(names, [lora.weight for lora in loras])


def _stored(path: Path) -> int:
    """Count the tensors of a file that have PEFT's names; those of other formats are renamed, joined and split."""
    with safe_open(path, "pt") as file:
        return sum(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in file.keys())  # noqa: SIM118


def _loaded(pipe: DiffusionPipeline, name: str) -> int:
    """Count the tensors of the adapter of this name in the pipeline's models."""
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(name in key.split(".") for model in models for key, _ in model.named_parameters())
