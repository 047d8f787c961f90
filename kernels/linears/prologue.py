"""The prologue of a linear layer: the pointwise work on its input that the quantiser does in the same pass."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Prologue:
    """LayerNorm, then (1 + scale)·x + shift, then GELU; each of them only where it is asked for.

    norm_eps: the eps of a LayerNorm over channels without weights; None for no LayerNorm.
    scale, shift: both `[B, K]` or `[1, K]`, of any float dtype, for x `[B, ..., K]`; or both None.
    gelu: whether x goes through GELU (its approximation by tanh).
    """

    norm_eps: float | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    gelu: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """x `[B, ..., K]` after it, in float32, or in float64 if x is; nothing is rounded in between."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.norm_eps is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=self.norm_eps)
        if self.scale is not None and self.shift is not None:
            scale, shift = (
                t.unflatten(0, (-1, *[1] * (x.ndim - 2))).to(x.dtype) for t in (self.scale, self.shift)
            )
            x = x * (1 + scale) + shift
        return F.gelu(x, approximate="tanh") if self.gelu else x


NOTHING = Prologue()
GELU_FACTOR = 2 * math.sqrt(2 / math.pi)
"""GELU(x) ≈ x · sigmoid(GELU_FACTOR · (x + 0.044715·x³)), which equals the approximation by tanh."""
