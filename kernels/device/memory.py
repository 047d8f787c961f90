"""Memory on a device that outlives the call in which it is allocated."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Made = TypeVar("_Made")


def kept(make: Callable[[], _Made], device: torch.device) -> _Made:
    """Makes tensors on `device` that are to be kept; on a GPU in a thread of their own.

    What a thread allocates while it warms up a CUDA graph (torch.compile's "reduce-overhead") belongs to the graph,
    which refuses to run if anything of it is kept.
    """
    if device.type != "cuda":
        return make()

    def make_now() -> _Made:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()  # whoever asked has another stream
        return made

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make_now).result()
