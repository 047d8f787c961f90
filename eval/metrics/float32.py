"""The metrics' networks run in float32, and twice alike."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Run cuDNN without TF32, which would change features in the third digit, and with deterministic algorithms."""
    cudnn = torch.backends.cudnn
    precision, deterministic = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision, cudnn.deterministic = "ieee", True
    try:
        yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = precision, deterministic
