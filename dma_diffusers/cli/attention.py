"""The options that choose how attention runs, and what they choose."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dma_diffusers.cli.console import given, quiet

Preset = Annotated[str, typer.Option(help="auto, b200, hopper or exact.")]
Format = Annotated[
    str | None, typer.Option(help="Format of these tiles, such as mxfp8; replaces the preset's.")
]
Tokens = Annotated[int | None, typer.Option(help="Tokens kept HIGH; replaces the preset's.")]
Policy = Annotated[
    str | None,
    typer.Option(
        help="A policy in words, such as 'neighborhood(window=8x8)'; or the file that `calibrate` wrote, instead "
        "of preset, formats and tokens."
    ),
]
Quality = Annotated[float | None, typer.Option(help="From 0 to 1: the policy file's choice at or above it.")]
Lowering = Annotated[
    str | None,
    typer.Option(help="auto, fastest, stock, native, faithful or reference; `doctor` says which run."),
]
QualityFirst = Annotated[
    bool, typer.Option("--quality-first", help="More of the noisy steps and outer layers all HIGH.")
]


@dataclass(frozen=True)
class Attention:
    """What the options chose: a DMAConfig, and the policy file that it is from."""

    config: Any
    file: Path | None

    def label(self, receipt: Any) -> str:
        """What was drawn with, as the receipt has it."""
        if not any(module.diverted for module in receipt.modules):
            return "stock attention"
        if self.file:
            return f"DMA as {self.file.name} chooses"
        formats = f"DMA {self.config.high}/{self.config.low}"
        if self.config.policy:
            return f"{formats}, {self.config.policy}"
        return f"{formats}, window {self.config.window}, sink {self.config.sink}"


def chosen(
    preset: str,
    high: str | None,
    low: str | None,
    window: int | None,
    sink: int | None,
    policy: str | None,
    quality: float | None,
    lowering: str | None,
    quality_first: bool,
) -> Attention:
    """ValueError, in one line, for options that do not go together, or a lowering that does not run here."""
    from dma_diffusers.config import DMAConfig, is_words

    tiles = given({"high": high, "low": low, "window": window, "sink": sink})
    others = given({"lowering": lowering, "quality_first": quality_first or None})
    if not policy or is_words(policy):
        if quality is not None:
            raise ValueError("--quality chooses from a policy file: give --policy too")
        asked = Attention(DMAConfig.preset(preset, **tiles, **others, **given({"policy": policy})), None)
    elif tiles:
        raise ValueError(f"--policy chooses {', '.join(tiles)} itself: give one or the other")
    else:
        asked = Attention(DMAConfig.from_file(policy, quality, **others), Path(policy))
    with quiet():
        from dma_diffusers.pipelines.placement import own_device
    asked.config.check_device(own_device())
    return asked
