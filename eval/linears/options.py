"""The ways in which each input's layers can be quantised for a GPU, with their errors and their costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DiffusionPipeline

from dma_diffusers.components import device_of
from dma_diffusers.eval.cost import linear_clocks
from dma_diffusers.eval.linears.errors import squared_errors
from dma_diffusers.eval.linears.rows import Rows, draw_sampled
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.formats import get_format
from dma_diffusers.kernels.linears.groups import Groups
from dma_diffusers.kernels.linears.lowering import choose as choose_lowering
from dma_diffusers.linears.allocation import groups_of
from dma_diffusers.linears.calibration import Calibration
from dma_diffusers.linears.exclusions import Choice, choose
from dma_diffusers.linears.files import save_linears
from dma_diffusers.linears.plans import Target, make_plans
from dma_diffusers.linears.quantise import calibrate_linears, quantisable, quantize_linears, restore_linears

FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""MicroMix's thresholds are multiplied by these, from many bits to few."""
_WHOLE = {"sm_90": ("fp8", "int8")}
_WHOLE_ON_BLACKWELL = ("mxfp8", "nvfp4", "mxfp4")
_STOCK_BITS = 16


@dataclass(frozen=True)
class Item:
    """The layers that read one input, which are quantised in the same way, and what each way errs and costs.

    layers: their names in the model, without prefix. ways: of each way, the groups of each layer by its full name; None
    leaves it as it is. errors: float64 `[ways]`, squared relative errors of outputs, means over prompts, summed over
    layers. costs: float64 `[ways]`, an SM's clocks in a step. weights: how many numbers the layers' weights have.
    """

    layers: tuple[str, ...]
    ways: tuple[Mapping[str, Groups | None], ...]
    errors: np.ndarray
    costs: np.ndarray
    weights: int


@dataclass(frozen=True)
class LinearChoice:
    """A choice for linear layers.

    groups: of each layer, by its name in the pipeline; None leaves it as it is. bits: the average of a weight, with the
    scales of blocks. relative_l2: of the outputs, the root mean square over prompts and layers. clocks: an SM's in a
    step, predicted.
    """

    groups: dict[str, Groups | None]
    bits: float
    relative_l2: float
    clocks: float

    @property
    def is_stock(self) -> bool:
        """Tell whether all layers stay as they are."""
        return not any(self.groups.values())


def observe(
    pipe: DiffusionPipeline,
    recordings: Recordings,
    call: dict[str, Any],
    target: str,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> tuple[dict[str, Calibration], list[Item]]:
    """Draw the recorded prompts again, calibrate on all steps, and measure on the recorded ones (`measure`)."""
    rows = Rows(recordings.settings["steps"].__contains__)
    prompts, seeds = (
        [recordings.settings[name][i] for i in recordings.prompts] for name in ("prompts", "seeds")
    )
    seen = calibrate_linears(
        pipe, partial(draw_sampled, pipe, prompts, seeds, call, rows, on_step), progress=False
    )
    return seen, measure(pipe, seen, rows, target, on_step)


def measure(
    pipe: DiffusionPipeline,
    seen: Mapping[str, Calibration],
    rows: Rows,
    target: str,
    on_step: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> list[Item]:
    """Return an item for each input that was sampled; its first way is to leave the layers as they are.

    seen: as `calibrate_linears` gives it. target: the GPU, by architecture, whose products are counted.

    On Hopper the ways are fp8 and int8; on Blackwell mxfp8, MicroMix at `FACTORS`, nvfp4 and mxfp4. Those that the GPU
    has no fast product for are left out, and those with fewer than eight bits where published work wants eight. Several
    transformers of a pipeline have the same ways, and groups and permutations of their own. Raises ValueError where no
    layer was sampled.
    """
    choices = {prefix: (model, choose(model)) for prefix, model in quantisable(pipe)}
    first = next(iter(choices))
    found: dict[str, list[str]] = {}
    for name in choices[first][1].layers:
        if all(name in seen[prefix].readers and rows.inputs(prefix + name) for prefix in choices):
            found.setdefault(seen[first].shared(name), []).append(name)
    if not found:
        raise ValueError(
            "no linear layer ran in the recorded steps of every transformer: record more of them"
        )
    items = []
    for done, layers in enumerate(found.values(), 1):
        targets = [
            Target(
                prefix,
                model,
                Choice({name: of.layers[name] for name in layers}, of.blocks, of.kept),
                seen[prefix],
            )
            for prefix, (model, of) in choices.items()
        ]
        items.append(_item(targets, layers, rows, target))
        on_step("measuring linear layers", done, len(found))
    return items


def choice_of(items: Sequence[Item], ways: Sequence[int]) -> LinearChoice:
    """Return what it is that each item takes this one of its ways."""
    taken = list(zip(items, ways, strict=True))
    groups = {name: groups for item, way in taken for name, groups in item.ways[way].items()}
    layers = sum(len(item.layers) for item in items)
    bits = sum(item.weights * _bits(item.ways[way]) for item, way in taken) / sum(i.weights for i in items)
    error = sum(item.errors[way] for item, way in taken) / layers
    return LinearChoice(groups, bits, float(error) ** 0.5, float(sum(item.costs[way] for item, way in taken)))


def save_choice(pipe: DiffusionPipeline, choice: LinearChoice, path: Path) -> None:
    """Write the file with which `DMAConfig(linears=path)` quantises the weights of such a model as chosen.

    pipe: calibrated by `calibrate_linears`; its layers are stock, before and afterwards.
    """
    groups = {name: groups for name, groups in choice.groups.items() if groups}
    stock = {
        name
        for prefix, model in quantisable(pipe)
        for name in choose(model).layers
        if prefix + name not in groups
    }
    quantize_linears(pipe, "micromix", groups=groups, skip=sorted(stock), progress=False)
    try:
        save_linears(pipe, path, weights=False)
    finally:
        restore_linears(pipe)


def _item(targets: Sequence[Target], layers: Sequence[str], rows: Rows, gpu: str) -> Item:
    ways, errors, costs = [], [], []
    for way in _ways(targets, layers, gpu):
        error = clocks = 0.0
        for target in targets:
            own = {name: groups for name in layers if (groups := way[target.prefix + name])}
            if own:
                make_plans([target], "micromix", None, own)
            for name in layers:
                layer, full = target.choice.layers[name], target.prefix + name
                plan = target.plans[name] if own else None
                device = device_of(target.model, layer)
                error += np.mean(squared_errors(layer, plan, rows.inputs(full), device)) / len(targets)
                tokens = rows.tokens[rows.first[full]] / rows.steps
                clocks += linear_clocks(gpu, tokens, layer.out_features, layer.in_features, way[full])
        ways.append(way)
        errors.append(error)
        costs.append(clocks)
    weights = sum(target.choice.layers[name].weight.numel() for target in targets for name in layers)
    return Item(tuple(layers), tuple(ways), np.array(errors), np.array(costs), weights)


def _ways(targets: Sequence[Target], layers: Sequence[str], gpu: str) -> list[Mapping[str, Groups | None]]:
    """The different ways in which these layers can be quantised, the first of them not at all."""
    ways: list[Mapping[str, Groups | None]] = [
        {target.prefix + name: None for target in targets for name in layers}
    ]
    makers: list[Callable[[Target, int], Groups]] = [
        lambda target, width, format=format: Groups.whole(format, width)
        for format in _WHOLE.get(gpu, _WHOLE_ON_BLACKWELL)
    ]
    if gpu not in _WHOLE:
        makers += [
            lambda target, width, factor=factor: groups_of(
                width, target.seen.statistics(layers[0]).shares().at(factor)
            )
            for factor in FACTORS
        ]
    for make in makers:
        way = {
            target.prefix + name: make(target, layer.in_features)
            for target in targets
            for name, layer in target.choice.layers.items()
        }
        if way not in ways and all(_is_fit(target, way, gpu) for target in targets):
            ways.append(way)
    return ways


def _is_fit(target: Target, way: Mapping[str, Groups | None], gpu: str) -> bool:
    """Tell whether the GPU has a fast product for each layer, and layers that are to keep eight bits have them."""
    for name, layer in target.choice.layers.items():
        groups = way[target.prefix + name]
        if choose_lowering(gpu, groups, out_features=layer.out_features).lowering == "reference":
            return False
        if name in target.choice.kept and any(get_format(each).bits < 8 for each in groups.formats):
            return False
    return True


def _bits(way: Mapping[str, Groups | None]) -> float:
    """The average bits of a weight: layers of one input have the same groups, but for models of their own."""
    return float(np.mean([groups.average_bits if groups else _STOCK_BITS for groups in way.values()]))
