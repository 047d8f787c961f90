"""The doctor: what this machine can run, and if not, why."""

import re
from typing import Any

import torch

from dma_diffusers.kernels.defaults import FORMAT_PAIRS, default_formats
from dma_diffusers.kernels.lowerings import LOWERINGS, MAX_HEAD_DIM, Lowering, architecture
from dma_diffusers.kernels.precision import Precisions

_HEAD_DIM = 128


def diagnose(size: tuple[int, int, int, int] | None = None) -> dict[str, Any]:
    """Versions, the GPU, and whether each lowering runs the default formats of each architecture here, and if not, why.

    A version is None where the package is absent, `gpu` where there is none.
    size: `[B, H, S, D]` of an attention call, for which each lowering also has `extra_bytes`: the most memory that the
        call takes beside q, k, v and its output; None where the lowering can't run it, and for the reference.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "lowerings": [
            _diagnose(lowering, architecture(device), *formats, size)
            for formats in dict.fromkeys(map(default_formats, FORMAT_PAIRS))
            for lowering in LOWERINGS
        ],
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _diagnose(
    lowering: Lowering, architecture: str, high: str, low: str, size: tuple[int, int, int, int] | None
) -> dict[str, Any]:
    precisions = Precisions.parse(high, low)
    refusal = lowering.refuses(architecture, size[-1] if size else _HEAD_DIM, precisions)
    found = {
        "formats": f"{high}|{low}",
        "name": lowering.name,
        "runs": refusal is None,
        "reason": refusal or lowering.description,
    }
    if size is None:
        return found
    extra = None
    if refusal is None and lowering.name != "reference":
        from dma_diffusers.kernels.attention.memory import workspace_bytes

        extra = workspace_bytes(size, precisions, lowering.name, architecture)
    return found | {"extra_bytes": extra}


def parse_size(text: str) -> tuple[int, int, int, int]:
    """The size of a call, `[B, H, S, D]`, from words such as "24x4608x128" or "2x24x4608x128".

    Raises ValueError for other words.
    """
    if not re.fullmatch(r"[1-9]\d*([x×][1-9]\d*){2,3}", text):
        raise ValueError(
            f"a shape is heads, tokens and head_dim, perhaps after a batch, such as 24x4608x128, got {text!r}"
        )
    batch, heads, tokens, head_dim = [1, *map(int, re.split("[x×]", text))][-4:]
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"shape {text}: head_dim must be 1 to {MAX_HEAD_DIM}")
    return batch, heads, tokens, head_dim
