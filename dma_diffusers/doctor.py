"""The doctor: what this machine can run, and if not, why."""

from typing import Any

import torch

from dma_diffusers.kernels.defaults import FORMAT_PAIRS, default_formats
from dma_diffusers.kernels.lowerings import LOWERINGS, Lowering, architecture
from dma_diffusers.kernels.precision import Precisions

_HEAD_DIM = 128


def diagnose() -> dict[str, Any]:
    """Versions, the GPU, and whether each lowering runs the default formats of each architecture here, and if not, why.

    A version is None where the package is absent, `gpu` where there is none.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "lowerings": [
            _diagnose(lowering, architecture(device), *formats)
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


def _diagnose(lowering: Lowering, architecture: str, high: str, low: str) -> dict[str, Any]:
    refusal = lowering.refuses(architecture, _HEAD_DIM, Precisions.parse(high, low))
    return {
        "formats": f"{high}|{low}",
        "name": lowering.name,
        "runs": refusal is None,
        "reason": refusal or lowering.description,
    }
