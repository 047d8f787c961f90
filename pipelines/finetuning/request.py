"""The request for a run of fine-tuning, and the settings that two runs in one folder must share."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dma_diffusers.config import DMAConfig
from dma_diffusers.finetune.preparation import check_attention
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.pipelines.finetuning.data import Example
from dma_diffusers.pipelines.finetuning.trainer import Settings
from dma_diffusers.pipelines.fingerprint import config_identity, model_fingerprint

_LAYOUT = 3  # of the stored examples: since 3, samples that were drawn together share a file


@dataclass(frozen=True)
class Request:
    """A run of fine-tuning is asked for a model, what it learns from, and a precision.

    model: local folder or hub id. call: arguments of the pipeline's call, which drawing the teacher's samples takes,
    and the sample sheets. prompts: for distillation from the full-precision model. examples: for flow matching, instead
    of prompts. linears, rounding, attention, lora_rank: as `dma_diffusers.finetune.prepare` takes them; a rank of 0 is
    for training all weights. component: the pipeline's name for its transformer.
    """

    model: str | Path
    call: Mapping[str, Any]
    prompts: Sequence[str] = ()
    examples: Sequence[Example] = ()
    linears: str | None = None
    rounding: str = "nearest"
    attention: DMAConfig | None = None
    lora_rank: int = 0
    component: str = "transformer"
    gradient_checkpointing: bool = False
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.examples):
            raise ValueError("give prompts to distil from full precision, or a folder of data, and not both")
        if self.prompts and not (self.linears or self.attention):
            raise ValueError(
                "nothing is low-bit: the model would learn from itself; say which linears or attention"
            )
        if self.attention and self.attention.linears not in (None, self.linears):
            raise ValueError("attention= is for attention alone: give linear layers by --linears")
        if self.attention:
            check_attention(self.attention)

    def identity(self, steps: int) -> dict[str, Any]:
        """Return all on which the weights depend after any of these steps.

        The number of steps is among it only where the learning rate falls towards the last one.
        """
        return {
            **self.identity_of_examples(),
            "linears": self.linears,
            "rounding": self.rounding,
            "attention": self.attention and config_identity(self.attention),
            "lora_rank": self.lora_rank,
            "gradient_checkpointing": self.gradient_checkpointing,
            **asdict(self.settings),
            "steps": steps if self.settings.decay else None,
        }

    def identity_of_examples(self) -> dict[str, Any]:
        """Return all on which the examples depend that the model learns from."""
        return {
            "model": f"{self.model} ({model_fingerprint(self.model)[:12]})",
            "component": self.component,
            "call": dict(self.call),
            "prompts": _digest(self.prompts),
            "data": _digest([_words(example) for example in self.examples]),
            "seed": self.settings.seed,
            "layout": _LAYOUT,
        }


def check(folder: Path, identity: Mapping[str, Any], name: str = "settings.json") -> None:
    """Raise ValueError, naming the differences, where a folder was begun for something else."""
    path = folder / name
    if not path.is_file():
        return
    former, wanted = json.loads(path.read_bytes()), json.loads(json.dumps(identity))
    if differing := list(_differences(former, wanted)):
        raise ValueError(
            f"{folder} was begun with other settings: {'; '.join(differing)}. Give those, or another folder"
        )


def begin(folder: Path, identity: Mapping[str, Any], name: str = "settings.json") -> None:
    """Write what a folder is for; raises ValueError as `check` does."""
    check(folder, identity, name)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / name, json.dumps(identity, indent=1).encode())


def _differences(former: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = ""):
    for name in sorted(former.keys() | wanted.keys()):
        was, now = former.get(name), wanted.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{name}.")
        elif was != now:
            yield f"{prefix}{name} was {was!r}, now {now!r}"


def _words(example: Example) -> tuple[str, int, str]:
    """The size stands for what the file holds, which takes long to read."""
    return example.path.name, example.path.stat().st_size, example.caption


def _digest(values: Sequence[Any]) -> str | None:
    if not values:
        return None
    return f"{len(values)} ({hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:12]})"
