"""Lowerings of linear layers: how groups really are multiplied on one architecture, and if they can't be, why."""

from collections.abc import Callable
from typing import NamedTuple

from dma_diffusers.kernels.linears.groups import ALONE, MIXABLE, Groups
from dma_diffusers.kernels.lowerings import (
    BLOCK_SCALED_ARCHITECTURES,
    KERNEL_ARCHITECTURES,
    WITHOUT_FP8,
    Choice,
    has_triton,
)

_OLDEST_INT8 = 80
_WITH_FP8 = tuple(name for name in KERNEL_ARCHITECTURES if name not in WITHOUT_FP8)


class Lowering(NamedTuple):
    """One way to multiply.

    formats: those that it multiplies. why_not: tells why it can't on an architecture, for groups and a number of output
        channels (None leaves it open); None where it can.
    """

    description: str
    formats: tuple[str, ...]
    why_not: Callable[[str, Groups, int | None], str | None]

    def refuses(self, architecture: str, groups: Groups, out_features: int | None) -> str | None:
        """Why it can't run a layer with these groups, in words; None if it can."""
        if others := [name for name in groups.formats if name not in self.formats]:
            return f"it multiplies {', '.join(self.formats)}, not {others[0]}"
        return self.why_not(architecture, groups, out_features)


def _native(architecture: str, groups: Groups, out_features: int | None) -> str | None:
    if architecture not in BLOCK_SCALED_ARCHITECTURES:
        return f"{architecture} has no block-scaled MMA ({', '.join(BLOCK_SCALED_ARCHITECTURES)} have)"
    return None if has_triton() else "Triton is not installed"


def _scaled_mm(architecture: str, groups: Groups, out_features: int | None) -> str | None:
    if groups.block is not None and architecture != "sm_90":
        return f"block formats are re-encoded for sm_90 alone, not for {architecture}"
    if architecture not in _WITH_FP8:
        return f"{architecture} has no FP8 MMA ({', '.join(_WITH_FP8)} have)"
    if groups.block is not None and not has_triton():
        return "Triton is not installed"
    return _multiples(16, groups, out_features)


def _int_mm(architecture: str, groups: Groups, out_features: int | None) -> str | None:
    if not architecture.startswith("sm_") or int(architecture.removeprefix("sm_")) < _OLDEST_INT8:
        return f"it is for NVIDIA GPUs from sm_{_OLDEST_INT8} on, not for {architecture}"
    return _multiples(8, groups, out_features)


def _multiples(of: int, groups: Groups, out_features: int | None) -> str | None:
    """Why torch refuses a weight with such sides."""
    if groups.in_features % of or (out_features or 0) % of:
        outputs = "" if out_features is None else f" and {out_features} outputs"
        return f"torch wants multiples of {of}, got {groups.in_features} inputs{outputs}"
    return None


LOWERINGS = {
    "native": Lowering("one kernel for all groups, block-scaled products", (*MIXABLE, "nvfp4"), _native),
    "scaled_mm": Lowering(
        "torch._scaled_mm, which gives bf16; block formats re-encoded into e4m3 under a power of two for each row",
        ("fp8", *MIXABLE),
        _scaled_mm,
    ),
    "int_mm": Lowering("torch._int_mm", ("int8",), _int_mm),
    "reference": Lowering("torch: exact about the formats, slow", ALONE + MIXABLE, lambda *_: None),
}
"""The lowerings by name, the preferred ones first."""


def choose(
    architecture: str, groups: Groups, lowering: str = "auto", out_features: int | None = None
) -> Choice:
    """The lowering that runs a layer with these groups: the one named, or with "auto" the first that can.

    architecture: as `lowerings.architecture` names it. out_features: the layer's; None leaves their number open.
    Raises ValueError, in one line, if the lowering doesn't exist, or can't run such a layer.
    """
    words = " | ".join(groups.formats)
    if lowering != "auto":
        if lowering not in LOWERINGS:
            raise ValueError(f"unknown lowering {lowering!r}: choose from auto, {', '.join(LOWERINGS)}")
        refusal = LOWERINGS[lowering].refuses(architecture, groups, out_features)
        if refusal:
            raise ValueError(f"lowering {lowering} can't run {words} on {architecture}: {refusal}")
        return Choice(lowering, "asked for")
    refusals: list[str] = []
    for name, candidate in LOWERINGS.items():
        if any(each not in candidate.formats for each in groups.formats):
            continue
        refusal = candidate.why_not(architecture, groups, out_features)
        if refusal is None:
            return Choice(name, "; ".join(refusals) or candidate.description)
        refusals.append(f"{name}: {refusal}")
    raise ValueError(f"no lowering runs {words}: {'; '.join(refusals)}")
