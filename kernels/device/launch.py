"""How a kernel is run: at once, on its arguments' device, unless whoever calls has other plans (compile.py has)."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

Run = Callable[..., None]


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors there are; a few in the interpreter, so that programs have more than one block."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch `kernel`; Triton alone would take the current device, whichever that is."""
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **options)
