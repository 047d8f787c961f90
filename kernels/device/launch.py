"""Launching kernels: at once, unless the caller has a launcher of its own."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from dma_diffusers.kernels.device.tritons import warn_of_untested

Run = Callable[..., Any]


_OF_AN_H200 = 132


def multiprocessors(device: torch.device) -> int:
    """Counts multiprocessors; the interpreter has a few, so that programs have more than one block.

    Tensors without numbers, on which memory is counted, are taken for an H200's.
    """
    if device.type == "meta":
        return _OF_AN_H200
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> Any:
    """Launch `kernel` on the device of its arguments; returns what Triton compiled, None in the interpreter."""
    warn_of_untested()
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    # Triton alone would take the current device, whichever that is.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return kernel[grid](*arguments, **options)


class Launcher:
    """Allocates what kernels write, and launches them.

    run: launches one kernel, called as `run` above is. Ahead-of-time compilation and tests have their own.
    """

    def __init__(self, run: Run = run):
        self._run = run

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        self._run(kernel, grid, *arguments, **options)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor that the call's kernels write and read."""
        return torch.empty(shape, dtype=dtype, device=device)

    def counters(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """int32 zeros in which kernels count, and to which they return them."""
        return torch.zeros(shape, dtype=torch.int32, device=device)
