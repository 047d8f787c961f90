"""A choice of policies, module by module and range by range, is written as a configuration."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.recordings.options import Range, joined
from dma_diffusers.eval.recordings.search import Selection
from dma_diffusers.eval.recordings.store import Recordings
from dma_diffusers.kernels.tiling.policies import Dense, Diagonal, Policy

AS_CHOSEN: dict[str, Any] = {"dense_above_sigma": 1, "dense_layers": ()}
"""No step and no layer is dense by the default of a model's family: the choice says which are."""


class Entry(NamedTuple):
    """A module has this policy in this range of noise levels."""

    range: Range
    policy: Policy


class OfModule(NamedTuple):
    """A module has these formats (HIGH, LOW), and entries at falling noise levels, neighbours of which differ."""

    formats: tuple[str, str]
    entries: tuple[Entry, ...]


def of_modules(
    recordings: Recordings,
    found: Selection,
    formats: Sequence[tuple[str, str]],
    policies: Sequence[Policy],
    ranges: Sequence[Range],
) -> dict[str, OfModule]:
    """Return what the search found for each recorded module."""
    heads = {recording.module: recording.shape[1] for recording in recordings}
    chosen = {}
    for name, pair, of_ranges in zip(recordings.modules, found.formats, found.option, strict=True):
        entries: list[Entry] = []
        for above, numbers in zip(ranges, of_ranges, strict=True):
            policy = joined([policies[number] for number in numbers[: heads[name]]])
            if entries and entries[-1].policy == policy:
                above = Range(above.above, entries.pop().range.steps + above.steps)
            entries.append(Entry(above, policy))
        chosen[name] = OfModule(formats[pair], tuple(entries))
    return chosen


def configuration(recordings: Recordings, chosen: Mapping[str, OfModule]) -> DMAConfig:
    """Write a choice: what most modules share, and what each has of its own."""
    fields = {name: _fields(of_module) for name, of_module in chosen.items()}
    common = {}
    for key in ("high", "low", "sink", "window"):
        shared = [own[key] for own in fields.values() if key in own and not isinstance(own[key], tuple)]
        if shared:
            common[key] = Counter(shared).most_common(1)[0][0]
    own = {
        name: {key: value for key, value in changes.items() if common.get(key) != value}
        for name, changes in fields.items()
    }
    model = recordings.settings["model"]
    modules = {name: own.get(name, {}) for name in model["modules"]}
    of_model = {"model": model["class"], "weights": model.get("fingerprint")}
    return DMAConfig(**common, **AS_CHOSEN, modules=modules, **of_model)


def _fields(of_module: OfModule) -> dict[str, Any]:
    """Return the fields that say a module's choice: a schedule only where its policy changes with the noise level."""
    (high, low), entries = of_module
    policy = entries[0].policy
    if len(entries) > 1:
        schedule = tuple((entry.range.above, str(entry.policy)) for entry in entries)
        return {"high": high, "low": low, "schedule": schedule}
    if policy == Dense():
        return {"high": high, "dense": True}
    if isinstance(policy, Diagonal):
        return {"high": high, "low": low, "window": policy.window, "sink": policy.sink}
    return {"high": high, "low": low, "policy": str(policy)}
