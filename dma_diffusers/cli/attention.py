"""The options that choose how attention and linear layers run, and the configuration that they choose."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dma_diffusers.cli.console import given, quiet

Words = Annotated[
    str | None,
    typer.Option(
        help="Format of these tiles' Q·K, such as mxfp8, or of Q·K and P·V, as in int8/bf16; replaces the preset's."
    ),
]
Linears = Annotated[
    str | None,
    typer.Option(
        help="Low-bit linear layers: fp8, int8, mxfp8, mxfp4 or nvfp4; micromix, which calibrates on eight "
        "built-in prompts first; or a file of save_linears. Full precision if left out."
    ),
]
_OF_POLICY_FILES = ("high", "low", "rotation", "window", "sink", "schedule")
Tokens = Annotated[int | None, typer.Option(help="Tokens kept HIGH; replaces the preset's.")]


@dataclass(frozen=True)
class Attention:
    """The configuration that options chose, and the policy file and the quality by which they did, if any."""

    config: Any
    file: Path | None = None
    quality: float | None = None

    def label(self, receipt: Any) -> str:
        """A few words for the attention and the linear layers that drew, as the receipt has it."""
        linears = f", linears {Path(self.config.linears).name}" if self.config.linears else ""
        return self._of_attention(receipt) + linears

    def _of_attention(self, receipt: Any) -> str:
        from dma_diffusers.fingerprint import OTHER_WEIGHTS

        if not any(module.intercepted for module in receipt.modules):
            return "stock attention"
        if self.file:
            others = any(OTHER_WEIGHTS in module.notes for module in receipt.modules)
            quality = "" if self.quality is None else f" for quality {self.quality:g}"
            return f"DMA as {self.file.name} chooses{quality}{', made for other weights' * others}"
        pair = self.config.high, self.config.low
        formats = f"DMA {('|' if '/' in ''.join(pair) else '/').join(pair)}"
        if self.config.rotation != "none":
            formats += f", rotation {self.config.rotation}"
        if words := self.config.schedule or self.config.policy:
            return f"{formats}, {words}"
        return f"{formats}, window {self.config.window}, sink {self.config.sink}"


@dataclass(frozen=True)
class AttentionOptions:
    """The options that choose an `Attention`, as the command line gives them; None where it gives none."""

    preset: Annotated[str | None, typer.Option(help="auto, b200, hopper or exact; b200 if left out.")] = None
    high: Words = None
    low: Words = None
    rotation: Annotated[
        str | None,
        typer.Option(help="Of Q and K, and behind a slash of V: hadamard16, hadamard32, head_dim or none."),
    ] = None
    smooth_k: Annotated[bool | None, typer.Option(help="Whether K loses its mean; it does if left out.")] = (
        None
    )
    smooth_v: Annotated[
        bool | None, typer.Option(help="Whether V loses its mean in 8 bits; it does if left out.")
    ] = None
    window: Tokens = None
    sink: Tokens = None
    policy: Annotated[
        str | None,
        typer.Option(
            help="A policy in words, such as 'neighborhood(window=8x8)'; or the file that `calibrate` wrote, instead "
            "of preset, formats and tokens."
        ),
    ] = None
    schedule: Annotated[
        str | None,
        typer.Option(
            help="What holds at each noise level, such as 'sigma>0.9: dense(); sigma>0.5: importance(budget=0.15); "
            "importance(budget=0.05)'; an entry may say high=, low=, rotation= and protect_text= too."
        ),
    ] = None
    quality: Annotated[
        float | None, typer.Option(help="From 0 to 1: the policy file's choice at or above it.")
    ] = None
    lowering: Annotated[
        str | None,
        typer.Option(help="auto, fastest, stock, native, faithful or reference; `doctor` says which run."),
    ] = None
    quality_first: Annotated[
        bool, typer.Option("--quality-first", help="More of the noisy steps and outer layers all HIGH.")
    ] = False
    guard: Annotated[
        float | None,
        typer.Option(
            help="A relative error, such as 0.2, above which an attention module turns to HIGH, then to stock; with "
            "inf, the receipt has an estimate of it, and nothing turns."
        ),
    ] = None
    linears: Linears = None

    @property
    def given(self) -> dict[str, Any]:
        """The options that the command line gives, by name."""
        return given(asdict(self) | {"quality_first": self.quality_first or None})

    def choose(self) -> Attention:
        """The attention that they choose.

        Raises ValueError, in one line, for options that do not go together, a lowering that does not run here, or a
        file of linear layers that is none; OSError where a file can't be read.
        """
        from dma_diffusers.config import DMAConfig, is_words

        options = self.given
        preset = options.pop("preset", "b200")
        if not self.policy or is_words(self.policy):
            if "quality" in options:
                raise ValueError("--quality chooses from a policy file: give --policy too")
            chosen = Attention(DMAConfig.preset(preset, **options))
        else:
            file, quality = Path(options.pop("policy")), options.pop("quality", None)
            if tiles := [name for name in _OF_POLICY_FILES if name in options]:
                raise ValueError(f"--policy chooses {', '.join(tiles)} itself: give one or the other")
            chosen = Attention(DMAConfig.from_file(file, quality, **options), file, quality)
        with quiet():
            from dma_diffusers.linears.files import read_header
            from dma_diffusers.linears.methods import is_file
            from dma_diffusers.pipelines.placement import own_device
        chosen.config.check_device(own_device())
        if chosen.config.linears and is_file(chosen.config.linears):
            read_header(chosen.config.linears)
        return chosen
