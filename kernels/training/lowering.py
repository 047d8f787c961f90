"""Lowerings of training: how the products of a recipe really run on one architecture, and if they can't, why."""

from collections.abc import Callable
from typing import Any, NamedTuple

from dma_diffusers.kernels.lowerings import (
    BLOCK_SCALED_ARCHITECTURES,
    KERNEL_ARCHITECTURES,
    WITHOUT_FP8,
    Choice,
    has_triton,
)
from dma_diffusers.kernels.training import reference
from dma_diffusers.kernels.training.recipe import Recipe


class Lowering(NamedTuple):
    """One way to multiply.

    formats: those that it multiplies. why_not: tells why it can't on an architecture, for a format; None where it can.
    """

    description: str
    formats: tuple[str, ...]
    why_not: Callable[[str, str], str | None]

    def refuses(self, architecture: str, format: str) -> str | None:
        """Why it can't run a recipe in this format, in words; None if it can."""
        if format not in self.formats:
            return f"it multiplies {', '.join(self.formats)}, not {format}"
        return self.why_not(architecture, format)


def _native(architecture: str, format: str) -> str | None:
    if architecture not in BLOCK_SCALED_ARCHITECTURES:
        return f"{architecture} has no block-scaled MMA ({', '.join(BLOCK_SCALED_ARCHITECTURES)} have)"
    return None if has_triton() else "Triton is not installed"


def _scaled_mm(architecture: str, format: str) -> str | None:
    if architecture != "sm_90":
        return f"block formats are re-encoded for sm_90 alone, not for {architecture}"
    return None if has_triton() else "Triton is not installed"


def _plain(architecture: str, format: str) -> str | None:
    if architecture not in KERNEL_ARCHITECTURES:
        return f"no kernel is built for {architecture} (there are some for {', '.join(KERNEL_ARCHITECTURES)})"
    if architecture in WITHOUT_FP8 and format == "nvfp4":
        return f"{architecture} has no FP8 conversions, which the scales of {format} need"
    return None if has_triton() else "Triton is not installed"


LOWERINGS = {
    "native": Lowering("block-scaled products", ("mxfp4", "nvfp4"), _native),
    "scaled_mm": Lowering(
        "torch._scaled_mm, which gives bf16; blocks re-encoded into e4m3 under a power of two for each row",
        ("mxfp4",),
        _scaled_mm,
    ),
    "plain": Lowering(
        "bf16 products of the very numbers that the format has, no faster than stock",
        ("mxfp4", "nvfp4", "mxint8"),
        _plain,
    ),
    "reference": Lowering(
        "torch: exact about the formats, slow", ("bf16", "mxfp4", "nvfp4", "mxint8"), lambda *_: None
    ),
}
"""The lowerings by name, the preferred ones first."""


def choose(architecture: str, recipe: Recipe, lowering: str = "auto") -> Choice:
    """The lowering that runs a recipe: the one named, or with "auto" the first that can.

    architecture: as `lowerings.architecture` names it. Raises ValueError, in one line, if the lowering doesn't exist,
    or can't run the recipe there.
    """
    format = recipe.forward.format
    if lowering != "auto":
        if lowering not in LOWERINGS:
            raise ValueError(f"unknown lowering {lowering!r}: choose from auto, {', '.join(LOWERINGS)}")
        refusal = LOWERINGS[lowering].refuses(architecture, format)
        if refusal:
            raise ValueError(f"lowering {lowering} can't train in {format} on {architecture}: {refusal}")
        return Choice(lowering, "asked for")
    refusals: list[str] = []
    for name, candidate in LOWERINGS.items():
        if format not in candidate.formats:
            continue
        refusal = candidate.why_not(architecture, format)
        if refusal is None:
            return Choice(name, "; ".join(refusals) or candidate.description)
        refusals.append(f"{name}: {refusal}")
    raise ValueError(f"no lowering trains in {format}: {'; '.join(refusals)}")


def products_of(lowering: str) -> Any:
    """The functions of reference.py for a lowering: that module, or a `KernelProducts`, which needs Triton."""
    if lowering == "reference":
        return reference
    from dma_diffusers.kernels.training.products import KernelProducts

    return KernelProducts(lowering)
