"""Plans that are kept: those of the sizes that were drawn last, and whatever a CUDA graph reads."""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch

from dma_diffusers.kernels import plan
from dma_diffusers.kernels.device.memory import kept
from dma_diffusers.kernels.tiling.layout import Layout
from dma_diffusers.kernels.tiling.policies import Policy

MOST_SIZES = 8
"""Sizes whose plans are kept. One draw takes few: prompt and negative prompt, perhaps of two transformers."""


@dataclass
class Size:
    """Everything that is kept for calls of one layout on one device.

    plans: by policy, causality and `masks_text`. prepared: whatever is made of them, by what its maker asks for.
    """

    layout: Layout
    device: torch.device
    plans: dict[tuple[Policy, bool, bool], plan.Plan] = field(default_factory=dict)
    prepared: dict[tuple, Any] = field(default_factory=dict)

    def plan(self, policy: Policy, is_causal: bool, masks_text: bool) -> plan.Plan:
        """The plan for such calls, on the device.

        Raises ValueError where it would have to be made while a CUDA graph is captured, and as `plan.make` does.
        """
        key = (policy, is_causal, masks_text)
        if key not in self.plans:
            if plan.is_capturing(self.device):
                raise ValueError("call attention once with these lengths before capturing it in a CUDA graph")
            made = plan.make(policy, self.layout, is_causal, masks_text)
            # The map stays where it was made: a kernel's block lists go to the device when it is first launched.
            there = kept(lambda: made.to(self.device), self.device)
            self.plans[key] = replace(there, precision_map=made.precision_map)
        return self.plans[key]


class PlanCache:
    """The sizes that were used last; those of which a CUDA graph was captured are kept for good."""

    def __init__(self, most: int = MOST_SIZES):
        self._most = most
        self._sizes: OrderedDict[tuple, Size] = OrderedDict()
        self._captured: dict[tuple, Size] = {}
        self._lock = Lock()

    def size(
        self,
        q_length: int,
        k_length: int,
        text: tuple[int, int],
        grid: tuple[int, ...],
        device: torch.device,
        parts: int = 1,
    ) -> Size:
        """Finds or makes what is kept for calls of this layout. Raises ValueError as `Layout` does."""
        key = (q_length, k_length, text, grid, device, parts)
        if self._captured and key in self._captured:
            return self._captured[key]
        size = self._sizes.get(key)
        captures = plan.is_capturing(device)
        if size is None or captures or len(self._sizes) > 1:
            with self._lock:
                size = size or Size(Layout(q_length, k_length, text, grid, parts), device)
                self._sizes[key] = size
                self._sizes.move_to_end(key)
                if captures:  # the graph goes on reading the plan's tensors
                    self._captured[key] = self._sizes.pop(key)
                if len(self._sizes) > self._most:
                    self._drop_oldest()
        return size

    def _drop_oldest(self) -> None:
        _, size = self._sizes.popitem(last=False)
        if size.device.type == "cuda" and not plan.is_capturing(size.device):
            torch.cuda.synchronize(size.device)  # another stream may still read the plans
