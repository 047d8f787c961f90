"""Lowerings: how a pair of formats really runs on one architecture, and if it can't, why, in words."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

MAX_HEAD_DIM = 256
BLOCK_SCALED_ARCHITECTURES = ("sm_100", "sm_103", "sm_120")
KERNEL_FORMATS = ("mxfp8", "mxfp8_e5m2", "mxfp4", "nvfp4")
_FP8_CAPABILITY = 89


def architecture(device: torch.device) -> str:
    """What `device` is: "sm_90" and the like for NVIDIA GPUs, else "cpu", "mps", "rocm" …"""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "rocm"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_triton() -> bool:
    """Whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Lowering:
    """One way to run a call.

    automatic: whether `auto` may choose it.
    why_not: from (architecture, high, low) to the reason why it can't run there, or None.
    """

    name: str
    description: str
    automatic: bool
    why_not: Callable[[str, str, str], str | None]

    def refuses(self, architecture: str, head_dim: int, high: str, low: str) -> str | None:
        """Why this lowering can't run such calls, in words; None if it can."""
        if head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}"
        return self.why_not(architecture, high, low)


def _kernel_formats_only(high: str, low: str) -> str | None:
    others = [name for name in dict.fromkeys((high, low)) if name not in KERNEL_FORMATS]
    if others:
        return f"the kernel multiplies {', '.join(KERNEL_FORMATS)}, not {', '.join(others)}"
    return None


def _block_scaled(architecture: str, high: str, low: str) -> str | None:
    if architecture not in BLOCK_SCALED_ARCHITECTURES:
        return f"{architecture} has no block-scaled MMA ({', '.join(BLOCK_SCALED_ARCHITECTURES)} have)"
    if not has_triton():
        return "Triton is not installed"
    return _kernel_formats_only(high, low)


def _emulated(architecture: str, high: str, low: str) -> str | None:
    capability = int(architecture.removeprefix("sm_")) if architecture.startswith("sm_") else 0
    if capability < _FP8_CAPABILITY:
        return f"{architecture} has no FP8 conversions (NVIDIA GPUs from sm_{_FP8_CAPABILITY} have)"
    if not has_triton():
        return "Triton is not installed"
    return _kernel_formats_only(high, low)


LOWERINGS = (
    Lowering("block_scaled", "the fused kernel on native block-scaled MMA", True, _block_scaled),
    Lowering("emulated", "the fused kernel with products widened to bf16: slow", False, _emulated),
    Lowering("reference", "torch: exact about the formats, slow", True, lambda *_: None),
)


@dataclass(frozen=True)
class Choice:
    """The lowering of a call, and why it was chosen."""

    lowering: str
    reason: str


def choose(architecture: str, head_dim: int, high: str, low: str, lowering: str = "auto") -> Choice:
    """The lowering that runs such calls: the one named, or with "auto" the first that can.

    Raises ValueError, in one line, if the lowering doesn't exist, or can't run such calls.
    """
    if lowering != "auto":
        named = {candidate.name: candidate for candidate in LOWERINGS}
        if lowering not in named:
            raise ValueError(f"unknown lowering {lowering!r}: choose from auto, {', '.join(named)}")
        refusal = named[lowering].refuses(architecture, head_dim, high, low)
        if refusal:
            raise ValueError(f"lowering {lowering} can't run {high} | {low} on {architecture}: {refusal}")
        return Choice(lowering, "asked for")
    refusals = []
    for candidate in LOWERINGS:
        if not candidate.automatic:
            continue
        refusal = candidate.refuses(architecture, head_dim, high, low)
        if refusal is None:
            return Choice(candidate.name, "; ".join(refusals) or candidate.description)
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError(f"no lowering runs {high} | {low}: {'; '.join(refusals)}")
