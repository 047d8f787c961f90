"""What this machine can run, and if not, why."""

from typing import Any

import torch

from dma_diffusers.kernels.lowerings import LOWERINGS, architecture

_HEAD_DIM = 128


def diagnose() -> dict[str, Any]:
    """Versions, the GPU, and for every lowering whether it runs here, with the reason in words.

    A version is None where the package is absent, `gpu` where there is none.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "lowerings": [_lowering(lowering, device) for lowering in LOWERINGS],
    }


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _lowering(lowering: Any, device: torch.device) -> dict[str, Any]:
    reason = lowering.refuses(architecture(device), _HEAD_DIM, "mxfp8", "mxfp4")
    return {"name": lowering.name, "runs": reason is None, "reason": reason or ""}
