"""The memory that an attention call takes beside its tensors, found by making the call on tensors without numbers."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dma_diffusers.kernels import plan
from dma_diffusers.kernels.attention import launch
from dma_diffusers.kernels.call import Call
from dma_diffusers.kernels.device.launch import Launcher
from dma_diffusers.kernels.precision import Precisions
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Diagonal, Policy

_DIAGONAL = Diagonal()


def workspace_bytes(
    size: tuple[int, int, int, int],
    precisions: Precisions,
    lowering: str,
    target: str,
    policy: Policy = _DIAGONAL,
    dtype: torch.dtype = torch.bfloat16,
    layout: Layout | None = None,
) -> int:
    """The most bytes that a call allocates at one time beside q, k, v and its output: operands, scales, V in e4m3.

    size: of q, k and v, `[B, H, S, D]`, laid out as models have them, `[B, S, H, D]`. lowering: the name of one that
    has a kernel. target: the architecture that would run it. layout: of the tokens; None for S without text and grid.
    """
    batch, heads, tokens, head_dim = size
    q, k, v = (
        torch.empty(batch, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
        for _ in range(3)
    )
    made = plan.make(policy, layout or Layout(tokens, tokens))
    made = replace(made.to(q.device), precision_map=made.precision_map)
    with _Allocations() as allocations:
        out, _, _ = launch.attention(
            Call(q, k, v), made, precisions,
            lowering=lowering, return_lse=False, target=target, launcher=_Unlaunched(),
        )  # fmt: skip
    return allocations.most - out.nbytes


class _Unlaunched(Launcher):
    """Launches nothing, and holds all that the kernels would write: a recorded call allocates it at once."""

    def __init__(self):
        super().__init__(lambda *_, **__: None)
        self._held: list[torch.Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._held.append(super().empty(shape, dtype, device))
        return self._held[-1]


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside and still alive. most: the most at any time."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self._known: weakref.WeakSet = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in tree_leaves(made):
            if isinstance(x, torch.Tensor) and x.device.type == "meta":
                self._count(x.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        weakref.finalize(storage, self._free, storage.nbytes())

    def _free(self, nbytes: int) -> None:
        self.bytes -= nbytes
