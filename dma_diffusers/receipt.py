"""Receipts: what was chosen for each attention module and each linear layer, and why."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from typing import Any

from dma_diffusers.linears.receipt import LinearReceipt, lines

_FORMER_NAMES = {"diverted": "intercepted", "left": "fallbacks"}
_DENSE_STEPS = "every tile HIGH for its noise level"


@dataclass(frozen=True)
class ModuleReceipt:
    """The receipt of one attention module. Calls inside a compiled graph are not counted in it.

    architecture: "sm_100", "cpu" and the like; None for a module that keeps its stock processor.
    lowering: "stock" for stock attention, "none" if an explicit lowering cannot run, None if not known yet.
    high, low: the precisions that were asked for, in words. policy: the policy that was asked for, or the schedule,
        dense steps included. All three are None for a module that keeps its stock processor.
    reason: the reason for that lowering.
    intercepted: the number of calls that the operator ran. by_entry: how many of these ran under each entry of the
        schedule, by its words; empty where there is none.
    fallbacks: the number of calls that stock attention ran, by reason.
    inexact_rows: rows of q and k (one token of one head each), summed over calls, that were not stored as their format
        says, because the scales of their blocks are too far apart for lowering "faithful".
    relative_error: the guard's estimate of the output's relative error (L2), against exact attention; None for none.
    sampled_rows: so many rows (one query of one head each) are behind it. turned: why the guard turned the module to
        HIGH or to stock, in words; these rows were sampled since.
    notes: where dense steps and layers come from if they were not asked for, and what the policy changed for the
        grid of the last call, such as a window that was clamped.
    """

    module: str
    lowering: str | None
    high: str | None = None
    low: str | None = None
    policy: str | None = None
    reason: str = ""
    intercepted: int = 0
    fallbacks: dict[str, int] = field(default_factory=dict)
    architecture: str | None = None
    inexact_rows: int = 0
    notes: tuple[str, ...] = ()
    by_entry: dict[str, int] = field(default_factory=dict)
    relative_error: float | None = None
    sampled_rows: int = 0
    turned: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.lowering == "stock":
            return f"stock attention: {self.reason}"
        lowering = f"lowering {self.lowering or 'not known'} on {self.architecture}"
        return f"{self.high}|{self.low} {self.policy}, {lowering}: {self.reason}"


@dataclass(frozen=True)
class Receipt:
    """The receipts of a model's or a pipeline's attention modules, in module order, and of its linear layers.

    linears: those that are quantised, and those that were left alone beside them; empty where none is quantised.
    """

    modules: tuple[ModuleReceipt, ...]
    linears: tuple[LinearReceipt, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        return {
            "modules": [asdict(module) for module in self.modules],
            "linears": [asdict(layer) for layer in self.linears],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Receipt":
        """The receipt that `to_dict` stored, also with the fields of former versions; unknown ones are passed over."""
        known = {field.name for field in fields(ModuleReceipt)}
        known_of_layers = {field.name for field in fields(LinearReceipt)}
        modules = map(_with_present_fields, stored["modules"])
        layers: Iterator[dict[str, Any]] = (
            {name: tuple(value) if isinstance(value, list) else value for name, value in layer.items()}
            for layer in stored.get("linears", ())
        )
        return cls(
            tuple(ModuleReceipt(**{n: v for n, v in module.items() if n in known}) for module in modules),
            tuple(
                LinearReceipt(**{n: v for n, v in layer.items() if n in known_of_layers}) for layer in layers
            ),
        )

    def __str__(self) -> str:
        return "\n".join([*self._of_attention(), *lines(self.linears)])

    def _of_attention(self) -> list[str]:
        if not self.modules:
            return ["stock attention: nothing is applied"]
        found = []
        for choice, group in groupby(sorted(self.modules, key=str), key=str):
            members = list(group)
            named = f"{len(members)} modules ({members[0].module}, …)" if members[1:] else members[0].module
            found.append(f"{named}: {choice}")
            fallbacks = sum((Counter(member.fallbacks) for member in members), Counter())
            found.append(f"  {sum(member.intercepted for member in members)} calls intercepted")
            if by_entry := sum((Counter(member.by_entry) for member in members), Counter()):
                calls_of = (f"{by_entry[entry]} of {entry}" for entry in members[0].by_entry)
                found[-1] += f": {'; '.join(calls_of)}"
            found.extend(f"  {calls} calls fell back to stock: {why}" for why, calls in fallbacks.items())
            found.extend(f"  note: {note}" for note in dict.fromkeys(n for m in members for n in m.notes))
            found.extend(f"  guard: {m.module}: {words}" for m in members for words in m.turned)
            if errors := [m.relative_error for m in members if m.relative_error is not None]:
                rows = sum(member.sampled_rows for member in members)
                found.append(f"  relative error {_range(errors)}, estimated from {rows:,} rows")
            if inexact := sum(member.inexact_rows for member in members):
                found.append(
                    f"  {inexact} rows of q and k lost small numbers that {members[0].high}|{members[0].low} "
                    "would keep: the scales of their blocks are too far apart for FP8"
                )
        return found


def _with_present_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored module's fields, under their present names."""
    fields_of = {_FORMER_NAMES.get(name, name): value for name, value in stored.items()}
    if dense := fields_of.pop("in_dense_steps", 0):  # receipts from before schedules
        fields_of["by_entry"] = {_DENSE_STEPS: dense, "the others": fields_of["intercepted"] - dense}
    return fields_of


def _range(errors: list[float]) -> str:
    low, high = (f"{error:.2g}" for error in (min(errors), max(errors)))
    return low if low == high else f"{low} to {high}"
