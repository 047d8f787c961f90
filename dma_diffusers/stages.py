"""Stages: ranges of noise levels in which each attention module of a model has one configuration.

A schedule makes them, and so do dense steps, which are a schedule of two entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch

from dma_diffusers import schedule
from dma_diffusers.config import DIAGONAL, DMAConfig, Entry
from dma_diffusers.dense import dense_parts
from dma_diffusers.families import Family
from dma_diffusers.kernels.tiling.policies import Dense
from dma_diffusers.kernels.tiling.precision_map import Class

_DENSE = str(Dense(Class.HIGH))


@dataclass(frozen=True)
class ModuleStages:
    """The configurations of one attention module at all noise levels.

    config: its own, of which the entries have other fields. entries: of its schedule, a single one without a schedule.
    of_stage: the number of the entry in each stage of the model.
    """

    config: DMAConfig
    entries: tuple[Entry, ...]
    of_stage: tuple[int, ...]

    @cached_property
    def needs_grid(self) -> str:
        """The words of a policy that needs to know what tokens lie on; empty if none of the entries has one."""
        asked = (entry.config.asked for entry in self.entries)
        return next((str(policy) for policy in asked if policy.on_grid), "")

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The entries as a schedule has them: level, policy, and other fields where they are not the module's."""
        found = []
        for above, config in self.entries:
            own = {name: getattr(config, name) for name in schedule.OF_ENTRIES}
            others = [schedule.say(*each) for each in own.items() if each[1] != getattr(self.config, each[0])]
            said = " ".join([config.words, *others])
            found.append((above, said))
        return schedule.of_entries(found)


@dataclass(frozen=True)
class Stages:
    """The stages of a model say what each of its attention modules runs at every noise level.

    above: falling levels (0 to 1); a stage reaches from each of them up to the one before, the last is all the rest.
    modules: by name. note: whose choice dense steps and layers are, as in `DenseParts`.
    """

    above: tuple[float, ...]
    modules: Mapping[str, ModuleStages]
    note: str

    @cached_property
    def kinds(self) -> tuple[int, ...]:
        """The number of each stage's kind; stages of one kind differ in policies alone, and share compiled graphs."""
        of_stages = [
            tuple(_outside_policy(own.entries[own.of_stage[stage]].config) for own in self.modules.values())
            for stage in range(len(self.above) + 1)
        ]
        different = list(dict.fromkeys(of_stages))
        return tuple(map(different.index, of_stages))

    def number(self, sigma: float | None) -> int:
        """The number of the stage at a noise level; that of the highest levels where it is not known."""
        if sigma is None:
            return 0
        # A noise level on the device is a float32, so that one at a threshold must be compared as such.
        level, *above = torch.tensor([sigma, *self.above], dtype=torch.float32, device="cpu").tolist()
        return sum(level <= threshold for threshold in above)

    def at(self, module: str, sigma: float | None) -> DMAConfig:
        """The configuration of a module at a noise level."""
        own = self.modules[module]
        return own.entries[own.of_stage[self.number(sigma)]].config


@lru_cache(256)  # `eval` asks again for each recorded call
def stages(config: DMAConfig, family: Family, kind: str, modules: tuple[str, ...]) -> Stages:
    """The stages that `config` makes of a model of this family.

    kind: name of its class. modules: its attention modules that can be intercepted, in module order.
    Raises ValueError as `dense_parts` does, and where schedules of single modules make too many stages.
    """
    dense = dense_parts(config, family, kind, modules)
    own = {name: config.of_module(name) for name in modules}
    entries = {name: _entries(own[name], dense.above_sigma, name in dense.modules) for name in modules}
    above = sorted({entry.above for each in entries.values() for entry in each[:-1]}, reverse=True)
    if len(above) >= schedule.MOST_ENTRIES:
        raise ValueError(
            f"the modules' schedules have the noise levels {', '.join(map(str, above))} between them: at most "
            f"{schedule.MOST_ENTRIES - 1} can be had, for the model may be compiled once more for each"
        )
    found = {
        name: ModuleStages(own[name], each, tuple(_holding(each, level) for level in (*above, -1.0)))
        for name, each in entries.items()
    }
    return Stages(tuple(above), found, dense.note)


def _outside_policy(config: DMAConfig) -> tuple[Any, ...]:
    """Everything but the words of the policy that may differ between a module's entries."""
    is_all_low = config.lowering == "fastest" and config.asked == Dense(Class.LOW)
    return *(getattr(config, name) for name in schedule.OF_ENTRIES), is_all_low


def _holding(entries: tuple[Entry, ...], level: float) -> int:
    """The number of the entry that holds right above a noise level."""
    return next((i for i, entry in enumerate(entries[:-1]) if entry.above <= level), len(entries) - 1)


def _entries(config: DMAConfig, dense_above: float | None, is_dense: bool) -> tuple[Entry, ...]:
    """The entries of a module: those of its schedule, or dense steps, if there are any, before its configuration.

    is_dense: the module runs with every tile HIGH at every level.
    """
    dense = replace(config, schedule=None, policy=_DENSE, **DIAGONAL)
    if is_dense:
        return (Entry(0.0, dense),)
    if dense_above is None or config.schedule is not None:
        return config.entries
    return (Entry(float(dense_above), dense), *config.entries)
