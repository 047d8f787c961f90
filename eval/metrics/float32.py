"""How the metrics' networks run: in float32, and twice alike."""

from contextlib import AbstractContextManager

import torch


def exact_float32() -> AbstractContextManager:
    """cuDNN without TF32, which would change features in the third digit, and with deterministic algorithms only."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
