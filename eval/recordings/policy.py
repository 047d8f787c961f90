"""A calibrated policy says for each quality what was chosen, what it costs and errs; it has a file and tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dma_diffusers.config import DMAConfig
from dma_diffusers.eval.linears.options import LinearChoice
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.policy_file import FORMAT, VERSION

EVERY_KEY = 2**20  # a window this wide is HIGH everywhere, at any length
LADDER_HEADER = (
    "quality", "relative L2", "at most", "cost", "recall",
    "formats", "mean window", "dense modules", "dense above sigma",
)  # fmt: skip
LINEARS_HEADER = ("quality", "cost", "attention's L2", "linears' L2", "linears' bits", "left in bf16")
MODULES_HEADER = ("module", "formats", "window of each head", "sink", "relative L2")
_CONFIG = ("high", "low", "window", "sink", "dense_above_sigma")


@dataclass(frozen=True)
class Choice:
    """A choice was made for a quality, and has its cost and its error on the recordings.

    relative_l2: of the output, the root mean square over prompts, steps and modules, linear layers among them. budget:
    the most that it was allowed to be. cost: predicted clocks over those of bf16 attention, and of bf16 linear layers
    if these were chosen for. recall: the share of attention in HIGH tiles. of_modules: relative L2 of each attention
    module, means over prompts and steps. attention_l2: `relative_l2` over attention alone. linears: None where linear
    layers were not chosen for.
    """

    quality: float
    config: DMAConfig
    budget: float
    relative_l2: float
    cost: float
    recall: float
    of_modules: dict[str, float]
    attention_l2: float
    linears: LinearChoice | None = None

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
                    "relative_l2": choice.relative_l2, "budget": choice.budget, "cost": choice.cost,
                    "recall": choice.recall, "relative_l2_of_modules": choice.of_modules,
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
        config = choice.config
        own = [config.of_module(name) for name in choice.of_modules if not config.is_dense(name)]
        used = sorted({f"{module.high}|{module.low}" for module in own}) or [f"{config.high} alone"]
        widths = [
            w
            for module in own
            for w in (module.window if isinstance(module.window, tuple) else [module.window])
        ]
        narrow = [width for width in widths if width < EVERY_KEY]
        rows.append([
            f"{choice.quality:g}" + " (asked for)" * (choice.quality == policy.quality),
            f"{choice.relative_l2:.4f}", f"{choice.budget:.4f}", f"{choice.cost:.3f}", f"{choice.recall:.3f}",
            ", ".join(used), f"{sum(narrow) / len(narrow):.0f}" if narrow else "–",
            f"{len(choice.of_modules) - len(own)} of {len(choice.of_modules)}",
            "–" if config.dense_above_sigma is None else f"{config.dense_above_sigma:.2f}",
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
    """Return the rows under `MODULES_HEADER`, one a module, for the quality that was asked for."""
    config, rows = policy.chosen.config, []
    for name, error in policy.chosen.of_modules.items():
        own = config.of_module(name)
        widths = own.window if isinstance(own.window, tuple) else (own.window,)
        words = ["all" if width == EVERY_KEY else str(width) for width in widths]
        is_dense = config.is_dense(name)
        rows.append([
            name, own.high if is_dense else f"{own.high}|{own.low}", "dense" if is_dense else " ".join(words),
            "–" if is_dense else str(own.sink), f"{error:.4f}",
        ])  # fmt: skip
    return rows
