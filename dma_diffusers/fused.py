"""The norm and the RoPE of FLUX's q and k inside of the operator, which reads and writes them anyway.

The stock processor runs as ever, on a module whose norms leave q and k as they are, and without angles. The operator
then takes both over; where a call falls back, they are applied in front of stock attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dma_diffusers.interception import Interception
from dma_diffusers.internals import FluxAttnProcessor, apply_rotary_emb
from dma_diffusers.kernels.call import Norms, Rope

_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Change:
    """Norm and RoPE of q and k, which the stock processor of a module was kept from applying in one call.

    attention: the module. tables: cosines and sines as Diffusers has them, each float32 `[S, D]`, every angle twice.
    text: the number of tokens that come first and have norms of their own; 0 for none.
    """

    attention: Any
    tables: tuple[torch.Tensor, torch.Tensor]
    text: int

    @property
    def norms(self) -> Norms:
        """The norms as the operator takes them."""
        own = self.attention
        if not self.text:
            return Norms(own.norm_q.weight, own.norm_k.weight, own.norm_q.eps)
        return Norms(
            own.norm_q.weight, own.norm_k.weight, own.norm_q.eps,
            self.text, own.norm_added_q.weight, own.norm_added_k.weight,
        )  # fmt: skip

    @property
    def rope(self) -> Rope:
        """The angles as the operator takes them: each once, and close together, as its kernels read them."""
        cos, sin = self.tables
        return cos[:, ::2].contiguous(), sin[:, ::2].contiguous()

    def applied(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k `[B, H, S, D]` as the stock processor would have handed them to its attention."""
        own = self.attention
        first = (own.norm_added_q, own.norm_added_k) if self.text else (None, None)
        return self._applied(q, own.norm_q, first[0]), self._applied(k, own.norm_k, first[1])

    def _applied(self, x: torch.Tensor, norm: nn.Module, first_norm: nn.Module | None) -> torch.Tensor:
        if first_norm is None:
            x = norm(x)
        else:
            x = torch.cat((first_norm(x[:, :, : self.text]), norm(x[:, :, self.text :])), dim=2)
        return apply_rotary_emb(x, self.tables, sequence_dim=2)


class _WithoutNorms:
    """An attention module whose norms leave q and k as they are."""

    def __init__(self, attention: Any):
        self.attention = attention

    def __getattr__(self, name: str) -> Any:
        return _as_it_is if name in _NORMS else getattr(self.attention, name)


def can_fuse(kind: type) -> bool:
    """Tells whether processors of this class norm and turn q and k as FLUX's own does."""
    return kind is FluxAttnProcessor


def without_change(
    interception: Interception,
    stock_call: Any,
    attention: Any,
    hidden: torch.Tensor,
    encoder: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    tables: Any = None,
) -> tuple[Change | None, tuple]:
    """Gives the change that the operator is to apply in a call of FLUX's processor, and the arguments without it.

    None, and the arguments as they are, where something of the call is unusual.
    """
    arguments = (attention, hidden, encoder, mask, tables)
    text = 0 if encoder is None else encoder.shape[1]
    if (
        interception.stand_in is not None
        or not interception.forward.call.pairs_angles
        or mask is not None
        or torch.is_grad_enabled()
        or torch.is_autocast_enabled(hidden.device.type)
        or stock_call.__globals__["apply_rotary_emb"] is not apply_rotary_emb
        or (encoder is None) != (attention.added_kv_proj_dim is None)
        or not _are_tables(tables, attention.head_dim)
    ):
        return None, arguments
    norms = [getattr(attention, name) for name in (_NORMS if text else _NORMS[:2])]
    if not all(_is_plain(norm, hidden) for norm in norms) or len({norm.eps for norm in norms}) > 1:
        return None, arguments
    return Change(attention, tables, text), (_WithoutNorms(attention), hidden, encoder, None, None)


def _are_tables(tables: Any, head_dim: int) -> bool:
    """Tells whether these are the cosines and sines of one head's channels, in float32."""
    return (
        isinstance(tables, tuple)
        and len(tables) == 2
        and all(x.ndim == 2 and x.shape[1] == head_dim and x.dtype is torch.float32 for x in tables)
    )


def _is_plain(norm: Any, hidden: torch.Tensor) -> bool:
    """Tells whether `norm` is PyTorch's own RMSNorm, that nothing hooks, with weights like the hidden states."""
    return (
        type(norm) is nn.RMSNorm
        and norm.eps is not None
        and norm.weight is not None
        and norm.weight.dtype == hidden.dtype
        and norm.weight.dtype in _DTYPES
        and norm.weight.device == hidden.device
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        and "forward" not in norm.__dict__  # as hooks of Diffusers have it
    )


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x
