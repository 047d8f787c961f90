"""This module compares the memory that attention calls take with what `doctor` says of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dma_diffusers.attach import interceptions
from dma_diffusers.kernels import operator
from dma_diffusers.kernels.lowerings import architecture
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import parse


class CallMemory:
    """It measures the calls of the operator that a model makes, beside their tensors.

    extra: the most bytes that a call took. said: what `doctor` says of that call; None for the reference.
    """

    def __init__(self):
        self.extra = 0
        self.said: int | None = None

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator["CallMemory"]:
        """Take the operator's place in a model to which DMA was applied."""
        found = interceptions(model).values()
        for interception in found:
            interception.stand_in = self.attend
        try:
            yield self
        finally:
            for interception in found:
                interception.stand_in = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **call: Any
    ) -> operator.Result:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = operator.attention(query, key, value, **call)
        extra = torch.cuda.max_memory_allocated() - before - result.out.nbytes
        if extra > self.extra:
            self.extra, self.said = extra, said_bytes(query, key, **call)
        return result


def said_bytes(query: torch.Tensor, key: torch.Tensor, **call: Any) -> int | None:
    """Return the bytes that `doctor` says of such a call of the operator; None for the reference."""
    high, low = call["high"], call["low"]
    chosen = operator.choose(query.device, query.shape[3], high, low, call["lowering"]).lowering
    if chosen == "reference":
        return None
    from dma_diffusers.kernels.attention.memory import workspace_bytes

    policy = parse(call["policy"])
    text = (call["text_start"], call["text_stop"])
    layout = Layout(query.shape[2], key.shape[2], text, tuple(call["grid"]) if policy.on_grid else ())
    return workspace_bytes(
        tuple(query.shape),
        Precisions.parse(high, low),
        chosen,
        architecture(query.device),
        policy,
        query.dtype,
        layout,
    )


def memory_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Return in words the memory that calls of our attention take beside their tensors, and what `doctor` says."""
    return [
        f"{entry['name']}: a call takes {entry['extra_bytes'] / 2**20:.1f} MiB beside its tensors; "
        f"doctor says {entry['said_bytes'] / 2**20:.1f}"
        for entry in entries
        if entry.get("said_bytes") is not None
    ]
