"""A calibrated policy says for each quality what was chosen, what it costs and errs; it has a file and tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.linears.options import LinearChoice
from dma_diffusers.eval.recordings.options import EVERY_KEY
from dma_diffusers.kernels.tiling.precision_map import Class
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.policy_file import FORMAT, VERSION

LADDER_HEADER = (
    "quality", "relative L2", "held out", "at most", "cost", *(each.name for each in Class), "formats", "policies",
)  # fmt: skip
LINEARS_HEADER = ("quality", "cost", "attention's L2", "linears' L2", "linears' bits", "left in bf16")
MODULES_HEADER = (
    "module", "noise", "formats", "policy", "relative L2", "cost", *(each.name for each in Class)
)  # fmt: skip
_CONFIG = ("high", "low", "rotation", "window", "sink", "dense_above_sigma", "dense_layers")


class EntryFound(NamedTuple):
    """A module has this policy above a noise level, up to that of its entry before; this is what it costs and buys.

    formats, policy: in words. cost: predicted clocks over those of bf16 attention there. relative_l2: the root mean
    square over prompts and steps. pairs: how many pairs of tiles are HIGH, LOW, MEAN and SKIP.
    """

    module: str
    above: float
    formats: str
    policy: str
    cost: float
    relative_l2: float
    pairs: list[float]


@dataclass(frozen=True)
class Choice:
    """A choice was made for a quality, and has its cost and its error on the recordings.

    relative_l2: of the output, the root mean square over prompts, steps and modules, linear layers among them. budget:
    the most that it was allowed to be. held_out: `relative_l2` of attention on prompts that it was not chosen by, with
    linear layers' as it is; None for no such prompts. cost: predicted clocks over those of bf16 attention, and of bf16
    linear layers if these were chosen for. recall: the share of attention in tiles that are HIGH by their position.
    of_modules: relative L2 of each attention module, means over prompts and steps. entries: what each module's policies
    cost and err, module by module, at falling noise levels. attention_l2: `relative_l2` over attention alone. linears:
    None where linear layers were not chosen for.
    """

    quality: float
    config: DMAConfig
    budget: float
    relative_l2: float
    held_out: float | None
    cost: float
    recall: float
    of_modules: dict[str, float]
    entries: tuple[EntryFound, ...]
    attention_l2: float
    linears: LinearChoice | None = None

    @property
    def shares(self) -> list[float]:
        """Return the shares of all modules' pairs of tiles that are HIGH, LOW, MEAN and SKIP."""
        return _shares(
            [sum(of_class) for of_class in zip(*(entry.pairs for entry in self.entries), strict=True)]
        )

    def file_of_linears(self, policy: str) -> str | None:
        """Return the name of the file of linear layers that goes with a policy file of this name; None for none."""
        if self.linears is None or self.linears.is_stock:
            return None
        return f"{Path(policy).stem}-{self.quality:g}.safetensors"


@dataclass(frozen=True)
class Policy:
    """A policy is a ladder of choices, lowest quality first, with what they were chosen from.

    quality: the one that was asked for.
    """

    quality: float
    model: dict[str, Any]
    choices: tuple[Choice, ...]
    evidence: dict[str, Any]

    @property
    def chosen(self) -> Choice:
        """Return the choice of the quality that was asked for."""
        return next(choice for choice in self.choices if choice.quality == self.quality)

    def save(self, path: Path) -> None:
        """Write the policy file, which `DMAConfig.from_file` reads; files of linear layers are written apart."""
        write_atomically(path, json.dumps(self.to_dict(path.name), indent=1, allow_nan=False).encode())

    def to_dict(self, name: str = "policy.json") -> dict[str, Any]:
        """Return the document (`dma_diffusers.policy_file`) of a policy file of this name."""
        choices = [
            {
                "quality": choice.quality,
                "config": {field: getattr(choice.config, field) for field in _CONFIG} | _linears(choice, name),
                "modules": {module: dict(changes) for module, changes in choice.config.modules if changes},
                "evidence": {
                    "relative_l2": choice.relative_l2, "relative_l2_held_out": choice.held_out,
                    "budget": choice.budget, "cost": choice.cost, "recall": choice.recall,
                    "shares": _named(choice.shares), "relative_l2_of_modules": choice.of_modules,
                    "entries": [
                        entry._asdict() | {"pairs": _named(entry.pairs)} for entry in choice.entries
                    ],
                } | _evidence_of_linears(choice),
            }
            for choice in self.choices
        ]  # fmt: skip
        return {
            "format": FORMAT, "version": VERSION, "quality": self.quality, "model": self.model,
            "choices": choices, "evidence": self.evidence,
        }  # fmt: skip


def _linears(choice: Choice, policy: str) -> dict[str, str]:
    """The field of `DMAConfig`, if there is one."""
    file = choice.file_of_linears(policy)
    return {"linears": file} if file else {}


def _evidence_of_linears(choice: Choice) -> dict[str, Any]:
    if choice.linears is None:
        return {}
    return {
        "relative_l2_of_attention": choice.attention_l2, "relative_l2_of_linears": choice.linears.relative_l2,
        "bits_of_linears": choice.linears.bits,
        "linears": {
            layer: groups and dict(zip(groups.formats, groups.widths, strict=True))
            for layer, groups in choice.linears.groups.items()
        },
    }  # fmt: skip


def ladder(policy: Policy) -> list[list[str]]:
    """Return the rows under `LADDER_HEADER`, one a quality. The cost is predicted, in units of bf16's."""
    rows = []
    for choice in policy.choices:
        kinds = {entry.policy.partition("(")[0] for entry in choice.entries}
        rows.append([
            f"{choice.quality:g}" + " (asked for)" * (choice.quality == policy.quality),
            f"{choice.relative_l2:.4f}", "–" if choice.held_out is None else f"{choice.held_out:.4f}",
            f"{choice.budget:.4f}", f"{choice.cost:.3f}", *_percent(choice.shares),
            ", ".join(sorted({entry.formats for entry in choice.entries})), ", ".join(sorted(kinds)),
        ])  # fmt: skip
    return rows


def linears(policy: Policy) -> list[list[str]]:
    """Return the rows under `LINEARS_HEADER`, one a quality; none where linear layers were not chosen for.

    Relative L2 is the root mean square over attention modules alone, and over linear layers alone.
    """
    rows = []
    for choice in policy.choices:
        if chosen := choice.linears:
            stock = sum(groups is None for groups in chosen.groups.values())
            rows.append([
                f"{choice.quality:g}", f"{choice.cost:.3f}", f"{choice.attention_l2:.4f}",
                f"{chosen.relative_l2:.4f}", f"{chosen.bits:.2f}", f"{stock} of {len(chosen.groups)}",
            ])  # fmt: skip
    return rows


def modules(policy: Policy) -> list[list[str]]:
    """Return the rows under `MODULES_HEADER`, for the quality that was asked for: one a module and range of noise."""
    rows = []
    for entry in policy.chosen.entries:
        words = entry.policy.replace(str(EVERY_KEY), "all")
        noise = f"over {entry.above:g}" if entry.above else "rest"
        rows.append([
            entry.module, noise, entry.formats, words, f"{entry.relative_l2:.4f}", f"{entry.cost:.3f}",
            *_percent(_shares(entry.pairs)),
        ])  # fmt: skip
    return rows


def _shares(pairs: list[float]) -> list[float]:
    return [number / sum(pairs) for number in pairs]


def _percent(shares: list[float]) -> list[str]:
    return [f"{share:.1%}" for share in shares]


def _named(of_classes: list[float]) -> dict[str, float]:
    return {each.name.lower(): value for each, value in zip(Class, of_classes, strict=True)}
