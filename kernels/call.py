"""The call: the tensors of one attention operation, and what is asked of them."""

import math
from dataclasses import dataclass

import torch

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each float32 `[S, D/2]`: one angle for each pair of neighbouring channels of each token."""


@dataclass(frozen=True)
class Call:
    """One attention call, in the model's own order of tokens.

    q: `[B, H, Sq, D]`; k and v: `[B, Hkv, Sk, D]`; bf16, fp16 or fp32. Hkv divides H.
    key_mask: bool `[B, Sk]`, True where a key is seen; None where all are.
    scale: the factor of the scores; None is D^-½.
    is_causal: query i sees the keys 0 … i.
    q_rope, k_rope: the angles by which q and k are rotated first; None where they are not.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None = None
    scale: float = None  # type: ignore[assignment]  # which stands for head_dim^-1/2
    is_causal: bool = False
    q_rope: Rope | None = None
    k_rope: Rope | None = None

    def __post_init__(self):
        if self.scale is None:
            object.__setattr__(self, "scale", self.q.shape[-1] ** -0.5)

    @property
    def softmax_scale_log2(self) -> float:
        """The scale times log2 e: scores times this number are exponents of 2."""
        return self.scale * math.log2(math.e)
