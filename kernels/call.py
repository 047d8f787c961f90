"""The call: the tensors of one attention operation, and what is asked of them."""

import math
from dataclasses import dataclass

import torch

from dma_diffusers.kernels.formats import Rotations, block_of

Rope = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, each float32 `[S, D/2]`: one angle for each pair of neighbouring channels of each token."""


@dataclass(frozen=True)
class Norms:
    """RMSNorm over the channels of every head of q and of k, which comes before RoPE (arXiv 1910.07467).

    q, k: the weights, each `[D]`, in a float dtype.
    eps: what is added to the mean of the squares.
    first: the number of tokens that come first and have weights of their own, as the text has in joint attention.
    q_first, k_first: the weights of these tokens, each `[D]` like the others; None if these tokens have the same.
    rounds_twice: whether x is rounded to its dtype before it is multiplied by the weight, as Diffusers' RMSNorm does,
        and not only afterwards, as PyTorch's does.
    """

    q: torch.Tensor
    k: torch.Tensor
    eps: float
    first: int = 0
    q_first: torch.Tensor | None = None
    k_first: torch.Tensor | None = None
    rounds_twice: bool = False

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The weights of q and of k, each followed by those of its first tokens."""
        return self.q, self.q_first, self.k, self.k_first


@dataclass(eq=False)
class Memory:
    """The pairs of tiles that routing chose, kept from one call to others of the same shapes.

    is_read: a call takes its pairs from here; else it chooses, and writes them here.
    high, left: int32 `[B, H, q_tiles, ⌈k_tiles / 32⌉]`, bits as of `PrecisionMap.means`: the LOW pairs that become
        HIGH, and the pairs that are MEAN or, where the rest is skipped, left out. The first call makes both; `left`
        stays None where the rest is LOW.
    """

    is_read: bool = False
    high: torch.Tensor | None = None
    left: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors that kernels read or write of it."""
        return [x for x in (self.high, self.left) if x is not None]


@dataclass(frozen=True)
class Call:
    """One attention call, in the model's own order of tokens.

    q: `[B, H, Sq, D]`; k and v: `[B, Hkv, Sk, D]`; bf16, fp16 or fp32. Hkv divides H.
    key_mask: bool `[B, Sk]`, True where a key is seen; None where all are.
    scale: the factor of the scores; None is D^-½.
    is_causal: query i sees the keys 0 … i.
    norms: the RMSNorm that q and k go through first; None for none.
    q_rope, k_rope: the angles by which q and k are rotated next; None where they are not.
    rotation: the words of `formats.Rotations`. q and k share theirs in every format but bf16, which gains nothing. v
        has its own if a class stores it in 8 bits: then every class multiplies rotated values, and the output is turned
        back, for which it is rounded to its dtype once more.
    smooth_k: whether k loses its mean in every format but bf16. smooth_v: whether v loses its mean where it is stored
        in 8 bits; the output gets it back.
    memory: where routing reads or writes the pairs that it chose; None for nowhere.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    key_mask: torch.Tensor | None = None
    scale: float = None  # type: ignore[assignment]  # which stands for head_dim^-1/2
    is_causal: bool = False
    q_rope: Rope | None = None
    k_rope: Rope | None = None
    norms: Norms | None = None
    rotation: str = "none"
    smooth_k: bool = True
    smooth_v: bool = True
    memory: Memory | None = None

    def __post_init__(self):
        if self.scale is None:
            object.__setattr__(self, "scale", self.q.shape[-1] ** -0.5)

    @property
    def changes_q(self) -> bool:
        """Says whether q is not multiplied as it is given."""
        return self.norms is not None or self.q_rope is not None

    @property
    def changes_k(self) -> bool:
        """Says whether k is not multiplied as it is given."""
        return self.norms is not None or self.k_rope is not None

    @property
    def rotations(self) -> Rotations:
        """The rotation of q and k, and that of v. Raises ValueError for words that say none."""
        return Rotations.parse(self.rotation)

    @property
    def rotated_block(self) -> int:
        """The number of channels that q and k's rotation mixes, 1 for none. Raises ValueError as `block_of` does."""
        return block_of(self.rotations.qk, self.q.shape[-1])

    @property
    def rotated_values(self) -> int:
        """The same of v's rotation."""
        return block_of(self.rotations.v, self.v.shape[-1])

    @property
    def softmax_scale_log2(self) -> float:
        """The scale times log2 e: scores times this number are exponents of 2."""
        return self.scale * math.log2(math.e)
