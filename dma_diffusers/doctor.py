"""What this machine can run, and if not, why."""

from typing import Any

import torch

from dma_diffusers.kernels.lowerings import LOWERINGS, Lowering, architecture

_CALL = {"head_dim": 128, "high": "mxfp8", "low": "mxfp4"}


def diagnose() -> dict[str, Any]:
    """Versions, the GPU, and for every lowering whether it runs DMA's default here, with the reason in words.

    A version is None where the package is absent, `gpu` where there is none.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "lowerings": [_diagnose(lowering, architecture(device)) for lowering in LOWERINGS],
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _diagnose(lowering: Lowering, architecture: str) -> dict[str, Any]:
    refusal = lowering.refuses(architecture, **_CALL)
    return {"name": lowering.name, "runs": refusal is None, "reason": refusal or lowering.description}
