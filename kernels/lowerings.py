"""Lowerings: how a pair of formats really runs on one architecture, and if it can't, why, in words."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch

from dma_diffusers.kernels.formats import FORMATS, get_format
from dma_diffusers.kernels.precision import Precisions

MAX_HEAD_DIM = 256
TCGEN05_ARCHITECTURES = ("sm_100", "sm_103")
BLOCK_SCALED_ARCHITECTURES = (*TCGEN05_ARCHITECTURES, "sm_120")
WITHOUT_FP8 = ("sm_80", "sm_86", "sm_87")
"""They neither multiply nor convert e4m3."""
WITHOUT_TMA = (*WITHOUT_FP8, "sm_89")
KERNEL_ARCHITECTURES = (*WITHOUT_TMA, "sm_90", *BLOCK_SCALED_ARCHITECTURES)
_BLOCKS = ("mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4")
_INTEGER_BLOCKS, _PACKED_BLOCKS = ("mxint8", "mxint6"), ("mxint4", "nvint4")
UNPACKED = ("sm_90",)
"""Integers of four bits lie in a byte each here, or as bf16 numbers: splitting bytes took longer (formats.md)."""
RUN = {"sm_90": ("bf16", "fp8", "int8", "int8_tile", "int4", *_BLOCKS, *_INTEGER_BLOCKS, *_PACKED_BLOCKS)}
"""The formats of Q·K with which, beside each of P·V, the kernel tests ran on a GPU (eval/results/h200_tests.txt)."""


class Storage(StrEnum):
    """The layout of a format's numbers in memory, which decides the MMA that multiplies them."""

    BLOCK = "block"
    """Elements and a scale for each block: block-scaled MMA."""
    ROW = "row"
    """e4m3 elements, a block format's re-encoded; one float32 scale for each token, of Q and of K: FP8 MMA."""
    TILE = "tile"
    """e4m3, int8 or int4 elements; one float32 scale for each token of Q, for each tile of K: FP8 or INT8 MMA."""
    SHARED = "shared"
    """The same, but the tokens of a tile of Q share their scale."""
    PLAIN = "plain"
    """bfloat16 numbers, scales multiplied in (a tensor scale stays outside): bf16 MMA."""
    PACKED = "packed"
    """int4 elements and a scale for each block, multiplied out as they are read: bf16 MMA."""
    CHANNEL = "channel"
    """e4m3 elements of V, one power of two for each channel: FP8 MMA."""
    HALF = "half"
    """float16 elements of V, one power of two for each channel: fp16 MMA, with sums in float32."""


_EVERYWHERE = {"bf16": Storage.PLAIN} | dict.fromkeys(("fp8", "int8", "int4"), Storage.TILE)
_EVERYWHERE |= {"int8_tile": Storage.SHARED}
NATIVE = _EVERYWHERE | dict.fromkeys(_BLOCKS, Storage.BLOCK)
FAITHFUL = (
    _EVERYWHERE
    | dict.fromkeys(("mxfp8", "mxfp8_e5m2", "nvfp4", *_INTEGER_BLOCKS), Storage.PLAIN)
    | dict.fromkeys(("mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"), Storage.ROW)
    | dict.fromkeys(_PACKED_BLOCKS, Storage.PACKED)
)
VALUES = {"bf16": Storage.PLAIN, "fp16": Storage.HALF, "fp8": Storage.CHANNEL}
"""The storage of V for each format of P·V that a kernel multiplies."""
UNSIGNED = {"int8": "its probabilities are unsigned, and Triton multiplies int8 by signed numbers alone"}
"""The formats of P·V that the reference alone multiplies, and why no kernel does."""


def architecture(device: torch.device) -> str:
    """Names a device: "sm_90" and the like for NVIDIA GPUs, else "cpu", "mps", "rocm" …"""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "rocm"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def has_triton() -> bool:
    """Says whether Triton can be imported."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class Lowering:
    """One way to run a call.

    stores: how it stores Q and K for each format of Q·K that it multiplies.
    stores_values: how it stores V for each format of P·V that it multiplies.
    why_not: tells why it can't run a call on an architecture, at a head dimension, with formats of Q·K and of P·V that
        have these storages; None where it can.
    """

    name: str
    description: str
    stores: dict[str, Storage]
    stores_values: dict[str, Storage]
    why_not: Callable[[str, int, dict[str, Storage], dict[str, Storage]], str | None]

    def storage(self, qk: str, architecture: str) -> Storage:
        """How it stores Q and K for a format of Q·K on an architecture."""
        found = self.stores[qk]
        return Storage.PLAIN if found is Storage.PACKED and architecture in UNPACKED else found

    def refuses(self, architecture: str, head_dim: int, precisions: Precisions) -> str | None:
        """Why this lowering can't run such calls, in words; None if it can."""
        if head_dim > MAX_HEAD_DIM:
            return f"head_dim {head_dim} is more than {MAX_HEAD_DIM}"
        is_odd = head_dim % 2 == 1 and head_dim > 1  # 1 stands for any
        if is_odd and "int4" in {precision.qk for precision in precisions}:
            return f"int4 stores two channels in a byte, and head_dim {head_dim} is odd"
        stored: list[dict[str, Storage]] = []
        for product, known, asked in (
            ("Q·K", self.stores, dict.fromkeys(precision.qk for precision in precisions)),
            ("P·V", self.stores_values, dict.fromkeys(precision.pv for precision in precisions)),
        ):
            if others := [name for name in asked if name not in known]:
                why = f": {UNSIGNED[others[0]]}" if product == "P·V" and others[0] in UNSIGNED else ""
                return f"the kernel multiplies {product} in {', '.join(known)}, not {', '.join(others)}{why}"
            stored.append({name: known[name] for name in asked})
        return self.why_not(architecture, head_dim, *stored)


def _native(
    architecture: str, head_dim: int, formats: dict[str, Storage], values: dict[str, Storage]
) -> str | None:
    has_blocks = Storage.BLOCK in formats.values()
    if has_blocks and architecture not in BLOCK_SCALED_ARCHITECTURES:
        return f"{architecture} has no block-scaled MMA ({', '.join(BLOCK_SCALED_ARCHITECTURES)} have)"
    if has_blocks and architecture in TCGEN05_ARCHITECTURES and head_dim > 128:
        return (
            f"head_dim {head_dim} fills {architecture}'s tensor memory, which leaves no room for block scales"
        )
    return _faithful(architecture, head_dim, formats, values)


def _faithful(
    architecture: str, head_dim: int, formats: dict[str, Storage], values: dict[str, Storage]
) -> str | None:
    if architecture in WITHOUT_FP8 and (refusal := _without_fp8(architecture, formats, values)):
        return refusal
    if architecture not in KERNEL_ARCHITECTURES:
        return f"no kernel is built for {architecture} (there are some for {', '.join(KERNEL_ARCHITECTURES)})"
    if architecture == "sm_103" and {"int8", "int8_tile", "int4"} & formats.keys():
        return "sm_103 has no INT8 MMA in tensor memory"
    if architecture in ("sm_89", "sm_90") and "fp8" in formats and 1 < head_dim < 16:
        return f"ptxas miscompiles how the padding of head_dim {head_dim} is rounded to fp8"
    return None if has_triton() else "Triton is not installed"


def _without_fp8(architecture: str, formats: dict[str, Storage], values: dict[str, Storage]) -> str | None:
    """Tells why an architecture that knows no e4m3 can't multiply these; None where it can."""
    if Storage.CHANNEL in values.values():
        return f"{architecture} has no FP8 MMA, which P·V in fp8 needs: write int8/bf16"
    for name, storage in formats.items():
        if storage is Storage.ROW or name == "fp8":
            return f"{architecture} has no FP8 MMA, which Q·K in {name} needs: write int8/bf16"
        if get_format(name).has_tensor_scale:
            return f"{architecture} has no FP8 conversions, which the scales of {name} need: write int8/bf16"
    return None


LOWERINGS = (
    Lowering("native", "the fused kernel, each format multiplied by its own MMA", NATIVE, VALUES, _native),
    Lowering(
        "faithful",
        "the fused kernel, block formats re-encoded for FP8 and bf16 MMA: the numbers that their own MMA would compute",
        FAITHFUL,
        VALUES,
        _faithful,
    ),
    Lowering(
        "reference",
        "torch: exact about the formats, slow",
        dict.fromkeys(FORMATS, Storage.PLAIN),
        VALUES | dict.fromkeys(UNSIGNED, Storage.CHANNEL),
        lambda *_: None,
    ),
)


def named(name: str) -> Lowering:
    """The lowering of this name. Raises ValueError, in one line, where there is none."""
    found = next((lowering for lowering in LOWERINGS if lowering.name == name), None)
    if found is None:
        known = ", ".join(lowering.name for lowering in LOWERINGS)
        raise ValueError(f"unknown lowering {name!r}: choose from auto, {known}")
    return found


@dataclass(frozen=True)
class Choice:
    """The lowering of a call, and why it was chosen."""

    lowering: str
    reason: str


def choose(architecture: str, head_dim: int, high: str, low: str, lowering: str = "auto") -> Choice:
    """The lowering that runs such calls: the one named, or with "auto" the first that can.

    high, low: the words of precisions (`Precisions.parse`).
    Raises ValueError, in one line, if the lowering doesn't exist, or can't run such calls.
    """
    precisions = Precisions.parse(high, low)
    words = " | ".join(precisions.words)
    if lowering != "auto":
        refusal = named(lowering).refuses(architecture, head_dim, precisions)
        if refusal:
            raise ValueError(f"lowering {lowering} can't run {words} on {architecture}: {refusal}")
        return Choice(lowering, "asked for")
    refusals: list[str] = []
    for candidate in LOWERINGS:
        refusal = candidate.refuses(architecture, head_dim, precisions)
        if refusal is None:
            return Choice(candidate.name, "; ".join(refusals) or candidate.description)
        refusals.append(f"{candidate.name}: {refusal}")
    raise ValueError(f"no lowering runs {words}: {'; '.join(refusals)}")
