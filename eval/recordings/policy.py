"""A calibrated policy says for each quality what was chosen, what it costs and errs; it has a file and tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dma_diffusers.config import DMAConfig
from dma_diffusers.pipelines.files import write_atomically
from dma_diffusers.policy_file import FORMAT, VERSION

EVERY_KEY = 2**20  # a window this wide is HIGH everywhere, at any length
LADDER_HEADER = (
    "quality", "relative L2", "at most", "cost", "recall",
    "formats", "mean window", "dense modules", "dense above sigma",
)  # fmt: skip
MODULES_HEADER = ("module", "formats", "window of each head", "sink", "relative L2")
_CONFIG = ("high", "low", "window", "sink", "dense_above_sigma")


@dataclass(frozen=True)
class Choice:
    """A choice was made for a quality, and has its cost and its error on the recordings.

    relative_l2: of the output, the root mean square over prompts, steps and modules. budget: the most that it was
    allowed to be. cost: predicted clocks over those of bf16 attention. recall: the share of attention in HIGH tiles.
    of_modules: relative L2 of each module, means over prompts and steps.
    """

    quality: float
    config: DMAConfig
    budget: float
    relative_l2: float
    cost: float
    recall: float
    of_modules: dict[str, float]


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
        """Write the policy file, which `DMAConfig.from_file` reads."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1, allow_nan=False).encode())

    def to_dict(self) -> dict[str, Any]:
        """Return the policy file's document (`dma_diffusers.policy_file`)."""
        choices = [
            {
                "quality": choice.quality,
                "config": {name: getattr(choice.config, name) for name in _CONFIG},
                "modules": {name: dict(changes) for name, changes in choice.config.modules if changes},
                "evidence": {
                    "relative_l2": choice.relative_l2, "budget": choice.budget, "cost": choice.cost,
                    "recall": choice.recall, "relative_l2_of_modules": choice.of_modules,
                },
            }
            for choice in self.choices
        ]  # fmt: skip
        return {
            "format": FORMAT, "version": VERSION, "quality": self.quality, "model": self.model,
            "choices": choices, "evidence": self.evidence,
        }  # fmt: skip


def ladder(policy: Policy) -> list[list[str]]:
    """Return the rows under `LADDER_HEADER`, one a quality. The cost is predicted, in units of bf16 attention's."""
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
