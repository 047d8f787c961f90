"""An evaluation compares full precision, another exact kernel for the noise floor, and configurations of DMA."""

import json
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel

from dma_diffusers.config import PRESETS, DMAConfig

BASELINE, NOISE_FLOOR, CONFIGURATION = "baseline", "noise floor", "configuration"

_ALL_TOKENS = 2**20  # a sink this wide makes every tile HIGH
_ALL_LOW = {"window": 0, "sink": 0, "protect_text": False}


@dataclass(frozen=True)
class Row:
    """A row is one way to draw all pictures. config: None leaves the pipeline as it is."""

    name: str
    role: str = CONFIGURATION
    config: DMAConfig | None = None

    def kernels(self) -> AbstractContextManager:
        """Choose the exact kernels that attention left to stock may take; the first that can run a call takes it.

        The noise floor takes another one than every other row.
        """
        first = SDPBackend.FLASH_ATTENTION if self.role != NOISE_FLOOR else _OTHER[torch.cuda.is_available()]
        return sdpa_kernel([first, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True)


_OTHER = {True: SDPBackend.EFFICIENT_ATTENTION, False: SDPBackend.MATH}

FULL_PRECISION = Row("full precision, first drawing", BASELINE)
"""Every row is compared with this one."""
AGAIN = Row("full precision", BASELINE, DMAConfig.preset("exact"))
"""The baseline is compared with itself: it is drawn a second time, with processors that leave every call to stock."""
ANOTHER_KERNEL = Row("noise floor", NOISE_FLOOR)
"""This shows what exchanging one exact attention kernel for another changes."""

DEFAULT = {
    "DMA, window 128": DMAConfig.preset("b200", window=128),
    "DMA, window 384": DMAConfig.preset("b200", window=384),
    "all MXFP8": DMAConfig.preset("b200", sink=_ALL_TOKENS),
    "all MXFP4": DMAConfig.preset("b200", low="mxfp4", **_ALL_LOW),
    "all NVFP4": DMAConfig.preset("b200", low="nvfp4", **_ALL_LOW),
    "all INT8": DMAConfig.preset("hopper", low="int8", **_ALL_LOW),
}
"""`dma-diffusers eval` compares these unless it is told otherwise."""


def rows(configurations: dict[str, DMAConfig]) -> list[Row]:
    """Return the two rows that are always there, and one for each configuration.

    Raises ValueError for a name that is taken.
    """
    always = [AGAIN, ANOTHER_KERNEL]
    if taken := [row.name for row in (FULL_PRECISION, *always) if row.name in configurations]:
        raise ValueError(f"a configuration cannot be called {taken[0]!r}: that row is always there")
    return always + [Row(name, CONFIGURATION, config) for name, config in configurations.items()]


def parse(text: str) -> DMAConfig:
    """Read a configuration such as `exact`, `preset=b200`, `low=mxfp4,window=384`, `policy=FILE,quality=0.7`.

    A policy in words, `policy=neighborhood(window=8x8)`, is a field; without parentheses it is a file of `calibrate`.
    So is a schedule, `schedule=sigma>0.9: dense(); low=int8/bf16`.
    Raises ValueError, in one line, for anything else.
    """
    if text in PRESETS:
        return DMAConfig.preset(text)
    try:
        fields = yaml.safe_load("{" + _TOKENS.sub(_yaml, text) + "}")
    except yaml.YAMLError:
        fields = None
    return _configuration(text, fields)


_TOKENS = re.compile(
    r"(?<=schedule=)([^,()]|\([^()]*\))+|=|\w+\s*\([^()]*\)(\s*\|\s*\w+\s*\([^()]*\))*"
)  # these are schedules in words, equals signs, and policies in words


def _yaml(token: re.Match) -> str:
    return ": " if token[0] == "=" else json.dumps(token[0])


def named(texts: Sequence[str]) -> dict[str, DMAConfig]:
    """Return configurations under the texts that say them; ValueError for one that is given twice."""
    if repeated := {text for text in texts if texts.count(text) > 1}:
        raise ValueError(f"configuration {repeated.pop()!r} is given twice")
    return {text: parse(text) for text in texts}


def with_linears(configurations: dict[str, DMAConfig], linears: str) -> dict[str, DMAConfig]:
    """Return the configurations with these linear layers, but for those that say which."""
    return {
        name: config if config.linears else DMAConfig.of(config, linears=linears)
        for name, config in configurations.items()
    }


def read(path: Path) -> dict[str, DMAConfig]:
    """Read configurations by name from a YAML file that maps names to fields or to text as `parse` takes it.

    Raises ValueError, in one line, where it holds anything else.
    """
    try:
        entries = yaml.safe_load(path.read_bytes().decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path} must map names to configurations, as in `DMA 384: low=mxfp4,window=384`")
    return {
        str(name): parse(entry) if isinstance(entry, str) else _configuration(f"{path}: {name}", entry)
        for name, entry in entries.items()
    }


def _configuration(label: str, fields: Any) -> DMAConfig:
    if not isinstance(fields, dict) or not fields or None in fields.values():
        raise ValueError(
            f"configuration {label!r}: give a preset ({', '.join(PRESETS)}) or fields, as in low=mxfp4,window=384"
        )
    try:
        return DMAConfig.from_fields({str(name): value for name, value in fields.items()})
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f"configuration {label!r}: {error}") from error
