"""This module lists the ways to compute a step that `bench pipeline` compares: stock, torchao's, and ours."""

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from dma_diffusers import apply, load_linears, quantize_linears
from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.bench.models import Workload
from dma_diffusers.eval.quality import configurations
from dma_diffusers.families import family_of
from dma_diffusers.kernels.lowerings import BLOCK_SCALED_ARCHITECTURES
from dma_diffusers.kernels.tiling.policies import Dense
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.linears.exclusions import choose
from dma_diffusers.linears.methods import is_file

STOCK, PEER, OURS = "stock", "peer", "ours"
PLAIN, TORCHAO = "stock", "stock, torchao fp8"
CALIBRATED_FP8 = "fp8-calibrated"  # fp8 with a fixed scale for each input
_NEAR_FROM = 10_000  # tokens, from which a neighbourhood that was published for more of them is measured
# No step and no layer is dense; without these fields a model's family may ask for some.
_UNGATED = {"dense_above_sigma": 1, "dense_layers": ()}
_LINEARS = re.compile(r"(?:^|,)\s*linears=([^,]+)")

PutOn = Callable[[nn.Module, dict[str, Any]], None]


class Asked(NamedTuple):
    """A configuration asks for attention, None for stock's, under a name, and for linears, empty for bf16.

    linears: a method of `quantize_linears`, a file of `save_linears`, or `CALIBRATED_FP8`.
    """

    name: str
    attention: DMAConfig | None
    linears: str = ""


@dataclass(frozen=True)
class Way:
    """A way to compute a step.

    kind: `STOCK`, `PEER` or `OURS`. put_on: changes a model, given the inputs of its step to calibrate on; raises, with
    the reason, where it can't. attends: tells if attention is ours; otherwise stock's best backend runs it.
    quantises: tells if its linears are quantised. parts: the names of the two ways that have only its attention and
    only its linears; empty where it has just one of them.
    """

    name: str
    kind: str
    put_on: PutOn = lambda model, inputs: None
    attends: bool = False
    quantises: bool = False
    parts: tuple[str, ...] = ()


def parse(texts: Sequence[str]) -> list[Asked]:
    """Read configurations such as `preset=hopper,linears=fp8`; raises ValueError, in one line, for anything else."""
    found = []
    for text in texts:
        methods = _LINEARS.findall(text)
        name = _LINEARS.sub("", text).lstrip(",").strip()
        if len(methods) > 1:
            raise ValueError(f"config {text!r}: give linears once")
        if methods and methods[0] != CALIBRATED_FP8:
            is_file(methods[0])  # raises for a word that is no method
        attention = configurations.parse(name) if name or not methods else None
        found.append(Asked(name, attention, *methods))
    return found


def default_configs(workload: Workload, model: nn.Module, architecture: str) -> list[Asked]:
    """Return attention that is LOW everywhere, and that of a neighbourhood if there is one, with fp8 linears.

    The neighbourhood is the workload's own, or, for many tokens, the one that was published for the model's family. No
    step is dense. Formats are those that the GPU multiplies.
    """
    preset = DMAConfig.preset("b200" if architecture in BLOCK_SCALED_ARCHITECTURES else "hopper")
    formats = {"high": preset.high, "low": preset.low} | _UNGATED
    low = DMAConfig(policy=str(Dense(Class.LOW)), **formats)
    found = [Asked(f"LOW {preset.low}", low, method) for method in ("fp8", CALIBRATED_FP8)]
    if workload.neighborhood is not None:
        near = DMAConfig(policy=str(workload.neighborhood), **formats)
        found.append(Asked(f"neighbourhood, LOW {preset.low}", near, "fp8"))
    elif math.prod(workload.grid) >= _NEAR_FROM and family_of(model).published:
        near = DMAConfig.published(model, workload.grid, **formats)
        found.append(Asked(f"published neighbourhood, LOW {preset.low}", near, "fp8"))
    return found


def ways(configs: Sequence[Asked], only: Sequence[str] = ()) -> list[Way]:
    """Return stock's way, torchao's, and those of each configuration: attention alone, linears alone, and both.

    only: names, or patterns such as `*linears=fp8`, of the ways that are wanted; all if empty. Raises ValueError for
    one that fits no way.
    """
    found = [Way(PLAIN, STOCK), Way(TORCHAO, PEER, _put_torchao_on, quantises=True)]
    alone = [asked._replace(linears="") for asked in configs if asked.attention]
    alone += [Asked("", None, asked.linears) for asked in configs if asked.linears]
    found += [_ours(asked) for asked in {_name(asked): asked for asked in (*alone, *configs)}.values()]
    for pattern in only:
        if not any(fnmatch.fnmatchcase(way.name, pattern) for way in found):
            names = "; ".join(way.name for way in found)
            raise ValueError(f"no way is called {pattern!r}: choose from {names}; * stands for anything")
    return [way for way in found if not only or any(fnmatch.fnmatchcase(way.name, each) for each in only)]


def _name(asked: Asked) -> str:
    return ",".join(filter(None, (asked.name, asked.linears and f"linears={asked.linears}")))


def _ours(asked: Asked) -> Way:
    parts = (asked.name, f"linears={asked.linears}") if asked.attention and asked.linears else ()
    attends, quantises = asked.attention is not None, bool(asked.linears)
    return Way(_name(asked), OURS, partial(_put_ours_on, asked), attends, quantises, parts)


def _put_ours_on(asked: Asked, model: nn.Module, inputs: dict[str, Any]) -> None:
    if asked.linears:
        _quantise(asked.linears, model, inputs)
    if asked.attention:
        apply(model, asked.attention)


def _quantise(linears: str, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Quantise linear layers; what needs calibration is calibrated on the step that is timed."""
    if linears == CALIBRATED_FP8:
        quantize_linears(model, "fp8", calibration=[inputs], keep_original=False, progress=False)
    elif is_file(linears):
        load_linears(model, linears)
    else:
        calibration = [inputs] if linears == "micromix" else None
        quantize_linears(model, linears, calibration=calibration, keep_original=False, progress=False)


def _put_torchao_on(model: nn.Module, inputs: dict[str, Any]) -> None:
    """Quantise the layers that ours quantises.

    Inductor's settings stay as they are: those that torchao recommends would hold for all that this process compiles,
    every other way too, and tuning by coordinate descent takes minutes for a model.
    """
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    names = choose(model).layers
    quantize_(
        model,
        Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        filter_fn=lambda module, name: name in names,
    )
